"""Keys that contradict each other: a line for each fault, with key, value and what was expected."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from grain_jax.config import fields
from grain_jax.config.fields import Config
from grain_jax.config.model_fields import ImageTower, Model, TextTower
from grain_jax.core import named

# (keys, with commas between them; what was expected), or ("", the whole line).
Fault = tuple[str, str]


def divisors(number: int) -> list[int]:
    """All divisors of a number above 0, in order."""
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})


def flags_of(key: str, choices: Sequence[int], wanted: int) -> str:
    """The flags that set `key` to the nearest choices below and above `wanted`."""
    below = [n for n in choices if n < wanted][-1:]
    above = [n for n in choices if n > wanted][:1]
    return " or ".join(f"--config.{key}={n}" for n in below + above)


def faults_of(part: Config | Model) -> list[str]:
    """The faults of a whole config, or of a model alone; a line each."""
    if isinstance(part, Model):
        return [_line(part, *fault) for fault in _model(part)]
    of_model = [_line(part.model, *fault) for fault in _model(part.model)]
    checks = (_run, _data, _regions, _loss, _terms, _text_rows, _divisions)
    return of_model + [_line(part, *fault) for check in checks for fault in check(part)]


def _line(part: Config | Model, names: str, expected: str) -> str:
    """The line of a fault, with the values of the keys."""
    if not names:
        return expected
    get = lambda group, key: group.get(key) if isinstance(group, dict) else getattr(group, key)
    paths = names.replace("model.", "") if isinstance(part, Model) else names
    values = [functools.reduce(get, path.split("."), part) for path in paths.split(", ")]
    shown = ("a group" if dataclasses.is_dataclass(value) else repr(value) for value in values)
    return f"{names}: got {', '.join(shown)}, expected {expected}"


def _model(model: Model) -> Iterator[Fault]:
    image, text, decoder = model.image, model.text, model.decoder
    is_vit, is_transformer = not named.is_external(image.tower), not named.is_external(text.tower)
    if is_vit and image.image_size % image.patch_size:
        yield "model.image.image_size", f"a multiple of model.image.patch_size = {image.patch_size}"
    towers = {"image": is_vit and image, "text": is_transformer and text, "decoder": decoder}
    for name, tower in towers.items():
        if tower and tower.width % tower.heads:
            yield f"model.{name}.heads", f"a divisor of model.{name}.width = {tower.width}"
    if is_vit and image.pool_heads and image.width % image.pool_heads:
        yield "model.image.pool_heads", f"0 or a divisor of model.image.width = {image.width}"
    if is_vit and image.rope != "none" and (image.width // image.heads) % 4:
        yield "model.image.rope", "none unless model.image.width / heads is a multiple of 4"
    if is_vit and image.rope == "none" and not image.positions:
        yield "model.image.positions", "True, or model.image.rope=centres or indices"
    for name, tower in (("image", image), ("text", text)):
        to_joint_space = name == "text" or model.tower_pools
        if to_joint_space and tower.projection == "none" and model.embed_dim != tower.width:
            yield "model.embed_dim", f"{tower.width}, since model.{name}.projection=none"
    if model.boxes.proposals and model.boxes.kind == "none":
        yield "model.boxes.proposals", "False, or a box head (model.boxes.kind=roi_align)"
    if model.boxes.proposals and not model.patches_predict_boxes:
        yield "model.boxes.proposals", "False, or model.decoder.boxes=pointer, or model.decoder=None"
    yield from _pooling(model)
    for name, value in (("pixel_mean", image.pixel_mean), ("pixel_std", image.pixel_std)):
        if len(value) != 3 or (name == "pixel_std" and min(value) <= 0):
            yield f"model.image.{name}", "three numbers, one for each channel"
    if text.tokenizer == "clip" and text.cleaning != "lower":
        yield "model.text.cleaning", "lower, which is part of model.text.tokenizer=clip"
    for name, value in (("pad_id", text.pad_id), ("end_id", text.end_id)):
        if value is not None and value >= text.vocab_size:
            yield f"model.text.{name}", f"less than model.text.vocab_size = {text.vocab_size}"
    if text.end_id == -1 and not text.mask_padding:
        yield "model.text.end_id", "None or an id, unless model.text.mask_padding=True"


def _pooling(model: Model) -> Iterator[Fault]:
    image, text, decoder = model.image, model.text, model.decoder
    pools = f"since the tower {image.tower} pools its tokens"
    if _pools(image):
        if model.boxes.kind != "none":
            yield "model.boxes.kind", f"none, {pools}"
        if decoder is not None:
            yield "model.decoder", f"None, {pools}"
        if image.pool != "none":
            yield "model.image.pool", f"none, {pools}"
    elif not model.tower_pools:
        if image.pool != "none" or image.projection != "matrix":
            decoder_pools = "none, matrix, since model.decoder pools and projects"
            yield "model.image.pool, model.image.projection", decoder_pools
    elif image.pool == "none" and named.may_import(image.tower):
        expected = "class, map or mean if model.decoder is None or its image_pool is tower"
        yield "model.image.pool", expected
    if _pools(text) and text.pool != "end":
        yield "model.text.pool", f"end, since the tower {text.tower} pools its rows"
    if not named.is_external(image.tower) and image.pool == "class" and not image.class_token:
        yield "model.image.pool", "map or mean if model.image.class_token=False"


def _pools(tower: ImageTower | TextTower) -> bool:
    """Whether the tower gives one vector per image or row (models/towers.py), if it may be imported."""
    if not named.is_external(tower.tower) or not named.may_import(tower.tower):
        return False
    return getattr(named.find("tower", tower.tower, {}), "pooled", False)


def _run(config: Config) -> Iterator[Fault]:
    for pair in fields.EITHER_OR:
        part = config.optim if pair[0].startswith("optim.") else config
        if sum(getattr(part, key.rpartition(".")[2]) is not None for key in pair) != 1:
            yield "", f"{', '.join(pair)}: exactly one must be set"
    group, _, best = config.checkpoint_best_metric.partition("/")
    if group == "eval" and best.partition("/")[0] not in config.evals:
        metrics = ", ".join(f"eval/{name}" for name in config.evals) or "a loss: evals is empty"
        yield "checkpoint_best_metric", f"one of {metrics}"
    optim = config.optim
    for key, patterns in ("frozen", optim.frozen), ("lora.modules", optim.lora.modules):
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                yield f"optim.{key}", f"regular expressions ({pattern!r}: {error})"
    if config.mesh.data == 0:
        yield "mesh.data", "at least 1, or -1 for all devices that the other axes leave"
    if optim.name == "muon" and optim.moment_dtype != "float32":
        yield "optim.moment_dtype", "float32 with optim.name=muon"


def _data(config: Config) -> Iterator[Fault]:
    data = config.input
    names = [dataset.name for dataset in data.datasets]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield "", f"input.datasets: has {name!r} more than once, expected each name once"
    for i, dataset in enumerate(data.datasets):
        if not 0 < dataset.weight < math.inf:
            yield "", f"input.datasets[{i}].weight: got {dataset.weight}, expected more than 0"
    for name in ("name", "data_dir", "prepare"):
        if data.datasets and getattr(data, name):
            yield f"input.{name}", "nothing beside input.datasets, which names all datasets"


def _regions(config: Config) -> Iterator[Fault]:
    decoder, regions = config.model.decoder, config.input.max_regions
    weight = config.loss.hard_negative
    negatives, head = config.input.negatives_per_region, config.model.boxes.kind
    if weight and not negatives:
        yield "loss.hard_negative", "0 with input.negatives_per_region=0"
    if weight and decoder is None and head == "none":
        yield "loss.hard_negative", "0 without model.decoder and model.boxes"
    if decoder is not None and decoder.reads_box and config.model.boxes.kind == "none":
        yield "model.decoder.reads_box", "False, or a box head (model.boxes.kind=roi_align)"
    if decoder is not None and decoder.queries == 0 and regions:
        yield "model.decoder.queries", "at least 1 if input.max_regions is not 0"
    reads_regions = config.loss.image_description or config.loss.terms
    if regions and decoder is None and head == "none" and not reads_regions:
        yield "input.max_regions", "0: without model.decoder and model.boxes no loss reads regions"


def _loss(config: Config) -> Iterator[Fault]:
    loss, bias = config.loss, config.model.logit_bias_init
    head, regions = config.model.boxes.kind, config.input.max_regions
    if (loss.contrast == "sigmoid") != (bias is not None):
        expected = "a number, such as SigLIP's -10," if bias is None else "None"
        yield "model.logit_bias_init", f"{expected} with loss.contrast={loss.contrast}"
    if loss.box_description and (head == "none" or not regions):
        with_these = f"model.boxes.kind={head} and input.max_regions={regions}"
        yield "loss.box_description", f"0 with {with_these}: it needs a box head and regions"
    if loss.agreement and head == "none":
        yield "loss.agreement", "False with model.boxes.kind=none: the box head measures it"
    if config.model.boxes.proposals and not loss.box:
        yield "loss.box", "more than 0 with model.boxes.proposals: nothing else trains the boxes of patches"
    if head != "none" and not (loss.box_description or loss.hard_negative or loss.terms):
        yield "loss.box_description", f"more than 0 with model.boxes.kind={head}: nothing trains it"


def _terms(config: Config) -> Iterator[Fault]:
    names = {field.name for field in dataclasses.fields(config.loss)}
    for name, entry in config.loss.terms.items():
        weight: Any = entry.get("weight")
        fault = f"loss.terms.{name}: expected a name of letters, digits and _"
        if name in names or not re.fullmatch(r"[a-z]\w*", name):
            yield "", f"{fault} that is no key of loss"
        if not isinstance(entry.get("term"), str):
            yield f"loss.terms.{name}.term", "module:function"
        if type(weight) not in (int, float) or not -math.inf < weight < math.inf:
            yield f"loss.terms.{name}.weight", "a finite number"


def _text_rows(config: Config) -> Iterator[Fault]:
    text, length = config.model.text, config.input.text_length
    if length and not 3 <= length <= text.context_length:
        yield "input.text_length", f"3 to model.text.context_length = {text.context_length}, or 0"
    if named.is_external(text.tower) and not named.may_import(text.tower):
        return
    mask = "" if named.is_external(text.tower) else ", or model.text.mask_padding=True"
    if 0 < length < text.context_length and not text.packable:
        yield "input.text_length", f"0, since the text tower sees its padding{mask}"
    if config.text.packing and not text.packable:
        yield "text.packing", f"False, since the text tower sees its padding{mask}"


def _divisions(config: Config) -> Iterator[Fault]:
    batch, lanes, group = config.batch_size, config.input.lanes or 1, config.text.pack_group or 1
    parts = {"microbatches": config.microbatches, "input.lanes": lanes}
    for name, number in (parts | {"loss.group_size": config.loss.group_size or 1}).items():
        if batch % number:
            flags = flags_of(name, divisors(batch), number)
            yield name, f"a divisor of batch_size = {batch}; set {flags}"
    lane_batch, rest = divmod(batch, lanes)
    if config.text.packing and not rest and lane_batch % group:
        flags = flags_of("text.pack_group", divisors(lane_batch), group)
        yield "text.pack_group", f"a divisor of {lane_batch} images per lane; set {flags}"
