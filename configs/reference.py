"""The behaviour of the PyTorch reference, switch by switch (docs/method.md, Where it differs), on CC12M.

For comparisons with the reference. Quirks 2, 3, 6, 17 and 18 (crashes and dead code) are not reproduced.

COMMAND   grain-jax train --config reference --workdir gs://BUCKET/reference \
              --config.input.data_dir=gs://BUCKET/records
HARDWARE  any mesh that 2048 images divide over. Not yet run by us.
"""

from grain_jax.config.recipe import reference_behaviour
from grain_jax.configs import grain_vitb16_cc12m


def get_config():
    return reference_behaviour(grain_vitb16_cc12m.get_config())
