"""Every key with its default, and the sizes of the towers: what config files share.

A config file starts from `base` and changes what differs. It may lie anywhere: this package imports
ml_collections alone, no JAX.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

# What differs from B/16, by the size that papers name. The larger ones are the reference's
# (clip/custom_models.py: S/16 has 12 heads of 32, not timm's 6 of 64; L/14 keeps the 512-wide text tower).
SIZES = {
    "tiny": dict(
        embed_dim=64,
        image=dict(image_size=64, patch_size=8, width=96, depth=3, heads=4, mlp_dim=384, unroll=3),
        text=dict(width=96, depth=2, heads=4, mlp_dim=384, unroll=2),
        decoder=dict(width=96, depth=2, heads=4, mlp_dim=384, unroll=2),
    ),
    "S/16": dict(image=dict(width=384, mlp_dim=1536)),
    "B/16": {},
    "L/14": dict(image=dict(patch_size=14, width=1024, depth=24, heads=16, mlp_dim=4096)),
}


def model(size: str = "B/16") -> ConfigDict:
    """The model of that size: one of tiny, S/16, B/16, L/14."""
    if size not in SIZES:
        raise ValueError(f"model size: got {size!r}, expected one of {', '.join(SIZES)}")
    c = ConfigDict()
    c.embed_dim = 512
    c.logit_scale_init = 1 / 0.07
    c.logit_bias_init = placeholder(float)
    c.image = ConfigDict(
        dict(
            image_size=224,
            patch_size=16,
            width=768,
            depth=12,
            heads=12,
            mlp_dim=3072,
            qk_norm=True,
            norm_eps=1e-6,
            position_init="normal",
            position_period=1e4,
            block_init="trunc_normal",
            unroll=1,
            class_token=True,
            patch_bias=True,
            pre_norm=False,
            activation="gelu",
            pool="none",
            projection="matrix",
            pixel_mean=(0.485, 0.456, 0.406),
            pixel_std=(0.229, 0.224, 0.225),
        )
    )
    c.text = ConfigDict(
        dict(
            vocab_size=49408,
            context_length=77,
            width=512,
            depth=12,
            heads=8,
            mlp_dim=2048,
            norm_eps=1e-5,
            unroll=1,
            causal=True,
            activation="quick_gelu",
            pool="end",
            projection="matrix",
            tokenizer="clip",
            cleaning="lower",
            pad_id=0,
        )
    )
    c.decoder = ConfigDict(
        dict(
            queries=5,
            width=512,
            depth=6,
            heads=8,
            mlp_dim=2048,
            dropout=0.1,
            norm_eps=1e-5,
            qkv_init_gain=1.0,
            unroll=1,
        )
    )
    c.update(SIZES[size])
    return c


def on_hardware(c: ConfigDict, table: dict[str, dict], name: str | None) -> ConfigDict:
    """`c` with the overrides that `table` has for that hardware; None: as it is."""
    if name is not None:
        if name not in table:
            raise ValueError(f"hardware: got {name!r}, expected one of {', '.join(table)}")
        c.update_from_flattened_dict(table[name])
    return c


def evaluator(kind: str, images: str = "", **fields) -> dict:
    """An entry of `evals`: what to measure, on which images (docs/evaluate.md)."""
    entry = dict(kind=kind, images=images, alphas=(1.0, 0.5), names=True, region_order="queries")
    entry |= dict(split="test", missing="error")
    for unset in ("descriptions", "annotations", "tfds", "data_dir", "classes", "templates", "get"):
        entry[unset] = placeholder(str)  # so that the command line can set it
    if kind == "linear_probe":
        entry |= dict(train=placeholder(str), shots=(), seeds=5)
    return entry | {name: value for name, value in fields.items() if value is not None}


def base(size: str = "B/16") -> ConfigDict:
    """GRAIN's recipe (docs/method.md, Training recipe); a config file names its data set and length."""
    c = ConfigDict()
    c.seed = 0
    c.total_steps = placeholder(int)  # exactly one of these two; the command line wins
    c.total_epochs = placeholder(float)
    c.batch_size = 2048
    c.microbatches = 1
    c.dtype = "bfloat16"
    c.remat = "none"
    c.ema_decay = 0.0
    c.log_every = 50
    c.checkpoint_every = 1000
    c.checkpoint_every_minutes = 0.0
    c.checkpoint_keep = 2
    c.checkpoint_keep_every = 0
    c.checkpoint_best_metric = ""
    c.checkpoint_best_mode = "max"
    c.eval_every = 0
    c.pictures = 0
    c.profile_start = 0
    c.profile_steps = 3
    c.wandb = ConfigDict(dict(mode="off", project="grain_jax", name=""))
    c.model = model(size)
    c.input = ConfigDict(
        dict(
            source="records",
            data_dir="",
            name="",
            datasets=(),  # or several: dict(name=, data_dir=, weight=, split="train") each
            prepare=placeholder(str),
            # None, as pack_group and pack_rows below: derived (grain_jax/input_pipeline/derived.py).
            lanes=placeholder(int),
            shards_per_block=1,
            max_regions=5,
            synthetic_caption_rate=0.5,
            descriptions_in_captions=0,
            flip_rate=0.0,
            crop_min_area=1.0,
            reader_threads=0,
        )
    )
    c.text = ConfigDict(
        dict(
            packing=True,
            pack_group=placeholder(int),
            pack_rows=placeholder(int),
            max_dropped_share=0.1,
        )
    )
    c.loss = ConfigDict(
        dict(
            image_caption=1.0,
            region_description=1.0,
            box=1.0,
            contrast="softmax",
            group_size=0,
            mask_duplicates=True,
            match_l1=5.0,
            match_giou=2.0,
            match_description=0.0,
            iou_epsilon=0.0,
            deep_supervision=False,
            shift_labels_after_empty_box=False,
            tile=1024,
            gather=1,
        )
    )
    c.optim = ConfigDict(
        dict(
            learning_rate=1e-3,
            warmup_init=1e-6,
            end_learning_rate=1e-5,
            warmup_steps=placeholder(int),
            warmup_epochs=placeholder(float),
            schedule="cosine",
            b1=0.9,
            b2=0.98,
            eps=1e-8,
            moment_dtype="float32",
            weight_decay=0.1,
            decay_groups="matrices",
            clip_norm=0.0,
            frozen=(),
            layer_decay=1.0,
        )
    )
    c.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1, dcn_data=1))
    # Logical axis of a parameter -> mesh axis. Exhaustive: an axis that stands in no row is an error.
    c.sharding = (
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
    )
    c.evals = ConfigDict()
    c.init = ConfigDict({part: placeholder(str) for part in ("image", "text", "decoder")})
    c.init.resize = "bilinear"
    return c


