"""The command average: a weighted sum of the parameters of equal models.

Of a fine-tuned model and its start that is WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903), of several fine-tuned
models a soup (Wortsman et al. 2022, arXiv 2203.05482).
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from grain_jax import config as config_lib
from grain_jax.checkpoint import saved_model
from grain_jax.convert import output, parity, tables, towers
from grain_jax.convert.faults import ConvertError, raise_any
from grain_jax.input_pipeline import tokenizer
from grain_jax.models import grain

# Keys that may differ; the last two are compared in another way.
_FREE = {
    *towers.OF_TRAINING,
    *("attention", "mlp", "logit_scale_init", "logit_bias_init", "tokenizer"),
}


def average(
    sources: Sequence[epath.PathLike], weights: Sequence[float], folder: epath.PathLike
) -> parity.Report:
    """average: equal models -> the model of the weighted sum of their parameters, for `grain_jax.load`.

    Sums are float32, in the order of the models, so equal calls give equal bits. Factors of LoRA are folded in first. The
    logit scale is summed as it is stored, as a logarithm. Two models at a time are in the host's memory, and a second copy of
    the matrices of one that has factors.

    Args:
      sources: two or more workdirs, checkpoints or converted folders.
      weights: one a model, with the sum 1; (): equal ones.
      folder: new, or an older conversion.

    Returns:
      What was averaged.

    Raises:
      ConvertError: wrong weights; the models differ, or have not the arrays of their config, with a line a difference; a
        sum is not finite; the folder holds something else, or cannot be written.
      checkpoint.CheckpointError: a source cannot be read.
    """
    _check(sources, weights)
    folder = output.check_free(folder)
    first: saved_model.Stored | None = None
    sums, lines = {}, []
    for source, weight in zip(sources, weights or [1 / len(sources)] * len(sources)):
        stored = saved_model.load_stored(source)
        arrays = grain.flat(stored.merged())
        stored = stored._replace(params={})
        first = first or stored
        raise_any([*_differences(first, stored), *_misfits(stored, arrays)])
        for name, x in arrays.items():
            sums[name] = sums.get(name, np.float32(0)) + np.float32(weight) * x
        merged = f", LoRA of rank {stored.lora.rank} folded in" if stored.lora.rank else ""
        lines.append(f"{weight:10.6g}  {stored.folder}, {_logit_scale(arrays)}{merged}")
        del arrays  # before the next model is read
    assert first is not None
    infinite = [name for name, x in sums.items() if not np.isfinite(x).all()]
    raise_any(
        [
            f"{name}: the sum is not finite; take out the model that it comes from"
            for name in infinite
        ]
    )
    made_of = ", ".join(map(str, sources))
    lines += [f"{len(sums)} arrays, {sum(x.size for x in sums.values()):,} values, float32"]
    lines = [f"average: {len(sources)} models -> {folder}, {_logit_scale(sums)}", *lines]
    made = parity.Report("\n".join(lines), True, "a sum: no other side")
    output.save(folder, first.model, tables.nested(sums), made_of, made, first.folder)
    return made


def _check(sources: Sequence[Any], weights: Sequence[float]) -> None:
    """Raises ConvertError where there are too few models, or weights that are not theirs."""
    if len(sources) < 2:
        raise ConvertError(f"models: got {len(sources)}, expected two or more to average")
    if weights and len(weights) != len(sources):
        raise ConvertError(
            f"--weights: got {len(weights)} for {len(sources)} models, expected one a model, with commas between"
        )
    total = math.fsum(weights or [1])
    if not abs(total - 1) <= 1e-6:
        raise ConvertError(f"--weights: got the sum {total:.7g}, expected 1, as of 0.5,0.5")


def _differences(first: saved_model.Stored, other: saved_model.Stored) -> Iterator[str]:
    """A line for each key that makes the parameters of the other model mean something else."""
    ours, theirs = _keys(first), _keys(other)
    if None in (first.model.decoder, other.model.decoder):
        ours, theirs = (_without_decoder(keys) for keys in (ours, theirs))
    for key in ours | theirs:
        got, wanted = theirs.get(key), ours.get(key)
        if got != wanted:
            yield f"{other.folder}: model.{key}: got {got!r}, expected {wanted!r} as {first.folder} has"


def _misfits(stored: saved_model.Stored, arrays: Mapping[str, np.ndarray]) -> Iterator[str]:
    """A line for each array that the config of a model does not have like that."""
    shapes = grain.parameter_shapes(stored.model)
    for name in dict.fromkeys((*shapes, *arrays)):
        got, wanted = (np.shape(arrays[name]) if name in arrays else None), shapes.get(name)
        if got != wanted:
            got, wanted = ("none" if shape is None else shape for shape in (got, wanted))
            yield f"{stored.folder}: {name}: got {got}, expected {wanted} as its config says"


def _logit_scale(arrays: Mapping[str, np.ndarray]) -> str:
    with np.errstate(over="ignore"):
        return f"logit scale {np.exp(arrays['logit_scale']):.4g}"


def _without_decoder(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys, in place of those of a decoder whether there is one."""
    rest = {key: value for key, value in keys.items() if key.partition(".")[0] != "decoder"}
    return rest | {"decoder": "one" if "decoder.width" in keys else None}


def _keys(stored: saved_model.Stored) -> dict[str, Any]:
    """The keys of a model that count, flat; of a tokenizer's file the digest of its content."""
    keys = config_lib.flatten(dataclasses.asdict(stored.model))
    keys = {key: value for key, value in keys.items() if key.rpartition(".")[2] not in _FREE}
    text = stored.model.text
    known = text.tokenizer
    if known != "clip" and (path := tokenizer.own_file(text, stored.folder)) is not None:
        known = f"{path.name}, sha256 {hashlib.sha256(tokenizer.content_of(path)).hexdigest()[:12]}"
    has_bias = stored.model.logit_bias_init is not None
    return keys | {"text.tokenizer": known, "logit_bias_init": "a bias" if has_bias else None}
