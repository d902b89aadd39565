"""GRAIN ViT-B/16 on CC12M with synthetic annotations (docs/method.md, Training recipe).

COMMAND   grain-jax train --config grain_vitb16_cc12m[:HARDWARE] --workdir gs://BUCKET/grain_b16_cc12m \
              --config.input.data_dir=gs://BUCKET/records
HARDWARE  the paper: 16 H100 x 128 images. v5e-64, v5e-256, v5p-128, v6e-64, tpu7x-128, h100-8: see
          below (planned, docs/performance.md); else any mesh that 2048 images divide over. Not yet run by us.
"""

from grain_jax.config.recipe import base, on_hardware

# The overrides for 2048 images per step.
HARDWARE = {
    "v5e-64": {"mesh.fsdp": 4},  # 32 images per chip
    "v5e-256": {"mesh.fsdp": 4},  # 8 images per chip
    "v5p-128": {},  # 64 chips, 32 images per chip
    "v6e-64": {},
    "tpu7x-128": {},  # 64 chips, 128 devices of 16 images
    "h100-8": {},  # 256 images a GPU; no rematerialisation
}


def get_config(hardware=None):
    c = base("B/16")
    c.total_epochs = 35.0
    c.optim.warmup_epochs = 1.0
    c.input.name = "cc12m"
    return on_hardware(c, HARDWARE, hardware)
