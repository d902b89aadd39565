"""Every key of a run, in one declaration each: type, default, bounds or choices, role and help.

model_fields has the keys of `model`.

`grain_jax.config.recipe` makes the ConfigDict of the defaults from these classes, `parse` makes the classes
from a dict, and `checks` finds keys that contradict each other.
"""

import dataclasses
import re
from typing import Any

from grain_jax.config.keys import WIDEST, NoOptions, OpenGroup, count, key, share
from grain_jax.config.model_fields import Model

REMAT_POLICIES = ("none", "dots", "qkv", "full")  # from most memory to most recomputation
DTYPES = ("float32", "bfloat16")
# The dense layers in a layer of a built-in tower, and the number of axes of their input.
LAYER_MAPS = {
    **dict.fromkeys(("attention/query", "attention/key", "attention/value"), 1),
    "attention/out": 2,  # heads and their width
    **dict.fromkeys(("mlp/in", "mlp/gate", "mlp/out"), 1),
}
# Pairs of which exactly one is set; the command line's choice wins over the config file's.
EITHER_OR = (("total_steps", "total_epochs"), ("optim.warmup_steps", "optim.warmup_epochs"))


@dataclasses.dataclass(frozen=True)
class Init:
    """Checkpoints that the towers start from; None: random weights."""

    image: str | None = key(None, "Folder with the weights of the image tower.")
    text: str | None = key(None, "Folder with the weights of the text tower.")
    decoder: str | None = key(None, "Folder with the weights of decoder, heads and logit scale.")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset of a mixture and its share of the examples."""

    name: str = key(help="Name of the dataset: records are in data_dir/name/VERSION.")
    data_dir: str = key(help="Folder of datasets.", role="free")
    weight: float = key(help="Weight above 0; the share of examples is weight / sum of weights.")
    split: str = key("train", "Split of the dataset.")


@dataclasses.dataclass(frozen=True)
class Input:
    """Which examples are read, in which order, and how they are varied."""

    source: str = key("records", "Source of examples.", built_in=("records", "synthetic"), role="order")
    options: Any = key(NoOptions, "Options of your source.", options_of="source", role="order")
    data_dir: str = key("", "Folder of datasets.", role="free")
    name: str = key("", "Name of the dataset: records are in data_dir/name/VERSION.", role="order")
    prepare: str | None = key(None, "Command that makes a missing dataset.", role="free")
    lanes: int | None = count(None, "Parts of the batch with own shards; None: derived.", low=1, role="order")
    shards_per_block: int = count(1, "Shards that are shuffled together.", low=1, role="order")
    max_regions: int = count(5, "R, the most regions per image; the highest scores stay.")
    synthetic_caption_rate: float = share(0.5, "Probability of the synthetic caption.")
    descriptions_in_captions: int = count(0, "Descriptions that are added to the caption.")
    captions_per_image: int = count(1, "1: one of both; 2: both; 3: also descriptions.", low=1, high=3)
    text_length: int = count(0, "Tokens of the longest text; 0: context length.", high=1_000_000)
    negatives_per_region: int = count(0, "H, the hard negatives per region and visit.", high=1000)
    flip_rate: float = share(0.0, "Probability of mirroring, unless a text says left or right.")
    crop_min_area: float = key(1.0, "Smallest share that a crop keeps; 1: off.", low=0.01, high=1)
    reader_threads: int = count(0, "Threads of tf.data; 0: tf.data decides.", role="free")
    datasets: tuple[Dataset, ...] = key((), "A mixture, instead of a name.", role="order")

    @property
    def sets(self) -> tuple[Dataset, ...]:
        """The datasets of the mixture, or the single one."""
        return self.datasets or (Dataset(self.name, self.data_dir, 1.0),)

    @property
    def texts_per_image(self) -> int:
        """Most captions, descriptions and negatives per image."""
        return self.captions_per_image + self.max_regions * (1 + self.negatives_per_region)


@dataclasses.dataclass(frozen=True)
class Text:
    """How texts are laid out in rows (docs/method.md, Packing)."""

    packing: bool = key(True, "Whether several texts share a row. False: a padded row per text.")
    pack_group: int | None = count(None, "Images that share rows; None: derived.", low=1)
    pack_rows: int | None = count(None, "Rows per group of images. None: derived.", low=1)
    max_dropped_share: float = share(0.1, "The run ends if more texts are dropped.", role="free")


@dataclasses.dataclass(frozen=True)
class Loss:
    """Weights and switches of the losses (docs/method.md, Losses and Where it differs)."""

    image_caption: float = key(1.0, "Weight of L_ic, images and captions.")
    region_description: float = key(1.0, "Weight of L_rd, regions and descriptions.")
    box: float = key(1.0, "Weight of L_box, predicted and annotated boxes.")
    token_boxes: float = key(3.0, "Weight in L_box of the boxes of patches (decoder.boxes=pointer).")
    agreement: bool = key(
        False,
        "Whether regions count by how well the box head finds that box and text agree; for noisy boxes.",
    )
    image_description: float = key(0.0, "Weight of L_id, images and all of their descriptions.")
    box_description: float = key(0.0, "Weight of L_bd, annotated boxes; needs model.boxes.")
    hard_negative: float = key(0.0, "Weight of L_hard, regions and their hard negatives.")
    contrast: str = key("softmax", "Contrastive loss.", choices=("softmax", "sigmoid"))
    group_size: int = count(0, "Images that share negative descriptions; 0: the whole batch.")
    mask_duplicates: bool = key(True, "Whether equal texts are left out as negatives.")
    match_l1: float = key(5.0, "Weight of L1 in the matching cost.")
    match_giou: float = key(2.0, "Weight of -GIoU in the matching cost.")
    match_description: float = key(0.0, "Weight of -cosine(region, text) in the matching cost.")
    deep_supervision: bool = key(False, "Whether each earlier decoder layer adds its box loss.")
    tile: int = count(1024, "A part of the similarity matrix has its square.", low=1, role="free")
    precision: str = key(
        "high", "Passes of float32 products on TPUs: three or six.", choices=("high", "highest"), role="free"
    )
    terms: dict[str, OpenGroup] = key(dict, "Your terms by name: dict(term='module:Name', weight=0.1, ...).")


@dataclasses.dataclass(frozen=True)
class Lora:
    """LoRA: low-rank factors A and B beside dense maps of the towers, y = x W + (alpha / rank) (x A) B.

    A tower with such factors trains nothing else.
    """

    rank: int = count(0, "Rank of the factors; 0: no LoRA.", high=WIDEST)
    alpha: float = key(8.0, "alpha / rank scales the product.", low=1e-3, high=1_000_000)
    modules: tuple[str, ...] = key(
        ("(image|text)/blocks/(attention|mlp)/(query|key|value|out|in|gate)",),
        "Regular expressions for whole names of dense layers.",
    )

    @property
    def scale(self) -> float:
        """alpha / rank; 0 without LoRA."""
        return self.alpha / self.rank if self.rank else 0.0

    def has(self, tower: str) -> bool:
        """Whether dense layers of that tower, "image" or "text", have factors."""
        names = [f"{tower}/blocks/{name}" for name in LAYER_MAPS]
        return self.rank > 0 and any(re.fullmatch(p, name) for p in self.modules for name in names)


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW or Muon, and the schedule (docs/method.md, Training recipe)."""

    name: str = key("adamw", "Optimiser; muon trains the matrices of the towers.", choices=("adamw", "muon"))
    muon_beta: float = share(0.95, "Decay of Muon's momentum.")
    learning_rate: float = key(1e-3, "Peak learning rate, after the warm-up.")
    warmup_init: float = key(1e-6, "Learning rate of step 0.")
    end_learning_rate: float = key(1e-5, "Learning rate of the last step.")
    warmup_steps: int | None = count(None, "Length of the warm-up, or set warmup_epochs.")
    warmup_epochs: float | None = key(None, "Length of the warm-up, or set warmup_steps.", low=0)
    b1: float = key(0.9, "Decay of AdamW's first moment.")
    b2: float = key(0.98, "Decay of AdamW's second moment.")
    eps: float = key(1e-8, "Epsilon of AdamW.")
    moment_dtype: str = key("float32", "Type of the first moment.", choices=DTYPES)
    weight_decay: float = key(0.1, "Weight decay of AdamW; it is multiplied by the learning rate.")
    clip_norm: float = key(0.0, "Largest global norm of the gradients; 0: no clipping.", low=0)
    frozen: tuple[str, ...] = key((), "Regular expressions of parameters that stay as they are.")
    layer_decay: float = key(
        1.0, "Factor on the learning rate per layer from the top; 1 with optim.lora.", low=0.01, high=1
    )
    lora: Lora = key(Lora)


