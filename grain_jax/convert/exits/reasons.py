"""What a model must be for each exit, and the exits that a model has."""

import dataclasses
import operator
from typing import Any, NamedTuple, TypeAlias

from grain_jax import config as config_lib
from grain_jax.convert import towers
from grain_jax.convert.exits import timm_trunk
from grain_jax.convert.faults import ConvertError
from grain_jax.convert.reference import names

Lengths: TypeAlias = tuple[int, ...]  # of images in their own shape; (): squares
_SQUARES = ("to-open-clip", "to-big-vision", "to-torch", "to-onnx")  # what else is no exit


class Need(NamedTuple):
    """A key of `config.Model` and the values that a format has for it."""

    key: str
    values: tuple[Any, ...]


class Format(NamedTuple):
    """What can be written, and what a model must be for it."""

    name: str
    needs: tuple[Need, ...]

    def faults(self, model: config_lib.Model) -> list[str]:
        """A line for each key that the format cannot express."""
        model = towers.plain_pool(model)
        return [
            f"model.{need.key}: got {got if got is None or isinstance(got, str | int | float) else 'one'},"
            f" {self.name} has {' or '.join(map(str, need.values))}"
            for need in self.needs
            if (got := _get(model, need.key)) not in need.values
        ]


def _get(model: config_lib.Model, key: str) -> Any:
    return operator.attrgetter(key)(model)


def _needs(**values: Any) -> tuple[Need, ...]:
    """image__pool="map" or a tuple of values -> the needs."""
    return tuple(
        Need(key.replace("__", "."), value if isinstance(value, tuple) else (value,))
        for key, value in values.items()
    )


_PLAIN_VIT = dict(
    image__tower="vit", image__pool_heads=0, image__pool_mlp_dim=0, **names.PLAIN_IMAGE
)
_VIT = _PLAIN_VIT | dict(image__qk_norm=False)
_GELUS = ("gelu", "gelu_tanh", "quick_gelu")
_TWO_TOWERS = dict(
    decoder=None,
    boxes__kind="none",
    text__tower="transformer",
    text__position_kind="learned",
    text__scale_tokens=False,
    text__mask_padding=False,
)
_CLIP_VISION = _VIT | dict(image__class_token=True, image__pre_norm=True)
_SIGLIP_VISION = _VIT | dict(image__class_token=False, image__pre_norm=False)
_FREE = ("none", "matrix")  # a projection without a bias; the identity stands in for none

CLIP = Format(
    "CLIPModel",
    _needs(
        **_TWO_TOWERS,
        logit_bias_init=None,
        **_CLIP_VISION,
        image__pool="class",
        image__projection=_FREE,
        text__causal=True,
        text__pool="end",
        text__projection=_FREE,
    ),
)
SIGLIP = Format(
    "SiglipModel",
    _needs(
        **_TWO_TOWERS,
        **_SIGLIP_VISION,
        image__pool="map",
        image__projection="none",
        text__causal=False,
        text__pool="last",
    ),
)
SIGLIP2 = Format("Siglip2Model", SIGLIP.needs)
CLIP_VISION = Format("CLIPVisionModel", _needs(**_CLIP_VISION))
SIGLIP_VISION = Format("SiglipVisionModel", _needs(**_SIGLIP_VISION))
SIGLIP2_VISION = Format("Siglip2VisionModel", SIGLIP_VISION.needs)
OPEN_CLIP = Format(
    "open_clip's own towers",
    _needs(
        **_TWO_TOWERS,
        **_PLAIN_VIT,
        image__class_token=True,
        image__pool=("class", "mean"),
        image__activation=_GELUS,
        image__projection=_FREE,
        text__activation=_GELUS,
        text__pool=("end", "last"),
    ),
)
OPEN_CLIP_TIMM = Format(
    "open_clip with a trunk of timm",
    _needs(
        **_TWO_TOWERS,
        **_SIGLIP_VISION,
        image__pool="map",
        image__activation=("gelu", "gelu_tanh"),
        text__activation=_GELUS,
        text__pool=("end", "last"),
    ),
)
BIG_VISION = Format(
    "big_vision's two_towers",
    _needs(
        **_TWO_TOWERS,
        **_VIT,
        image__pre_norm=False,
        image__pool=("map", "class", "mean"),
        image__activation="gelu_tanh",
        image__norm_eps=1e-6,
        text__causal=False,
        text__pool=("last", "map", "mean"),
        text__activation="gelu_tanh",
        text__norm_eps=1e-6,
    ),
)


def of_hugging_face(model: config_lib.Model, lengths: Lengths = ()) -> tuple[Format, list[str]]:
    """The class of transformers that a two-tower model is nearest to, and why it cannot hold the model.

    Of one of images in their own shape (`lengths`, as `checkpoint.Stored` has them) it is Siglip2Model.
    """
    if lengths:
        return SIGLIP2, SIGLIP2.faults(model)
    kind, faults = _nearest(model, CLIP, SIGLIP)
    if kind is CLIP and model.text.end_id == 2:
        faults.append("model.text.end_id: got 2, with which CLIPModel takes the highest id")
    return kind, faults


