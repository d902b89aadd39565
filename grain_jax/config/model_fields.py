"""The keys of `model`: towers, region decoder, box head and the joint space."""

import dataclasses
from typing import Any

from grain_jax.config.keys import DEEPEST, WIDEST, NoOptions, count, key, layers, size
from grain_jax.core import named

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu")
PROJECTIONS = ("none", "matrix", "affine")
# What maps come from: what the model has, its patches, the boxes of its queries, or a weighted sum.
MAPS_BY = ("auto", "patches", "regions", "both")
# What a patch is: its value in the last layer, or its last token. auto: the token where a box head reads it.
PATCH_FEATURES = ("auto", "values", "tokens")
# Tower -> the top levels of its parameters, without its projection.
TOWER_MODULES = {"image": ("image", "image_pool"), "text": ("text", "text_norm", "text_pool")}


@dataclasses.dataclass(frozen=True)
class ImageTower:
    """The image tower: "vit" is a vision transformer (docs/method.md, Model) with pre-norm layers.

    A tower of your own (models/towers.py) may ignore keys. All towers use image_size, pool, projection,
    pixel_mean and pixel_std.
    """

    tower: str = key("vit", "The image tower, or a class of your own.", built_in=("vit",))
    options: Any = key(NoOptions, "Options of your own tower class.", options_of="tower")
    image_size: int = size(224, "Height and width of the images in pixels.")
    patch_size: int = size(16, "Height and width of a patch in pixels; must divide image_size.")
    width: int = size(768, "E, the width of a token.")
    depth: int = layers(12, "Number of layers.")
    heads: int = size(12, "Number of attention heads; must divide width.")
    mlp_dim: int = count(3072, "Hidden width of the MLP in each layer.", low=1, high=4 * WIDEST)
    qk_norm: bool = key(True, "Whether a LayerNorm normalises the queries and keys.")
    norm_eps: float = key(1e-6, "Epsilon of the LayerNorms.")
    position_init: str = key("normal", "Initial values of learned positions.", choices=("normal", "sincos2d"))
    position_period: float = key(1e4, "Longest / shortest wave of position_init=sincos2d.", low=1)
    block_init: str = key(
        "trunc_normal", "Initial weights: timm's, PyTorch's.", choices=("trunc_normal", "torch")
    )
    unroll: int = count(0, "Layers in the body of the loop over layers; 0: derived.", high=DEEPEST)
    class_token: bool = key(True, "Whether a learned class token precedes the patches.")
    patch_bias: bool = key(True, "Whether the projection of the patches has a bias.")
    pre_norm: bool = key(False, "Whether a LayerNorm precedes the first layer, as in CLIP.")
    activation: str = key("gelu", "Activation of the MLP; gelu is exact.", choices=ACTIVATIONS)
    positions: bool = key(True, "Whether the tower learns positions of class token and patches.")
    rope: str = key(
        "none",
        "Rotary positions: centres of patches (DINOv3), or their columns and rows (PE-core).",
        choices=("none", "centres", "indices"),
    )
    rope_grid: int = size(14, "Patches per side that rope=indices counts; other grids are scaled to it.")
    rope_theta: float = key(100.0, "Longest wave / shortest wave of the rotary positions.", low=1)
    registers: int = count(0, "Learned tokens without a position after the class token.", high=1000)
    layer_scale: bool = key(False, "Whether outputs of attention and MLP have learned factors.")
    mlp: str = key("plain", "MLP; gated has a second linear layer.", choices=("plain", "gated"))
    key_bias: bool = key(True, "Whether the projection to the keys has a bias.")
    pool: str = key("none", "Pooling; none if the decoder pools.", choices=("none", "class", "map", "mean"))
    pool_heads: int = count(0, "Attention heads of pool=map; 0: heads.", high=WIDEST)
    keep: float = key(1.0, "Fraction of the patches that training keeps.", low=0.01, high=1)
    projection: str = key("matrix", "Map to joint space; affine has a bias.", choices=PROJECTIONS)
    pixel_mean: tuple[float, ...] = key((0.485, 0.456, 0.406), "Mean per channel in [0, 1].")
    pixel_std: tuple[float, ...] = key((0.229, 0.224, 0.225), "Deviation per channel in [0, 1].")


