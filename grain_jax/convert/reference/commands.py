"""The commands from-torch and to-torch, and the `.pth.tar` files of the PyTorch reference.

The torch module (`hf_files/modeling_grain.py`) is the other side of the parity.
"""

import dataclasses
import io
from collections.abc import Mapping
from typing import Any

from etils import epath

from grain_jax import config as config_lib
from grain_jax.checkpoint import saved_model
from grain_jax.convert import archives, output, parity, towers
from grain_jax.convert.faults import ConvertError, needing, prefixed, raise_any
from grain_jax.convert.reference import names
from grain_jax.convert.tables import Arrays
from grain_jax.core import atomic, errors, regular_file

KEYS = {"backbone": "backbone_state_dict", "decoder": "state_dict"}


def from_torch(
    source: epath.PathLike, folder: epath.PathLike, heads: Mapping[str, int | None]
) -> parity.Report:
    """from-torch: a file of the reference to a folder for `grain_jax.load`.

    `heads`: "image", "text", "decoder" -> heads, or None to read or assume them.

    Raises:
      ConvertError: the file cannot be converted, or the folder holds something else.
    """
    folder = output.check_free(folder)
    state = read(source)
    with prefixed(f"{source}: "):
        model, assumed = names.infer(state, heads)
        params = names.to_params(state, model)
    proof = prove(model, params, state)
    output.save(folder, model, params, source, proof)
    lines = [*towers.describe(model), *assumed]
    return proof.after(f"from-torch: {source} -> {folder}", *lines)


def to_torch(source: epath.PathLike, path: epath.PathLike) -> parity.Report:
    """to-torch: a model that `grain_jax.load` reads to a `.pth.tar` of the reference.

    Raises:
      ConvertError: the reference's format cannot hold the model, torch is missing, or `path` is a folder.
      checkpoint.CheckpointError: `source` cannot be read.
    """
    path = epath.Path(path)
    if path.is_dir():
        raise ConvertError(f"{path}: is a folder; expected a file name such as grain.pth.tar")
    model, params, read_from = saved_model.load_model(source)
    state = names.reference_state(model, params)
    with errors.storage_faults_as_one_line(path), needing("torch", path):
        write(path, state)
    proof = prove(model, params, read(path))
    lines = [f"to-torch: {read_from} -> {path}"]
    for tower in names.TOWERS:  # the file does not hold heads: the reference's code fixes them by the width
        config = getattr(model, tower)
        lines.append(f"{tower}: width {config.width}, depth {config.depth}, {config.heads} heads")
        theirs = names.REFERENCE_HEADS.get((tower, config.width), config.heads)
        if theirs != config.heads:
            lines[-1] += f"; ATTENTION: the reference's code has {theirs} and would give other outputs"
    return proof.after(*lines)


def read(path: epath.PathLike) -> Arrays:
    """The two state dicts as float32 arrays, "backbone.NAME" and "decoder.NAME"; names without `module.`.

    Raises:
      ConvertError: no such file, not a checkpoint, or one that asks to run code; nothing in it is executed.
    """
    path = epath.Path(path)
    if not regular_file.is_one(path):
        raise ConvertError(f"{path}: no such file; expected the reference's .pth.tar")
    with archives.reading(path, archives.TENSORS), needing("torch", "reading it", "torch"):
        stored = archives.load_torch(path)
        expected = f"expected a dict with {' and '.join(KEYS.values())}"
        if not isinstance(stored, Mapping):
            raise ConvertError(f"got a {type(stored).__name__}, {expected}")
        keys = ", ".join(map(str, list(stored)[:8])) or "nothing"
        lacking = [key for key in KEYS.values() if not isinstance(stored.get(key), Mapping)]
        raise_any([f"no state dict {key!r}; the file has {keys}" for key in lacking])
        out = {}
        for part, key in KEYS.items():
            with prefixed(f"{part} "):
                arrays = archives.tensors_to_float32(path, stored[key])
            out |= {f"{part}.{name}": array for name, array in arrays.items()}
        return out


def write(path: epath.PathLike, state: Arrays) -> None:
    """Writes what `read` gives in the format of the reference's training script, as of a run at step 0.

    Names start with `module.`, as in a DDP model.
    """
    import torch

    stored: dict[str, Any] = {key: {} for key in KEYS.values()}
    for name, array in state.items():
        part, _, rest = name.partition(".")
        stored[KEYS[part]][f"module.{rest}"] = torch.tensor(array)  # a copy: each entry has its own storage
    stored |= dict(epoch=0, iteration=0, best_acc=0.0, optimizer={"state": {}, "param_groups": []})
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    torch.save(stored, file)
    atomic.write_bytes(path, file.getvalue())


def make_module(model: config_lib.Model, state: Arrays) -> Any:
    """The torch module of a model in eval mode, with these entries; ImportError without transformers."""
    import torch

    from grain_jax.convert.hf_files import configuration_grain, modeling_grain

    config = configuration_grain.GrainConfig(towers=dataclasses.asdict(model))
    module = modeling_grain.GrainModel(config).eval()
    module.load_state_dict({name: torch.tensor(x) for name, x in state.items() if name not in names.UNUSED})
    return module


def prove(model: config_lib.Model, params: Any, state: Arrays) -> parity.Report:
    """Compares our model with `params` and the torch module with `state`, the arrays of the file."""
    run = lambda inputs: parity.clip_outputs(make_module(model, state), inputs)
    return parity.prove(model, params, "the torch module", ("transformers", "torch"), run)
