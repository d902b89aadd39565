"""The `.pth.tar` files of the PyTorch reference: reading and writing their two state dicts."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from grain_jax.convert import archives
from grain_jax.convert.faults import ConvertError, raise_any
from grain_jax.files import atomic, regular_file

StateDict = dict[str, np.ndarray]
KEYS = {"backbone": "backbone_state_dict", "decoder": "state_dict"}


def read(path: epath.PathLike) -> dict[str, StateDict]:
    """The two state dicts as float32 arrays, {"backbone": ..., "decoder": ...}; names without `module.`.

    Raises:
      ConvertError: no such file, not a checkpoint, or one that asks to run code; nothing in it is executed.
    """
    path = epath.Path(path)
    if not regular_file.is_one(path):
        raise ConvertError(f"{path}: no such file; expected the reference's .pth.tar")
    try:
        import torch
    except ImportError as error:
        raise ConvertError(
            f"{path}: PyTorch is needed to read it; pip install 'grain_jax[torch]'"
        ) from error
    try:
        with archives.reading(path):
            stored = archives.load_torch(path)
    except ConvertError:
        raise
    except Exception as error:  # a damaged or hostile pickle may raise anything
        raise ConvertError(
            f"{path}: not a checkpoint of plain tensors ({archives.refusal(error)})"
        ) from error
    if not isinstance(stored, Mapping):
        raise ConvertError(
            f"{path}: got a {type(stored).__name__}, expected a dict with {' and '.join(KEYS.values())}"
        )
    out, faults = {}, []
    for module, key in KEYS.items():
        if not isinstance(stored.get(key), Mapping):
            found = ", ".join(map(str, list(stored)[:8])) or "nothing"
            faults.append(f"{path}: no state dict {key!r}; the file has {found}")
            continue
        for name, value in stored[key].items():
            if not isinstance(value, torch.Tensor):
                faults.append(f"{path}: {module} {name}: got {type(value).__name__}, not a tensor")
            elif not value.is_floating_point():
                faults.append(f"{path}: {module} {name}: got {value.dtype}, expected plain floats")
        with archives.reading(f"{path}: {module}"):
            out[module] = archives.tensors_to_float32(path, stored[key])
    raise_any(faults)
    return out


def write(path: epath.PathLike, states: Mapping[str, StateDict]) -> None:
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
