"""The resolved configuration as frozen dataclasses: every key a run can have, and no default.

Defaults live in `configs/common.py` alone. `from_dict` consumes keys: a missing, misspelt or left-over
key is an error that names the nearest one, wherever it was typed. This module needs neither JAX nor
ml_collections, so that a config can be checked anywhere.
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

REMAT_POLICIES = ("none", "full", "dots")
DTYPES = ("float32", "bfloat16")


class ConfigError(ValueError):
    """The configuration cannot be used; the message has one line a fault."""


@dataclasses.dataclass(frozen=True)
class ImageTower:
    """A vision transformer (method.md, Model): class token, learned positions, pre-norm."""

    image_size: int  # pixels, height = width
    patch_size: int  # pixels; must divide image_size
    width: int  # E
    depth: int
    heads: int
    mlp_dim: int
    qk_norm: bool  # LayerNorm on each head's queries and keys
    norm_eps: float
    stem_width: (
        int  # 0: patches are projected at once; else two strided 3x3 convolutions come first
    )
    position_init: str  # "normal" (0.02) or "sincos2d"; the positions are learned either way
    block_init: str  # "trunc_normal" (0.02, zero biases) or "torch" (the reference's quirk 13)
    unroll: (
        int  # layers of the scan that are unrolled; depth = no loop (faster for tiny towers on CPU)
    )


@dataclasses.dataclass(frozen=True)
class TextTower:
    """CLIP's causal text transformer, read at each text's end token."""

    vocab_size: int
    context_length: int  # L, also the length of a packed row
    width: int
    depth: int
    heads: int
    mlp_dim: int
    norm_eps: float
    unroll: int


@dataclasses.dataclass(frozen=True)
class RegionDecoder:
    """DETR-like decoder: `queries` region queries and one more for the image."""

    queries: int  # Q, without the image query
    width: int
    depth: int
    heads: int
    mlp_dim: int
    dropout: float
    norm_eps: float
    unroll: int


@dataclasses.dataclass(frozen=True)
class Model:
    embed_dim: int  # D
    image: ImageTower
    text: TextTower
    decoder: RegionDecoder


@dataclasses.dataclass(frozen=True)
class Input:
    source: str  # "records" (TFDS-format TFRecords) or "synthetic" (random, no TensorFlow)
    data_dir: str
    name: str
    prepare: str | None  # command that makes the data set when it is not there yet
    lanes: int  # sub-batches with shards of their own; a constant of the run (method.md, Order of the data)
    shards_per_block: int  # shards that are read whole and permuted together
    max_regions: int  # R: the regions with the highest scores are kept
    synthetic_caption_rate: float  # chance that the synthetic caption stands in for the web caption
    flip_rate: (
        float  # chance of a mirror image; boxes move, left and right change places in the words
    )
    crop_min_area: float  # smallest share of the picture that a random crop keeps; 1 = no crop
    reader_threads: int  # 0 = as many as tf.data wants


@dataclasses.dataclass(frozen=True)
class Text:
    packing: bool  # several texts share a row; False: each has its own, padded
    pack_group: int  # consecutive images that share rows
    pack_rows: int  # rows a group


@dataclasses.dataclass(frozen=True)
class Loss:
    image_caption: float  # weight of L_ic
    region_description: float  # weight of L_rd
    box: float  # weight of L_box
    group_size: int  # images whose descriptions are negatives of each other; 0 = all
    mask_duplicates: bool  # equal texts are not each other's negatives
    match_l1: float  # weight of L1 in the matching cost
    match_giou: float  # weight of -GIoU in the matching cost
    iou_epsilon: float  # added to the union in the IoU term (reference: 1e-4, quirk 15)
    deep_supervision: bool  # the box loss of the earlier decoder layers is added
    shift_labels_after_empty_box: bool  # the reference's quirk 1


@dataclasses.dataclass(frozen=True)
class Optim:
    learning_rate: float
    warmup_init: float  # learning rate of step 0
    end_learning_rate: float
    warmup_steps: int | None  # exactly one of these two
    warmup_epochs: float | None
    schedule: str  # "cosine" or "reference" (quirk 12)
    b1: float
    b2: float
    eps: float
    weight_decay: float
    decay_groups: str  # "matrices" or "reference" (quirk 7)
    clip_norm: float  # global norm that gradients are scaled down to; 0 = off


@dataclasses.dataclass(frozen=True)
class Mesh:
    data: int  # -1: what the others leave
    fsdp: int
    tensor: int


@dataclasses.dataclass(frozen=True)
class Evaluator:
    kind: str  # "zeroshot", "retrieval" or "grounding"
    images: str  # class folders (zeroshot), else the folder that the annotations' paths start from
    descriptions: str | None  # zeroshot: D.json
    annotations: str | None  # retrieval, grounding: A.jsonl
    alphas: tuple[float, ...]  # zeroshot: shares of the global score
    names: bool  # zeroshot: class names stand in the prompts; False: descriptions alone
    region_order: (
        str  # zeroshot: the region score is a mean over "queries" (paper) or "descriptions"
    )


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int
    total_steps: int | None  # exactly one of these two
    total_epochs: float | None
    batch_size: int  # global
    microbatches: (
        int  # the towers see batch_size / microbatches images at a time; the loss sees all
    )
    dtype: str  # of activations; parameters and losses are float32
    remat: str
    ema_decay: float  # 0 = no average is kept
    log_every: int
    checkpoint_every: int  # steps; 0 = only the last
    checkpoint_every_minutes: float  # 0 = by steps only
    checkpoint_keep: int
    eval_every: int  # steps; 0 = only after the last
    pictures: int  # test pictures drawn with their regions after the last step; 0 = none
    model: Model
    input: Input
    text: Text
    loss: Loss
    optim: Optim
    mesh: Mesh
    sharding: tuple[tuple[str, str | None], ...]  # logical axis -> mesh axis, exhaustive
    evals: dict[str, Evaluator]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        out = {}
        for key, item in value.items():
            out |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
        return out
    return {prefix: value}


def _convert(kind: Any, value: Any, path: str, faults: list[str]) -> Any:
    """`value` as an instance of the annotated type `kind`; what does not fit is added to `faults`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, path, faults)
    if origin is dict:
        items = value.items() if isinstance(value, Mapping) else ()
        return {k: _convert(args[1], v, f"{path}.{k}", faults) for k, v in items}
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, path, faults)
    if origin is tuple:
        if isinstance(value, (list, tuple)):
            inner = args[:1] * len(value) if args[-1] is Ellipsis else args
            if len(inner) == len(value):
                return tuple(_convert(a, v, path, faults) for a, v in zip(inner, value))
        faults.append(f"{path}: got {value!r}, expected a list")
        return ()
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        faults.append(f"{path}: got {value!r}, expected {kind.__name__}")
    return value


