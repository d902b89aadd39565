"""Readers of weights from untrusted sources: sizes are checked before memory is taken, nothing is executed.

An archive of a few KB can declare, or repeat, terabytes. Weights hardly compress, so the bound is a multiple
of the length of the file.
"""

import contextlib
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from grain_jax.convert.faults import ConvertError, needing, prefixed, raise_any
from grain_jax.core import errors, regular_file

# Limit of the arrays as float32, in lengths of the file: 4 for 8-bit numbers, 8 for two names of each array.
MAX_GROWTH = 8
ALLOWANCE = 64 << 20  # bytes on top: a small model of zeros compresses to nothing
TENSORS = "a checkpoint of plain tensors"
_OPENAI = "CLIP of OpenAI is at hf://openai/clip-vit-base-patch32 for from-hf"


@contextlib.contextmanager
def reading(path: epath.PathLike, kind: str) -> Iterator[None]:
    """Turns whatever is raised inside, but an ImportError, into faults that name the file, not `kind`."""
    with prefixed(f"{path}: "):
        try:
            yield
        except (errors.UserError, ImportError, MemoryError):
            raise
        except OSError as error:
            reason = error.strerror or error
            raise ConvertError(f"{reason}, expected a file that can be read") from None
        except Exception as error:
            raise ConvertError(f"not {kind} ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    """Why a reader refused a file, without torch's advice to load the file unchecked."""
    text = str(error).strip()
    asked = re.search(r"unsupported global:?(?: global)? (\S+)", text, re.IGNORECASE)
    if asked:
        return f"it asks for {asked[1]}; what might run code is not loaded"
    reason = " ".join(text.split()).partition(". ")[0]
    return f"{type(error).__name__}: {reason[:200]}" if reason else type(error).__name__


def _limit(file: IO[bytes]) -> int:
    """The bytes that the arrays of an open file may take as float32.

    Raises:
      ConvertError: a zip declares more of them, or is a TorchScript archive.
    """
    length = file.seek(0, 2)
    most = ALLOWANCE + MAX_GROWTH * length
    file.seek(0)
    if file.read(2) == b"PK":
        with zipfile.ZipFile(file) as archive:
            total = sum(member.file_size for member in archive.infolist())
            is_program = any(name.endswith("/constants.pkl") for name in archive.namelist())
        if total > most:
            raise ConvertError(
                f"its members unpack to {total:,} bytes, expected at most {most:,} of a file of {length:,}"
            )
        if is_program:
            raise ConvertError(f"a TorchScript archive, expected {TENSORS}; {_OPENAI}")
    file.seek(0)
    return most


def read_npz(path: epath.Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz as float32. Raises ConvertError where it is none, or is damaged."""
    with reading(path, "a .npz of plain arrays"), path.open("rb") as file:
        _limit(file)
        out = {}
        with np.load(file, allow_pickle=False) as stored:
            for name in stored.files:
                try:
                    array = stored[name]
                except MemoryError:
                    raise ConvertError(f"{name}: its header declares more than the memory") from None
                if array.dtype.str == "|V2":  # numpy stores bfloat16 as raw bytes
                    array = array.view(jnp.dtype("bfloat16"))
                out[name] = array.astype(np.float32)
        return out


def load_torch(path: epath.Path) -> Any:
    """The object in a file of torch.save, by torch.load with `weights_only`.

    Raises:
      ConvertError: the zip declares more bytes than the limit, or is a TorchScript archive.
      Exception: of many kinds, where the file is damaged or asks to run code.
    """
    import torch

    with path.open("rb") as file:
        _limit(file)
        with warnings.catch_warnings():  # a sparse tensor is refused by whoever reads the result
            warnings.filterwarnings("ignore", "Validating sparse tensor invariants")
            return torch.load(file, map_location="cpu", weights_only=True)


def tensors_to_float32(path: epath.Path, named: Mapping[Any, Any]) -> dict[str, np.ndarray]:
    """The tensors of a state dict as float32 arrays, without its other entries; names without `module.`.

    Raises:
      ConvertError: one line per fault. They take more bytes than the file `path` explains, since tensors may
        share storage; one is not of plain numbers; or its name is there twice.
    """
    import torch

    out: dict[str, np.ndarray] = {}
    faults = []
    tensors = [(str(k).removeprefix("module."), x) for k, x in named.items() if torch.is_tensor(x)]
    with path.open("rb") as file:
        most = _limit(file)
    if sum(4 * x.numel() for _, x in tensors) > most:
        raise ConvertError(
            f"its arrays take more than {most:,} bytes, {MAX_GROWTH} times the file and"
            f" {ALLOWANCE >> 20} MiB; expected weights"
        )
    for name, value in tensors:
        plain = value.layout == torch.strided and not value.is_quantized and not value.is_complex()
        if not plain or value.device.type != "cpu":
            got = "a quantised tensor" if value.is_quantized else f"{value.dtype}, {value.layout}"
            faults.append(f"{name}: got {got}, expected plain numbers")
        elif name in out:
            faults.append(f"{name}: is there with and without module.")
        else:
            out[name] = value.detach().to(torch.float32).numpy()
    raise_any(faults)
    return out


def read_weights(path: epath.Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of a .safetensors or a file of torch.save as float32; of a folder the first file of `names`.

    Raises:
      ConvertError: there is none, it is damaged, or it asks to run code; nothing in it is executed.
    """
    if path.is_dir():
        files = [path / name for name in names if regular_file.is_one(path / name)]
        if not files:
            raise ConvertError(f"{path}: holds no weights; expected one of {', '.join(names)}")
        path = files[0]
    if not regular_file.is_one(path):
        raise ConvertError(f"{path}: no such file, expected weights")
    with reading(path, TENSORS), needing("torch", "reading it"):
        if path.suffix == ".safetensors":
            import safetensors.torch

            stored = safetensors.torch.load(path.read_bytes())
        else:
            stored = load_torch(path)
        if isinstance(stored, Mapping) and isinstance(stored.get("state_dict"), Mapping):
            stored = stored["state_dict"]
        if not isinstance(stored, Mapping) or not any(hasattr(v, "dtype") for v in stored.values()):
            raise ConvertError(f"got a {type(stored).__name__}, expected a state dict of tensors")
        return tensors_to_float32(path, stored)
