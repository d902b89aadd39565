"""Every key of a run: its type, default, bounds or choices, and its role, in one declaration each.

`grain_jax.config.recipe` makes the ConfigDict of the defaults from these classes, `parse` makes the classes from a
dict, and `checks` finds values out of bounds and keys that contradict each other.
"""

import dataclasses
import math
import re
from typing import Any, Literal

from grain_jax.config.evals import Evaluator
from grain_jax.core import named

# What a run that resumes with another value of the key is:
# - "order": the key decides which examples a step sees. The trainer refuses to resume.
# - "numbers": it decides what a step computes from them. `grain-jax sweep` calls it another run.
# - "result": it changes how a run starts or ends or what is measured, not how a step computes. `grain-jax sweep`
#   calls it another run.
# - "free": it changes where a run computes, how fast, or what is kept and shown. The same run.
Role = Literal["order", "numbers", "result", "free"]

REMAT_POLICIES = ("none", "dots", "qkv", "full")  # from most memory to most recomputation
DTYPES = ("float32", "bfloat16")
IMAGE_TOWERS = ("vit",)
TEXT_TOWERS = ("transformer",)
SOURCES = ("records", "synthetic")
ATTENTIONS = ("auto", "xla", "pallas", "cudnn")
MLP_PROGRAMS = ("auto", "xla", "pallas")
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu")
ROPES = ("none", "centres")
MLPS = ("plain", "gated")
PROJECTIONS = ("none", "matrix", "affine")
IMAGE_POOLS = ("none", "class", "map", "mean")
TEXT_POOLS = ("end", "last", "map", "mean")
TEXT_CLEANINGS = ("lower", "canonical", "none")
BOX_HEADS = ("none", "roi_align")
# The dense maps in a layer of a built-in tower, and the number of axes of their input.
LAYER_MAPS = {
    **dict.fromkeys(("attention/query", "attention/key", "attention/value"), 1),
    "attention/out": 2,  # heads and their width
    **dict.fromkeys(("mlp/in", "mlp/gate", "mlp/out"), 1),
}
# Pairs of which exactly one is set; the command line's choice wins over the config file's.
EITHER_OR = (("total_steps", "total_epochs"), ("optim.warmup_steps", "optim.warmup_epochs"))

MOST = 2**31 - 1  # steps and sizes are int32 on the devices
WIDEST = 2**17  # several times any published width or image size; more is a typing error
DEEPEST = 10_000


def key(
    default: Any = dataclasses.MISSING,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    choices: tuple[str, ...] = (),
    role: Role | None = None,
    built_in: tuple[str, ...] = (),
    options_of: str = "",
) -> Any:
    """The declaration of a key, or of a group of keys.

    Args:
      default: its value; the class of a group, for a group with its defaults. Without one the key must be given.
      low: the smallest value.
      high: the largest value.
      choices: the values of a key that names one.
      role: see Role; None takes that of the group.
      built_in: names that the package has; the key is one of them, or `module:Name` of a class (grain_jax/core/named.py).
      options_of: the key beside this one that names a class: the group has the keys of its `Options`, a frozen
        dataclass. Without options, and of a built-in name, it is NoOptions.
    """
    declared = dict(low=low, high=high, choices=choices, role=role, built_in=built_in)
    declared["options_of"] = options_of
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=declared)
    return dataclasses.field(default=default, metadata=declared)


def count(default: Any = dataclasses.MISSING, *, low: float = 0, high: float = MOST, **more) -> Any:
    """`key` of a whole number of 32 bits."""
    return key(default, low=low, high=high, **more)


def size(default: Any) -> Any:
    """`key` of a size of a tower."""
    return count(default, low=1, high=WIDEST)


def layers(default: Any) -> Any:
    """`key` of a number of layers."""
    return count(default, low=1, high=DEEPEST)