def _build(cls: type, value: Any, path: str, faults: list[str]) -> Any:
    if not isinstance(value, Mapping):
        faults.append(f"{path}: got {value!r}, expected a group of keys")
        return None
    hints = typing.get_type_hints(cls)
    at = lambda key: f"{path}.{key}" if path else str(key)  # noqa: E731
    for key in value:
        if key not in hints:
            faults.append(f"{at(key)}: {unknown_key(key, [at(h) for h in hints], at(key))}")
    missing = [key for key in hints if key not in value]
    faults.extend(f"{at(key)}: missing; configs/common.py has its default" for key in missing)
    if missing:
        return None
    return cls(**{k: _convert(t, value[k], at(k), faults) for k, t in hints.items()})


def unknown_key(key: str, known: list[str], path: str | None = None) -> str:
    """The words for a key that does not exist, with the nearest one of `known`."""
    near = difflib.get_close_matches(path or key, known, n=1, cutoff=0.0)
    return "no such key" + (f"; did you mean {near[0]}?" if near else "")


def model_from_dict(value: Mapping[str, Any]) -> Model:
    """The `model` part alone, as converted checkpoints carry it. Raises ConfigError."""
    faults: list[str] = []
    model = _build(Model, value, "model", faults)
    if not faults:
        _check_model(model, faults)
    if faults:
        raise ConfigError("\n".join(faults))
    return model


