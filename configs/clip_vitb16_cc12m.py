"""The CLIP baseline: GRAIN's trainer, towers and data, without regions.

No region is read, so no description is encoded; the weights of the region losses are 0. The image
embedding comes from the image query of the decoder, as in GRAIN, so that the two models are equal in size.

COMMAND   grain-jax train --config clip_vitb16_cc12m --workdir gs://BUCKET/clip_b16_cc12m \
              --config.input.data_dir=gs://BUCKET/records
HARDWARE  any mesh that 2048 images divide over. Not yet run by us.
"""

from grain_jax.configs import grain_vitb16_cc12m


def get_config():
    c = grain_vitb16_cc12m.get_config()
    c.loss.update(region_description=0.0, box=0.0)
    c.input.max_regions = 0
    return c
