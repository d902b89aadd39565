"""The keys in which SigLIP differs from the defaults of the towers, and a small SigLIP."""

import numpy as np

from grain_jax.convert.big_vision import from_big_vision
from tests.paths import GOLDENS

HALF = (0.5, 0.5, 0.5)
IMAGE = dict(qk_norm=False, class_token=False, activation="gelu_tanh", pixel_mean=HALF, pixel_std=HALF)
TEXT: dict = dict(vocab_size=32000, context_length=64, width=768, heads=12, mlp_dim=3072, norm_eps=1e-6)
TEXT |= dict(causal=False, activation="gelu_tanh", pool="last", projection="affine")
TEXT |= dict(tokenizer="siglip.model", cleaning="siglip", pad_id=1)


def convert_golden(root):
    """The folder of ours below `root` with the towers of big_vision's golden."""
    with np.load(GOLDENS / "big_vision_map.npz") as stored:
        np.savez(root / "m.npz", **{k: v for k, v in stored.items() if k.startswith("params/")})
    from_big_vision(root / "m.npz", root / "ours")
    return root / "ours"
