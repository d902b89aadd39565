"""The `.pth.tar` files of the PyTorch reference: reading and writing their two state dicts."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from grain_jax.convert import archives
from grain_jax.convert.faults import ConvertError, prefixed, raise_any
from grain_jax.core import atomic, regular_file

KEYS = {"backbone": "backbone_state_dict", "decoder": "state_dict"}


def read(path: epath.PathLike) -> dict[str, dict[str, np.ndarray]]:
    """The two state dicts as float32 arrays, {"backbone": ..., "decoder": ...}; names without `module.`.

    Raises:
      ConvertError: no such file, not a checkpoint, or one that asks to run code; nothing in it is executed.
    """
    path = epath.Path(path)
    if not regular_file.is_one(path):
        raise ConvertError(f"{path}: no such file; expected the reference's .pth.tar")
    with archives.reading(path, archives.TENSORS):
        stored = archives.load_torch(path)
        expected = f"expected a dict with {' and '.join(KEYS.values())}"
        if not isinstance(stored, Mapping):
            raise ConvertError(f"got a {type(stored).__name__}, {expected}")
        found = ", ".join(map(str, list(stored)[:8])) or "nothing"
        raise_any(
            [
                f"no state dict {key!r}; the file has {found}"
                for key in KEYS.values()
                if not isinstance(stored.get(key), Mapping)
            ]
        )
        out, faults = {}, []
        for module, key in KEYS.items():
            for name, value in stored[key].items():
                dtype = getattr(value, "dtype", None)
                if dtype is None:
                    faults.append(f"{module} {name}: got {type(value).__name__}, not a tensor")
                elif not dtype.is_floating_point:
                    faults.append(f"{module} {name}: got {dtype}, expected plain floats")
            with prefixed(f"{module} "):
                out[module] = archives.tensors_to_float32(path, stored[key])
        raise_any(faults)
        return out


def write(path: epath.PathLike, states: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Writes the state dicts in the format of the reference's train.py.

    Names start with `module.`, as in a DDP model; the other keys are of a run at step 0: epoch and iteration 0,
    an empty optimizer.
    """
    import torch

    stored: dict[str, Any] = {
        key: {
            f"module.{name}": torch.tensor(array)  # a copy: each entry has its own storage
            for name, array in states[module].items()
        }
        for module, key in KEYS.items()
    }
    stored |= {"epoch": 0, "iteration": 0, "best_acc": 0.0}
    stored |= {"optimizer": {"state": {}, "param_groups": []}}
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    torch.save(stored, file)
    atomic.write_bytes(path, file.getvalue())
