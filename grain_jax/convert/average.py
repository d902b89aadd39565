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
from grain_jax.convert import output, parity, tables, towers
from grain_jax.convert.faults import ConvertError, raise_any
from grain_jax.inference import rerank
from grain_jax.input_pipeline import tokenizer
from grain_jax.models import grain
from grain_jax.runtime import checkpoint

_DECODER = "text_decoder/"  # before the names of the arrays of a text decoder
_CHECKED = 4096  # values of an array whose sum is compared with one in float64
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
    logit scale is summed as it is stored, as a logarithm. A text decoder is summed where all models have one of the same
    sizes, and else left out. Two models at a time are in the host's memory, and a second copy of the matrices of one that
    has factors.

    Args:
      sources: two or more workdirs, checkpoints or converted folders.
      weights: one a model, with the sum 1; (): equal ones.
      folder: new, or an older conversion.

    Returns:
      What was averaged, and the comparison of sums with those in float64.

    Raises:
      ConvertError: wrong weights; the models differ, or have not the arrays of their config, with a line a difference; a
        sum is not finite; the folder holds something else, or cannot be written.
      checkpoint.CheckpointError: a source cannot be read.
    """
    _check(sources, weights)
    folder = output.check_free(folder)
    first: checkpoint.Stored | None = None
    sums, exact, lines, has_weight = {}, {}, [], False
    sizes: list[config_lib.TextDecoder | None] = []
    for source, weight in zip(sources, weights or [1 / len(sources)] * len(sources)):
        stored = checkpoint.load_stored(source)
        arrays = grain.flat(stored.merged())
        of_decoder = stored.text_decoder
        has_weight |= of_decoder is not None and rerank.path_of(stored.folder).exists()
        stored = stored._replace(params={}, text_decoder=None)
        first = first or stored
        raise_any([*_differences(first, stored), *_misfits(stored, arrays)])
        sizes.append(of_decoder and dataclasses.replace(of_decoder.config, unroll=1))
        if of_decoder is not None and sizes[-1] == sizes[0]:
            flat = grain.flat(of_decoder.params)
            arrays |= {_DECODER + name: x for name, x in flat.items()}
        for name, x in arrays.items():
            sums[name] = sums.get(name, np.float32(0)) + np.float32(weight) * x
            exact[name] = exact.get(name, 0.0) + weight * _some(x).astype(np.float64)
        merged = f", LoRA of rank {stored.lora.rank} folded in" if stored.lora.rank else ""
        lines.append(f"{weight:10.6g}  {stored.folder}, {_logit_scale(arrays)}{merged}")
        del arrays, of_decoder  # before the next model is read
    assert first is not None
    of_decoder, said = _of_decoder(sizes)
    if of_decoder is None:
        for name in [name for name in sums if name.startswith(_DECODER)]:
            del sums[name], exact[name]
    infinite = [name for name, x in sums.items() if not np.isfinite(x).all()]
    raise_any(
        [
            f"{name}: the sum is not finite; take out the model that it comes from"
            for name in infinite
        ]
    )
    parts = dict.fromkeys(name.partition("/")[0] for name in sums)
    proof = parity.report(
        parity.compare(
            {part: _part(part, {name: _some(x) for name, x in sums.items()}) for part in parts},
            {part: _part(part, exact) for part in parts},
        ),
        f"sums in float64 of up to {_CHECKED} values of each array",
    )
    made_of = ", ".join(map(str, sources))
    params = tables.nested(sums)
    decoder = None
    if of_decoder is not None:
        decoder = checkpoint.StoredDecoder(of_decoder, params.pop(_DECODER.rstrip("/")))
    given = proof, first.folder, decoder, first.sequence_lengths
    output.save(folder, first.model, params, made_of, *given)
    return proof.after(
        f"average: {len(sources)} models -> {folder}, {_logit_scale(sums)}",
        *lines,
        *said,
        *["without a weight of reranking: that of another model would not be its best"]
        * has_weight,
        f"{len(sums)} arrays, {sum(x.size for x in sums.values()):,} values, float32",
    )


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


def _differences(first: checkpoint.Stored, other: checkpoint.Stored) -> Iterator[str]:
    """A line for each key that makes the parameters of the other model mean something else."""
    ours, theirs = _keys(first), _keys(other)
    if None in (first.model.decoder, other.model.decoder):
        ours, theirs = (_without_decoder(keys) for keys in (ours, theirs))
    for key in ours | theirs:
        got, wanted = theirs.get(key), ours.get(key)
        if got != wanted:
            yield f"{other.folder}: model.{key}: got {got!r}, expected {wanted!r} as {first.folder} has"
    got, wanted = other.sequence_lengths, first.sequence_lengths
    if bool(got) != bool(wanted):  # one has learned from squares
        yield f"{other.folder}: sequence_lengths: got {got}, expected {wanted} as {first.folder} has"


def _of_decoder(
    sizes: Sequence[config_lib.TextDecoder | None],
) -> tuple[config_lib.TextDecoder | None, list[str]]:
    """(what the text decoders of all models have, or None; what the report says of them)."""
    if None not in sizes and len(set(sizes)) == 1:
        return sizes[0], ["text decoder: averaged"]
    missing = "text decoder: left out, as not all models have one of the same sizes"
    return None, [missing] if any(sizes) else []


def _misfits(stored: checkpoint.Stored, arrays: Mapping[str, np.ndarray]) -> Iterator[str]:
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


def _keys(stored: checkpoint.Stored) -> dict[str, Any]:
    """The keys of a model that count, flat; of a tokenizer's file the digest of its content."""
    keys = config_lib.flatten(dataclasses.asdict(stored.model))
    keys = {key: value for key, value in keys.items() if key.rpartition(".")[2] not in _FREE}
    text = stored.model.text
    known = text.tokenizer
    if known != "clip" and (path := tokenizer.own_file(text, stored.folder)) is not None:
        known = f"{path.name}, sha256 {hashlib.sha256(tokenizer.content_of(path)).hexdigest()[:12]}"
    has_bias = stored.model.logit_bias_init is not None
    return keys | {"text.tokenizer": known, "logit_bias_init": "a bias" if has_bias else None}


def _some(x: Any) -> np.ndarray:
    """Values of an array at even distances, at most `_CHECKED`."""
    values = np.asarray(x).reshape(-1)
    return values[:: max(-(-values.size // _CHECKED), 1)]


def _part(part: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """The values of all arrays of a part of the model, one after another."""
    return np.concatenate([x for name, x in arrays.items() if name.partition("/")[0] == part])