@dataclasses.dataclass(frozen=True)
class TextTower:
    """The text tower: "transformer" is CLIP's (causal, read at each text's end token), or such as SigLIP's.

    A tower of your own (models/towers.py) may ignore keys. All towers use vocab_size, context_length,
    norm_eps, pool, projection, tokenizer, cleaning and pad_id.
    """

    tower: str = key("transformer", "The text tower, or your own class.", built_in=("transformer",))
    options: Any = key(NoOptions, "Options of your own tower class.", options_of="tower")
    vocab_size: int = count(49408, "Size of the vocabulary.", low=3, high=10_000_000)
    context_length: int = count(77, "L, most tokens of a text or row.", low=3, high=1_000_000)
    width: int = size(512, "E, the width of a token.")
    depth: int = layers(12, "Number of layers.")
    heads: int = size(8, "Number of attention heads; must divide width.")
    mlp_dim: int = count(2048, "Hidden width of the MLP in each layer.", low=1, high=4 * WIDEST)
    norm_eps: float = key(1e-5, "Epsilon of the LayerNorms.")
    unroll: int = count(0, "Layers in the body of the loop over layers; 0: derived.", high=DEEPEST)
    causal: bool = key(True, "Whether a token sees only the tokens before it.")
    activation: str = key("quick_gelu", "Activation of the MLP.", choices=ACTIVATIONS)
    pool: str = key("end", "Pooling of the tokens.", choices=("end", "last", "map", "mean"))
    mask_padding: bool = key(False, "Whether attention and pooling ignore the padding.")
    projection: str = key("matrix", "Map to joint space; affine has a bias.", choices=PROJECTIONS)
    tokenizer: str = key("clip", "clip, or the path of a tokenizer.json or SentencePiece .model.")
    cleaning: str = key(
        "lower", "Cleaning of texts.", choices=("lower", "canonical", "siglip", "siglip2", "none")
    )
    pad_id: int = count(0, "Token id of the padding; it matters if the tower sees it.")
    end_id: int | None = count(
        None,
        "Token id that ends a text. None: the highest id of the text; -1: its last id before the padding.",
        low=-1,
    )

    @property
    def packable(self) -> bool:
        """Whether several texts may share a row: no output depends on the padding.

        Raises:
          UserError: `tower` names a class that does not exist, or may not be imported.
        """
        if named.is_external(self.tower):
            return named.find("model.text.tower", self.tower, {}).packable(self)
        return shares_rows(self)

    @property
    def seeks_end(self) -> bool:
        """Whether it matters where in token ids a text ends."""
        return self.mask_padding or self.pool == "end"

    @property
    def has_end_id(self) -> bool:
        """Whether texts end with the token `end_id`."""
        return self.end_id is not None and self.end_id >= 0

    def ends(self, tokens: Any) -> Any:
        """Where the texts of token ids [N, L] end, [N]; 0 for one without the token `end_id`."""
        if self.end_id == -1:
            return ((tokens != self.pad_id).sum(axis=1) - 1).clip(0)
        return (tokens if self.end_id is None else tokens == self.end_id).argmax(axis=1)


def shares_rows(text: Any) -> bool:
    """Whether texts may share the rows of the built-in tower of these keys, a TextTower or a ConfigDict."""
    return text.mask_padding or (text.causal and text.pool == "end")


