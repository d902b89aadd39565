"""Files of weights that anyone may have made: what they declare is bounded before anything in them takes memory.

An archive of a few KB can declare, or repeat, terabytes. Weights hardly compress, so the bound follows
the file's own length. Nothing in a file is executed.
"""

import contextlib
import json
import math
import os
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
from etils import epath

from grain_jax import errors
from grain_jax.files import regular_file

# How much a file may become as float32: 8 bits a number make it 4 times as long, two names of one array 8.
MAX_GROWTH = 8
# Small models may be all zeros, which compress to nothing.
ALLOWANCE = 64 << 20
MAX_JSON = 64 << 20  # bytes; the index of 10,000 arrays takes 1 MB
_FLOATS = {  # safetensors' names; its own reader for numpy has no bfloat16
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": jnp.dtype("bfloat16"),
}
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class ArchiveError(errors.UserError):
    """A file of weights cannot be used; the message has one line a fault, without the file's name."""


@contextlib.contextmanager
def reading(path: epath.PathLike, error: type[errors.UserError]) -> Iterator[None]:
    """Turns an ArchiveError, or an OSError, raised inside into `error`, with the file's name on each line."""
    try:
        yield
    except ArchiveError as fault:
        lines = str(fault).split("\n")
        raise error("\n".join(f"{path}: {line}" for line in lines)) from None
    except OSError as fault:
        raise error(
            f"{path}: {fault.strerror or fault}, expected a file that can be read"
        ) from None


class Budget:
    """The bytes that the arrays of one file may take as float32."""

    def __init__(self, file: BinaryIO):
        self.length = file.seek(0, 2)
        self.total = self._left = ALLOWANCE + MAX_GROWTH * self.length
        file.seek(0)

    def spend(self, count: int) -> None:
        """Takes `count` bytes off. Raises ArchiveError where there are not as many."""
        self._left -= count
        if self._left < 0:
            raise ArchiveError(
                f"its arrays take more than {self.total:,} bytes, {MAX_GROWTH} times the file's"
                f" {self.length:,} and {ALLOWANCE >> 20} MiB; expected weights"
            )

    def check(self, archive: zipfile.ZipFile) -> None:
        """Raises ArchiveError where the members, by the archive's directory, unpack to more than there is."""
        members = archive.infolist()
        if sum(member.file_size for member in members) > self.total:
            raise ArchiveError(
                f"its members unpack to {sum(member.file_size for member in members):,} bytes, expected"
                f" at most {self.total:,} of a file of {self.length:,}"
            )
        if len({member.filename for member in members}) < len(members):
            raise ArchiveError("has members of the same name, expected each once")


