"""The seam between models by name and conversions, which lie below this room; `grain_jax` sets it."""

from collections.abc import Callable
from typing import Any

# (hf://ORG/NAME, the folder with its weights) -> the folder with our model made of them.
import_weights: Callable[[str, Any], Any]
