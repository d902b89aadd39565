"""Where a conversion writes its model."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from etils import epath

from grain_jax import config as config_lib
from grain_jax.convert import parity
from grain_jax.convert.faults import ConvertError
from grain_jax.core import errors
from grain_jax.inference import predictor, rerank
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


def carry_weight(source: checkpoint.Stored, folder: epath.Path) -> list[str]:
    """Stores the weight of reranking of a model with one that was made of it and computes the same.

    Args:
      source: the model.
      folder: of the other one, written.

    Returns:
      A line for the report; none where there is no weight.

    Raises:
      regular_file.FileError: the weight is damaged.
    """
    chosen = rerank.read(source.folder)
    if chosen is None or source.text_decoder is None:
        return []
    if chosen.model != _digest(source):
        return [f"without {rerank.path_of(source.folder)}: its weight is of another model"]
    new = dict(model=_digest(checkpoint.load_stored(folder)), checkpoint=str(folder))
    rerank.write(folder, msgspec.structs.replace(chosen, **new))
    return [f"with the weight of reranking, {chosen.weight:g}"]


def _digest(stored: checkpoint.Stored) -> str:
    given = stored.model, stored.merged()
    length = max(stored.sequence_lengths, default=0)  # as `grain_jax.load` takes it
    more: Any = dict(text_decoder=stored.text_decoder, sequence_length=length)
    return predictor.Predictor(*given, **more).digest


def save(
    folder: epath.Path,
    model: config_lib.Model,
    params: Any,
    source: epath.PathLike,
    proof: parity.Report,
    model_folder: epath.PathLike | None = None,
    text_decoder: checkpoint.StoredDecoder | None = None,
    sequence_lengths: Sequence[int] = (),
) -> None:
    """Writes a model for `grain_jax.load`, with its source and the verdict of the parity.

    Args:
      folder: to write.
      model: what is written.
      params: its parameters.
      source: what the model was made of, for its config.json.
      proof: the parity.
      model_folder: folder of a model of ours, whose tokenizer's file is copied, where it lies there.
      text_decoder: beside the model, or None.
      sequence_lengths: as `checkpoint.Stored` has them.

    Raises:
      ConvertError: the folder cannot be written.
    """
    path = None
    if model_folder is not None and model.text.tokenizer != "clip":
        path = tokenizer.own_file(model.text, model_folder)
    if path is not None:
        text = dataclasses.replace(model.text, tokenizer=path.name)
        model = dataclasses.replace(model, text=text)
    with writing(folder):
        notes = dict(source=str(source), parity=proof.verdict)
        checkpoint.save_model(folder, model, params, text_decoder, sequence_lengths, **notes)
        if path is not None:
            (folder / path.name).write_bytes(tokenizer.content_of(path))
