"""Readers of weight files from untrusted sources: sizes are checked before memory is taken, nothing is executed.

An archive of a few KB can declare, or repeat, terabytes. Weights hardly compress, so the bound is a multiple
of the length of the file.
"""

import contextlib
import math
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

import jax.numpy as jnp
import msgspec
import numpy as np
from etils import epath

from grain_jax.convert.faults import ConvertError, needing, prefixed, raise_any
from grain_jax.core import errors, regular_file

# Limit of the arrays as float32, in lengths of the file: 4 for 8-bit numbers, 8 for two names of each array.
MAX_GROWTH = 8
ALLOWANCE = 64 << 20  # bytes on top: a small model of zeros compresses to nothing
TENSORS = "a checkpoint of plain tensors"
_FLOATS = {  # names of safetensors, whose numpy reader has no bfloat16
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": jnp.dtype("bfloat16"),
}
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


@contextlib.contextmanager
def reading(path: epath.PathLike, kind: str = "") -> Iterator[None]:
    """Puts the name of the file before each line of a fault raised inside; an OSError becomes one.

    Args:
      path: the file.
      kind: what the file should be: whatever else is raised, but an ImportError, says that it is not. A damaged or
        hostile file may raise anything.
    """
    with prefixed(f"{path}: "):
        try:
            yield
        except (errors.UserError, ImportError, MemoryError):
            raise
        except OSError as error:
            raise ConvertError(
                f"{error.strerror or error}, expected a file that can be read"
            ) from None
        except Exception as error:
            if not kind:
                raise
            raise ConvertError(f"not {kind} ({_refusal(error)})") from None


def _refusal(error: Exception) -> str:
    """The reason why a reader refused a file, without torch's advice to load the file unchecked."""
    text = str(error).strip()
    asked = re.search(r"unsupported global:?(?: global)? (\S+)", text, re.IGNORECASE)
    if asked:
        return f"it asks for {asked[1]}; what might run code is not loaded"
    told = re.search(r"WeightsUnpickler error:\s*(.+)", text)
    reason = told[1] if told else text.partition(". ")[0].partition("\n")[0]
    return f"{type(error).__name__}: {reason[:120]}" if reason else type(error).__name__


class Budget:
    """Counts down the bytes that the arrays of one file may take as float32."""

    def __init__(self, file: IO[bytes]):
        self.length = file.seek(0, 2)
        self.total = self._left = ALLOWANCE + MAX_GROWTH * self.length
        file.seek(0)

    def spend(self, count: int) -> None:
        """Takes `count` bytes from the budget. Raises ConvertError where fewer are left."""
        self._left -= count
        if self._left < 0:
            raise ConvertError(
                f"its arrays take more than {self.total:,} bytes, {MAX_GROWTH} times the file's"
                f" {self.length:,} and {ALLOWANCE >> 20} MiB; expected weights"
            )

    def check(self, archive: zipfile.ZipFile) -> None:
        """Raises ConvertError where the directory of the zip declares more bytes than the budget."""
        members = archive.infolist()
        total = sum(member.file_size for member in members)
        if total > self.total:
            raise ConvertError(
                f"its members unpack to {total:,} bytes, expected"
                f" at most {self.total:,} of a file of {self.length:,}"
            )
        if len({member.filename for member in members}) < len(members):
            raise ConvertError("has members of the same name, expected each once")


