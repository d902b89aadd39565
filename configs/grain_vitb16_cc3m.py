"""GRAIN ViT-B/16 on CC3M with synthetic annotations (docs/method.md, Training recipe).

COMMAND   grain-jax train --config grain_vitb16_cc3m --workdir gs://BUCKET/grain_b16_cc3m \
              --config.input.data_dir=gs://BUCKET/records
HARDWARE  any mesh that 2048 images divide over. Not yet run by us.
"""

from grain_jax.configs import grain_vitb16_cc12m


def get_config():
    c = grain_vitb16_cc12m.get_config()
    c.input.name = "cc3m"
    return c