@dataclasses.dataclass(frozen=True)
class Mesh:
    """The device mesh; data and fsdp split the batch."""

    data: int = count(-1, "Devices that split only the batch; -1: all the others.", low=-1)
    fsdp: int = count(1, "Devices that split the batch, the parameters and the moments.", low=1)
    tensor: int = count(1, "Devices that split attention heads and MLPs.", low=1)
    dcn_data: int = count(1, "Slices or nodes that only data is split over.", low=1)


@dataclasses.dataclass(frozen=True)
class Wandb:
    """Weights & Biases, beside TensorBoard."""

    mode: str = key("off", "Logging to W&B.", choices=("off", "online", "offline"))
    project: str = key("grain_jax", "Project in Weights & Biases.")
    name: str = key("", "Name of the run in Weights & Biases; empty: the name of the workdir.")


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run. The defaults are the paper's for GRAIN B/16 (docs/method.md, Training recipe)."""

    seed: int = key(0, "Seed of all draws.", low=-(2**63), high=2**63 - 1, role="order")
    total_steps: int | None = count(None, "Training steps, or set total_epochs.", low=1, role="result")
    total_epochs: float | None = key(
        None, "Passes over the dataset, or set total_steps.", low=0, high=1_000_000, role="result"
    )
    batch_size: int = count(2048, "Images per step, over all devices.", low=1, role="order")
    microbatches: int = count(1, "Parts that the towers see in turn; the loss sees all.", low=1, role="free")
    dtype: str = key(
        "bfloat16", "Type of activations; auto: float32 on CPUs.", choices=(*DTYPES, "auto"), role="numbers"
    )
    remat: str = key("none", "Activations that are computed again.", choices=REMAT_POLICIES, role="free")
    ema_decay: float = share(0.0, "EMA decay of the parameters; 0 disables it.", role="numbers")
    log_every: int = count(50, "Steps between lines of metrics.jsonl.", low=1, role="free")
    checkpoint_every: int = count(1000, "Steps between checkpoints; 0: only the last.", role="free")
    checkpoint_every_minutes: float = key(0.0, "Minutes between checkpoints; 0: off.", low=0, role="free")
    checkpoint_keep: int = count(2, "Number of newest checkpoints to keep.", low=1, role="free")
    checkpoint_keep_every: int = count(0, "Multiples of this step are kept; 0: none.", role="free")
    checkpoint_best_metric: str = key("", "Metric whose best checkpoint is kept.", role="free")
    checkpoint_best_mode: str = key("max", "Which value is best.", choices=("max", "min"), role="free")
    eval_every: int = count(0, "Steps between evaluations; 0: only after the last.", role="result")
    report_images: int = count(0, "Test images that the report draws with their regions.", role="free")
    profile_start: int = count(0, "First step of a profiler trace; 0: no trace.", role="free")
    profile_steps: int = count(3, "Steps of a trace, also of SIGUSR2.", low=1, role="free")
    profile_port: int = count(0, "Port of the profiler, per process; 0: none.", high=65535, role="free")
    wandb: Wandb = key(Wandb, role="free")
    model: Model = key(Model, role="numbers")
    input: Input = key(Input, role="numbers")
    text: Text = key(Text, role="numbers")
    loss: Loss = key(Loss, role="numbers")
    optim: Optim = key(Optim, role="numbers")
    reference: bool = key(False, "Whether to train as the PyTorch reference.", role="numbers")
    mesh: Mesh = key(Mesh, role="free")
    sharding: tuple[tuple[str, str | None], ...] = key(
        (
            *dict(width="fsdp", mlp="tensor", heads="tensor", vocab="tensor").items(),
            *((name, None) for name in "layers head_dim patch positions queries embed vector".split()),
        ),
        "Mesh axis of each logical axis of parameters; an axis without a row is an error.",
        role="free",
    )
    evals: dict[str, OpenGroup] = key(dict, "Evaluators: dict(kind=..., ...).", role="result")
    init: Init = key(Init, role="result")

    def with_dtype(self, platform: str) -> "Config":
        """The config with a type for `dtype=auto`, on devices of a JAX platform."""
        dtype = "float32" if platform == "cpu" else "bfloat16"
        return dataclasses.replace(self, dtype=dtype) if self.dtype == "auto" else self

    @property
    def frozen(self) -> tuple[str, ...]:
        """Regular expressions of all parameters that are never updated.

        These are `optim.frozen`, and everything but the factors in a tower with factors of `optim.lora`.
        """
        of_lora = ["|".join(self.model.modules(x)) for x in ("image", "text") if self.optim.lora.has(x)]
        return (*self.optim.frozen, *(f"({tops})/(?!.*/lora_[ab]$).*" for tops in of_lora))

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
