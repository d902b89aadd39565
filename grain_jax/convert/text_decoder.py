"""A text decoder under the names of PyTorch, and what its parity compares."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grain_jax import config as config_lib
from grain_jax.convert import formats, parity, tables
from grain_jax.convert.tables import Arrays, NamePair
from grain_jax.inference import jitted
from grain_jax.models import grain, text_decoder