def default_of(field: dataclasses.Field) -> Any:
    """The field's default; MISSING where it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """The options of a class that has none, and of the built-in ones, which have keys of their own."""


@dataclasses.dataclass(frozen=True)
class ImageTower:
    """The image tower: "vit" is a vision transformer (docs/method.md, Model) with learned positions and pre-norm layers.

    Another tower (models/towers.py) reads of these keys what it likes; all towers have image_size, pool, projection,
    pixel_mean and pixel_std.
    """

    # "vit", or a class of your own (models/towers.py).
    tower: str = key("vit", built_in=IMAGE_TOWERS)
    # Of a class of your own.
    options: Any = key(NoOptions, options_of="tower")
    image_size: int = size(224)  # pixels, height = width
    patch_size: int = size(16)  # pixels; must divide image_size
    width: int = size(768)  # E, of a token
    depth: int = layers(12)  # number of layers
    heads: int = size(12)  # of attention; must divide width
    mlp_dim: int = count(3072, low=1, high=4 * WIDEST)  # hidden width of the MLP of a layer
    qk_norm: bool = key(True)  # LayerNorm on the queries and keys of each head
    norm_eps: float = key(1e-6)  # epsilon of the LayerNorms
    # "normal" (0.02) or "sincos2d"; the positions are learned either way.
    position_init: str = key("normal", choices=("normal", "sincos2d"))
    position_period: float = key(1e4, low=1)  # of sincos2d: longest wave / shortest wave
    # "trunc_normal" (0.02, zero biases), or "torch", which narrow towers want.
    block_init: str = key("trunc_normal", choices=("trunc_normal", "torch"))
    # Layers of the scan that are unrolled; depth = no loop (faster for tiny towers on a CPU). 0: all of up to 24 where a
    # Pallas kernel writes what the backward pass keeps, since a loop would copy it, and mesh.fsdp is 1; else 1.
    unroll: int = count(0, high=DEEPEST)
    class_token: bool = key(True)  # a learned token before the patches
    patch_bias: bool = key(True)  # a bias in the projection of the patches
    # LayerNorm between the positions and the first layer (CLIP's ln_pre).
    pre_norm: bool = key(False)
    activation: str = key("gelu", choices=ACTIVATIONS)  # of the MLP; "gelu" is exact
    positions: bool = key(True)  # learned positions, of the class token and the patches
    # Rotary positions of the patches in queries and keys: "none", or "centres" of patches in [-1, 1] (DINOv3).
    rope: str = key("none", choices=ROPES)
    rope_theta: float = key(100.0, low=1)  # of rope: longest wave / shortest wave
    registers: int = count(0, high=1000)  # learned tokens after the class token, without a position
    # A learned factor for each channel of what attention and MLP add.
    layer_scale: bool = key(False)
    # Of a layer: "plain", or "gated" by a second linear layer (with silu: SwiGLU).
    mlp: str = key("plain", choices=MLPS)
    key_bias: bool = key(True)  # a bias in the projection to the keys
    # How tokens become one vector where there is no decoder: "class" (the class token), "map" (attention
    # pooling) or "mean". "none" where there is a decoder.
    pool: str = key("none", choices=IMAGE_POOLS)
    # Share of the patches that training sees, drawn anew for each image and step. Evaluations and exports see all.
    keep: float = key(1.0, low=0.01, high=1)
    # To the joint space: "matrix", "affine" (with a bias) or "none".
    projection: str = key("matrix", choices=PROJECTIONS)
    # Of pixels in [0, 1], a number a channel; the defaults are ImageNet's.
    pixel_mean: tuple[float, ...] = key((0.485, 0.456, 0.406))
    # As pixel_mean: the standard deviations.
    pixel_std: tuple[float, ...] = key((0.229, 0.224, 0.225))


@dataclasses.dataclass(frozen=True)
class TextTower:
    """The text tower: "transformer" is CLIP's (causal, read at the end token of each text), or one such as SigLIP's.

    Another tower (models/towers.py) reads of these keys what it likes; all towers have vocab_size, context_length,
    norm_eps, pool, projection, tokenizer, cleaning and pad_id.
    """

    # "transformer", or a class of your own (models/towers.py).
    tower: str = key("transformer", built_in=TEXT_TOWERS)
    # Of a class of your own.
    options: Any = key(NoOptions, options_of="tower")
    vocab_size: int = count(49408, low=3, high=10_000_000)  # tokens that the tokenizer knows
    context_length: int = count(77, low=3, high=1_000_000)  # L, also the length of a packed row
    width: int = size(512)  # E, of a token
    depth: int = layers(12)  # number of layers
    heads: int = size(8)  # of attention; must divide width
    mlp_dim: int = count(2048, low=1, high=4 * WIDEST)  # hidden width of the MLP of a layer
    norm_eps: float = key(1e-5)  # epsilon of the LayerNorms
    unroll: int = count(0, high=DEEPEST)  # as of the image tower
    causal: bool = key(True)  # False: every position sees all of the row
    # As that of the image tower.
    activation: str = key("quick_gelu", choices=ACTIVATIONS)
    # "end": the end token; "last": the last position of the row; "map" (attention pooling) and "mean": all of
    # the row.
    pool: str = key("end", choices=TEXT_POOLS)
    # Whether no position attends to the padding and no pooling sees it ("last" is the end token): then texts may share
    # rows (text.packing). It changes the function of a tower such as SigLIP's, and needs the end (end_id).
    mask_padding: bool = key(False)
    projection: str = key("matrix", choices=PROJECTIONS)  # as that of the image tower
    # "clip", or the path of a tokenizer.json or of a SentencePiece .model.
    tokenizer: str = key("clip")
    # Of texts before the tokenizer: "lower", "canonical" (no punctuation) or "none".
    cleaning: str = key("lower", choices=TEXT_CLEANINGS)
    # The token of the padding; it matters only to towers that are not packable.
    pad_id: int = count(0)
    # The token that ends a text, by which pool="end" and mask_padding find the end in token ids; None: the highest id of
    # the text.
    end_id: int | None = count(None)

    @property
    def packable(self) -> bool:
        """Whether several texts may share a row: no output depends on the padding.

        Raises:
          UserError: `tower` names a class that is not there, or may not be imported.
        """
        if named.is_external(self.tower):
            return named.find("model.text.tower", self.tower, {}).packable(self)
        return shares_rows(self)

    @property
    def seeks_end(self) -> bool:
        """Whether it matters where in token ids a text ends."""
        return self.mask_padding or self.pool == "end"

    def ends(self, tokens: Any) -> Any:
        """Where the texts of token ids [N, L] end, [N]; 0 for one without the token `end_id`."""
        return (tokens if self.end_id is None else tokens == self.end_id).argmax(axis=1)


def shares_rows(text: Any) -> bool:
    """Whether texts may share the rows of the built-in tower of these keys, a TextTower or a ConfigDict."""
    return text.mask_padding or (text.causal and text.pool == "end")


@dataclasses.dataclass(frozen=True)
class RegionDecoder:
    """DETR-like decoder: `queries` region queries and one more for the image."""

    queries: int = count(5, high=WIDEST)  # Q, without the image query
    width: int = size(512)  # E, of a token
    depth: int = layers(6)  # number of layers
    heads: int = size(8)  # of attention; must divide width
    mlp_dim: int = count(2048, low=1, high=4 * WIDEST)  # hidden width of the MLP of a layer
    dropout: float = key(0.1, low=0, high=0.99)  # rate, in training
    norm_eps: float = key(1e-5)  # epsilon of the LayerNorms
    # Factor on the initial query, key and value weights; 1 = xavier, as the reference.
    qkv_init_gain: float = key(1.0, low=0)
    unroll: int = layers(1)  # layers of the scan that are unrolled; depth = no loop
    # The image embedding: that of the image "query", or the sum of those of "all" queries.
    image_pool: str = key("query", choices=("query", "all"))


@dataclasses.dataclass(frozen=True)
class BoxHead:
    """Embeddings of given boxes, beside the decoder or instead of it (models/box_head.py)."""

    # "roi_align": the tokens in the box, averaged and projected.
    kind: str = key("none", choices=BOX_HEADS)
    # Of roi_align: parts of a box along each side, each with weights of its own.
    bins: int = count(1, low=1, high=64)
    samples: int = count(4, low=1, high=64)  # of roi_align: points of a part along each side


@dataclasses.dataclass(frozen=True)
class Model:
    """The towers and the width D of the joint space; the defaults are GRAIN B/16."""

    embed_dim: int = size(512)  # D, width of the joint space
    # The factor itself, not its logarithm; CLIP's 1 / 0.07, SigLIP's 10.
    logit_scale_init: float = key(1 / 0.07, low=1, high=100)
    # Of loss.contrast=sigmoid; SigLIP's is -10. None: no bias.
    logit_bias_init: float | None = key(None)
    image: ImageTower = key(ImageTower)
    text: TextTower = key(TextTower)
    decoder: RegionDecoder | None = key(RegionDecoder)  # None: two towers, without regions
    boxes: BoxHead = key(BoxHead)
    # The program of the towers' self-attention, for the same numbers up to rounding (docs/performance.md). "auto": a Pallas
    # kernel on TPUs, cuDNN on CUDA in bfloat16, else XLA's.
    attention: str = key("auto", choices=ATTENTIONS, role="free")
    # The program of norm, MLP and residual of the layers of the towers, likewise. "auto": a Pallas kernel on TPUs whose
    # memory holds the weights of a layer, with remat=none and mesh.fsdp=1, else XLA's.
    mlp: str = key("auto", choices=MLP_PROGRAMS, role="free")


@dataclasses.dataclass(frozen=True)
class Init:
    """Checkpoints that the towers start from; None: random weights."""

    # Of the image tower: ours, big_vision's .npz (`path:sub-tree`), CLIP's or SigLIP's.
    image: str | None = key(None)
    # Of the text tower, with its projection.
    text: str | None = key(None)
    # How image positions become those of another grid.
    resize: str = key("bilinear", choices=("bilinear", "bicubic"))
    # Ours: the decoder, the projections of image and regions, the boxes, the logit scale, an equal box head; of two
    # towers the logit scale and bias, and that head.
    decoder: str | None = key(None)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A record set and its share of the examples."""

    name: str = key()  # of the record set: data_dir/name/VERSION
    data_dir: str = key(role="free")  # folder of record sets
    weight: float = key()  # more than 0; the share is weight / sum of all weights
    split: str = key("train")  # of the record set


