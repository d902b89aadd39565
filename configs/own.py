"""Your own images on one machine, from random weights: a laptop's CPU (tiny) or one GPU (S/16, B/16).

COMMAND   grain-jax train --config own[:SIZE[,patches]] --workdir runs/own \
              --config.input.data_dir=records --config.input.name=mine
DATA      records of grain-jax build (docs/own_images.md). The paper trains on millions of images; with
          fewer, start from pretrained towers: configs/finetune.py.
ARGUMENT  tiny, S/16 or B/16; with ",patches" two towers without a decoder (docs/claim.md).
HARDWARE  any batch size that the devices divide; grain-jax plan says what fits.
"""

from grain_jax.config.recipe import base, with_pointer, without_decoder
from grain_jax.evaluate.kinds import evaluator

# Size -> images per step, peak learning rate.
SIZES = {"tiny": (64, 1e-3), "S/16": (256, 5e-4), "B/16": (256, 5e-4)}


def get_config(argument="tiny"):
    size, _, kind = argument.partition(",")
    if size not in SIZES or kind not in ("", "patches"):
        raise ValueError(f"got {argument!r}, expected one of {', '.join(SIZES)}, or one of them and ,patches")
    c = own_images(size)
    c.batch_size, c.optim.learning_rate = SIZES[size]
    c.total_epochs = 50.0
    c.optim.warmup_epochs = 2.0
    if size == "tiny":  # as configs/demo.py, for a narrow model
        c.model.image.update(block_init="torch", position_init="sincos2d", position_period=16.0)
        c.model.decoder.update(dropout=0.0, qkv_init_gain=2.5)
    return without_decoder(c) if kind else c


def own_images(size="B/16"):
    """What this config shares with configs/finetune.py: a user's images on one machine."""
    c = with_pointer(base(size))
    c.dtype = "auto"  # a CPU computes bfloat16 slowly
    c.update(log_every=10, checkpoint_every=0, checkpoint_every_minutes=10.0, report_images=12)
    c.input.update(flip_rate=0.5, crop_min_area=0.5)
    # As many queries as an image has described regions: set both.
    c.model.decoder.queries = 8
    c.input.max_regions = 8
    c.optim.clip_norm = 1.0
    # Measured after the last step if their images are named.
    for kind in ("zeroshot", "retrieval", "grounding"):
        how = f"--config.evals.{kind}.images=FOLDER"
        if kind != "zeroshot":
            how += f" --config.evals.{kind}.annotations=A.jsonl"
        c.evals[kind] = evaluator(kind, missing="skip", get=how)
    return c
