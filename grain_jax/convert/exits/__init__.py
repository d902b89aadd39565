"""Exits to the formats of others: transformers' CLIP and SigLIP, open_clip, big_vision; and what each cannot hold."""