@dataclasses.dataclass(frozen=True)
class Input:
    """Which examples are read, in which order, and how they are varied."""

    # "records" (TFDS-format TFRecords), "synthetic" (random, no TensorFlow) or a class of your own
    # (input_pipeline/sources.py).
    source: str = key("records", built_in=SOURCES, role="order")
    # Of a class of your own.
    options: Any = key(NoOptions, options_of="source", role="order")
    data_dir: str = key("", role="free")  # folder of record sets
    name: str = key("", role="order")  # of the record set: data_dir/name/VERSION
    # Command that makes the data set where it is missing.
    prepare: str | None = key(None, role="free")
    # Sub-batches with shards of their own (docs/method.md, Order of the data); a constant of the run.
    # None: derived (input_pipeline/derived.py), as text.pack_group and text.pack_rows.
    lanes: int | None = count(None, low=1, role="order")
    # Shards that are read whole and permuted together.
    shards_per_block: int = count(1, low=1, role="order")
    max_regions: int = count(5)  # R: the regions with the highest scores are kept
    # Chance that the synthetic caption replaces the web caption.
    synthetic_caption_rate: float = key(0.5, low=0, high=1)
    # The descriptions of so many regions, best scores first, are added to the caption.
    descriptions_in_captions: int = count(0)
    # C, captions of an image, all of them its positives: 1 is drawn as above; 2 are the web and the synthetic one,
    # whatever the rate; 3 are these and the descriptions of the best `descriptions_in_captions` regions, joined (0: of
    # all).
    captions_per_image: int = count(1, low=1, high=3)
    # Most tokens of a text, shorter than the tower's (CLIPA); without text.packing a row is as long. 0: those of
    # model.text.context_length.
    text_length: int = count(0, high=1_000_000)
    # H, the hard negatives of a region that are read from the records, for loss.hard_negative. Of more, each visit of an
    # image takes others.
    negatives_per_region: int = count(0, high=1000)
    # Chance that an image is mirrored, with its boxes; an image whose texts say left or right never is.
    flip_rate: float = key(0.0, low=0, high=1)
    # Smallest share of the image that a random crop keeps; 1 = no crop.
    crop_min_area: float = key(1.0, low=0.01, high=1)
    reader_threads: int = count(0, role="free")  # of tf.data; 0 = it chooses
    # A mixture, instead of `data_dir` and `name`.
    datasets: tuple[Dataset, ...] = key((), role="order")

    @property
    def sets(self) -> tuple[Dataset, ...]:
        """The sets of the mixture, or the single one."""
        return self.datasets or (Dataset(self.name, self.data_dir, 1.0),)

    @property
    def texts_per_image(self) -> int:
        """Captions, descriptions and negatives, at most."""
        return self.captions_per_image + self.max_regions * (1 + self.negatives_per_region)


