"""What a model must be for the classes of other packages."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

from grain_jax import config as config_lib


class Format(NamedTuple):
    """A class of another package, and the values that it has for keys of `config.Model`."""

    name: str
    values: dict[str, tuple[Any, ...]]
    rule: Callable[[config_lib.Model], str] = lambda model: ""  # a key that does not fit others

    def faults(self, model: config_lib.Model) -> list[str]:
        """A line for each key that the format cannot express."""
        lines = []
        for key, values in self.values.items():
            if key.startswith("decoder.") and model.decoder is None:
                continue
            got = operator.attrgetter(key)(model)
            if got not in values:
                shown = got if got is None or isinstance(got, str | int | float | tuple) else "one"
                lines.append(f"model.{key}: got {shown}, {self.name} has {' or '.join(map(str, values))}")
        if key := self.rule(model):
            got = operator.attrgetter(key)(model)
            shown = "regions" if key.startswith("decoder") else "another value with the model's other keys"
            lines.append(f"model.{key}: got {got}, {self.name} has {shown}")
        return lines


def nearest(model: config_lib.Model, *formats: Format) -> tuple[Format, list[str]]:
    """The format that lacks the fewest keys of a model, and its faults."""
    return min(((each, each.faults(model)) for each in formats), key=lambda pair: len(pair[1]))


def _format(name: str, shared: dict[str, Any], **values: Any) -> Format:
    """A format; image__pool="map", or a tuple of values, is what it has for `image.pool`."""
    in_tuples = {k: x if isinstance(x, tuple) else (x,) for k, x in (shared | values).items()}
    return Format(name, {key.replace("__", "."): x for key, x in in_tuples.items()})


_CODE: dict[str, Any] = dict(image__tower="vit", text__tower="transformer")
# What the towers of CLIP, SigLIP and the reference have.
_PLAIN: dict[str, Any] = _CODE | dict(
    boxes__kind="none",
    image__positions=True,
    image__rope="none",
    image__registers=0,
    image__layer_scale=False,
    image__mlp="plain",
    image__key_bias=True,
    text__mask_padding=False,
)
_TWO = _PLAIN | dict(decoder=None)
_GELUS = ("gelu", "gelu_tanh", "quick_gelu")
_FREE = ("none", "matrix")  # a projection without a bias; the identity stands in for none
_SIGLIP_IMAGE: dict[str, Any] = dict(
    image__qk_norm=False,
    image__class_token=False,
    image__pre_norm=False,
    image__pool="map",
    image__pool_heads=0,
)
CLIP = _format(
    "CLIPModel",
    _TWO,
    logit_bias_init=None,
    image__qk_norm=False,
    image__class_token=True,
    image__pre_norm=True,
    image__pool="class",
    image__projection=_FREE,
    text__causal=True,
    text__pool="end",
    text__projection=_FREE,
)._replace(rule=lambda m: "text.end_id" if m.text.end_id == 2 else "")  # it means the highest id
SIGLIP = _format(
    "SiglipModel", _TWO | _SIGLIP_IMAGE, image__projection="none", text__causal=False, text__pool="last"
)
_is_quick = lambda tower: tower.activation == "quick_gelu"  # in both towers of open_clip or in none
OPEN_CLIP = _format(
    "open_clip's own towers",
    _TWO,
    image__class_token=True,
    image__pool=("class", "mean"),
    image__activation=_GELUS,
    image__projection=_FREE,
    text__activation=_GELUS,
    text__pool=("end", "last"),
)._replace(rule=lambda m: "text.activation" if _is_quick(m.image) != _is_quick(m.text) else "")
OPEN_CLIP_TIMM = _format(
    "open_clip with a trunk of timm",
    _TWO | _SIGLIP_IMAGE,
    image__activation=("gelu", "gelu_tanh"),
    text__activation=_GELUS,
    text__pool=("end", "last"),
)
_pools_class = lambda m: m.image.pool == "class"  # as big_vision does where it has a class token
BIG_VISION = _format(
    "big_vision's two_towers",
    _TWO,
    image__qk_norm=False,
    image__pre_norm=False,
    image__pool=("map", "class", "mean"),
    image__pool_heads=0,
    image__activation="gelu_tanh",
    image__norm_eps=1e-6,
    text__causal=False,
    text__pool=("last", "map", "mean"),
    text__activation="gelu_tanh",
    text__norm_eps=1e-6,
)._replace(rule=lambda m: "image.class_token" if m.image.class_token != _pools_class(m) else "")
MODELING = _format("modeling_grain.py", _CODE)
TORCH = _format(
    "the PyTorch reference",
    _PLAIN,
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
    text__projection="matrix",
    text__tokenizer="clip",
    text__end_id=None,
    decoder__norm_eps=1e-5,
    decoder__boxes="query",
    decoder__image_pool="query",
)._replace(rule=lambda m: "decoder" if m.decoder is None else "" if m.decoder.queries else "decoder.queries")