@dataclasses.dataclass(frozen=True)
class RegionDecoder:
    """DETR-like decoder: `queries` region queries and one more for the image."""

    queries: int = count(5, "Q, the region queries, without the image query.", high=WIDEST)
    width: int = size(512, "E, the width of a token.")
    depth: int = layers(6, "Number of layers.")
    heads: int = size(8, "Number of attention heads; must divide width.")
    mlp_dim: int = count(2048, "Hidden width of the MLP in each layer.", low=1, high=4 * WIDEST)
    dropout: float = key(0.1, "Dropout rate in training.", low=0, high=0.99)
    norm_eps: float = key(1e-5, "Epsilon of the LayerNorms.")
    qkv_init_gain: float = key(1.0, "Factor on initial query, key and value weights.", low=0)
    unroll: int = count(0, "Layers in the body of the loop over layers; 0: derived.", high=DEEPEST)
    image_pool: str = key(
        "query",
        "Image embedding by the image query, all queries or tower.",
        choices=("query", "all", "tower"),
    )
    boxes: str = key(
        "query", "Boxes by an MLP, or as means of boxes that patches predict.", choices=("query", "pointer")
    )
    reads_box: bool = key(False, "Whether region embeddings add the box head's, of the predicted box.")
    class_score: str = key(
        "mean",
        "Region score of a class: by all queries (the paper), or by the best query per description.",
        choices=("mean", "best"),
    )

    @property
    def inputs(self) -> int:
        """The learned vectors: Q region queries, and the image query unless the tower pools."""
        return self.queries + (self.image_pool != "tower")


@dataclasses.dataclass(frozen=True)
class BoxHead:
    """Embeddings of given boxes, beside the decoder or instead of it (models/box_head.py)."""

    kind: str = key("none", "Head that embeds given boxes.", choices=("none", "roi_align"))
    bins: int = count(1, "Parts per side of a box, each with its own weights.", low=1, high=64)
    samples: int = count(4, "Sampled points per side of such a part.", low=1, high=64)
    proposals: bool = key(
        False, "Whether the regions are boxes that patches predict; a decoder then needs boxes=pointer."
    )
    object_weight: float = key(0.05, "Factor of log P(object) beside a proposal's cosine.", low=0)


@dataclasses.dataclass(frozen=True)
class Model:
    """The towers and the width D of the joint space; the defaults are GRAIN B/16."""

    embed_dim: int = size(512, "D, the width of the joint space.")
    logit_scale_init: float = key(1 / 0.07, "Initial logit scale.", low=1, high=100)
    logit_bias_init: float | None = key(None, "Initial logit bias, as in SigLIP; None: no bias.")
    image: ImageTower = key(ImageTower)
    text: TextTower = key(TextTower)
    decoder: RegionDecoder | None = key(RegionDecoder, "The region decoder; None: two towers.")
    boxes: BoxHead = key(BoxHead)
    attention: str = key(
        "auto",
        "Program of self-attention; auto: Pallas on TPUs, cuDNN on CUDA in bfloat16, else XLA.",
        choices=("auto", "xla", "pallas", "cudnn"),
        role="free",
    )

    @property
    def tower_pools(self) -> bool:
        """Whether the image embedding is the image tower's own, by `image.pool` and `image.projection`."""
        return self.decoder is None or self.decoder.image_pool == "tower"

    @property
    def patches_predict_boxes(self) -> bool:
        """Whether patches predict boxes, and whether they show an object (models/region_decoder.py)."""
        return self.boxes.proposals if self.decoder is None else self.decoder.boxes == "pointer"

    def modules(self, tower: str) -> tuple[str, ...]:
        """The top levels of the parameters of the "image" or "text" tower, with its own projection."""
        projection = (f"{tower}_projection",) if tower == "text" or self.tower_pools else ()
        return TOWER_MODULES[tower] + projection

    def part(self, name: str) -> str:
        """The part of a parameter or of its top level: "image", "text", "boxes", "scale" or "decoder"."""
        top = name.partition("/")[0]
        if "logit_" in top:
            return "scale"
        if top in ("box_head", "box_projection") or (top == "pointer" and self.decoder is None):
            return "boxes"
        return next((tower for tower in TOWER_MODULES if top in self.modules(tower)), "decoder")

    @property
    def regions_have_scale(self) -> bool:
        """Whether regions have a logit scale and bias of their own, since the towers keep theirs."""
        return self.decoder is not None and self.decoder.image_pool == "tower"
