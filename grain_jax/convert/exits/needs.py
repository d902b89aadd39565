"""What a model must be for the classes of other packages."""

import operator
from typing import Any, NamedTuple

from grain_jax import config as config_lib
from grain_jax.convert.reference import names


class Format(NamedTuple):
    """What can be written, and the values that it has for keys of `config.Model`."""

    name: str
    values: dict[str, tuple[Any, ...]]

    def faults(self, model: config_lib.Model) -> list[str]:
        """A line for each key that the format cannot express."""
        lines = []
        for key, values in self.values.items():
            got = operator.attrgetter(key)(model)
            if got not in values:
                shown = got if got is None or isinstance(got, str | int | float) else "one"
                has = " or ".join(map(str, values))
                lines.append(f"model.{key}: got {shown}, {self.name} has {has}")
        return lines


def _format(name: str, **values: Any) -> Format:
    """image__pool="map" or a tuple of values -> the format; it has two towers alone."""
    values = (
        dict(decoder=None, boxes__kind="none", image__tower="vit", text__tower="transformer")
        | dict(text__mask_padding=False)
        | names.PLAIN_IMAGE
        | values
    )
    return Format(
        name,
        {
            key.replace("__", "."): value if isinstance(value, tuple) else (value,)
            for key, value in values.items()
        },
    )


_GELUS = ("gelu", "gelu_tanh", "quick_gelu")
_FREE = ("none", "matrix")  # a projection without a bias; the identity stands in for none
CLIP = _format(
    "CLIPModel",
    logit_bias_init=None,
    image__qk_norm=False,
    image__class_token=True,
    image__pre_norm=True,
    image__pool="class",
    image__projection=_FREE,
    text__causal=True,
    text__pool="end",
    text__projection=_FREE,
)
SIGLIP = _format(
    "SiglipModel",
    image__qk_norm=False,
    image__class_token=False,
    image__pre_norm=False,
    image__pool="map",
    image__projection="none",
    text__causal=False,
    text__pool="last",
)
OPEN_CLIP = _format(
    "open_clip's own towers",
    image__class_token=True,
    image__pool=("class", "mean"),
    image__activation=_GELUS,
    image__projection=_FREE,
    text__activation=_GELUS,
    text__pool=("end", "last"),
)
OPEN_CLIP_TIMM = _format(
    "open_clip with a trunk of timm",
    image__qk_norm=False,
    image__class_token=False,
    image__pre_norm=False,
    image__pool="map",
    image__activation=("gelu", "gelu_tanh"),
    text__activation=_GELUS,
    text__pool=("end", "last"),
)
BIG_VISION = _format(
    "big_vision's two_towers",
    image__qk_norm=False,
    image__pre_norm=False,
    image__pool=("map", "class", "mean"),
    image__activation="gelu_tanh",
    image__norm_eps=1e-6,
    text__causal=False,
    text__pool=("last", "map", "mean"),
    text__activation="gelu_tanh",
    text__norm_eps=1e-6,
)


def of_hugging_face(model: config_lib.Model) -> tuple[Format, list[str]]:
    """The class of transformers that a two-tower model is nearest to, and why it cannot hold the model."""
    kind, faults = _nearest(model, CLIP, SIGLIP)
    if kind is CLIP and model.text.end_id == 2:
        faults.append("model.text.end_id: got 2, with which CLIPModel takes the highest id")
    return kind, faults


def of_open_clip(model: config_lib.Model) -> tuple[Format, list[str]]:
    """The kind of open_clip's models that a model is nearest to, and why it cannot hold the model."""
    kind, faults = _nearest(model, OPEN_CLIP, OPEN_CLIP_TIMM)
    quick = {t.activation == "quick_gelu" for t in (model.image, model.text)}
    if kind is OPEN_CLIP and len(quick) > 1:
        faults.append(
            f"model.text.activation: got {model.text.activation}, with {model.image.activation} of the image tower;"
            " open_clip has quick_gelu in both of its own towers or in none"
        )
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


def _nearest(model: config_lib.Model, *formats: Format) -> tuple[Format, list[str]]:
    return min(((each, each.faults(model)) for each in formats), key=lambda pair: len(pair[1]))
