"""What the exports that write a folder share: the model to write, its files, and our side of the parity."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from grain_jax import config as config_lib
from grain_jax.checkpoint import saved_model
from grain_jax.checkpoint.saved_model import Stored
from grain_jax.convert import model_card, output, parity, tables
from grain_jax.convert.faults import needing
from grain_jax.convert.tables import Arrays
from grain_jax.models import grain

MARK = "converted_from.json"  # in every folder of an export; published with it, so it names no path


def read(path: epath.PathLike) -> Stored:
    """The model in a workdir, a checkpoint or a converted folder. Raises checkpoint.CheckpointError."""
    stored = saved_model.load_stored(path)
    return stored._replace(params=stored.merged())


def read_towers(path: epath.PathLike) -> Stored:
    """As `read`; of a model whose tower pools beside regions its two towers, as they were published."""
    source = read(path)
    if source.model.decoder is None or not source.model.tower_pools:
        return source
    model = dataclasses.replace(source.model, decoder=None, boxes=config_lib.BoxHead())
    kept = grain.parameter_shapes(model)
    params = {name: x for name, x in grain.flat(source.params).items() if name in kept}
    return source._replace(model=model, params=tables.nested(params))


def write(
    target: epath.Path,
    source: Stored,
    arrays: tuple[str, Arrays],
    files: Mapping[str, Any],
    prove: Callable[[epath.Path], parity.Report],
    lines: Sequence[str],
    **card: Any,
) -> parity.Report:
    """Writes a folder: the weights, other files, the model card, and MARK with the verdict of the parity.

    The `arrays` have the name of their file, and `card` are further arguments of `model_card.write`.

    Raises:
      ConvertError: safetensors is missing, or the folder cannot be written.
    """
    name, state = arrays
    with needing("safetensors", name):
        import safetensors.numpy
    content = safetensors.numpy.save(state, metadata={"format": "pt"})
    with output.replacing(target, MARK) as new:
        write_files(new, {**files, name: content})
        proof = prove(new)
        text = model_card.write(source.model, source.folder, proof, **card)
        write_files(new, {"README.md": text, MARK: {"parity": proof.verdict}})
    return proof.after(*lines)


def write_files(folder: epath.Path, files: Mapping[str, Any]) -> None:
    """Writes files by name: bytes, texts, or other values as JSON."""
    for name, content in files.items():
        if not isinstance(content, bytes | str):
            content = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
