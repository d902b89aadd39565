"""GRAIN ViT-B/16 on CC12M with synthetic annotations (method.md, Training recipe).

COMMAND   python -m grain_jax.train --config configs/grain_vitb16_cc12m.py --workdir gs://BUCKET/grain_b16_cc12m \
              --config.input.data_dir=gs://BUCKET/records
HARDWARE  the paper: 16 H100 x 128 images; here any mesh that 2048 images divide over. Not yet run by us.
"""

from configs.common import base


def get_config():
    c = base("B/16")
    c.total_epochs = 35.0
    c.optim.warmup_epochs = 1.0
    c.input.name = "cc12m"
    return c
