"""The configuration of a run as frozen dataclasses: its keys (`fields`), `from_dict` (`parse`), and what
contradicts itself (`checks`).

It needs neither JAX nor ml_collections, so that a config can be checked anywhere.
"""

from grain_jax.config.checks import divisors, flags_of
from grain_jax.config.fields import (
    DTYPES,
    EITHER_OR,
    LAYER_MAPS,
    REMAT_POLICIES,
    Config,
    Dataset,
    Init,
    Input,
    Lora,
    Loss,
    Mesh,
    Optim,
    Text,
    Wandb,
)
from grain_jax.config.keys import NoOptions, OpenGroup, flatten, select, without_defaults
from grain_jax.config.model_fields import (
    MAPS_BY,
    PATCH_FEATURES,
    TOWER_MODULES,
    BoxHead,
    ImageTower,
    Model,
    RegionDecoder,
    TextTower,
    shares_rows,
)
from grain_jax.config.parse import (
    ConfigError,
    LocalEntry,
    build,
    from_dict,
    loss_term,
    model_from_dict,
    raise_faults,
    to_json,
    unknown_key,
)