@dataclasses.dataclass(frozen=True)
class Text:
    """How texts are laid out in rows (docs/method.md, Packing)."""

    packing: bool = key(True)  # several texts share a row; False: a padded row for each text
    pack_group: int | None = count(None, low=1)  # consecutive images that share rows
    pack_rows: int | None = count(None, low=1)  # rows per group
    # The run ends where a larger share of the texts between two lines of metrics.jsonl does not fit; 1 = never.
    max_dropped_share: float = key(0.1, low=0, high=1, role="free")


class TermEntry(dict[str, Any]):
    """An entry of `loss.terms`: `term`, `weight`, and the options of the term."""


@dataclasses.dataclass(frozen=True)
class Loss:
    """Weights and switches of the losses (docs/method.md, Losses and Where it differs)."""

    image_caption: float = key(1.0)  # weight of L_ic, images and captions
    region_description: float = key(1.0)  # weight of L_rd, regions and descriptions
    box: float = key(1.0)  # weight of L_box, predicted and annotated boxes
    # Weight of L_id, images and all of their descriptions.
    image_description: float = key(0.0)
    # Weight of L_bd, annotated boxes and their descriptions; it needs model.boxes.
    box_description: float = key(0.0)
    # Weight of L_hard, regions and descriptions against input.negatives_per_region hard negatives.
    hard_negative: float = key(0.0)
    # Contrastive loss type: "softmax" (InfoNCE) or "sigmoid" (each pair alone, as SigLIP).
    contrast: str = key("softmax", choices=("softmax", "sigmoid"))
    group_size: int = count(0)  # images whose descriptions are negatives of each other; 0 = all
    mask_duplicates: bool = key(True)  # equal texts are not negatives of each other
    match_l1: float = key(5.0)  # weight of L1 in the matching cost
    match_giou: float = key(2.0)  # weight of -GIoU in the matching cost
    # Weight of -cosine(region, description) in the matching cost.
    match_description: float = key(0.0)
    deep_supervision: bool = key(False)  # adds the box loss of the earlier decoder layers
    # Rows and columns of a tile of similarities (losses/streaming.py); no effect on the result.
    tile: int = count(1024, low=1, role="free")
    # Neighbouring devices that gather their columns before these go round the ring; no effect but on rounding.
    gather: int = count(1, low=1, role="free")
    # Of the products of float32 embeddings on TPUs: "high" (three passes of bfloat16; the ring sends 16 bits of a
    # mantissa) or "highest" (six). GPUs and CPUs multiply float32.
    precision: str = key("high", choices=("high", "highest"), role="free")
    # Further loss terms by name: {"term": "module:function or Class", "weight": 0.1, and its own options}
    # (losses/total.py).
    terms: dict[str, TermEntry] = key(dict)


