"""Values out of bounds, and keys that contradict each other: a line a fault, with key, value and what was expected."""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from grain_jax.config import fields, values
from grain_jax.config.evals import Evaluator
from grain_jax.config.fields import Config, Input, Loss, Model, Optim, Suite
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


def faults_of(part: Config | Model | Suite | Evaluator, path: str = "") -> list[str]:
    """The faults of a whole config, or of a part of one: those of single values, or else those between keys.

    Args:
      part: also a model, as converted checkpoints carry it, or an entry of `evals`.
      path: its key; "" for a whole config.
    """
    found = list(of_values(part, path))
    if found:
        return found  # the rest divides by these numbers
    if isinstance(part, Model):
        return list(_of_model(part))
    if isinstance(part, Evaluator):
        return [f"{path}.{fault}" for fault in part.faults()]
    if isinstance(part, Config):
        found += [*_of_model(part.model), *_of_run(part), *_data(part.input), *_regions(part)]
        found += [*_loss(part.loss, part), *_text_rows(part), *_divisions(part)]
    for name, entry in part.evals.items():
        own = entry.faults()
        found += [f"evals.{name}.{fault}" for fault in own]
    return found


def of_values(part: Any, path: str) -> Iterator[str]:
    """Bounds and choices that the fields of a dataclass and of those in it declare."""
    for name, field, _, _, value in values.walk(part, path):
        if value is None:
            continue
        choices = field.metadata.get("choices", ())
        if choices and value not in choices:
            yield f"{name}: got {value!r}, expected one of {', '.join(choices)}"
        built_in = field.metadata.get("built_in", ())
        if built_in and value not in built_in and not named.is_external(value):
            known = ", ".join(built_in)
            yield f"{name}: got {value!r}, expected one of {known}, or module:Class of your own"
        low, high = field.metadata.get("low", -math.inf), field.metadata.get("high", math.inf)
        if (low, high) != (-math.inf, math.inf) and not low <= value <= high:
            least = value < low and high >= fields.WIDEST
            limit = f"at least {low}" if least else f"{low} to {high}"
            yield f"{name}: got {value}, expected {limit}"


def _of_model(model: Model) -> Iterator[str]:
    image, text, decoder = model.image, model.text, model.decoder
    is_vit, pooled = not named.is_external(image.tower), _pooled(image)
    pools = f"with the tower {image.tower}, which pools its tokens; expected"
    if is_vit and image.image_size % image.patch_size:
        yield (
            f"model.image.image_size: got {image.image_size}, expected a multiple of"
            f" model.image.patch_size = {image.patch_size}"
        )
    with_heads = {
        "image": image if is_vit else None,
        "decoder": decoder,
        "text": None if named.is_external(text.tower) else text,
    }
    for name, tower in with_heads.items():
        if tower is not None and tower.width % tower.heads:
            yield f"model.{name}.heads: got {tower.heads}, must divide width {tower.width}"
    if is_vit and image.width % image.heads == 0:
        yield from _positions(image)
    for name, tower in (("image", image), ("text", text)):
        to_joint_space = name == "text" or decoder is None
        if to_joint_space and tower.projection == "none" and model.embed_dim != tower.width:
            yield (
                f"model.embed_dim: got {model.embed_dim}, expected model.{name}.width = {tower.width},"
                f" because model.{name}.projection is none"
            )
    if pooled and model.boxes.kind != "none":
        yield f"model.boxes.kind: got {model.boxes.kind} {pools} none"
    if pooled and (decoder is not None or image.pool != "none"):
        got = f"got {image.pool}, {'None' if decoder is None else 'a decoder'}"
        yield f"model.image.pool, model.decoder: {got} {pools} none, None"
    if not pooled and decoder is not None:
        if image.pool != "none" or image.projection != "matrix":
            yield (
                f"model.image.pool, model.image.projection: got {image.pool}, {image.projection} with a"
                " decoder, which pools and projects itself; expected none, matrix"
            )
    elif not pooled and image.pool == "none" and named.may_import(image.tower):
        yield "model.image.pool: got none without model.decoder; expected class, map or mean"
    if _pooled(text) and text.pool != "end":
        got = f"got {text.pool} with the tower {text.tower}"
        yield f"model.text.pool: {got}, which pools its rows; expected end"
    if is_vit and image.pool == "class" and not image.class_token:
        yield "model.image.pool: got class, but model.image.class_token is False"
    for name, value in (("pixel_mean", image.pixel_mean), ("pixel_std", image.pixel_std)):
        if len(value) != 3 or (name == "pixel_std" and min(value) <= 0):
            yield f"model.image.{name}: got {value}, expected three numbers"
    if text.tokenizer == "clip" and text.cleaning != "lower":
        got = f"got {text.cleaning}, expected lower"
        yield f"model.text.cleaning: {got}, which is part of model.text.tokenizer=clip"
    clips_end = fields.TextTower.vocab_size - 1
    is_clips = text.tokenizer == "clip" and text.vocab_size > max(clips_end, text.end_id or 0)
    if is_clips and text.end_id not in (None, clips_end):
        got = f"got {text.end_id}, expected None or {clips_end}"
        yield f"model.text.end_id: {got}, the end token of model.text.tokenizer=clip"
    for name, value in (("pad_id", text.pad_id), ("end_id", text.end_id)):
        if value is not None and value >= text.vocab_size:
            most = f"model.text.vocab_size = {text.vocab_size}"
            yield f"model.text.{name}: got {value}, expected less than {most}"