def read_npz(path: epath.Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz as float32.

    Raises:
      ArchiveError: an array of no numbers, or one that is longer or shorter than it says.
      Exception: of several kinds, where the archive is damaged.
    """
    out = {}
    with path.open("rb") as file:
        budget = Budget(file)
        with zipfile.ZipFile(file) as archive:
            budget.check(archive)
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                with archive.open(member) as opened:
                    version = np.lib.format.read_magic(opened)
                    if version not in _HEADERS:
                        raise ArchiveError(
                            f"{name}: got version {version} of .npy, expected 1 or 2"
                        )
                    shape, by_columns, dtype = _HEADERS[version](opened)
                    if dtype.kind not in "fiub" and dtype.str != "|V2":
                        raise ArchiveError(f"{name}: got {dtype}, expected an array of numbers")
                    count = math.prod(shape)  # of Python's numbers, which do not overflow
                    if count * dtype.itemsize != member.file_size - opened.tell():
                        raise ArchiveError(
                            f"{name}: got shape {shape} of {dtype}, which is not the {member.file_size:,}"
                            " bytes that it has"
                        )
                    budget.spend(4 * count)
                    if dtype.kind == "V":  # numpy forgets bfloat16's name
                        dtype = jnp.dtype("bfloat16")
                    array = np.frombuffer(opened.read(), dtype) if count else np.zeros(0, dtype)
                out[name] = array.astype(np.float32).reshape(
                    shape, order="F" if by_columns else "C"
                )
    return out


def load_torch(path: epath.Path) -> Any:
    """What torch.load reads (`weights_only`), where the zip's directory keeps within its budget.

    Raises:
      ArchiveError: it does not.
      Exception: of many kinds, where the file is damaged or asks to run code.
    """
    import torch

    with path.open("rb") as file:
        budget = Budget(file)
        if file.read(2) == b"PK":
            with zipfile.ZipFile(file) as archive:
                budget.check(archive)
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


def tensors_to_float32(path: epath.Path, named: Mapping[Any, Any]) -> dict[str, np.ndarray]:
    """The tensors of a state dict as arrays, its other entries left out; names without `module.`.

    Tensors may repeat the same numbers: as arrays they keep within the file's budget.

    Raises:
      ArchiveError: a tensor of another kind than plain numbers, or a name that is there twice; a line each.
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
    if faults:
        raise ArchiveError("\n".join(faults))
    return out


def read_safetensors(
    path: epath.Path, integers: Mapping[str, np.dtype] | None = None
) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, of 16 bits or more, as float32.

    Args:
      path: the file.
      integers: safetensors' names of whole numbers that are read too, and their types.

    Raises:
      ArchiveError: not a whole file, or numbers of another type; a line each.
      ImportError: the package is missing.
      OSError: it cannot be read.
    """
    import safetensors

    kinds = _FLOATS | dict(integers or {})
    try:
        stored = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ArchiveError(
            f"not a whole safetensors file ({reason[:120]}); copy it again"
        ) from None
    faults = [
        f"{name}: got {entry['dtype']}, expected one of {', '.join(kinds)}"
        for name, entry in stored
        if entry["dtype"] not in kinds
    ]
    if faults:
        raise ArchiveError("\n".join(faults))
    return {
        name: np.frombuffer(entry["data"], kinds[entry["dtype"]])
        .astype(np.float32)
        .reshape(entry["shape"])
        for name, entry in stored
    }


def read_json(path: epath.Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      ArchiveError: it is none, too long, or too deep.
      OSError: it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(MAX_JSON + 1)
    if len(content) > MAX_JSON:
        raise ArchiveError(f"got over {MAX_JSON:,} bytes, expected a JSON object")
    try:
        value = json.loads(content, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ArchiveError("got JSON of too many levels, expected an object of few") from None
    except ValueError as error:
        raise ArchiveError(f"not JSON ({error}), expected an object") from None
    if not isinstance(value, dict):
        raise ArchiveError(f"got a {type(value).__name__}, expected a JSON object")
    return value


def files_of_index(path: epath.Path) -> list[epath.Path]:
    """The files that an index of weights names, each once: those beside it alone.

    A link may lead elsewhere only within Hugging Face's cache, whose folders hold links to ../../blobs.

    Raises:
      ArchiveError: no index, or a file that is not beside it.
      OSError: it cannot be read.
    """
    expected = "transformers' index, with the key weight_map"
    named = read_json(path).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(x, str) for x in named.values()):
        raise ArchiveError(f"got no names of files under weight_map, expected {expected}")
    out = []
    for name in sorted(set(named.values())):
        file = path.parent / name
        if not name or "\0" in name or "/" in name or "\\" in name or name in (".", ".."):
            raise ArchiveError(f"names the file {name[:200]!r}, expected one beside it")
        if "://" not in str(file):
            folder, blobs = epath.Path(os.path.realpath(path.parent)), None
            if folder.parent.name == "snapshots":
                blobs = folder.parent.parent / "blobs"
            if epath.Path(os.path.realpath(file)).parent not in (folder, blobs):
                raise ArchiveError(
                    f"names {name!r}, a link to elsewhere, expected a file beside it"
                )
        if not regular_file.is_one(file):
            raise ArchiveError(f"names {name!r}, which is no file beside it")
        out.append(file)
    if not out:
        raise ArchiveError(f"names no file, expected {expected}")
    return out


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"got the number {text}, expected a finite one")
    return value
