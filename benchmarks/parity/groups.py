"""What is compared with the reference, stage by stage."""

import jax

from benchmarks.parity import forward, preprocessing, training
from benchmarks.parity.comparison import Comparison

GROUPS = {
    "image tokens": forward.image_tower,
    "text embeddings": forward.text_tower,
    "decoder": forward.decoder,
    "matching": forward.matched,
    "losses": training.losses,
    "gradients": training.gradients,
    "decay groups": training.decay_groups,
    "AdamW step": training.adamw,
    "schedule": training.schedule,
    "degenerate boxes": training.degenerate,
    "packed texts": training.packed,
    "zero-shot scores": forward.zero_shot,
    "tokenizer": forward.tokens,
    "preprocessing, PIL": preprocessing.preprocessing_pil,
    "preprocessing, tf": preprocessing.preprocessing_tf,  # empty without TensorFlow
}


def compare(group: str) -> list[Comparison]:
    """All comparisons of a group of `GROUPS`, at full float32 precision."""
    with jax.default_matmul_precision("highest"):
        return list(GROUPS[group]())
