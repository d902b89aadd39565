"""Your own images on one machine, from random weights: a laptop's CPU (tiny) or one GPU (S/16, B/16).

COMMAND   grain-jax train --config own[:S/16|:B/16] --workdir runs/own \
              --config.input.data_dir=records --config.input.name=mine
DATA      records of grain-jax build (docs/own_images.md). The paper trains on millions of images; with fewer, start from
          pretrained towers: configs/finetune.py.
HARDWARE  any batch size that the devices divide; docs/own_images.md lists what fits where.
"""

from grain_jax.config.recipe import own_images

# Size -> images per step, peak learning rate, dtype of activations. A CPU computes bfloat16 slowly.
SIZES = {
    "tiny": (64, 1e-3, "float32"),
    "S/16": (256, 5e-4, "bfloat16"),
    "B/16": (256, 5e-4, "bfloat16"),
}


def get_config(size="tiny"):
    if size not in SIZES:
        raise ValueError(f"size: got {size!r}, expected one of {', '.join(SIZES)}")
    c = own_images(size)
    c.batch_size, c.optim.learning_rate, c.dtype = SIZES[size]
    c.total_epochs = 50.0
    c.optim.warmup_epochs = 2.0
    if size == "tiny":  # as configs/demo.py, for a narrow model
        c.model.image.block_init = "torch"
        c.model.image.position_init = "sincos2d"
        c.model.image.position_period = 16.0
        c.model.decoder.dropout = 0.0
        c.model.decoder.qkv_init_gain = 2.5
    return c
