"""The resolved configuration as frozen dataclasses: every key a run can have.

Defaults live in `grain_jax.recipe` alone. `from_dict` consumes keys: a missing, misspelt or left-over
key is an error that names the nearest one, wherever it was typed. A field with a value here came later
than the first checkpoints: the value is what those that lack it mean. This module needs neither JAX nor
ml_collections, so that a config can be checked anywhere.
"""

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from grain_jax import errors

REMAT_POLICIES = ("none", "dots", "qkv", "full")  # from most memory to most recomputation
DTYPES = ("float32", "bfloat16")
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
PROJECTIONS = ("none", "matrix", "affine")
IMAGE_POOLS = ("none", "class", "map", "mean")
TEXT_POOLS = ("end", "last", "map", "mean")
TEXT_CLEANINGS = ("lower", "canonical", "none")
EVAL_KINDS = ("zeroshot", "linear_probe", "retrieval", "grounding", "boxes", "diagnostics")
LABELLED_KINDS = (
    "zeroshot",
    "linear_probe",
)  # of EVAL_KINDS: class folders or a TFDS set, no annotations


class ConfigError(errors.UserError):
    """The configuration cannot be used; the message has one line a fault."""


@dataclasses.dataclass(frozen=True)
class ImageTower:
    """A vision transformer (docs/method.md, Model): learned positions, norms before attention and MLP."""

    image_size: int  # pixels, height = width
    patch_size: int  # pixels; must divide image_size
    width: int  # E
    depth: int
    heads: int
    mlp_dim: int
    qk_norm: bool  # LayerNorm on each head's queries and keys
    norm_eps: float
    position_init: str  # "normal" (0.02) or "sincos2d"; the positions are learned either way
    position_period: float  # sincos2d: the longest wave against the shortest
    block_init: str  # "trunc_normal" (0.02, zero biases) or "torch" (the reference's quirk 13)
    unroll: (
        int  # layers of the scan that are unrolled; depth = no loop (faster for tiny towers on CPU)
    )
    class_token: bool = True  # a learned token before the patches
    patch_bias: bool = True
    pre_norm: bool = False  # LayerNorm between the positions and the first layer (CLIP's ln_pre)
    activation: str = "gelu"  # of the MLP: "gelu" (exact), "gelu_tanh" or "quick_gelu"
    # Without a decoder, how tokens become one vector: "class" (its token), "map" (attention pooling) or
    # "mean"; with one, "none".
    pool: str = "none"
    projection: str = "matrix"  # to the joint space; "affine" has a bias, "none" is no projection
    pixel_mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of pixels in [0, 1]: ImageNet's
    pixel_std: tuple[float, ...] = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class TextTower:
    """A text transformer: CLIP's (causal, read at each text's end token), or one such as SigLIP's."""

    vocab_size: int
    context_length: int  # L, also the length of a packed row
    width: int
    depth: int
    heads: int
    mlp_dim: int
    norm_eps: float
    unroll: int
    causal: bool = True  # False: every position sees all of the row
    activation: str = "quick_gelu"  # as the image tower's
    # "end": the end token; "last": the row's last position; "map" (attention pooling) and "mean": all of
    # the row.
    pool: str = "end"
    projection: str = "matrix"  # as the image tower's
    tokenizer: str = "clip"  # or the path of a tokenizer.json or of a SentencePiece .model
    cleaning: str = "lower"  # of texts before it: "lower", "canonical" (no punctuation) or "none"
    pad_id: int = 0  # the token of the padding; seen only by towers that are not packable

    @property
    def packable(self) -> bool:
        """Whether several texts may share a row: nothing that the tower gives depends on the padding."""
        return self.causal and self.pool == "end"


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
    qkv_init_gain: (
        float  # of the initial query, key and value weights; 1 = xavier, as the reference
    )
    unroll: int


@dataclasses.dataclass(frozen=True)
class Model:
    """The towers and the width D of the joint space."""

    embed_dim: int  # D
    logit_scale_init: float  # the factor itself; CLIP's 1 / 0.07, SigLIP's 10
    logit_bias_init: float | None  # of loss.contrast=sigmoid; SigLIP's -10. None: no bias
    image: ImageTower
    text: TextTower
    decoder: RegionDecoder | None  # None: two towers, without regions


