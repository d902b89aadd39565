"""Exports to the formats of others: CLIP and SigLIP of transformers, open_clip, big_vision, ONNX."""
