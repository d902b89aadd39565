"""The arrays in a TorchScript archive, such as the CLIP files of OpenAI, without running its program.

The archive is a zip: `data.pkl` holds the attributes of the modules, `data/N` the numbers. The pickle may
name only tensors, modules and plain containers; anything else is refused.
"""

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any

import jax.numpy as jnp
import numpy as np

from grain_jax.convert.faults import ConvertError

_DTYPES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "BoolStorage": "bool",
}
_MAX_DEPTH = 50  # nesting of modules


class _Module:
    """A module or object of the program, reduced to its attributes."""

    def __setstate__(self, state):
        self.attributes = state


class _Unpickler(pickle._Unpickler):  # in Python; the C one takes gigabytes for a large memo index
    def __init__(self, archive: zipfile.ZipFile, root: str, spend: Callable[[int], None]):
        super().__init__(archive.open(f"{root}data.pkl"))
        self._archive, self._root, self._spend = archive, root, spend

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Module
        if module == "torch" and name in _DTYPES:
            return jnp.dtype(_DTYPES[name])
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, dtype, key, _, _ = pid
        member = self._archive.getinfo(f"{self._root}data/{key}")
        self._spend(4 * member.file_size // dtype.itemsize)  # once for each reference to it
        return np.frombuffer(self._archive.read(member), dtype)

    def _rebuild(self, storage: np.ndarray, offset: int, size: tuple, *rest: Any) -> np.ndarray:
        self._spend(4 * math.prod(size))  # many tensors may share a storage
        return _tensor(storage, offset, size, *rest)


def _tensor(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_) -> np.ndarray:
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    beyond = 0 not in size and last >= len(storage)
    if min((offset, *stride, *size)) < 0 or beyond or math.prod(size) > len(storage):
        raise pickle.UnpicklingError("a tensor reaches beyond its numbers")
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides).copy()


def is_archive(file: IO[bytes]) -> bool:
    """Whether an open file is a TorchScript archive; its position is reset to the start."""
    is_program = zipfile.is_zipfile(file)
    if is_program:
        with zipfile.ZipFile(file) as archive:
            is_program = any(name.endswith("/constants.pkl") for name in archive.namelist())
    file.seek(0)
    return is_program


def read(file: IO[bytes], spend: Callable[[int], None]) -> dict[str, np.ndarray]:
    """Every tensor of the archive under its dotted name, as in the state_dict of the module, as float32.

    Args:
      file: the archive.
      spend: called with the bytes of each tensor as float32; it may raise.

    Raises:
      ConvertError: its modules are not a tree.
      Exception: of several kinds, where the archive is damaged or names anything else.
    """
    with zipfile.ZipFile(file) as archive:
        data = next(x for x in archive.namelist() if x.endswith("/data.pkl"))
        top = _Unpickler(archive, data.removesuffix("data.pkl"), spend).load()
    out: dict[str, np.ndarray] = {}
    waiting: list[tuple[str, Any]] = [("", top)]
    entered: set[int] = set()
    while waiting:
        prefix, module = waiting.pop()
        if id(module) in entered or prefix.count(".") > _MAX_DEPTH:
            raise ConvertError("its modules hold each other without end, expected a tree")
        entered.add(id(module))
        for name, value in module.attributes.items():
            if isinstance(value, _Module):
                waiting.append((f"{prefix}{name}.", value))
            elif isinstance(value, np.ndarray):
                out[f"{prefix}{name}"] = value.astype(np.float32)
    return out