@dataclasses.dataclass(frozen=True)
class Lora:
    """LoRA: low-rank factors A and B beside dense maps of the towers, y = x W + (alpha / rank) (x A) B.

    Of a tower that has them nothing else is trained.
    """

    rank: int = count(0, high=WIDEST)  # of the factors; 0 = off
    alpha: float = key(8.0, low=1e-3, high=1e6)  # the factors' product is scaled by alpha / rank
    # Regular expressions of whole names of maps: TOWER/blocks/attention/ with query, key, value or out,
    # TOWER/blocks/mlp/ with in, gate or out.
    modules: tuple[str, ...] = key(
        ("(image|text)/blocks/(attention|mlp)/(query|key|value|out|in|gate)",)
    )

    @property
    def scale(self) -> float:
        """alpha / rank; 0 where it is off."""
        return self.alpha / self.rank if self.rank else 0.0

    def has(self, tower: str) -> bool:
        """Whether maps of that tower, "image" or "text", have factors."""
        names = [f"{tower}/blocks/{name}" for name in LAYER_MAPS]
        return self.rank > 0 and any(re.fullmatch(p, name) for p in self.modules for name in names)


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW and its schedule (docs/method.md, Training recipe)."""

    learning_rate: float = key(1e-3)  # the peak, at the end of the warm-up
    warmup_init: float = key(1e-6)  # learning rate of step 0
    end_learning_rate: float = key(1e-5)  # learning rate of the last step
    warmup_steps: int | None = count(None)  # set this or warmup_epochs
    warmup_epochs: float | None = key(None, low=0)  # set this or warmup_steps
    b1: float = key(0.9)  # decay of the first moment of AdamW
    b2: float = key(0.98)  # decay of the second moment of AdamW
    eps: float = key(1e-8)  # epsilon of AdamW
    moment_dtype: str = key("float32", choices=DTYPES)  # of the first moment; "bfloat16" halves it
    weight_decay: float = key(0.1)  # of AdamW, times the learning rate
    clip_norm: float = key(0.0, low=0)  # largest global norm of the gradients; 0 = off
    # Regular expressions of parameters that are never updated (LiT).
    frozen: tuple[str, ...] = key(())
    # Factor per layer of the learning rates of the towers (optim.layer_scales); 1 = off.
    layer_decay: float = key(1.0, low=0.01, high=1)
    lora: Lora = key(Lora)


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Device mesh; the batch is cut over data and fsdp."""

    data: int = count(-1, low=-1)  # devices that cut the batch alone; -1: what the others leave
    fsdp: int = count(1, low=1)  # devices that cut the batch, parameters and moments
    tensor: int = count(1, low=1)  # devices that cut heads and MLPs
    # Slices or nodes, joined by the slow network; only `data` is cut over them.
    dcn_data: int = count(1, low=1)


