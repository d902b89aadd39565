"""The image tower of a CLIP or SigLIP checkpoint: its layout is recognised by an entry, its sizes by shapes."""

from typing import NamedTuple

from grain_jax import config as config_lib
from grain_jax.convert import layouts, towers
from grain_jax.convert.faults import ConvertError, prefixed
from grain_jax.convert.open_clip import names
from grain_jax.convert.open_clip import settings as settings_lib
from grain_jax.convert.open_clip.checkpoint import Checkpoint, entry, group, layer_count
from grain_jax.convert.towers import Row, Settings, Tower

CLIP_PIXELS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIGLIP_PIXELS = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


class _Layout(NamedTuple):
    """The names of one package, and the values that its configs state."""

    root: str  # of all entries of this tower
    patch: str
    position: str
    token: str
    pre_norm: str
    layers: str
    layer: names.LayerNames
    norm: str
    pool_rows: list[Row]  # of an attention pooling head; [] where the package has none
    projection: list[Row]
    pool: str  # without a pooling head
    norm_eps: float
    heads: int | None
    activation: str | None
    fallback: str  # activation where neither config nor flag states it


def import_tower(checkpoint: Checkpoint, settings: Settings) -> Tower[config_lib.ImageTower]:
    """The image tower of a checkpoint.

    Raises:
      ConvertError: there is none, or an entry is missing or does not fit.
    """
    with prefixed(f"{checkpoint.path}: "):
        assumed: list[str] = []
        return _import(checkpoint, _recognise(checkpoint, assumed), settings, assumed)


def _recognise(checkpoint: Checkpoint, assumed: list[str]) -> _Layout:
    if "visual.conv1.weight" in checkpoint.state:
        return _native(checkpoint)
    if "visual.trunk.patch_embed.proj.weight" in checkpoint.state:
        return _timm(checkpoint, assumed)
    if "vision_model.embeddings.patch_embedding.weight" in checkpoint.state:
        return _hugging_face(checkpoint)
    raise ConvertError(
        "no image tower; expected visual.conv1.weight (OpenAI, open_clip), visual.trunk.* (timm) or"
        " vision_model.* (Hugging Face)"
    )


def _native(checkpoint: Checkpoint) -> _Layout:
    """OpenAI's and open_clip's own."""
    cfg = group(checkpoint.open_clip, "vision_cfg")
    pool = cfg.get("pool_type") or "tok"
    pool = {"tok": "class", "avg": "mean"}.get(pool, pool)
    if pool == "mean" and cfg.get("final_ln_after_pool"):
        raise ConvertError("vision_cfg: final_ln_after_pool with pool_type avg is not supported")
    return _Layout(
        root="visual.",
        patch="visual.conv1",
        position="visual.positional_embedding",
        token="visual.class_embedding",
        pre_norm="visual.ln_pre",
        layers="visual.transformer.resblocks.",
        layer=names.NATIVE,
        norm="visual.ln_post",
        pool_rows=[],
        projection=[Row("image_projection/kernel", "visual.proj")],
        pool=pool,
        norm_eps=group(cfg, "norm_kwargs").get("eps") or 1e-5,
        heads=(cfg.get("width") or 768) // (cfg.get("head_width") or 64) if cfg else None,
        activation=settings_lib.stated_by_open_clip(checkpoint, cfg),
        fallback="gelu",
    )


def _timm(checkpoint: Checkpoint, assumed: list[str]) -> _Layout:
    """A vision transformer of timm inside open_clip."""
    state, prefix = checkpoint.state, "visual.trunk."
    norm_eps = 1e-5 if f"{prefix}norm_pre.weight" in state else 1e-6  # CLIP towers; all others
    assumed.append(f"norm epsilon {norm_eps:g}, timm's")
    has_bias = "visual.head.proj.bias" in state
    return _Layout(
        root="visual.",
        patch=prefix + "patch_embed.proj",
        position=prefix + "pos_embed",
        token=prefix + "cls_token",
        pre_norm=prefix + "norm_pre",
        layers=prefix + "blocks.",
        layer=names.TIMM,
        norm=prefix + "norm",
        pool_rows=names.attention_pool(
            prefix + "attn_pool.", "latent", ("q.{kind}", "kv.{kind}"), "proj", "norm"
        ),
        projection=names.linear("image_projection", "visual.head.proj", bias=has_bias),
        pool="class" if prefix + "cls_token" in state else "mean",
        norm_eps=norm_eps,
        heads=None,
        activation=None,  # the name of the timm model decides between exact and tanh GELU
        fallback="gelu",
    )