def of_vision(model: config_lib.Model, lengths: Lengths = ()) -> tuple[Format, list[str]]:
    """The class of transformers that the image tower alone is nearest to, and why it cannot hold the tower."""
    if lengths:
        return SIGLIP2_VISION, SIGLIP2_VISION.faults(model)
    return _nearest(model, CLIP_VISION, SIGLIP_VISION)


def of_shapes(lengths: Lengths, command: str) -> list[str]:
    """A line where a model is of images in their own shape, of a command that writes models of squares alone."""
    if not lengths:
        return []
    return [f"input.sequence_lengths: got {lengths}, {command} writes models of square images"]


def of_open_clip(model: config_lib.Model, search: bool = True) -> tuple[Format, list[str]]:
    """The kind of open_clip's models that a model is nearest to, and why it cannot hold the model.

    `search` looks in timm for a trunk of the sizes, which needs torch and seconds.
    """
    kind, faults = _nearest(model, OPEN_CLIP, OPEN_CLIP_TIMM)
    quick = {t.activation == "quick_gelu" for t in (model.image, model.text)}
    if kind is OPEN_CLIP and len(quick) > 1:
        faults.append(
            f"model.text.activation: got {model.text.activation}, with {model.image.activation} of the image tower;"
            " open_clip has quick_gelu in both of its own towers or in none"
        )
    if kind is OPEN_CLIP_TIMM and not faults and search:
        try:
            timm_trunk.name_of(model.image)
        except ConvertError as error:
            faults.append(str(error))
    return kind, faults


def of_big_vision(model: config_lib.Model) -> list[str]:
    """Why big_vision's two_towers cannot hold the model."""
    faults = BIG_VISION.faults(model)
    if model.decoder is None and model.image.class_token != (model.image.pool == "class"):
        faults.append(
            f"model.image.class_token: got {model.image.class_token} with the pool {model.image.pool},"
            " big_vision has a class token with the pool class alone"
        )
    return faults


def of_onnx(model: config_lib.Model) -> list[str]:
    """Why the torch module, which writes ONNX, cannot express the model."""
    return names.faults(model, "to-onnx")


def _nearest(model: config_lib.Model, *formats: Format) -> tuple[Format, list[str]]:
    found = [(each, each.faults(model)) for each in formats]
    return min(found, key=lambda pair: len(pair[1]))


def towers_alone(model: config_lib.Model) -> config_lib.Model:
    """The two towers without region decoder and box head; the image's class token (or its mean) stands for the image."""
    if model.decoder is None:
        return dataclasses.replace(model, boxes=config_lib.BoxHead())
    pool = "class" if model.image.class_token else "mean"
    projection = "none" if model.image.width == model.embed_dim else "matrix"
    image = dataclasses.replace(model.image, pool=pool, projection=projection)
    return dataclasses.replace(model, decoder=None, boxes=config_lib.BoxHead(), image=image)


def of(model: config_lib.Model, search: bool = True, lengths: Lengths = ()) -> dict[str, list[str]]:
    """Each exit, and a line for each thing of the model that it cannot hold; none: it works.

    `search`: as `of_open_clip`; `lengths`: as `of_hugging_face`.
    """
    is_whole = model.decoder is None and model.boxes.kind == "none"
    alone, flag = towers_alone(model), "" if is_whole else " --part towers"
    found = {"to-hf": names.faults(model, "to-hf")}
    if not is_whole:
        found["to-hf --part towers"] = of_hugging_face(alone, lengths)[1]
    found |= {
        "to-hf --part vision": of_vision(model, lengths)[1],
        f"to-open-clip{flag}": of_open_clip(alone, search)[1],
        f"to-big-vision{flag}": of_big_vision(alone),
        "to-torch": names.faults(model, "to-torch"),
        "to-onnx": of_onnx(model),
        "pack": [],
        "export": [],  # StableHLO
    }
    for name in found:
        if name.partition(" ")[0] in _SQUARES:
            found[name] = found[name] + of_shapes(lengths, name)
    return found


def working(model: config_lib.Model, lengths: Lengths = ()) -> list[str]:
    """The commands of the exits that the model has."""
    return [
        f"grain-jax {'' if name == 'export' else 'convert '}{name}"
        for name, faults in of(model, lengths=lengths).items()
        if not faults
    ]


def line(model: config_lib.Model, checkpoint: object, lengths: Lengths = ()) -> str:
    """The exits of a model that is to be trained, in a line; imports neither torch nor timm."""
    of_model = of(model, search=False, lengths=lengths)
    found = [name for name, faults in of_model.items() if not faults]
    if of_open_clip(towers_alone(model), search=False)[0] is OPEN_CLIP_TIMM:
        found = [f"{name} (sizes of timm's)" if "open-clip" in name else name for name in found]
    return f"exits: {', '.join(found)} (all: grain-jax convert table --checkpoint {checkpoint})"


def refuse(model: config_lib.Model, faults: list[str], lengths: Lengths = ()) -> None:
    """Raises ConvertError with these lines, and with the exits that the model has as its hint; does nothing without lines."""
    if faults:
        error = ConvertError("\n".join(faults))
        error.hint = f"what writes this model: {', '.join(working(model, lengths))}"
        raise error
