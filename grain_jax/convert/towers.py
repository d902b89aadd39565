"""Third-party towers: what the importers of open_clip's, big_vision's and the reference's checkpoints share.

An importer finds the table of a tower and what its package states; the sizes are read off the entries here. Two towers
become a model, `initialise` takes one. Every array of the checkpoint is accounted for.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from grain_jax import config as config_lib
from grain_jax.convert import tables
from grain_jax.convert.faults import ConvertError, raise_any
from grain_jax.convert.tables import Entries, NamePair
from grain_jax.models import grain

TOWERS = ("image", "text")
T = TypeVar("T")
# Config fields that change neither parameters nor what they compute: initialisation, training, speed.
OF_TRAINING = (
    *("position_init", "position_period", "block_init", "qkv_init_gain"),
    *("dropout", "unroll", "keep"),
)
# Config fields that may differ from the checkpoint's: those, sizes that are resized, tokenizer.
_NOT_COMPARED = {
    *OF_TRAINING,
    *("image_size", "context_length", "tokenizer", "cleaning", "pad_id", "end_id", "mask_padding"),
}
CLIP_PIXELS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIGLIP_PIXELS = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
# Of SigLIP's So400m and g-opt, of DINOv3's 7B; all others have heads of 64.
_HEAD_SIZES = {1152: 72, 1536: 96, 4096: 128}
_FREE_GRID = 14  # patches a side of a tower whose arrays do not depend on it
# Names of transformers.
OUR_ACTIVATION = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


class Tower(NamedTuple):
    """A tower of a checkpoint."""

    config: Any  # config.ImageTower or config.TextTower
    rows: Sequence[NamePair]  # its table, the pooling head and the projection included
    prefix: str  # of the checkpoint's names; names with it belong to this tower
    assumed: Sequence[str] = ()  # assumptions where the checkpoint is silent, for the report


class Settings(NamedTuple):
    """Values that a checkpoint may not hold, by tower; None: read or assumed."""

    heads: Mapping[str, int | None] = {}
    activation: Mapping[str, str | None] = {}


class Stated(NamedTuple):
    """What a package, or a config beside the weights, says of a tower."""

    norm_eps: float
    fallback: str  # activation where neither config nor flag states it
    activation: str | None = None
    heads: int | None = None
    pool: str = "none"  # without a pooling head
    fields: Mapping[str, Any] = {}  # others of its config: of an image tower the pixels' mean and
    # standard deviation; of a text tower causal, tokenizer, cleaning, pad_id, and what else its family has


def settled(what: str, given: T | None, stated: T | None) -> T | None:
    """The one of two values that is not None. Raises ConvertError where both are given and differ."""
    if given is not None and stated is not None and given != stated:
        raise ConvertError(f"{what}: got {given}, but the checkpoint says {stated}")
    return stated if given is None else given


def settle_heads(
    which: str,
    width: int,
    stated: int | None,
    settings: Settings,
    assumed: list[str],
    usual: int | None,
) -> int:
    """The number of heads of a tower; adds a line to `assumed` where the checkpoint does not state it.

    Raises:
      ConvertError: flag and checkpoint differ, nothing tells them, or they do not divide the width.
    """
    heads = settled(f"{which} heads", settings.heads.get(which), stated)
    if heads is None:
        if usual is None:
            raise ConvertError(
                f"--{which}-heads: must be given; a width of {width} does not tell the number of heads"
            )
        heads = usual
        assumed.append(f"{heads} heads; --{which}-heads says otherwise")
    elif stated is None and heads != usual is not None:  # any divisor fits the arrays
        assumed.append(f"{heads} heads, as told; towers of width {width} have {usual} as a rule")
    if heads < 1 or width % heads:
        raise ConvertError(f"{which} heads: got {heads}, expected a divisor of the width {width}")
    return heads


def _settle(
    which: str, width: int, stated: Stated, settings: Settings, assumed: list[str]
) -> dict[str, Any]:
    """Heads, activation and norm epsilon of a tower; adds lines to `assumed`."""
    usual = max(width // _HEAD_SIZES.get(width, 64), 1)
    heads = settle_heads(which, width, stated.heads, settings, assumed, usual)
    given = settings.activation.get(which)
    activation = settled(f"{which} activation", given, stated.activation)
    if activation is None:
        activation = stated.fallback
        assumed.append(f"activation {activation}; --{which}-activation says otherwise")
    elif stated.activation is None and activation != stated.fallback:
        rule = f"such towers have {stated.fallback} as a rule"
        assumed.append(f"activation {activation}, as told; {rule}")
    if activation not in config_lib.ACTIVATIONS:
        raise ConvertError(
            f"{which} activation: got {activation!r}, expected one of"
            f" {', '.join(config_lib.ACTIVATIONS)}"
        )
    return dict(heads=heads, activation=activation, norm_eps=stated.norm_eps)


def _projection(there: Entries, name: str) -> str:
    if f"{name}/kernel" not in there:
        return "none"
    return "affine" if f"{name}/bias" in there else "matrix"


def image_sizes(there: Entries) -> dict[str, Any]:
    """The fields of `config.ImageTower` that the shapes of a checkpoint tell.

    Raises:
      ConvertError: an entry that gives a size is missing or has another number of axes.
    """
    (width,) = there.shape("image/norm/scale", 1)
    patch = math.isqrt(math.prod(there.shape("image/patch_embed/kernel", 2, 4)) // 3 // width)
    class_token = "image/class_token" in there
    grid = _grid(there, class_token)
    return dict(
        image_size=grid * patch,
        patch_size=patch,
        width=width,
        depth=there.depth("image/blocks/norm_1/scale"),
        mlp_dim=there.shape("image/blocks/mlp/in/bias", 1)[0],
        qk_norm="image/blocks/attention/query_norm/scale" in there,
        class_token=class_token,
        patch_bias="image/patch_embed/bias" in there,
        pre_norm="image/pre_norm/scale" in there,
        positions=bool(there.name("image/position_embed")),
        registers=there.shape("image/registers", 3)[1] if "image/registers" in there else 0,
        layer_scale="image/blocks/layer_scale_1" in there,
        mlp="gated" if "image/blocks/mlp/gate/kernel" in there else "plain",
        projection=_projection(there, "image_projection"),
        unroll=1,
    )


def _grid(there: Entries, class_token: bool) -> int:
    """Patches a side, by the learned positions. Raises ConvertError: they are no square, or missing."""
    if not there.name("image/position_embed"):
        return _FREE_GRID
    positions = there.shape("image/position_embed", 2, 3)[-2]
    grid = math.isqrt(positions)
    if class_token and grid * grid != positions:
        grid = math.isqrt(positions - 1)
    if positions - grid * grid not in (0, int(class_token)):
        name = there.name("image/position_embed")
        raise ConvertError(f"{name}: got {positions} positions, expected a square")
    return grid


def text_sizes(there: Entries) -> dict[str, Any]:
    """The fields of `config.TextTower` that the shapes of a checkpoint tell; raises as `image_sizes`."""
    vocab, width = there.shape("text/token_embed/embedding", 2)
    return dict(
        context_length=there.shape("text/position_embed", 2, 3)[-2],
        vocab_size=vocab,
        width=width,
        depth=there.depth("text/blocks/norm_1/scale"),
        mlp_dim=there.shape("text/blocks/mlp/in/bias", 1)[0],
        projection=_projection(there, "text_projection"),
        unroll=1,
    )


def settle(
    which: str,
    state: Mapping[str, np.ndarray],
    rows: Sequence[NamePair],
    prefix: str,
    stated: Stated,
    settings: Settings,
    assumed: list[str],
) -> Tower:
    """A tower of a checkpoint.

    Args:
      which: "image" or "text".
      state: the arrays.
      rows: the table of the tower.
      prefix: of its names.
      stated: what its package says.
      settings: what the command line says.
      assumed: assumptions so far, for the report.

    Raises:
      ConvertError: entries that are missing, or contradict what is stated or given.
    """
    there = Entries(state, rows)
    if which == "image":
        kind, sizes = config_lib.ImageTower, image_sizes(there)
    else:
        kind, sizes = config_lib.TextTower, text_sizes(there)
    settled_fields = _settle(which, sizes["width"], stated, settings, assumed)
    pool = "map" if f"{which}_pool/probe" in there else stated.pool
    fields = {**sizes, **settled_fields, "pool": pool, **stated.fields}
    return Tower(kind(**fields), rows, prefix, assumed)


def two_tower_model(
    state: Mapping[str, np.ndarray],
    image: Tower,
    text: Tower,
    scalars: Mapping[str, str],
) -> tuple[config_lib.Model, dict]:
    """The model of the two towers of a checkpoint, and its parameters as a nested dict.

    Args:
      state: all arrays of the checkpoint.
      image: its image tower.
      text: its text tower.
      scalars: "logit_scale" (in log space) and "logit_bias" -> their names in the checkpoint; the second may be missing.

    Raises:
      ConvertError: arrays that are missing, not part of the model, not finite, or of another shape; a line each.
      config.ConfigError: sizes that are no model's.
    """
    width = {
        Entries(state, tower.rows).width(f"{which}_projection/kernel")
        if tower.config.projection != "none"
        else tower.config.width
        for which, tower in zip(TOWERS, (image, text))
    }
    if len(width) > 1:
        raise ConvertError(f"the towers' embeddings have different widths, {sorted(width)}")
    numbers = _numbers(state, scalars)
    model = config_lib.Model(
        embed_dim=width.pop(),
        logit_scale_init=float(np.clip(np.exp(min(numbers["logit_scale"], 88)), 1, 100)),
        logit_bias_init=numbers.get("logit_bias"),
        image=image.config,
        text=text.config,
        decoder=None,
    )
    model = config_lib.model_from_dict(dataclasses.asdict(model))
    shapes = grain.parameter_shapes(model)
    rows = [*image.rows, *text.rows, *(NamePair(ours, name) for ours, name in scalars.items())]
    state = {**state, **{scalars[x]: np.array(value, np.float32) for x, value in numbers.items()}}
    params = tables.read(rows, completed(state, image), shapes)
    refuse_unknown(state, rows, shapes)
    return model, tables.nested(params)


def refuse_unknown(
    state: Mapping[str, np.ndarray], rows: Sequence[NamePair], shapes: Mapping[str, tables.Shape]
) -> None:
    """Raises ConvertError with a line for each array that is no part of the model."""
    unknown = sorted(state.keys() - tables.used(rows, shapes))
    raise_any([f"{name}: unknown key" for name in unknown])


def completed(state: Mapping[str, np.ndarray], tower: Tower) -> Mapping[str, np.ndarray]:
    """`state` with a position of 0 for a class token that has none, as in big_vision and some models of timm."""
    name = Entries(state, tower.rows).name("image/position_embed")
    if not tower.config.class_token or name not in state:
        return state
    positions = state[name]
    if math.isqrt(positions.shape[-2]) ** 2 != positions.shape[-2]:
        return state
    return {**state, name: np.concatenate([0 * positions[..., :1, :], positions], axis=-2)}


def _numbers(state: Mapping[str, np.ndarray], scalars: Mapping[str, str]) -> dict[str, float]:
    out, faults = {}, []
    for ours, name in scalars.items():
        if name in state:
            value = np.asarray(state[name], np.float32)
            if value.size != 1 or not np.isfinite(value).all():
                faults.append(f"{name}: got {value.tolist()}, expected one finite number ({ours})")
            else:
                out[ours] = float(value.reshape(()))
        elif ours == "logit_scale":
            faults.append(f"{name}: missing; expected a model of two towers, with its {ours}")
    raise_any(faults)
    return out


def differences(part: str, got: Any, wanted: Any, *ignored: str) -> list[str]:
    """A line for each field in which a checkpoint's tower or decoder differs from the config."""
    noun = "tower" if part in TOWERS else part
    return [
        f"model.{part}.{field.name}: got {getattr(wanted, field.name)!r}, but the checkpoint's {noun} has"
        f" {getattr(got, field.name)!r}"
        for field in dataclasses.fields(got)
        if field.name not in {*_NOT_COMPARED, *ignored}
        and getattr(got, field.name) != getattr(wanted, field.name)
    ]