def _positions(image: fields.ImageTower) -> Iterator[str]:
    head = image.width // image.heads
    if image.rope != "none" and head % 4:
        yield (
            f"model.image.rope: got {image.rope} with heads of {head}, expected model.image.width / model.image.heads"
            " to be a multiple of 4"
        )
    if image.rope == "none" and not image.positions:
        yield (
            "model.image.positions: got False with model.image.rope=none, so that nothing tells where a patch is;"
            " expected True, or rope"
        )


def _pooled(tower: fields.ImageTower | fields.TextTower) -> bool:
    """Whether the tower gives one vector an image or row (models/towers.py), as far as its class may be imported."""
    if not named.is_external(tower.tower) or not named.may_import(tower.tower):
        return False
    return getattr(named.find("tower", tower.tower, {}), "pooled", False)


def _of_run(config: Config) -> Iterator[str]:
    for pair in fields.EITHER_OR:
        part = config.optim if pair[0].startswith("optim.") else config
        if sum(getattr(part, key.rpartition(".")[2]) is not None for key in pair) != 1:
            yield f"{', '.join(pair)}: exactly one must be set"
    best = config.checkpoint_best_metric.split("/")
    if best[0] == "eval" and best[1:2] not in [[name] for name in config.evals]:
        there = ", ".join(f"eval/{name}" for name in config.evals)
        yield f"checkpoint_best_metric: got {'/'.join(best[:2])!r}, expected one of {there}"
    patterns = {
        "optim.frozen": config.optim.frozen,
        "optim.lora.modules": config.optim.lora.modules,
    }
    for key, pattern in ((key, pattern) for key, all_of in patterns.items() for pattern in all_of):
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"{key}: got {pattern!r}, no regular expression ({error})"
    if config.optim.lora.rank:
        yield from _lora(config.optim)
    if config.mesh.data == 0:
        yield "mesh.data: got 0, expected at least 1, or -1 for what the other axes leave"
    for axis in _doubled(axis for axis, _ in config.sharding):
        yield f"sharding: has {axis!r} more than once, expected one row for each axis"
    for name, entry in config.evals.items():
        yield from (f"evals.{name}.{line}" for line in entry.misses(config.model))


def _lora(optim: Optim) -> Iterator[str]:
    if not optim.lora.modules:
        yield "optim.lora.modules: got (), expected the maps that have factors, or optim.lora.rank=0"
    if optim.layer_decay != 1:
        yield (
            f"optim.layer_decay: got {optim.layer_decay} with optim.lora, expected 1: it slows down layers that are"
            " trained, and LoRA freezes those of its towers"
        )


def _doubled(names: Iterable[str]) -> list[str]:
    names = list(names)
    return sorted({name for name in names if names.count(name) > 1})


def _data(data: Input) -> Iterator[str]:
    for name in _doubled(entry.name for entry in data.datasets):
        yield f"input.datasets: has {name!r} more than once, expected each name once"
    for i, entry in enumerate(data.datasets):
        if not 0 < entry.weight < math.inf:
            yield f"input.datasets[{i}].weight: got {entry.weight}, expected more than 0"
    if data.captions_per_image == 2 and data.descriptions_in_captions:
        yield (
            f"input.descriptions_in_captions: got {data.descriptions_in_captions} with input.captions_per_image=2,"
            " expected 0: these are the web caption and the synthetic one; the descriptions are the third caption"
            " of input.captions_per_image=3"
        )
    single = {"name": data.name, "data_dir": data.data_dir, "prepare": data.prepare}
    for key, value in single.items():
        if data.datasets and value:
            yield (
                f"input.{key}: got {value!r} beside input.datasets, which names all sets;"
                f" expected one of the two: take out input.datasets or input.{key}"
            )


