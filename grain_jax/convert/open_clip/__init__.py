"""Import of CLIP and SigLIP checkpoints: OpenAI, open_clip (with timm trunks), Hugging Face."""