def read_npz(path: epath.Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz as float32.

    Raises:
      ConvertError: an array is not of numbers, or has another length than its header declares.
      Exception: of several kinds, where the archive is damaged.
    """
    with path.open("rb") as file:
        budget = Budget(file)
        with zipfile.ZipFile(file) as archive:
            budget.check(archive)
            out = {}
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                with prefixed(f"{name}: "), archive.open(member) as opened:
                    out[name] = _read_npy(opened, member.file_size, budget)
            return out


def _read_npy(file: IO[bytes], length: int, budget: Budget) -> np.ndarray:
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ConvertError(f"got version {version} of .npy, expected 1 or 2")
    shape, by_columns, dtype = _HEADERS[version](file)
    if dtype.kind not in "fiub" and dtype.str != "|V2":
        raise ConvertError(f"got {dtype}, expected an array of numbers")
    count = math.prod(shape)  # Python integers do not overflow
    if count * dtype.itemsize != length - file.tell():
        raise ConvertError(
            f"got shape {shape} of {dtype}, which is not the {length:,} bytes that it has"
        )
    budget.spend(4 * count)
    if dtype.kind == "V":  # numpy stores bfloat16 as raw bytes
        dtype = jnp.dtype("bfloat16")
    array = np.frombuffer(file.read(), dtype) if count else np.zeros(0, dtype)
    return array.astype(np.float32).reshape(shape, order="F" if by_columns else "C")


def load_torch(path: epath.Path) -> Any:
    """The object in a file of torch.save, by torch.load with `weights_only`.

    Raises:
      ConvertError: torch is missing, or the directory of the zip declares more bytes than the budget.
      Exception: of many kinds, where the file is damaged or asks to run code.
    """
    with needing("torch", "it is a file of PyTorch (or give a .safetensors)", "torch"):
        import torch
    with path.open("rb") as file:
        budget = Budget(file)
        if file.read(2) == b"PK":
            with zipfile.ZipFile(file) as archive:
                budget.check(archive)
        file.seek(0)
        with warnings.catch_warnings():  # a sparse tensor is refused by whoever reads the result
            warnings.filterwarnings("ignore", "Validating sparse tensor invariants")
            return torch.load(file, map_location="cpu", weights_only=True)


def tensors_to_float32(path: epath.Path, named: Mapping[Any, Any]) -> dict[str, np.ndarray]:
    """The tensors of a state dict as arrays, without its other entries; names without `module.`.

    Args:
      path: the file that holds it; its length bounds the arrays, since tensors may share storage.
      named: the state dict.

    Raises:
      ConvertError: a tensor that is not of plain numbers, or a name that is there twice; a line each.
    """
    import torch

    out: dict[str, np.ndarray] = {}
    faults = []
    with path.open("rb") as file:
        budget = Budget(file)
    for key, value in named.items():
        if not torch.is_tensor(value):
            continue
        name = str(key).removeprefix("module.")
        plain = value.layout == torch.strided and not value.is_quantized and not value.is_complex()
        if not plain or value.device.type != "cpu":
            got = "a quantised tensor" if value.is_quantized else f"{value.dtype}, {value.layout}"
            faults.append(f"{name}: got {got}, expected plain numbers")
        elif name in out:
            faults.append(f"{name}: is there with and without module.")
        else:
            budget.spend(4 * value.numel())
            out[name] = value.detach().to(torch.float32).numpy()
    raise_any(faults)
    return out


def read_safetensors(
    path: epath.Path, integers: Mapping[str, np.dtype] | None = None
) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, of 16 bits or more, as float32.

    Args:
      path: the file.
      integers: integer types that are accepted too, by the names of safetensors.

    Raises:
      ConvertError: the package is missing, not a whole file, or numbers of another type; a line each.
    """
    kinds = _FLOATS | dict(integers or {})
    with needing("safetensors", path):
        import safetensors
    with reading(path):
        try:
            stored = safetensors.deserialize(path.read_bytes())
        except safetensors.SafetensorError as error:
            reason = next(iter(str(error).splitlines()), "")
            raise ConvertError(
                f"not a whole safetensors file ({reason[:120]}); copy it again"
            ) from None
        wrong = {name: x["dtype"] for name, x in stored if x["dtype"] not in kinds}
        raise_any([f"{n}: got {x}, expected one of {', '.join(kinds)}" for n, x in wrong.items()])
    return {
        name: np.frombuffer(x["data"], kinds[x["dtype"]]).astype(np.float32).reshape(x["shape"])
        for name, x in stored
    }


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def files_of_index(path: epath.Path) -> list[epath.Path]:
    """The files that an index of weights names, each once; they must be in its folder.

    A link may lead out of the folder only in the cache of Hugging Face, which links to ../../blobs.

    Raises:
      UserError: not an index, or a file that is not in its folder; one line.
    """
    expected = "transformers' index, with the key weight_map"
    named = set(regular_file.read_json(path, _Index, expected).weight_map.values())
    if not named:
        raise ConvertError(f"{path}: names no file, expected {expected}")
    return [_beside(path, name) for name in sorted(named)]


def _beside(path: epath.Path, name: str) -> epath.Path:
    file = path.parent / name
    if not name or "\0" in name or "/" in name or "\\" in name or name in (".", ".."):
        raise ConvertError(f"{path}: names the file {name[:200]!r}, expected one beside it")
    if "://" not in str(file):
        folder, blobs = epath.Path(os.path.realpath(path.parent)), None
        if folder.parent.name == "snapshots":
            blobs = folder.parent.parent / "blobs"
        if epath.Path(os.path.realpath(file)).parent not in (folder, blobs):
            raise ConvertError(
                f"{path}: names {name!r}, a link to elsewhere, expected a file beside it"
            )
    if not regular_file.is_one(file):
        raise ConvertError(f"{path}: names {name!r}, which is no file beside it")
    return file
