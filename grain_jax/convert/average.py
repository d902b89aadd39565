"""The command average: a weighted sum of the parameters of equal models.

The sum of a fine-tuned model and its start is WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903), of several
fine-tuned models a soup (Wortsman et al. 2022, arXiv 2203.05482). A run with LoRA loses its factors.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from grain_jax import config as config_lib
from grain_jax.checkpoint import saved_model
from grain_jax.convert import output, parity, tables, towers
from grain_jax.convert.faults import ConvertError, raise_any
from grain_jax.core import atomic
from grain_jax.input_pipeline import tokenizer
from grain_jax.models import grain

# Keys that may differ; the last two are compared in another way.
_FREE = {*towers.OF_TRAINING, *("attention", "mlp", "logit_scale_init", "logit_bias_init", "tokenizer")}


def average(
    sources: Sequence[epath.PathLike], weights: Sequence[float], folder: epath.PathLike
) -> parity.Report:
    """average: equal models -> the model of the weighted sum of their parameters, for `grain_jax.load`.

    Sums are float32, in the order of the models, so equal calls give equal bits. Factors of LoRA are folded
    in first. The logit scale is summed as it is stored, as a logarithm. The host holds two models at a time.

    Weights are one per model, with the sum 1, or () for equal ones.

    Raises:
      ConvertError: wrong weights; the models differ, with a line per difference; a sum is not finite; the
        folder holds something else, or cannot be written.
      checkpoint.CheckpointError: a source cannot be read.
    """
    weights = weights or [1 / len(sources)] * len(sources)
    if len(weights) != len(sources) or not abs(math.fsum(weights) - 1) <= 1e-6:
        raise ConvertError(
            f"--weights: got {len(weights)} for {len(sources)} models with the sum {math.fsum(weights):.7g},"
            " expected one per model with the sum 1, as 0.5,0.5"
        )
    folder = output.check_free(folder)
    first: saved_model.Stored | None = None
    sums, lines = {}, [f"average: {len(sources)} models -> {folder}"]
    for source, weight in zip(sources, weights):
        stored = saved_model.load_stored(source)
        arrays = grain.flat(stored.merged())
        stored = stored._replace(params={})
        first = first or stored
        expected, actual = _keys(first), _keys(stored)
        raise_any(
            [
                f"{stored.folder}: model.{key}: got {actual.get(key)!r}, expected {expected.get(key)!r} as"
                f" {first.folder} has"
                for key in expected | actual
                if actual.get(key) != expected.get(key)
            ]
        )
        for name, x in arrays.items():
            sums[name] = sums.get(name, np.float32(0)) + np.float32(weight) * x
        merged = f", LoRA of rank {stored.lora.rank} folded in" if stored.lora.rank else ""
        lines.append(f"{weight:10.6g}  {stored.folder}{merged}")
        del arrays  # before the next model is read
    assert first is not None
    raise_any([f"{n}: the sum is not finite" for n, x in sums.items() if not np.isfinite(x).all()])
    report = parity.Report("\n".join(lines), True, "a sum: no other side")
    output.save(folder, first.model, tables.nested(sums), ", ".join(map(str, sources)), report, first.folder)
    return report


def _keys(stored: saved_model.Stored) -> dict[str, Any]:
    """The keys of a model that count, flat; for a tokenizer's file the digest of its content."""
    keys = config_lib.flatten(dataclasses.asdict(stored.model))
    keys = {key: value for key, value in keys.items() if key.rpartition(".")[2] not in _FREE}
    text, known = stored.model.text, stored.model.text.tokenizer
    if known != "clip" and (path := tokenizer.own_file(text, stored.folder)) is not None:
        known = f"{path.name}, sha256 {atomic.digest(tokenizer.content_of(path))[:12]}"
    has_bias = stored.model.logit_bias_init is not None
    return keys | {"text.tokenizer": known, "logit_bias_init": "a bias" if has_bias else None}