def _options(image: config_lib.ImageTower) -> str:
    """What an image tower has beyond CLIP's and SigLIP's, for the report."""
    said = {
        f"rotary positions, theta {image.rope_theta:g}": image.rope != "none",
        "no learned positions": not image.positions,
        f"registers {image.registers}": image.registers,
        "layer scale": image.layer_scale,
        "gated MLP": image.mlp == "gated",
        "no bias of keys": not image.key_bias,
    }
    return "".join(f", {words}" for words, there in said.items() if there)


def describe(model: config_lib.Model, assumed: Mapping[str, Sequence[str]]) -> list[str]:
    """The lines of the report about the parts of a model and the assumptions in them, by part."""
    i, t, d = model.image, model.text, model.decoder
    decoder = "no region decoder"
    if d is not None:
        pool = "the sum of all queries" if d.image_pool == "all" else "the image query"
        decoder = (
            f"of an image: {pool}; decoder {d.queries} + 1 queries, width {d.width}, depth {d.depth}, heads {d.heads},"
            f" MLP {d.mlp_dim}"
        )
    return [
        f"image    {i.image_size} px, patch {i.patch_size}, width {i.width}, depth {i.depth}, heads"
        f" {i.heads}, MLP {i.mlp_dim} {i.activation}, pool {i.pool}, pre-norm {'yes' if i.pre_norm else 'no'},"
        f" qk-norm {'yes' if i.qk_norm else 'no'}, norm epsilon {i.norm_eps:g}{_options(i)}",
        f"text     vocabulary {t.vocab_size}, context {t.context_length}, width {t.width}, depth {t.depth},"
        f" heads {t.heads}, MLP {t.mlp_dim} {t.activation}, {'causal' if t.causal else 'bidirectional'},"
        f" pool {t.pool}, norm epsilon {t.norm_eps:g}{'' if t.end_id is None else f', ended by the id {t.end_id}'}",
        f"embedding {model.embed_dim}; {decoder}",
        *(f"ASSUMED  {part}: {words}" for part, lines in assumed.items() for words in lines),
    ]
