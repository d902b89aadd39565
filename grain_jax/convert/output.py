"""Where a conversion writes its model."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from typing import Any

from etils import epath

from grain_jax import config as config_lib
from grain_jax.convert import parity
from grain_jax.convert.faults import ConvertError
from grain_jax.core import errors
from grain_jax.input_pipeline import tokenizer
from grain_jax.runtime import checkpoint


def check_free(path: epath.PathLike, mark: str = "params") -> epath.Path:
    """The folder to write to.

    Args:
      path: the folder.
      mark: a file or folder that every conversion of this kind has; a folder with it may be overwritten.

    Raises:
      ConvertError: `path` is neither new, nor empty, nor an older conversion.
    """
    path = epath.Path(path)
    if path.exists() and not (path.is_dir() and (path / mark).exists()):
        # Orbax removes what it could not finish when it writes there again.
        if not path.is_dir() or any(x.suffix != ".orbax-checkpoint-tmp" for x in path.iterdir()):
            raise ConvertError(f"{path}: is in use by something else; expected a new folder")
    return path


@contextlib.contextmanager
def writing(path: epath.PathLike) -> Iterator[None]:
    """A fault of the system inside is a ConvertError of one line, also where TensorStore wraps it in a ValueError."""
    try:
        yield
    except Exception as error:
        fault = errors.of_system(error)
        if fault is None:
            raise
        raise ConvertError(f"{path}: cannot be written: {fault}") from error


@contextlib.contextmanager
def on_disk(folder: epath.Path) -> Iterator[str]:
    """The path of the folder; of a URL, which transformers cannot open, a local copy."""
    if "://" not in str(folder):
        yield str(folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        for path in folder.iterdir():
            path.copy(epath.Path(scratch) / path.name)
        yield scratch


def with_tokenizer(
    model: config_lib.Model, source: epath.PathLike, folder: epath.Path
) -> config_lib.Model:
    """Copies the tokenizer's file that lies in the folder of a model into another one.

    Args:
      model: whose text tower names it.
      source: folder of the model.
      folder: to copy it to.

    Returns:
      The model that names the copy; `model` where there is none.

    Raises:
      ConvertError: the folder cannot be written.
    """
    if model.text.tokenizer == "clip":
        return model
    path = tokenizer.own_file(model.text, source)
    if path is None:
        return model
    content = tokenizer.content_of(path)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / path.name).write_bytes(content)
    return dataclasses.replace(model, text=dataclasses.replace(model.text, tokenizer=path.name))


def save(
    folder: epath.Path,
    model: config_lib.Model,
    params: Any,
    source: epath.PathLike,
    proof: parity.Report,
) -> None:
    """Writes a model for `grain_jax.load`, with its source and the verdict of the parity.

    Raises:
      ConvertError: the folder cannot be written.
    """
    with writing(folder):
        checkpoint.save_model(folder, model, params, source=str(source), parity=proof.verdict)
