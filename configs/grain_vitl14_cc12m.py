"""GRAIN ViT-L/14 on CC12M with synthetic annotations: the B/16 recipe at the larger size.

COMMAND   grain-jax train --config grain_vitl14_cc12m[:v5p-128] --workdir gs://BUCKET/grain_l14_cc12m \
              --config.input.data_dir=gs://BUCKET/records
HARDWARE  v5p-128 (planned as v5p:4x4x4, docs/performance.md). Not yet run by us.
"""

from grain_jax.config.recipe import model, on_hardware
from grain_jax.configs import grain_vitb16_cc12m

# 32 images per chip; parameters, moments and all activations fit.
HARDWARE = {"v5p-128": {"remat": "none"}}


def get_config(hardware=None):
    c = grain_vitb16_cc12m.get_config()
    c.model = model("L/14")
    c.remat = "full"
    return on_hardware(c, HARDWARE, hardware)
