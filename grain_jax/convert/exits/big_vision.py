"""The command to-big-vision: the .npz that the `load` of big_vision's two_towers reads."""

import io
from typing import Any

import numpy as np
from etils import epath

from grain_jax.convert import big_vision, parity, tables, towers
from grain_jax.convert.exits import arrays, folder, needs
from grain_jax.convert.faults import ConvertError, raise_any
from grain_jax.convert.tables import Arrays
from grain_jax.core import atomic, errors
from grain_jax.models import grain


def to_big_vision(source: epath.PathLike, path: epath.PathLike) -> parity.Report:
    """to-big-vision: a two-tower model that `grain_jax.load` reads to a .npz of big_vision.

    Args:
      source: a workdir, a checkpoint or a converted folder.
      path: the file to write.

    Raises:
      ConvertError: big_vision cannot express the model, or `path` is no file name that ends in .npz.
      checkpoint.CheckpointError: `source` cannot be read.
    """
    path = epath.Path(path)
    if path.suffix != ".npz" or path.is_dir():
        raise ConvertError(f"{path}: expected the name of a file that ends in .npz")
    source_model = folder.read_towers(source)
    model = source_model.model
    raise_any(needs.BIG_VISION.faults(model))
    state = _state(grain.flat(source_model.params))
    content = io.BytesIO()
    named: dict[str, Any] = {f"params/{name}": array for name, array in state.items()}
    np.savez(content, **named)
    with errors.storage_faults_as_one_line(path):
        atomic.write_bytes(path, content.getvalue())
    proof = big_vision.prove(big_vision.read(path), model, source_model.params)
    mean, std = model.image.pixel_mean, model.image.pixel_std
    pixels = f"pixels not in a .npz: ([0, 1] - {list(mean)}) / {list(std)}"
    if (tuple(mean), tuple(std)) != towers.SIGLIP_PIXELS:
        pixels = f"ATTENTION: {pixels}; value_range(-1, 1) and from-big-vision give others"
    tokenizer = f"tokenizer not in a .npz: {model.text.tokenizer}, texts {model.text.cleaning}"
    return proof.after(
        f"to-big-vision: {source_model.folder} -> {path}, its sub-trees img and txt",
        f"{tokenizer}, padded with the id {model.text.pad_id}",
        pixels,
        f"for its config: {big_vision.sizes_of(model)}",
    )


def _state(flat: Arrays) -> Arrays:
    """The arrays by big_vision's names, without `params/`."""
    flat = arrays.with_patch_bias(arrays.without_class_position(flat))
    for tower in ("image", "text"):
        if f"{tower}_projection/kernel" in flat:
            flat = arrays.with_projection(flat, tower, 0, bias=True)
    state = tables.write(big_vision.ROWS, flat)
    return state | {
        row.theirs: state[row.theirs].reshape(1) for row in big_vision.SCALARS if row.ours in flat
    }
