"""Sizes of the models of the PyTorch reference, read from the shapes in their state dicts.

The number of heads is not in a state dict; it comes by flag, from the size of the qk-norm, or is assumed.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from grain_jax import config as config_lib
from grain_jax.convert.faults import ConvertError, raise_any
from grain_jax.convert.reference.checkpoint import StateDict
from grain_jax.models import box_head

TOWERS = ("image", "text", "decoder")
MAX_LAYERS = 1000
# (tower, width) -> heads of the reference's own models (clip/custom_models.py and train.py).
REFERENCE_HEADS = {
    ("image", 384): 12,
    ("image", 768): 12,
    ("image", 1024): 16,
    ("text", 512): 8,
    ("decoder", 512): 8,
}


class Inferred(NamedTuple):
    """A model by its sizes, and the source of each number of heads."""

    model: config_lib.Model
    heads: dict[str, str]  # tower -> words for the report


class _Shapes:
    """Reads sizes off the shapes of two state dicts and collects the faults."""

    def __init__(self, states: Mapping[str, StateDict]):
        self.states, self.faults = states, []

    def shape(self, module: str, name: str, axes: int) -> tuple[int, ...]:
        array = self.states[module].get(name)
        if array is None:
            self.faults.append(f"{module} {name}: missing")
        elif array.ndim != axes or 0 in array.shape:
            self.faults.append(f"{module} {name}: got shape {array.shape}, expected {axes} axes")
        else:
            return array.shape
        return (1,) * axes

    def depth(self, module: str, pattern: str) -> int:
        found = [int(m[1]) for name in self.states[module] if (m := re.match(pattern, name))]
        found = [i for i in found if i < MAX_LAYERS]
        if not found:
            self.faults.append(f"{module}: no layer like {pattern}")
        return 1 + max(found, default=0)


def infer(states: Mapping[str, StateDict], heads: Mapping[str, int | None]) -> Inferred:
    """The model that these state dicts are the parameters of.

    Args:
      states: {"backbone": ..., "decoder": ...}.
      heads: "image", "text", "decoder" -> heads, or None to read or assume them.

    Raises:
      ConvertError: an array that gives a size is missing or has another number of axes, or heads do not fit.
    """
    found = _Shapes(states)
    shape, depth = found.shape, found.depth
    _, positions, _ = shape("backbone", "visual.pos_embed", 3)
    image_width, _, patch, _ = shape("backbone", "visual.patch_embed.proj.weight", 4)
    image_mlp, _ = shape("backbone", "visual.blocks.0.mlp.fc1.weight", 2)
    vocab, text_width = shape("backbone", "token_embedding.weight", 2)
    context, _ = shape("backbone", "positional_embedding", 2)
    text_mlp, _ = shape("backbone", "transformer.resblocks.0.mlp.c_fc.weight", 2)
    _, embed_dim = shape("backbone", "text_projection", 2)
    queries, decoder_width = shape("decoder", "query_embed.weight", 2)
    decoder_mlp, _ = shape("decoder", "transformer.decoder.layers.0.linear1.weight", 2)
    image_depth = depth("backbone", r"visual\.blocks\.(\d+)\.")
    text_depth = depth("backbone", r"transformer\.resblocks\.(\d+)\.")
    decoder_depth = depth("decoder", r"transformer\.decoder\.layers\.(\d+)\.")
    grid = math.isqrt(positions - 1)
    raise_any(found.faults)
    if grid * grid != positions - 1:
        raise ConvertError(
            f"backbone visual.pos_embed: got {positions} positions, expected a class token and a square"
        )

    q_norm = states["backbone"].get("visual.blocks.0.attn.q_norm.weight")
    head_dim = q_norm.size if q_norm is not None else None
    widths = {"image": image_width, "text": text_width, "decoder": decoder_width}
    count, words, faults = {}, {}, []
    for tower, width in widths.items():
        count[tower], words[tower] = _heads(
            tower, width, heads.get(tower), head_dim if tower == "image" else None, faults
        )
    raise_any(faults)
    # Norm epsilons and dropout are constants of the reference; the initialisers are not used.
    model = config_lib.Model(
        embed_dim=embed_dim,
        logit_scale_init=1 / 0.07,
        logit_bias_init=None,
        image=config_lib.ImageTower(
            image_size=grid * patch,
            patch_size=patch,
            width=image_width,
            depth=image_depth,
            heads=count["image"],
            mlp_dim=image_mlp,
            qk_norm=q_norm is not None,
            norm_eps=1e-6,
            position_init="normal",
            position_period=1e4,
            block_init="torch",
            unroll=1,
        ),
        text=config_lib.TextTower(
            vocab_size=vocab,
            context_length=context,
            width=text_width,
            depth=text_depth,
            heads=count["text"],
            mlp_dim=text_mlp,
            norm_eps=1e-5,
            unroll=1,
        ),
        decoder=config_lib.RegionDecoder(
            queries=queries - 1,
            width=decoder_width,
            depth=decoder_depth,
            heads=count["decoder"],
            mlp_dim=decoder_mlp,
            dropout=0.1,
            qkv_init_gain=1.0,
            norm_eps=1e-5,
            unroll=1,
        ),
    )
    return Inferred(model, words)


def _heads(
    tower: str, width: int, flag: int | None, head_dim: int | None, faults: list[str]
) -> tuple[int, str]:
    """The number of heads of a tower, and its source for the report."""
    if head_dim is not None and width % head_dim == 0:
        read_off = width // head_dim
        if flag is not None and flag != read_off:
            faults.append(
                f"--{tower}-heads: got {flag}, but the qk-norm of size {head_dim} means {read_off}"
            )
        return read_off, f"{read_off} (width {width}; read from the qk-norm's size {head_dim})"
    if flag is not None:
        if flag < 1 or width % flag:
            faults.append(f"--{tower}-heads: got {flag}, expected a divisor of the width {width}")
        return flag, f"{flag} (width {width}; given by --{tower}-heads)"
    if (tower, width) in REFERENCE_HEADS:
        known = REFERENCE_HEADS[tower, width]
        return known, f"{known} (width {width}; ASSUMED, as in the reference's models)"
    if width % 64 == 0:
        return width // 64, f"{width // 64} (width {width}; ASSUMED, heads of size 64)"
    faults.append(
        f"--{tower}-heads: must be given; a width of {width} does not tell the number of heads"
    )
    return 1, ""


def sizes_of(model: config_lib.Model) -> dict[str, dict[str, int]]:
    """Tower of the model -> the letters in the shapes of `names`, and "layers"."""
    out: dict[str, dict[str, int]] = {}
    for tower in TOWERS:
        c = getattr(model, tower)
        if c is None:
            continue
        out[tower] = dict(
            E=c.width,
            F=c.mlp_dim,
            K=c.heads,
            h=c.width // c.heads,
            D=model.embed_dim,
            layers=c.depth,
        )
    grid = model.image.image_size // model.image.patch_size
    positions = int(model.image.class_token) + grid * grid
    out["image"] |= dict(N=positions, p=model.image.patch_size)
    out["text"] |= dict(V=model.text.vocab_size, L=model.text.context_length)
    if model.boxes.kind != "none":
        bins = model.boxes.bins**2 if model.boxes.kind == "roi_align" else 1
        out["boxes"] = out["image"] | dict(B=bins * model.image.width, P=box_head.PLACE, layers=1)
    if model.decoder is not None:
        out["decoder"] |= dict(I=model.image.width, Q=model.decoder.queries)
    return out