@dataclasses.dataclass(frozen=True)
class Suite:
    """A suite of evaluations (configs/eval.py); the entries are made from the other keys."""

    evals: dict[str, Evaluator] = key()  # entries of evaluators by name
    data_dir: str = key("")  # of TFDS
    folders: str = key("")  # of the sets that are no TFDS sets
    descriptions: str | None = key(None)  # folder of NAME.json
    templates: str | None = key(None)  # file of prompts
    alphas: tuple[float, ...] = key(())  # shares of the global score


@dataclasses.dataclass(frozen=True)
class Wandb:
    """Weights & Biases, beside TensorBoard."""

    # "offline" writes into the workdir, for `wandb sync`.
    mode: str = key("off", choices=("off", "online", "offline"))
    project: str = key("grain_jax")  # of Weights & Biases
    name: str = key("")  # of the run; "" = the name of the workdir


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run. The defaults are the recipe of the paper for GRAIN B/16 (docs/method.md, Training recipe)."""

    # Of the parameters, of the order of the data and of every draw.
    seed: int = key(0, low=-(2**63), high=2**63 - 1, role="order")
    # Length of the run: set this or total_epochs.
    total_steps: int | None = count(None, low=1, role="result")
    # Length of the run: set this or total_steps.
    total_epochs: float | None = key(None, low=0, high=1e6, role="result")
    batch_size: int = count(2048, low=1, role="order")  # images a step, over all devices
    # The towers see batch_size / microbatches images at a time; the loss sees all.
    microbatches: int = count(1, low=1, role="free")
    dtype: str = key("bfloat16", choices=DTYPES, role="numbers")  # of activations
    # What the backward pass computes again instead of keeping: nothing ... all of a layer.
    remat: str = key("none", choices=REMAT_POLICIES, role="free")
    # Of the average of the parameters over steps; 0 = no average is kept.
    ema_decay: float = key(0.0, low=0, high=1, role="numbers")
    log_every: int = count(50, low=1, role="free")  # steps between lines of metrics.jsonl
    checkpoint_every: int = count(1000, role="free")  # steps; 0 = only the last
    checkpoint_every_minutes: float = key(0.0, low=0, role="free")  # 0 = by steps only
    checkpoint_keep: int = count(2, low=1, role="free")  # how many of the newest are kept
    # Checkpoints of steps that this divides are kept, too; 0 = none.
    checkpoint_keep_every: int = count(0, role="free")
    # The best checkpoint by this key of metrics.jsonl, e.g. "loss", is kept, too; "" = none.
    checkpoint_best_metric: str = key("", role="free")
    # Whether the largest or the smallest value of checkpoint_best_metric is best.
    checkpoint_best_mode: str = key("max", choices=("max", "min"), role="free")
    eval_every: int = count(0, role="result")  # steps between evaluations; 0 = after the last only
    # Test images that are drawn with their regions after the last step; 0 = none.
    pictures: int = count(0, role="free")
    profile_start: int = count(0, role="free")  # first step of a profiler trace; 0 = none
    profile_steps: int = count(3, low=1, role="free")  # steps of the trace
    wandb: Wandb = key(Wandb, role="free")
    model: Model = key(Model, role="numbers")
    input: Input = key(Input, role="numbers")
    text: Text = key(Text, role="numbers")
    loss: Loss = key(Loss, role="numbers")
    optim: Optim = key(Optim, role="numbers")
    # Whether losses, weight decay and learning rate are the PyTorch reference's (quirks 1, 7, 12 and 15).
    reference: bool = key(False, role="numbers")
    mesh: Mesh = key(Mesh, role="free")
    # Logical axis of a parameter -> mesh axis. Exhaustive: an axis in no row is an error.
    sharding: tuple[tuple[str, str | None], ...] = key(
        (
            ("layers", None),
            ("width", "fsdp"),
            ("mlp", "tensor"),
            ("heads", "tensor"),
            ("head_dim", None),
            ("vocab", "tensor"),
            ("patch", None),
            ("positions", None),
            ("queries", None),
            ("embed", None),
            ("vector", None),
        ),
        role="free",
    )
    # What is measured: entries of evaluators by name (docs/evaluate.md).
    evals: dict[str, Evaluator] = key(dict, role="result")
    init: Init = key(Init, role="result")

    @property
    def frozen(self) -> tuple[str, ...]:
        """Regular expressions of all parameters that are never updated: `optim.frozen`, and all but the factors in a tower
        that has those of `optim.lora`.
        """
        image = "image" if self.model.decoder is not None else "image(_pool|_projection)?"
        towers = {"image": image, "text": "text(_norm|_pool|_projection)?"}
        of_lora = [parts for tower, parts in towers.items() if self.optim.lora.has(tower)]
        return (*self.optim.frozen, *(f"{parts}/(?!.*/lora_[ab]$).*" for parts in of_lora))

    @property
    def text_length(self) -> int:
        """Most tokens of a text in training."""
        return self.input.text_length or self.model.text.context_length

    @property
    def row_length(self) -> int:
        """L, the tokens of a row in training."""
        return self.model.text.context_length if self.text.packing else self.text_length

    @property
    def text_layout(self) -> tuple[int, int]:
        """(images of a packing group, rows of a group); without packing, an image and a row for each text.

        Raises:
          ValueError: the numbers are open (input_pipeline/derived.py).
        """
        text = self.text
        if not text.packing:
            return 1, self.input.texts_per_image
        if text.pack_group is None or text.pack_rows is None:
            raise ValueError("text.pack_group, text.pack_rows: got None, expected derived numbers")
        return text.pack_group, text.pack_rows
