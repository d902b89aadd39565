"""Values out of bounds, and keys that contradict each other.

Each function adds a line for every fault to a list: key, value, what was expected.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

from grain_jax.config import fields, values
from grain_jax.config.evals import Evaluator
from grain_jax.config.fields import Config, Input, Model
from grain_jax.core import named


def divisors(number: int) -> list[int]:
    """All divisors of a number above 0, in order."""
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})


def flags_of(key: str, choices: Sequence[int], wanted: int) -> str:
    """The flags that set `key` to the choices next to `wanted`, on both sides where there are two."""
    near = [max((n for n in choices if n < wanted), default=None)]
    near.append(min((n for n in choices if n > wanted), default=None))
    return " or ".join(f"--config.{key}={n}" for n in near if n is not None)


def check_config(config: Config, faults: list[str]) -> None:
    """Checks a whole run."""
    check_values(config, "", faults)
    if faults:
        return  # the rest divides by these numbers
    check_model(config.model, faults)
    _lengths(config, faults)
    _data(config.input, faults)
    _regions(config, faults)
    _loss(config, faults)
    _text_rows(config, faults)
    _divisions(config, faults)
    _placement(config, faults)
    for name, entry in config.evals.items():
        check_evaluator(f"evals.{name}", entry, faults)
    best = config.checkpoint_best_metric.split("/")
    if best[0] == "eval" and best[1:2] not in [[name] for name in config.evals]:
        there = ", ".join(f"eval/{name}" for name in config.evals)
        faults.append(
            f"checkpoint_best_metric: got {'/'.join(best[:2])!r}, expected one of {there}"
        )
    for pattern in config.optim.frozen:
        try:
            re.compile(pattern)
        except re.error as error:
            faults.append(f"optim.frozen: got {pattern!r}, no regular expression ({error})")


def check_values(part: Any, path: str, faults: list[str]) -> None:
    """Checks the bounds and choices that the fields of a dataclass and of those in it declare.

    Args:
      part: an instance of a dataclass.
      path: its key; "" for a whole config.
      faults: gets a line a fault.
    """
    for name, field, _, _, value in values.walk(part, path):
        if value is None:
            continue
        choices = field.metadata.get("choices", ())
        if choices and value not in choices:
            faults.append(f"{name}: got {value!r}, expected one of {', '.join(choices)}")
        built_in = field.metadata.get("built_in", ())
        if built_in and value not in built_in and not named.is_external(value):
            known = ", ".join(built_in)
            faults.append(
                f"{name}: got {value!r}, expected one of {known}, or module:Class of your own"
            )
        low, high = field.metadata.get("low", -math.inf), field.metadata.get("high", math.inf)
        if (low, high) != (-math.inf, math.inf) and not low <= value <= high:
            least = value < low and high >= fields.WIDEST
            limit = f"at least {low}" if least else f"{low} to {high}"
            faults.append(f"{name}: got {value}, expected {limit}")


def check_model(model: Model, faults: list[str]) -> None:
    """Checks the `model` part alone, as converted checkpoints carry it."""
    check_values(model, "model", faults)
    if faults:
        return
    image, text, decoder = model.image, model.text, model.decoder
    is_vit = not named.is_external(image.tower)
    if is_vit and image.image_size % image.patch_size:
        faults.append(
            f"model.image.image_size: got {image.image_size}, expected a multiple of"
            f" model.image.patch_size = {image.patch_size}"
        )
    needs_heads = is_vit or model.boxes.kind == "prompter"
    built_in = {"image": image if needs_heads else None, "decoder": decoder}
    built_in["text"] = None if named.is_external(text.tower) else text
    for name, tower in built_in.items():
        if tower is not None and tower.width % tower.heads:
            faults.append(f"model.{name}.heads: got {tower.heads}, must divide width {tower.width}")
    for name, tower in (("image", image), ("text", text)):
        to_joint_space = name == "text" or decoder is None
        if to_joint_space and tower.projection == "none" and model.embed_dim != tower.width:
            faults.append(
                f"model.embed_dim: got {model.embed_dim}, expected model.{name}.width = {tower.width},"
                f" because model.{name}.projection is none"
            )
    if _pooled(image) and model.boxes.kind != "none":
        faults.append(
            f"model.boxes.kind: got {model.boxes.kind} with the tower {image.tower}, which pools its tokens; expected"
            " none"
        )
    if _pooled(image):
        if decoder is not None or image.pool != "none":
            faults.append(
                f"model.image.pool, model.decoder: got {image.pool}, {'None' if decoder is None else 'a decoder'}"
                f" with the tower {image.tower}, which pools its tokens; expected none, None"
            )
    elif decoder is not None and (image.pool != "none" or image.projection != "matrix"):
        faults.append(
            f"model.image.pool, model.image.projection: got {image.pool}, {image.projection} with a"
            " decoder, which pools and projects itself; expected none, matrix"
        )
    elif decoder is None and image.pool == "none" and named.may_import(image.tower):
        faults.append(
            "model.image.pool: got none without model.decoder; expected class, map or mean"
        )
    if _pooled(text) and text.pool != "end":
        faults.append(
            f"model.text.pool: got {text.pool} with the tower {text.tower}, which pools its rows; expected end"
        )
    if is_vit and image.pool == "class" and not image.class_token:
        faults.append("model.image.pool: got class, but model.image.class_token is False")
    for name, value in (("pixel_mean", image.pixel_mean), ("pixel_std", image.pixel_std)):
        if len(value) != 3 or (name == "pixel_std" and min(value) <= 0):
            faults.append(f"model.image.{name}: got {value}, expected three numbers")
    if text.tokenizer == "clip" and text.cleaning != "lower":
        faults.append(
            f"model.text.cleaning: got {text.cleaning}, expected lower, which is part of"
            " model.text.tokenizer=clip"
        )
    if text.pad_id >= text.vocab_size:
        faults.append(
            f"model.text.pad_id: got {text.pad_id}, expected less than model.text.vocab_size"
            f" = {text.vocab_size}"
        )


def _pooled(tower: fields.ImageTower | fields.TextTower) -> bool:
    """Whether the tower gives one vector an image or row (models/towers.py), as far as its class may be imported."""
    if not named.is_external(tower.tower) or not named.may_import(tower.tower):
        return False
    return getattr(named.find("tower", tower.tower, {}), "pooled", False)


def check_evaluator(path: str, entry: Evaluator, faults: list[str]) -> None:
    """Checks an entry of `evals`, beyond the values of its keys."""
    faults.extend(f"{path}.{fault}" for fault in entry.faults())


def _lengths(config: Config, faults: list[str]) -> None:
    for pair in fields.EITHER_OR:
        part = config.optim if pair[0].startswith("optim.") else config
        if sum(getattr(part, key.rpartition(".")[2]) is not None for key in pair) != 1:
            faults.append(f"{', '.join(pair)}: exactly one must be set")


def _data(data: Input, faults: list[str]) -> None:
    names = [entry.name for entry in data.datasets]
    for name in sorted({name for name in names if names.count(name) > 1}):
        faults.append(f"input.datasets: has {name!r} more than once, expected each name once")
    for i, entry in enumerate(data.datasets):
        if not 0 < entry.weight < math.inf:
            faults.append(f"input.datasets[{i}].weight: got {entry.weight}, expected more than 0")
    if data.captions_per_image == 2 and data.descriptions_in_captions:
        faults.append(
            f"input.descriptions_in_captions: got {data.descriptions_in_captions} with input.captions_per_image=2,"
            " expected 0: these are the web caption and the synthetic one; the descriptions are the third caption"
            " of input.captions_per_image=3"
        )
    single = {"name": data.name, "data_dir": data.data_dir, "prepare": data.prepare}
    for key, value in single.items():
        if data.datasets and value:
            faults.append(
                f"input.{key}: got {value!r} beside input.datasets, which names all sets;"
                f" expected one of the two: take out input.datasets or input.{key}"
            )


def _regions(config: Config, faults: list[str]) -> None:
    decoder, regions = config.model.decoder, config.input.max_regions
    negatives = config.input.negatives_per_region
    if negatives and not regions:
        faults.append(
            f"input.negatives_per_region: got {negatives}, expected 0: with input.max_regions=0 no region has negatives"
        )
    if config.loss.hard_negative and not negatives:
        faults.append(
            f"loss.hard_negative: got {config.loss.hard_negative:g} with input.negatives_per_region=0, expected"
            " negatives that it compares with: set input.negatives_per_region, or loss.hard_negative=0"
        )
    if config.loss.hard_negative and decoder is None and config.model.boxes.kind == "none":
        faults.append(
            f"loss.hard_negative: got {config.loss.hard_negative:g} without model.decoder and model.boxes, expected one"
            " of them, whose embeddings of regions it compares, or loss.hard_negative=0"
        )
    if decoder is not None:
        if decoder.queries == 0 and regions:
            faults.append(
                "model.decoder.queries: got 0, expected at least 1 where input.max_regions is not 0: no query"
                " could be matched with a region"
            )
        return
    reads_regions = config.model.boxes.kind != "none" or config.loss.image_description
    if regions and not reads_regions:
        faults.append(
            f"input.max_regions: got {regions}, expected 0: a model without model.decoder and model.boxes has no"
            " regions, and loss.image_description, which reads their descriptions, is 0"
        )
    if config.init.decoder is not None:
        faults.append(
            f"init.decoder: got {config.init.decoder!r}, but model.decoder is None; expected no init.decoder"
        )
    for name, entry in config.evals.items():
        by_head = entry.kind == "boxes" and config.model.boxes.kind != "none"
        if entry.needs_regions and not by_head:
            faults.append(
                f"evals.{name}: got kind={entry.kind}, which needs regions, but a model without"
                " model.decoder has no regions; take out the entry, or set alphas=(1.0,) in one of kind=zeroshot"
            )


def _loss(config: Config, faults: list[str]) -> None:
    loss, bias = config.loss, config.model.logit_bias_init
    if (loss.contrast == "sigmoid") != (bias is not None):
        faults.append(
            f"model.logit_bias_init: got {bias} with loss.contrast={loss.contrast}; a sigmoid needs a bias"
            " (-10, SigLIP's), a softmax has none"
        )
    head = config.model.boxes.kind
    if loss.box_description and (head == "none" or not config.input.max_regions):
        faults.append(
            f"loss.box_description: got {loss.box_description} with model.boxes.kind={head} and"
            f" input.max_regions={config.input.max_regions}; expected a box head (roi_align or prompter) and regions,"
            " or the weight 0"
        )
    if head != "none" and not (loss.box_description or loss.hard_negative or loss.terms):
        faults.append(
            f"loss.box_description: got 0 with model.boxes.kind={head}, so that nothing trains the box head; expected"
            " a weight above 0, or model.boxes.kind=none"
        )
    if loss.match_l1 == loss.match_giou == loss.match_description == 0:
        faults.append(
            "loss.match_l1, loss.match_giou, loss.match_description: got 0 for all, so that queries"
            " would be matched by their numbers; expected at least one that is not 0"
        )
    keys = {field.name for field in dataclasses.fields(loss)}
    for name, entry in loss.terms.items():
        path = f"loss.terms.{name}"
        if name in keys or not re.fullmatch(r"[a-z]\w*", name):
            faults.append(
                f"{path}: expected a name of letters, digits and _ that is no key of loss"
            )
        if not isinstance(entry.get("term"), str):
            faults.append(f"{path}.term: got {entry.get('term')!r}, expected module:function")
        weight = entry.get("weight", math.nan)
        if type(weight) not in (int, float) or not math.isfinite(weight):
            faults.append(f"{path}.weight: got {entry.get('weight')!r}, expected a finite number")


def _text_rows(config: Config, faults: list[str]) -> None:
    text = config.model.text
    if named.is_external(text.tower):
        if config.text.packing and named.may_import(text.tower) and not text.packable:
            faults.append(
                f"text.packing: got True, but the text tower {text.tower} is not packable: each text needs a row"
                " of its own; set text.packing=False"
            )
    elif config.text.packing and not text.packable:
        faults.append(
            f"text.packing: got True, but a text tower with causal={text.causal} and pool={text.pool}"
            " sees its padding, so that each text needs a row of its own; set text.packing=False"
        )


def _divisions(config: Config, faults: list[str]) -> None:
    lanes, group = config.input.lanes or 1, config.text.pack_group or 1
    parts = {
        "microbatches": config.microbatches,
        "input.lanes": lanes,
        "loss.group_size": config.loss.group_size or 1,
    }
    for name, number in parts.items():
        if config.batch_size % number:
            good = flags_of(name, divisors(config.batch_size), number)
            faults.append(
                f"{name}: got {number}, must divide batch_size {config.batch_size}; set {good}"
            )
    lane_batch, rest = divmod(config.batch_size, lanes)
    if config.text.packing and not rest and lane_batch % group:
        good = flags_of("text.pack_group", divisors(lane_batch), group)
        faults.append(
            f"text.pack_group: got {group}, must divide batch_size / input.lanes = {lane_batch}, so that no"
            f" group crosses a process; set {good}"
        )


def _placement(config: Config, faults: list[str]) -> None:
    if config.mesh.data == 0:
        faults.append("mesh.data: got 0, expected at least 1, or -1 for what the other axes leave")
    axes = [axis for axis, _ in config.sharding]
    for axis in sorted({axis for axis in axes if axes.count(axis) > 1}):
        faults.append(f"sharding: has {axis!r} more than once, expected one row for each axis")
