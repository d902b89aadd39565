"""GRAIN ViT-B/16 on CC12M as this package recommends it: the pointer and the box head (docs/claim.md).

COMMAND   grain-jax train --config grain_plus_vitb16_cc12m[:HARDWARE] \
              --workdir gs://BUCKET/grain_plus_b16_cc12m --config.input.data_dir=gs://BUCKET/records
HARDWARE  as configs/grain_vitb16_cc12m.py, the paper's recipe. Not yet run by us.
"""

from grain_jax.config.recipe import with_pointer
from grain_jax.configs import grain_vitb16_cc12m

HARDWARE = grain_vitb16_cc12m.HARDWARE


def get_config(hardware=None):
    c = with_pointer(grain_vitb16_cc12m.get_config(hardware))
    c.loss.image_description = 1.0
    return c