def from_dict(value: Mapping[str, Any]) -> Config:
    """A plain dict, or ml_collections' ConfigDict, as a checked Config. Raises ConfigError, a line a fault."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    faults: list[str] = []
    config = _build(Config, value, "", faults)
    if not faults:
        _check(config, faults)
    if faults:
        raise ConfigError("\n".join(faults))
    return config


def _one_of(name: str, value: str, choices: tuple[str, ...], faults: list[str]) -> None:
    if value not in choices:
        faults.append(f"{name}: got {value!r}, expected one of {', '.join(choices)}")


def _check_model(model: Model, faults: list[str]) -> None:
    image = model.image
    if image.image_size % image.patch_size:
        faults.append(
            f"model.image.image_size: got {image.image_size}, expected a multiple of"
            f" model.image.patch_size = {image.patch_size}"
        )
    if image.stem_width and image.patch_size % 4:
        faults.append(
            "model.image.stem_width: the stem divides by 4; patch_size must be a multiple"
        )
    for name in ("image", "text", "decoder"):
        tower = getattr(model, name)
        if tower.width % tower.heads:
            faults.append(f"model.{name}.heads: got {tower.heads}, must divide width {tower.width}")
    _one_of("model.image.position_init", image.position_init, ("normal", "sincos2d"), faults)
    _one_of("model.image.block_init", image.block_init, ("trunc_normal", "torch"), faults)


def _check(config: Config, faults: list[str]) -> None:
    _check_model(config.model, faults)
    _one_of("remat", config.remat, REMAT_POLICIES, faults)
    _one_of("dtype", config.dtype, DTYPES, faults)
    _one_of("input.source", config.input.source, ("records", "synthetic"), faults)
    _one_of("optim.schedule", config.optim.schedule, ("cosine", "reference"), faults)
    _one_of("optim.decay_groups", config.optim.decay_groups, ("matrices", "reference"), faults)
    for name, evaluator in config.evals.items():
        _one_of(
            f"evals.{name}.kind", evaluator.kind, ("zeroshot", "retrieval", "grounding"), faults
        )
        _one_of(
            f"evals.{name}.region_order",
            evaluator.region_order,
            ("queries", "descriptions"),
            faults,
        )
    if (config.total_steps is None) == (config.total_epochs is None):
        faults.append("total_steps, total_epochs: exactly one must be set")
    if (config.optim.warmup_steps is None) == (config.optim.warmup_epochs is None):
        faults.append("optim.warmup_steps, optim.warmup_epochs: exactly one must be set")
    divides = {
        "microbatches": config.microbatches,
        "input.lanes": config.input.lanes,
        "loss.group_size": config.loss.group_size or 1,
    }
    for name, number in divides.items():
        if number < 1 or config.batch_size % number:
            faults.append(f"{name}: got {number}, must divide batch_size {config.batch_size}")
    lane_batch = config.batch_size // max(1, config.input.lanes)
    if config.text.packing and lane_batch % max(1, config.text.pack_group):
        faults.append(
            f"text.pack_group: got {config.text.pack_group}, must divide batch_size / input.lanes"
            f" = {lane_batch}, so that no group crosses a process"
        )
    if config.log_every < 1:
        faults.append(f"log_every: got {config.log_every}, expected at least 1")


def to_json(config: Any) -> str:
    """A Config (or a part of one) as indented JSON that `from_dict` reads back."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"