def own_images(size: str = "B/16") -> ConfigDict:
    """What configs/own.py and configs/finetune.py share: one's own images on one machine."""
    c = base(size)
    c.log_every = 10
    c.checkpoint_every = 0
    c.checkpoint_every_minutes = 10.0
    c.pictures = 12
    c.input.flip_rate = 0.5
    c.input.crop_min_area = 0.5
    # What docs/claim.md found: as many queries as things are described in an image (set both), and a box
    # loss that does not drown the captions.
    c.model.decoder.queries = 8
    c.input.max_regions = 8
    c.loss.box = 0.2
    c.loss.deep_supervision = True
    c.optim.clip_norm = 1.0
    # Measured after the last step, each one whose images are named.
    for kind in ("zeroshot", "retrieval", "grounding"):
        how = f"--config.evals.{kind}.images=FOLDER"
        if kind != "zeroshot":
            how += f" --config.evals.{kind}.annotations=A.jsonl"
        c.evals[kind] = evaluator(kind, missing="skip", get=how)
    return c


# Where the towers of others differ from ours, beyond their sizes: OpenAI's CLIP (open_clip's models are
# alike, but most have activation="gelu"), and SigLIP (big_vision's models, sizes of SigLIP B's text tower).
FAMILIES = {
    "clip": dict(
        image=dict(
            qk_norm=False,
            norm_eps=1e-5,
            patch_bias=False,
            pre_norm=True,
            activation="quick_gelu",
            pixel_mean=(0.48145466, 0.4578275, 0.40821073),
            pixel_std=(0.26862954, 0.26130258, 0.27577711),
        ),
        text={},
    ),
    "siglip": dict(
        image=dict(
            qk_norm=False,
            class_token=False,
            activation="gelu_tanh",
            pixel_mean=(0.5, 0.5, 0.5),
            pixel_std=(0.5, 0.5, 0.5),
        ),
        text=dict(
            vocab_size=32000,
            context_length=64,
            width=768,
            heads=12,
            mlp_dim=3072,
            norm_eps=1e-6,
            causal=False,
            activation="gelu_tanh",
            pool="last",
            projection="affine",
            tokenizer="siglip.model",
            cleaning="canonical",
            pad_id=1,
        ),
    ),
}


def towers_of(
    c: ConfigDict, family: str, towers: tuple[str, ...] = ("image", "text")
) -> ConfigDict:
    """`c` with the model's `towers` built as that family's ("clip" or "siglip"), for `init.image`, `init.text`."""
    if family not in FAMILIES:
        raise ValueError(f"family of towers: got {family!r}, expected one of {', '.join(FAMILIES)}")
    for tower in towers:
        c.model[tower].update(FAMILIES[family][tower])
    if "text" in towers and family == "siglip":
        c.text.packing = False
    return c


def reference_behaviour(c: ConfigDict) -> ConfigDict:
    """Switches `c` to what the PyTorch reference does (docs/method.md, Where it differs), for comparisons with it."""
    c.text.packing = False
    c.loss.group_size = 128
    c.loss.mask_duplicates = False
    c.loss.shift_labels_after_empty_box = True
    c.loss.box = 1.5
    c.loss.iou_epsilon = 1e-4
    c.optim.decay_groups = "reference"
    c.optim.schedule = "reference"
    c.model.image.block_init = "torch"
    return c