def _regions(config: Config) -> Iterator[str]:
    decoder, regions, weight = (
        config.model.decoder,
        config.input.max_regions,
        config.loss.hard_negative,
    )
    negatives, head = config.input.negatives_per_region, config.model.boxes.kind
    if negatives and not regions:
        got = f"input.negatives_per_region: got {negatives}"
        yield f"{got}, expected 0: with input.max_regions=0 no region has negatives"
    if weight and not negatives:
        yield (
            f"loss.hard_negative: got {weight:g} with input.negatives_per_region=0, expected"
            " negatives that it compares with: set input.negatives_per_region, or loss.hard_negative=0"
        )
    if weight and decoder is None and head == "none":
        yield (
            f"loss.hard_negative: got {weight:g} without model.decoder and model.boxes, expected one"
            " of them, whose embeddings of regions it compares, or loss.hard_negative=0"
        )
    if decoder is not None:
        if decoder.queries == 0 and regions:
            yield (
                "model.decoder.queries: got 0, expected at least 1 where input.max_regions is not 0: no query"
                " could be matched with a region"
            )
        return
    if regions and head == "none" and not (config.loss.image_description or config.loss.terms):
        yield (
            f"input.max_regions: got {regions}, expected 0: a model without model.decoder and model.boxes has no"
            " regions, and loss.image_description, which reads their descriptions, is 0"
        )
    for name, entry in config.evals.items():
        if entry.needs_regions and not (entry.kind == "boxes" and head != "none"):
            yield (
                f"evals.{name}: got kind={entry.kind}, which needs regions, but a model without"
                " model.decoder has no regions; take out the entry, or set alphas=(1.0,) in one of kind=zeroshot"
            )


def _loss(loss: Loss, config: Config) -> Iterator[str]:
    bias, head, regions = (
        config.model.logit_bias_init,
        config.model.boxes.kind,
        config.input.max_regions,
    )
    if (loss.contrast == "sigmoid") != (bias is not None):
        yield (
            f"model.logit_bias_init: got {bias} with loss.contrast={loss.contrast}; a sigmoid needs a bias"
            " (-10, SigLIP's), a softmax has none"
        )
    if loss.box_description and (head == "none" or not regions):
        yield (
            f"loss.box_description: got {loss.box_description} with model.boxes.kind={head} and"
            f" input.max_regions={regions}; expected a box head (roi_align) and regions, or the weight 0"
        )
    if head != "none" and not (loss.box_description or loss.hard_negative or loss.terms):
        yield (
            f"loss.box_description: got 0 with model.boxes.kind={head}, so that nothing trains the box head; expected"
            " a weight above 0, or model.boxes.kind=none"
        )
    if loss.match_l1 == loss.match_giou == loss.match_description == 0:
        yield (
            "loss.match_l1, loss.match_giou, loss.match_description: got 0 for all, so that queries"
            " would be matched by their numbers; expected at least one that is not 0"
        )
    keys = {field.name for field in dataclasses.fields(loss)}
    for name, entry in loss.terms.items():
        path = f"loss.terms.{name}"
        if name in keys or not re.fullmatch(r"[a-z]\w*", name):
            yield f"{path}: expected a name of letters, digits and _ that is no key of loss"
        if not isinstance(entry.get("term"), str):
            yield f"{path}.term: got {entry.get('term')!r}, expected module:function"


def _text_rows(config: Config) -> Iterator[str]:
    text, length = config.model.text, config.input.text_length
    if length and not 3 <= length <= text.context_length:
        most = f"model.text.context_length = {text.context_length}"
        yield f"input.text_length: got {length}, expected 3 to {most}, or 0"
    external = named.is_external(text.tower)
    is_known = not external or named.may_import(text.tower)
    if is_known and 0 < length < text.context_length and not text.packable:
        yield (
            f"input.text_length: got {length} with a text tower that sees its padding: evaluations and exports fill its rows to"
            f" model.text.context_length = {text.context_length}; expected 0, that length as context_length, or"
            " model.text.mask_padding=True"
        )
    if config.text.packing and is_known:
        which = f"the text tower {text.tower} is not packable"
        masked = ", or model.text.mask_padding=True too, which changes the function of the tower: train it"
        if not external:
            which = f"a text tower with causal={text.causal} and pool={text.pool} sees its padding"
        if not text.packable:
            yield (
                f"text.packing: got True, but {which}, so that each text needs a row of its own; set"
                f" text.packing=False{'' if external else masked}"
            )
    if text.mask_padding and fields.shares_rows(dataclasses.replace(text, mask_padding=False)):
        yield (
            f"model.text.mask_padding: got True with causal={text.causal} and pool={text.pool}, of which nothing depends"
            " on the padding; expected False"
        )


def _divisions(config: Config) -> Iterator[str]:
    lanes, group = config.input.lanes or 1, config.text.pack_group or 1
    parts = {
        "microbatches": config.microbatches,
        "input.lanes": lanes,
        "loss.group_size": config.loss.group_size or 1,
    }
    for name, number in parts.items():
        if config.batch_size % number:
            good = flags_of(name, divisors(config.batch_size), number)
            yield f"{name}: got {number}, must divide batch_size {config.batch_size}; set {good}"
    lane_batch, rest = divmod(config.batch_size, lanes)
    if config.text.packing and not rest and lane_batch % group:
        good = flags_of("text.pack_group", divisors(lane_batch), group)
        yield (
            f"text.pack_group: got {group}, must divide batch_size / input.lanes = {lane_batch}, so that no"
            f" group crosses a process; set {good}"
        )
