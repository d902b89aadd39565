"""The arrays in a TorchScript archive, such as OpenAI's own CLIP files, without running its program.

The archive is a zip: `data.pkl` lists the modules' attributes, `data/N` hold the numbers. The pickle may
name nothing but tensors, modules and plain containers here; anything else is refused.
"""

import math
import pickle
import zipfile
from collections import OrderedDict
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from grain_jax.convert import archives

_DTYPES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "BoolStorage": "bool",
}
_MOST_DEEP, _MOST_MODULES = 50, 100_000  # modules in modules, and in all


class _Module:
    """A module or object of the program: its attributes alone."""

    def __setstate__(self, state):
        self.attributes = state


class _Unpickler(pickle._Unpickler):  # Python's own: the one in C takes gigabytes for a far memo
    def __init__(self, archive: zipfile.ZipFile, root: str, budget: archives.Budget):
        super().__init__(archive.open(f"{root}data.pkl"))
        self._archive, self._root, self._budget = archive, root, budget

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
        self._budget.spend(4 * member.file_size // dtype.itemsize)  # each time that it is asked for
        return np.frombuffer(self._archive.read(member), dtype)

    def _rebuild(self, storage: np.ndarray, offset: int, size: tuple, *rest: Any) -> np.ndarray:
        self._budget.spend(4 * math.prod(size))  # many may be of one storage
        return _tensor(storage, offset, size, *rest)


def _tensor(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_) -> np.ndarray:
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    beyond = 0 not in size and last >= len(storage)
    if min((offset, *stride, *size)) < 0 or beyond or math.prod(size) > len(storage):
        raise pickle.UnpicklingError("a tensor reaches beyond its numbers")
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides).copy()


def is_archive(file: BinaryIO) -> bool:
    """Whether an open file is a TorchScript archive; it is left at its start."""
    found = zipfile.is_zipfile(file)
    if found:
        with zipfile.ZipFile(file) as archive:
            found = any(name.endswith("/constants.pkl") for name in archive.namelist())
    file.seek(0)
    return found


def read(file: BinaryIO) -> dict[str, np.ndarray]:
    """Every tensor of the archive under its dotted name, as in the module's state_dict.

    Raises:
      ArchiveError: it unpacks to more than weights would, or its modules are no tree.
      Exception: of several kinds, where the archive is damaged or names anything but tensors.
    """
    budget = archives.Budget(file)
    with zipfile.ZipFile(file) as archive:
        budget.check(archive)
        root = next(x for x in archive.namelist() if x.endswith("/data.pkl")).removesuffix(
            "data.pkl"
        )
        top = _Unpickler(archive, root, budget).load()
    out: dict[str, np.ndarray] = {}
    entered = 0

    def walk(prefix: str, module: _Module, depth: int) -> None:
        nonlocal entered
        entered += 1
        if depth > _MOST_DEEP or entered > _MOST_MODULES:
            raise archives.ArchiveError("its modules hold each other without end, expected a tree")
        for name, value in module.attributes.items():
            if isinstance(value, _Module):
                walk(f"{prefix}{name}.", value, depth + 1)
            elif isinstance(value, np.ndarray):
                out[f"{prefix}{name}"] = value

    walk("", top, 0)
    return out
