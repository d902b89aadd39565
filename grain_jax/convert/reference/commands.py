"""The commands from-torch and to-torch."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from grain_jax.convert import output, parity
from grain_jax.convert.faults import ConvertError, prefixed
from grain_jax.convert.layouts import get
from grain_jax.convert.reference import checkpoint as files
from grain_jax.convert.reference import names
from grain_jax.convert.reference.module import prove
from grain_jax.convert.reference.parameters import to_params, to_states
from grain_jax.convert.reference.sizes import REFERENCE_HEADS, TOWERS, Inferred, infer, sizes_of
from grain_jax.files import atomic
from grain_jax.runtime import checkpoint


def from_torch(
    source: epath.PathLike, folder: epath.PathLike, heads: Mapping[str, int | None]
) -> parity.Report:
    """from-torch: a file of the reference to a folder for `grain_jax.load`.

    Args:
      source: the `.pth.tar`.
      folder: new, or an older conversion.
      heads: "image", "text", "decoder" -> heads, or None to read or assume them.

    Raises:
      ConvertError: the file cannot be converted, or the folder holds something else.
    """
    folder = output.check_free(folder)
    states = files.read(source)
    with prefixed(f"{source}: "):
        inferred = infer(states, heads)
        params = to_params(states["backbone"], states["decoder"], inferred.model)
    proof = prove(inferred.model, params, states)
    output.save(folder, inferred.model, params, source, proof)
    lines = [f"from-torch: {source} -> {folder}", *_sizes_report(inferred), ""]
    lines += [*_parameter_table(params), "", *_left_out(states, params, inferred)]
    return proof._replace(text="\n".join([*lines, "", proof.text]))


def to_torch(source: epath.PathLike, path: epath.PathLike) -> parity.Report:
    """to-torch: a model that `grain_jax.load` reads to a `.pth.tar` of the reference.

    Args:
      source: a workdir, a checkpoint or a converted folder.
      path: the file to write.

    Raises:
      ConvertError: the reference's format cannot hold the model, torch is missing, or `path` is a folder.
      checkpoint.CheckpointError: `source` cannot be read.
    """
    path = epath.Path(path)
    if path.is_dir() or atomic.is_special(path):  # it is read again, for the parity
        raise ConvertError(
            f"{path}: is a folder, pipe or device; expected a file name such as grain.pth.tar"
        )
    model, params, read_from = checkpoint.load_model(source)
    states = to_states(model, params)
    try:
        files.write(path, states)
    except ImportError as error:
        raise ConvertError(
            f"{path}: PyTorch is needed to write it; pip install 'grain_jax[torch]'"
        ) from error
    except OSError as error:
        raise ConvertError(f"{path}: cannot be written ({error})") from error
    proof = prove(model, params, files.read(path))
    lines = [f"to-torch: {read_from} -> {path}"]
    for module, key in files.KEYS.items():
        size = sum(array.size for array in states[module].values())
        lines.append(f"{key}: {len(states[module])} entries, {size:,} values, names with module.")
    lines += [_heads_line(tower, getattr(model, tower)) for tower in TOWERS]
    zeros = ", ".join(f"{m} {name}" for m, of in names.UNUSED.items() for name in of)
    lines.append(f"zeros, for the entries that the reference never uses: {zeros}")
    return proof._replace(text="\n".join([*lines, "", proof.text]))


def _heads_line(tower: str, config: Any) -> str:
    """The heads, which the file does not hold: the reference's code fixes them by the width."""
    line = f"{tower}: width {config.width}, depth {config.depth}, {config.heads} heads"
    theirs = REFERENCE_HEADS.get((tower, config.width), config.heads)
    if theirs != config.heads:
        line += f"; ATTENTION: the reference's code has {theirs} and would give other outputs"
    return line


def _sizes_report(inferred: Inferred) -> list[str]:
    model, heads = inferred
    image, text, decoder = model.image, model.text, model.decoder
    assert decoder is not None  # `infer` reads one
    return [
        f"image    {image.image_size} px, patch {image.patch_size}, width {image.width}, depth {image.depth},"
        f" MLP {image.mlp_dim}, qk-norm {'yes' if image.qk_norm else 'no'}, heads {heads['image']}",
        f"text     vocabulary {text.vocab_size}, context {text.context_length}, width {text.width},"
        f" depth {text.depth}, MLP {text.mlp_dim}, heads {heads['text']}",
        f"decoder  {decoder.queries} + 1 queries, width {decoder.width}, depth {decoder.depth},"
        f" MLP {decoder.mlp_dim}, heads {heads['decoder']}; embedding {model.embed_dim}",
    ]


def _parameter_table(params: Any) -> list[str]:
    lines = [f"{'parameter':45} {'shape':20} {'norm':>12}  reference"]
    for _, module, rows in names.TABLES:
        for row in rows:
            leaf = get(params, row.ours)
            if leaf is not None:
                third = "" if row.third is None else f" [third {row.third + 1}]"
                norm = np.linalg.norm(leaf.astype(np.float64))
                lines.append(
                    f"{row.ours:45} {str(leaf.shape):20} {norm:12.6g}  {module} {row.theirs}{third}"
                )
    return lines


def _left_out(states: Mapping[str, files.StateDict], params: Any, inferred: Inferred) -> list[str]:
    """The entries that no parameter takes, and the numbers of values."""
    lines = ["left out, because no output of GRAIN depends on it:"]
    for module, unused in names.UNUSED.items():
        for name in unused:
            shape = states[module][name].shape if name in states[module] else "not in the file"
            lines.append(f"  {module} {name} {shape}")
    back = names.state_dicts(params, sizes_of(inferred.model))
    used = sum(states[m][k].size for m in back for k in back[m])
    written = sum(array.size for entries in back.values() for array in entries.values())
    total = sum(array.size for state in states.values() for array in state.values())
    lines.append(
        f"values: {total:,} in the file = {used:,} used + {total - used:,} left out; {written:,} written"
    )
    return lines
