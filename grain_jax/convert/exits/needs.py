"""What a model must be for the classes of other packages."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

from grain_jax import config as config_lib


class Format(NamedTuple):
    """A class of another package, and the values that it has for keys of `config.Model`."""

    name: str
    values: dict[str, tuple[Any, ...]]
    rule: Callable[[config_lib.Model], str] = lambda model: ""  # a fault of several keys, or ""

    def faults(self, model: config_lib.Model) -> list[str]:
        """A line for each key that the format cannot express."""
        lines = []
        for key, values in self.values.items():
            try:
                got = operator.attrgetter(key)(model)
            except AttributeError:  # of a part that the model lacks
                continue
            if got not in values:
                shown = got if got is None or isinstance(got, str | int | float | tuple) else "one"
                has = " or ".join(map(str, values))
                lines.append(f"model.{key}: got {shown}, {self.name} has {has}")
        return lines + [fault for fault in [self.rule(model)] if fault]


def nearest(model: config_lib.Model, *formats: Format) -> tuple[Format, list[str]]:
    """The format that lacks the fewest keys of a model, and its faults."""
    return min(((each, each.faults(model)) for each in formats), key=lambda pair: len(pair[1]))


# What an image tower of CLIP, SigLIP or the reference has.
_PLAIN_IMAGE: dict[str, Any] = dict(
    image__positions=True,
    image__rope="none",
    image__registers=0,
    image__layer_scale=False,
    image__mlp="plain",
    image__key_bias=True,
)


def _format(name: str, rule: Callable[[config_lib.Model], str] | None = None, **values: Any):
    """A format of two plain towers; image__pool="map", or a tuple of values, is what it has for `image.pool`."""
    plain = dict(decoder=None, boxes__kind="none", image__tower="vit", text__tower="transformer")
    values = plain | _PLAIN_IMAGE | dict(text__mask_padding=False) | values
    return Format(name, _keys(values), rule) if rule else Format(name, _keys(values))


def _keys(values: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    return {
        key.replace("__", "."): value if isinstance(value, tuple) else (value,)
        for key, value in values.items()
    }


def _queries(model: config_lib.Model) -> str:
    if model.decoder is not None and model.decoder.queries:
        return ""
    return f"model.decoder: got {'none' if model.decoder is None else 'no queries'}, the reference has regions"


def _highest_id(model: config_lib.Model) -> str:
    if model.text.end_id != 2:
        return ""
    return "model.text.end_id: got 2, with which CLIPModel takes the highest id"


def _one_activation(model: config_lib.Model) -> str:
    if len({tower.activation == "quick_gelu" for tower in (model.image, model.text)}) == 1:
        return ""
    return (
        f"model.text.activation: got {model.text.activation}, with {model.image.activation} of the image tower;"
        " open_clip has quick_gelu in both of its own towers or in none"
    )


def _class_token(model: config_lib.Model) -> str:
    if model.image.class_token == (model.image.pool == "class"):
        return ""
    return (
        f"model.image.class_token: got {model.image.class_token} with the pool {model.image.pool},"
        " big_vision has a class token with the pool class alone"
    )


_GELUS = ("gelu", "gelu_tanh", "quick_gelu")
_FREE = ("none", "matrix")  # a projection without a bias; the identity stands in for none
_SIGLIP_IMAGE: dict[str, Any] = dict(
    image__qk_norm=False, image__class_token=False, image__pre_norm=False, image__pool="map"
)
CLIP = _format(
    "CLIPModel",
    _highest_id,
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
    **_SIGLIP_IMAGE,
    image__projection="none",
    text__causal=False,
    text__pool="last",
)
OPEN_CLIP = _format(
    "open_clip's own towers",
    _one_activation,
    image__class_token=True,
    image__pool=("class", "mean"),
    image__activation=_GELUS,
    image__projection=_FREE,
    text__activation=_GELUS,
    text__pool=("end", "last"),
)
OPEN_CLIP_TIMM = _format(
    "open_clip with a trunk of timm",
    **_SIGLIP_IMAGE,
    image__activation=("gelu", "gelu_tanh"),
    text__activation=_GELUS,
    text__pool=("end", "last"),
)
BIG_VISION = _format(
    "big_vision's two_towers",
    _class_token,
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


_CODE = dict(image__tower="vit", text__tower="transformer")
MODELING = Format("modeling_grain.py", _keys(_CODE))
TORCH = Format(
    "the PyTorch reference",
    _keys(
        _CODE
        | _PLAIN_IMAGE
        | dict(
            logit_bias_init=None,
            image__norm_eps=1e-6,
            image__class_token=True,
            image__patch_bias=True,
            image__pre_norm=False,
            image__activation="gelu",
            image__pixel_mean=(config_lib.ImageTower.pixel_mean,),
            image__pixel_std=(config_lib.ImageTower.pixel_std,),
            text__norm_eps=1e-5,
            text__causal=True,
            text__activation="quick_gelu",
            text__pool="end",
            text__mask_padding=False,
            text__projection="matrix",
            text__tokenizer="clip",
            text__end_id=None,
            decoder__norm_eps=1e-5,
            decoder__image_pool="query",
            boxes__kind="none",
        )
    ),
    _queries,
)
