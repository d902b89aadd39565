"""GRAIN ViT-L/14 on CC12M with synthetic annotations: the B/16 recipe at the larger size.

COMMAND   python -m grain_jax.train --config configs/grain_vitl14_cc12m.py --workdir gs://BUCKET/grain_l14_cc12m \
              --config.input.data_dir=gs://BUCKET/records
HARDWARE  v5p-64: add --config.mesh.fsdp=8 (python -m launch.plan --topology v5p:4x4x4 tells what it needs).
          Not yet run by us.
"""

from configs import grain_vitb16_cc12m
from configs.common import model


def get_config():
    c = grain_vitb16_cc12m.get_config()
    c.model = model("L/14")
    c.remat = "full"
    return c