@dataclasses.dataclass(frozen=True)
class Init:
    """Checkpoints that towers start from; None: from the seed."""

    image: str | None = None  # ours, big_vision's .npz (`path:sub-tree`), CLIP's or SigLIP's
    text: str | None = None
    resize: str = "bilinear"  # of the image's positions to another grid; or "bicubic"
    decoder: str | None = (
        None  # ours: the decoder, projections of image and regions, box head, logit scale
    )


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A record set and its share of the examples."""

    name: str
    data_dir: str
    weight: float  # more than 0; against the sum of all weights it is the share
    split: str = "train"


@dataclasses.dataclass(frozen=True)
class Input:
    """Where examples come from, in which order, and how they are varied."""

    source: str  # "records" (TFDS-format TFRecords) or "synthetic" (random, no TensorFlow)
    data_dir: str
    name: str
    prepare: str | None  # command that makes the data set when it is not there yet
    # Sub-batches with shards of their own; a constant of the run (docs/method.md, Order of the data). None, as
    # for the numbers of Text: derived (derived.py).
    lanes: int | None
    shards_per_block: int  # shards that are read whole and permuted together
    max_regions: int  # R: the regions with the highest scores are kept
    synthetic_caption_rate: float  # chance that the synthetic caption stands in for the web caption
    descriptions_in_captions: (
        int  # so many best-scored regions' descriptions are added to the caption
    )
    flip_rate: (
        float  # chance of a mirror image; boxes move, left and right change places in the words
    )
    crop_min_area: float  # smallest share of the image that a random crop keeps; 1 = no crop
    reader_threads: int  # 0 = as many as tf.data wants
    datasets: tuple[Dataset, ...] = ()  # a mixture, instead of `data_dir` and `name`

    @property
    def sets(self) -> tuple[Dataset, ...]:
        """The sets of the mixture, or the single one."""
        return self.datasets or (Dataset(self.name, self.data_dir, 1.0),)


@dataclasses.dataclass(frozen=True)
class Text:
    """How texts are laid out in rows (docs/method.md, Packing)."""

    packing: bool  # several texts share a row; False: each has its own, padded
    pack_group: int | None  # consecutive images that share rows
    pack_rows: int | None  # rows a group
    # A run ends where more of the texts between two lines of metrics.jsonl do not fit; 1 = never.
    max_dropped_share: float = 0.1


@dataclasses.dataclass(frozen=True)
class Loss:
    """Weights and switches of the losses (docs/method.md, Losses and Where it differs)."""

    image_caption: float  # weight of L_ic
    region_description: float  # weight of L_rd
    box: float  # weight of L_box
    contrast: str  # "softmax" (InfoNCE) or "sigmoid" (every pair by itself, as SigLIP)
    group_size: int  # images whose descriptions are negatives of each other; 0 = all
    mask_duplicates: bool  # equal texts are not each other's negatives
    match_l1: float  # weight of L1 in the matching cost
    match_giou: float  # weight of -GIoU in the matching cost
    match_description: float  # weight of -cosine(region, description) in the matching cost
    iou_epsilon: float  # added to the union in the IoU term (reference: 1e-4, quirk 15)
    deep_supervision: bool  # the box loss of the earlier decoder layers is added
    shift_labels_after_empty_box: bool  # the reference's quirk 1
    tile: int  # rows and columns of a tile of similarities (streaming.py); no effect on the result
    gather: int  # neighbouring devices that share their columns before these go round the ring; likewise


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW and its schedule (docs/method.md, Training recipe)."""

    learning_rate: float
    warmup_init: float  # learning rate of step 0
    end_learning_rate: float
    warmup_steps: int | None  # exactly one of these two
    warmup_epochs: float | None
    schedule: str  # "cosine" or "reference" (quirk 12)
    b1: float
    b2: float
    eps: float
    moment_dtype: str  # of the first moment; "bfloat16" halves it
    weight_decay: float
    decay_groups: str  # "matrices" or "reference" (quirk 7)
    clip_norm: float  # global norm that gradients are scaled down to; 0 = off
    frozen: tuple[str, ...] = ()  # regular expressions: parameters that are never updated (LiT)
    layer_decay: float = 1.0  # of the towers' learning rates, a layer (optim.layer_scales); 1 = off


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Device mesh; the batch is cut over data and fsdp."""

    data: int  # -1: what the others leave
    fsdp: int
    tensor: int
    dcn_data: int  # slices or nodes, joined by the slow network; data is cut over them first, nothing else is


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """One measurement: what, on which images."""

    kind: str  # one of EVAL_KINDS
    images: str  # class folders (LABELLED_KINDS), else the folder that the annotations' paths start from
    descriptions: str | None  # zeroshot: D.json
    annotations: str | None  # all kinds but LABELLED_KINDS: A.jsonl
    alphas: tuple[float, ...]  # zeroshot: shares of the global score
    names: bool  # zeroshot: class names stand in the prompts; False: descriptions alone
    region_order: (
        str  # zeroshot: the region score is a mean over "queries" (paper) or "descriptions"
    )
    # LABELLED_KINDS: a TFDS set instead of `images`, "name" or "name/config:version".
    tfds: str | None = None
    split: str = "test"  # of the TFDS set
    data_dir: str | None = None  # of TFDS; None: TFDS's own
    # zeroshot, boxes: file of class names, or the name of one in grain_jax/evaluate/classes; None: the
    # data set's own.
    classes: str | None = None
    templates: str | None = None  # zeroshot, boxes: file of prompts; None: the general ones
    missing: str = "error"  # where the data is not there; or "skip": a line says so
    get: str | None = None  # how to get the data, for that line
    # linear_probe: class folders of the training images, or their split of the TFDS set. None: a seeded share of
    # `images`, or "train".
    train: str | None = None
    shots: tuple[
        int, ...
    ] = ()  # linear_probe: training images a class, a probe each; 0, and (): all
    seeds: int = 5  # linear_probe: draws of few shots


@dataclasses.dataclass(frozen=True)
class Suite:
    """A suite of evaluations (configs/eval.py); all but `evals` is what its entries were made from."""

    data_dir: str  # of TFDS
    folders: str  # of the sets that are no TFDS sets
    descriptions: str | None  # folder of NAME.json
    templates: str | None
    alphas: tuple[float, ...]
    evals: dict[str, Evaluator]


@dataclasses.dataclass(frozen=True)
class Wandb:
    """Weights & Biases, beside TensorBoard."""

    mode: str  # "off", "online" or "offline" (into the workdir, for `wandb sync`)
    project: str
    name: str  # of the run; "" = the workdir's


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

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
    checkpoint_keep: int  # the newest ones; and beside these:
    checkpoint_keep_every: int  # those of steps that this divides, for good; 0 = none
    checkpoint_best_metric: str  # the best by this key of metrics.jsonl, e.g. "loss"; "" = none
    checkpoint_best_mode: str  # "max" or "min"
    eval_every: int  # steps; 0 = only after the last
    pictures: int  # test images drawn with their regions after the last step; 0 = none
    profile_start: int  # first step of a profiler trace; 0 = none
    profile_steps: int  # how many steps it has
    wandb: Wandb
    model: Model
    input: Input
    text: Text
    loss: Loss
    optim: Optim
    mesh: Mesh
    sharding: tuple[tuple[str, str | None], ...]  # logical axis -> mesh axis, exhaustive
    evals: dict[str, Evaluator]
    init: Init = Init()


def _convert(kind: Any, value: Any, path: str, faults: list[str]) -> Any:
    """`value` as an instance of the annotated type `kind`; what does not fit is added to `faults`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, path, faults)
    if origin is dict:
        if not isinstance(value, Mapping):
            faults.append(f"{path}: got {value!r}, expected a group of keys")
            return {}
        items = value.items()
        return {k: _convert(args[1], v, f"{path}.{k}", faults) for k, v in items}
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, path, faults)
    if origin is tuple:
        if isinstance(value, (list, tuple)):
            inner = args[:1] * len(value) if args[-1] is Ellipsis else args
            if len(inner) == len(value):
                numbered = len(inner) and dataclasses.is_dataclass(inner[0])
                paths = [f"{path}[{i}]" if numbered else path for i in range(len(inner))]
                return tuple(_convert(*part, faults) for part in zip(inner, value, paths))
        faults.append(f"{path}: got {value!r}, expected a list")
        return ()
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1e300 else math.inf
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        faults.append(f"{path}: got {value}, expected a finite number")
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
            faults.append(f"{at(key)}: {unknown_key(at(key), [at(h) for h in hints])}")
    new = {f.name for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
    missing = [key for key in hints if key not in value and key not in new]
    default = "" if path.endswith("]") else "; grain_jax.recipe.base has its default"
    faults.extend(f"{at(key)}: missing{default}" for key in missing)
    if missing:
        return None
    return cls(**{k: _convert(t, value[k], at(k), faults) for k, t in hints.items() if k in value})


def unknown_key(path: str, known: list[str]) -> str:
    """The words for a key that does not exist, with the nearest one of `known`, or those of its group."""
    group, _, leaf = path.rpartition(".")

    def likeness(key: str) -> tuple[float, bool]:
        owner, _, name = key.rpartition(".")
        return difflib.SequenceMatcher(None, leaf, name).ratio(), owner == group

    near = max(known, key=likeness)
    if likeness(near)[0] > 0.6:
        return f"no such key; did you mean {near}?"
    beside = [key for key in known if key.rpartition(".")[0] == group]
    return f"no such key; there are: {', '.join(beside or known)}"


def model_from_dict(value: Mapping[str, Any]) -> Model:
    """The `model` part alone, as converted checkpoints carry it. Raises ConfigError."""
    faults: list[str] = []
    model = _build(Model, value, "model", faults)
    if not faults:
        _check_model(model, faults)
    if faults:
        raise ConfigError("\n".join(faults))
    return model


def suite_from_dict(value: Mapping[str, Any]) -> Suite:
    """The config of a suite, a plain dict or a ConfigDict, checked. Raises ConfigError, a line a fault."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    faults: list[str] = []
    suite = _build(Suite, value, "", faults)
    if not faults:
        for name, entry in suite.evals.items():
            _check_evaluator(f"evals.{name}", entry, faults)
    if faults:
        raise ConfigError("\n".join(faults))
    return suite


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


_MOST = 2**31 - 1  # steps and sizes are int32 on the devices
_WIDEST = (
    2**17
)  # several times any published width or image size; what is above is a slip of the finger
# The smallest and largest value of each number that has bounds; any float is finite (`_convert`).
_BOUNDS: dict[str, tuple[float, float]] = {
    "seed": (-(2**63), 2**63 - 1),
    "total_steps": (1, _MOST),
    "total_epochs": (0, 1e6),
    "batch_size": (1, _MOST),
    "microbatches": (1, _MOST),
    "ema_decay": (0, 1),
    "log_every": (1, _MOST),
    "checkpoint_every": (0, _MOST),
    "checkpoint_every_minutes": (0, math.inf),
    "checkpoint_keep": (1, _MOST),
    "checkpoint_keep_every": (0, _MOST),
    "eval_every": (0, _MOST),
    "pictures": (0, _MOST),
    "profile_start": (0, _MOST),
    "profile_steps": (1, _MOST),
    "input.lanes": (1, _MOST),
    "input.shards_per_block": (1, _MOST),
    "input.max_regions": (0, _MOST),
    "input.synthetic_caption_rate": (0, 1),
    "input.descriptions_in_captions": (0, _MOST),
    "input.flip_rate": (0, 1),
    "input.crop_min_area": (0.01, 1),
    "input.reader_threads": (0, _MOST),
    "text.pack_group": (1, _MOST),
    "text.pack_rows": (1, _MOST),
    "text.max_dropped_share": (0, 1),
    "loss.group_size": (0, _MOST),
    "loss.tile": (1, _MOST),
    "loss.gather": (1, _MOST),
    "optim.warmup_steps": (0, _MOST),
    "optim.warmup_epochs": (0, math.inf),
    "optim.clip_norm": (0, math.inf),
    "optim.layer_decay": (0.01, 1),
    "mesh.data": (-1, _MOST),
    "mesh.fsdp": (1, _MOST),
    "mesh.tensor": (1, _MOST),
    "mesh.dcn_data": (1, _MOST),
    "model.image.image_size": (1, _WIDEST),
    "model.embed_dim": (1, _WIDEST),
    "model.logit_scale_init": (1, 100),
    "model.image.patch_size": (1, _WIDEST),
    "model.image.position_period": (1, math.inf),
    "model.text.vocab_size": (3, 10_000_000),
    "model.text.context_length": (3, 1_000_000),
    "model.text.pad_id": (0, _MOST),
    "model.decoder.queries": (0, _WIDEST),
    "model.decoder.dropout": (0, 0.99),
    "model.decoder.qkv_init_gain": (0, math.inf),
    **{
        f"model.{tower}.{field}": (1, most)
        for tower in ("image", "text", "decoder")
        for field, most in (
            ("width", _WIDEST),
            ("depth", 10_000),
            ("heads", _WIDEST),
            ("mlp_dim", 4 * _WIDEST),
            ("unroll", 10_000),
        )
    },
}


def _check_bounds(part: Any, prefix: str, faults: list[str]) -> None:
    for name, (low, high) in _BOUNDS.items():
        if not name.startswith(prefix):
            continue
        value = part
        for key in name.removeprefix(prefix).split("."):
            value = getattr(value, key, None)  # a model without a decoder has none of its numbers
        if value is not None and not low <= value <= high:
            limit = f"at least {low}" if value < low and high >= _WIDEST else f"{low} to {high}"
            faults.append(f"{name}: got {value}, expected {limit}")


def _check_model(model: Model, faults: list[str]) -> None:
    _check_bounds(model, "model.", faults)
    if faults:
        return  # what follows divides by these numbers
    image = model.image
    if image.image_size % image.patch_size:
        faults.append(
            f"model.image.image_size: got {image.image_size}, expected a multiple of"
            f" model.image.patch_size = {image.patch_size}"
        )
    for name in ("image", "text", "decoder"):
        tower = getattr(model, name)
        if tower is not None and tower.width % tower.heads:
            faults.append(f"model.{name}.heads: got {tower.heads}, must divide width {tower.width}")
    _one_of("model.image.position_init", image.position_init, ("normal", "sincos2d"), faults)
    _one_of("model.image.block_init", image.block_init, ("trunc_normal", "torch"), faults)
    for name, tower in (("image", image), ("text", model.text)):
        _one_of(f"model.{name}.activation", tower.activation, ACTIVATIONS, faults)
        _one_of(f"model.{name}.projection", tower.projection, PROJECTIONS, faults)
        if (
            tower.projection == "none"
            and model.embed_dim != tower.width
            and (name == "text" or model.decoder is None)
        ):
            faults.append(
                f"model.embed_dim: got {model.embed_dim}, expected model.{name}.width = {tower.width},"
                f" because model.{name}.projection is none"
            )
    _one_of("model.image.pool", image.pool, IMAGE_POOLS, faults)
    _one_of("model.text.pool", model.text.pool, TEXT_POOLS, faults)
    _one_of("model.text.cleaning", model.text.cleaning, TEXT_CLEANINGS, faults)
    if model.decoder is not None and (
        image.pool in IMAGE_POOLS[1:] or image.projection != "matrix"
    ):
        faults.append(
            f"model.image.pool, model.image.projection: got {image.pool}, {image.projection} with a"
            " decoder, which pools and projects itself; expected none, matrix"
        )
    if model.decoder is None and image.pool == "none":
        faults.append(
            "model.image.pool: got none without model.decoder; expected class, map or mean"
        )
    if image.pool == "class" and not image.class_token:
        faults.append("model.image.pool: got class, but model.image.class_token is False")
    for name in ("pixel_mean", "pixel_std"):
        value = getattr(image, name)
        if len(value) != 3 or (name == "pixel_std" and min(value) <= 0):
            faults.append(f"model.image.{name}: got {value}, expected three numbers")
    if model.text.tokenizer == "clip" and model.text.cleaning != "lower":
        faults.append(
            f"model.text.cleaning: got {model.text.cleaning}, expected lower, which is part of"
            " model.text.tokenizer=clip"
        )
    if model.text.pad_id >= model.text.vocab_size:
        faults.append(
            f"model.text.pad_id: got {model.text.pad_id}, expected less than model.text.vocab_size"
            f" = {model.text.vocab_size}"
        )


def _check_mixture(data: Input, faults: list[str]) -> None:
    names = [entry.name for entry in data.datasets]
    for name in sorted({name for name in names if names.count(name) > 1}):
        faults.append(f"input.datasets: has {name!r} more than once, expected each name once")
    for i, entry in enumerate(data.datasets):
        if not 0 < entry.weight < math.inf:
            faults.append(f"input.datasets[{i}].weight: got {entry.weight}, expected more than 0")
    for key in ("name", "data_dir", "prepare"):
        if data.datasets and getattr(data, key):
            faults.append(
                f"input.{key}: got {getattr(data, key)!r} beside input.datasets, which names all sets;"
                f" expected one of the two: take out input.datasets or input.{key}"
            )


def _check_evaluator(path: str, entry: Evaluator, faults: list[str]) -> None:
    _one_of(f"{path}.kind", entry.kind, EVAL_KINDS, faults)
    _one_of(f"{path}.region_order", entry.region_order, ("queries", "descriptions"), faults)
    _one_of(f"{path}.missing", entry.missing, ("error", "skip"), faults)
    if entry.tfds is not None and (entry.images or entry.kind not in LABELLED_KINDS):
        faults.append(
            f"{path}.tfds: got {entry.tfds!r} with images={entry.images!r}, kind={entry.kind}; expected it"
            f" alone, in an entry of kind={' or '.join(LABELLED_KINDS)}"
        )
    if entry.kind != "linear_probe" and (entry.train is not None or entry.shots):
        faults.append(
            f"{path}.train, {path}.shots: got {entry.train!r}, {entry.shots} with kind={entry.kind}; expected"
            " them in an entry of kind=linear_probe"
        )
    if any(shots < 0 for shots in entry.shots):
        faults.append(f"{path}.shots: got {entry.shots}, expected at least 1 each, or 0 for all")
    if entry.seeds < 1:
        faults.append(f"{path}.seeds: got {entry.seeds}, expected at least 1")


def _check(config: Config, faults: list[str]) -> None:
    _check_bounds(config, "", faults)
    if faults:
        return
    _check_model(config.model, faults)
    _one_of("remat", config.remat, REMAT_POLICIES, faults)
    _one_of("dtype", config.dtype, DTYPES, faults)
    _one_of("optim.moment_dtype", config.optim.moment_dtype, DTYPES, faults)
    _one_of("loss.contrast", config.loss.contrast, ("softmax", "sigmoid"), faults)
    if (config.loss.contrast == "sigmoid") != (config.model.logit_bias_init is not None):
        faults.append(
            f"model.logit_bias_init: got {config.model.logit_bias_init} with loss.contrast="
            f"{config.loss.contrast}; a sigmoid needs a bias (-10, SigLIP's), a softmax has none"
        )
    _one_of("wandb.mode", config.wandb.mode, ("off", "online", "offline"), faults)
    _one_of("input.source", config.input.source, ("records", "synthetic"), faults)
    _check_mixture(config.input, faults)
    _one_of("checkpoint_best_mode", config.checkpoint_best_mode, ("max", "min"), faults)
    best = config.checkpoint_best_metric.split("/")
    if best[0] == "eval":
        _one_of(
            "checkpoint_best_metric",
            "/".join(best[:2]),
            tuple(f"eval/{e}" for e in config.evals),
            faults,
        )
    _one_of("optim.schedule", config.optim.schedule, ("cosine", "reference"), faults)
    _one_of("optim.decay_groups", config.optim.decay_groups, ("matrices", "reference"), faults)
    for name, entry in config.evals.items():
        _check_evaluator(f"evals.{name}", entry, faults)
        needs_regions = entry.kind in ("grounding", "boxes", "diagnostics") or (
            entry.kind == "zeroshot"
            and entry.descriptions
            and any(alpha < 1 for alpha in entry.alphas)
        )
        if config.model.decoder is None and needs_regions:
            faults.append(
                f"evals.{name}: got kind={entry.kind} with alphas {entry.alphas}, but a model without"
                " model.decoder has no regions; take out the entry, or set alphas=(1.0,)"
            )
    if config.text.packing and not config.model.text.packable:
        text = config.model.text
        faults.append(
            f"text.packing: got True, but a text tower with causal={text.causal} and pool={text.pool}"
            " sees its padding, so that each text needs a row of its own; set text.packing=False"
        )
    if config.model.decoder is None and config.input.max_regions:
        faults.append(
            f"input.max_regions: got {config.input.max_regions}, expected 0: a model without"
            " model.decoder has no regions"
        )
    if config.init.decoder is not None and config.model.decoder is None:
        faults.append(
            f"init.decoder: got {config.init.decoder!r}, but model.decoder is None; expected no init.decoder"
        )
    _one_of("init.resize", config.init.resize, ("bilinear", "bicubic"), faults)
    for pattern in config.optim.frozen:
        try:
            re.compile(pattern)
        except re.error as error:
            faults.append(f"optim.frozen: got {pattern!r}, no regular expression ({error})")
    loss = config.loss
    if loss.match_l1 == loss.match_giou == loss.match_description == 0:
        faults.append(
            "loss.match_l1, loss.match_giou, loss.match_description: got 0 for all, so that queries"
            " would be matched by their numbers; expected at least one that is not 0"
        )
    if config.mesh.data == 0:
        faults.append("mesh.data: got 0, expected at least 1, or -1 for what the other axes leave")
    decoder = config.model.decoder
    if decoder is not None and decoder.queries == 0 and config.input.max_regions:
        faults.append(
            "model.decoder.queries: got 0, expected at least 1 where input.max_regions is not 0: no query"
            " could be matched with a region"
        )
    axes = [axis for axis, _ in config.sharding]
    for axis in sorted({axis for axis in axes if axes.count(axis) > 1}):
        faults.append(f"sharding: has {axis!r} more than once, expected one row for each axis")
    for pair in (("total_steps", "total_epochs"), ("optim.warmup_steps", "optim.warmup_epochs")):
        part = config.optim if pair[0].startswith("optim") else config
        values = [getattr(part, key.rpartition(".")[2]) for key in pair]
        if (values[0] is None) == (values[1] is None):
            faults.append(f"{', '.join(pair)}: exactly one must be set")
    divides = {
        "microbatches": config.microbatches,
        "input.lanes": config.input.lanes or 1,
        "loss.group_size": config.loss.group_size or 1,
    }
    for name, number in divides.items():
        if config.batch_size % number:
            good = flags_of(name, divisors(config.batch_size), number)
            faults.append(
                f"{name}: got {number}, must divide batch_size {config.batch_size}; set {good}"
            )
    lanes, group = config.input.lanes or 1, config.text.pack_group or 1
    lane_batch, rest = divmod(config.batch_size, lanes)
    if config.text.packing and not rest and lane_batch % group:
        good = flags_of("text.pack_group", divisors(lane_batch), group)
        faults.append(
            f"text.pack_group: got {group}, must divide batch_size / input.lanes = {lane_batch}, so that no"
            f" group crosses a process; set {good}"
        )


def divisors(number: int) -> list[int]:
    """All divisors of a number above 0, in order."""
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})


def flags_of(key: str, choices: Sequence[int], wanted: int) -> str:
    """The flags that set `key` to the choices next to `wanted`, on both sides where there are two."""
    near = [max((n for n in choices if n < wanted), default=None)]
    near.append(min((n for n in choices if n > wanted), default=None))
    return " or ".join(f"--config.{key}={n}" for n in near if n is not None)


def without_new_fields(part: Any) -> dict[str, Any]:
    """A Config (or a part of one) as a dict, without the fields that came later and have their value.

    So a run's config is the same dict before and after fields are added.
    """

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, tuple):
            return tuple(map(plain, value))
        return without_new_fields(value) if dataclasses.is_dataclass(value) else value

    return {
        field.name: plain(getattr(part, field.name))
        for field in dataclasses.fields(part)
        if getattr(part, field.name) != field.default
    }


def to_json(config: Any) -> str:
    """A Config (or a part of one) as indented JSON that `from_dict` reads back."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"