def _hugging_face(checkpoint: Checkpoint) -> _Layout:
    """transformers' CLIP, SigLIP and SigLIP 2."""
    prefix = "vision_model."
    is_siglip = prefix + "embeddings.class_embedding" not in checkpoint.state
    default = "gelu_pytorch_tanh" if is_siglip else "quick_gelu"
    norm_eps, heads, activation = 1e-6 if is_siglip else 1e-5, None, None
    if (cfg := settings_lib.hf_config(checkpoint, "vision")) is not None:
        norm_eps = cfg.get("layer_norm_eps") or norm_eps
        activation = cfg.get("hidden_act") or default
        heads = cfg.get("num_attention_heads") or 12
    return _Layout(
        root=prefix,
        patch=prefix + "embeddings.patch_embedding",
        position=prefix + "embeddings.position_embedding.weight",
        token=prefix + "embeddings.class_embedding",
        pre_norm=prefix + "pre_layrnorm",
        layers=prefix + "encoder.layers.",
        layer=names.HF,
        norm=prefix + "post_layernorm",
        pool_rows=names.attention_pool(
            prefix + "head.",
            "probe",
            ("attention.in_proj_{kind}",),
            "attention.out_proj",
            "layernorm",
        ),
        projection=names.linear("image_projection", "visual_projection", bias=False),
        pool="class",
        norm_eps=norm_eps,
        heads=heads,
        activation=activation,
        fallback=settings_lib.our_activation(default),
    )


def _import(
    checkpoint: Checkpoint, layout: _Layout, settings: Settings, assumed: list[str]
) -> Tower[config_lib.ImageTower]:
    state = checkpoint.state
    kernel = entry(state, f"{layout.patch}.weight", (2, 4))
    positions = entry(state, layout.position, (2, 3))
    width, depth = kernel.shape[0], layer_count(state, layout.layers)
    side = kernel.shape[-1] if kernel.ndim == 4 else round((kernel.shape[1] / 3) ** 0.5)
    has_token = layout.token in state
    has_pool = bool(layout.pool_rows) and layout.pool_rows[0].theirs in state
    has_projection = layout.projection[0].theirs in state
    grid = towers.side_of_grid(layout.position, positions.shape[-2], has_token)
    if checkpoint.pixels:
        mean, std = checkpoint.pixels
    else:
        mean, std = SIGLIP_PIXELS if has_pool else CLIP_PIXELS
        assumed.append(f"pixels normalised as {'SigLIP' if has_pool else 'CLIP'} does, mean {mean}")
    projection = "affine" if len(layout.projection) > 1 else "matrix"
    config = config_lib.ImageTower(
        image_size=grid * side,
        patch_size=side,
        width=width,
        depth=depth,
        heads=settings_lib.settle_heads("image", width, layout.heads, settings, assumed),
        mlp_dim=entry(state, f"{layout.layers}0.{layout.layer.mlp[0]}.weight", (2,)).shape[0],
        qk_norm=f"{layout.layers}0.attn.q_norm.weight" in state,
        norm_eps=layout.norm_eps,
        position_init="normal",
        position_period=1e4,
        block_init="trunc_normal",
        unroll=1,
        class_token=has_token,
        patch_bias=f"{layout.patch}.bias" in state,
        pre_norm=f"{layout.pre_norm}.weight" in state,
        activation=settings_lib.settle_activation(
            "image", layout.activation, layout.fallback, settings, assumed
        ),
        pool="map" if has_pool else layout.pool,
        projection=projection if has_projection else "none",
        pixel_mean=tuple(mean),
        pixel_std=tuple(std),
    )
    patches = layouts.PATCHES if kernel.ndim == 4 else layouts.LINEAR
    rows = [
        Row("image/patch_embed/kernel", f"{layout.patch}.weight", patches),
        Row(
            "image/position_embed",
            layout.position,
            layouts.BATCHED if positions.ndim == 3 else layouts.SAME,
        ),
        *([Row("image/patch_embed/bias", f"{layout.patch}.bias")] if config.patch_bias else []),
        *(names.norm("image/pre_norm", layout.pre_norm) if config.pre_norm else []),
        *names.blocks("image", layout.layers, layout.layer),
        *names.norm("image/norm", layout.norm),
        *(layout.pool_rows if has_pool else []),
        *(layout.projection if has_projection else []),
    ]
    if has_token:
        token = layouts.TOKEN if state[layout.token].ndim == 3 else layouts.SAME
        rows.append(Row("image/class_token", layout.token, token))
    if config.qk_norm:
        for ours, theirs in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
            rows += names.norm(
                f"image/blocks/attention/{ours}", f"{layout.layers}{{}}.attn.{theirs}"
            )
    sizes = dict(K=config.heads, h=width // config.heads, p=side)
    params, theirs = towers.arrange(state, rows, depth, sizes)
    params["image/position_embed"] = towers.with_class_position(
        params["image/position_embed"], grid, has_token
    )
    return Tower(config, params, theirs, tuple(assumed), prefix=layout.root)
