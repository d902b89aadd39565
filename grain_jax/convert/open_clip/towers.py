"""The towers of a CLIP or SigLIP checkpoint: an entry tells the package, whose table and habits are stated here."""

import re
from collections.abc import Mapping
from typing import Any

from grain_jax.convert import formats, towers
from grain_jax.convert.faults import ConvertError, prefixed
from grain_jax.convert.open_clip import rotary_towers
from grain_jax.convert.open_clip.checkpoint import Checkpoint, group
from grain_jax.convert.tables import Entries, NamePair
from grain_jax.convert.towers import Settings, Stated, Tower

_CLIP_VOCABULARY = 49408
_CLIP_END = 49407  # what transformers assumes
_LONGEST = 4096  # of TIPS v2's constant positions; published models have 64
_GEMMA_VOCABULARY = 256000  # of SigLIP 2
_OUR_POOL = {"tok": "class", "avg": "mean", "argmax": "end", "eos": "end"}


def import_tower(which: str, checkpoint: Checkpoint, settings: Settings) -> Tower:
    """The "image" or "text" tower of a checkpoint.

    Raises:
      ConvertError: there is none, or an entry that gives a size is missing or does not fit.
    """
    with prefixed(f"{checkpoint.path}: "):
        assumed: list[str] = []
        prefix, rows, stated = (_image if which == "image" else _text)(checkpoint, assumed)
        tower = towers.settle(which, checkpoint.state, rows, prefix, stated, settings, assumed)
        return tower._replace(notes=checkpoint.notes)


def _image(checkpoint: Checkpoint, assumed: list[str]) -> tuple[str, list[NamePair], Stated]:
    """The prefix of an image tower's names, its table, and what its package states."""
    state, cfg = checkpoint.state, group(checkpoint.open_clip, "vision_cfg")
    if "vision_encoder.patch_embed.proj.weight" in state:
        return _tips_image(checkpoint)
    patches = state.get("vision_model.embeddings.patch_embedding.weight")
    if "visual.conv1.weight" in state:  # OpenAI's and open_clip's own
        prefix, rows, pool = "visual.", formats.openai_image(), cfg.get("pool_type") or "tok"
        if pool == "avg" and cfg.get("final_ln_after_pool"):
            raise ConvertError(
                "vision_cfg: final_ln_after_pool with pool_type avg is not supported"
            )
        heads = (cfg.get("width") or 768) // (cfg.get("head_width") or 64) if cfg else None
        stated = _stated_by_open_clip(checkpoint, cfg, 1e-5, pool, heads)
    elif family := rotary_towers.family_of_timm(cfg.get("timm_model_name"), state, "visual.trunk."):
        found = rotary_towers.of_timm(family, state, "visual.trunk.", assumed)
        prefix, (_, rows, stated) = "visual.", found
    elif "embeddings.patch_embeddings.weight" in state:
        prefix, rows, stated = rotary_towers.of_hugging_face(checkpoint, assumed)
    elif re.fullmatch(r"vit_\w+_tipsv2(\..*)?", checkpoint.timm.get("architecture") or ""):
        prefix, rows, stated = _tips_of_timm(checkpoint)
    elif "patch_embed.proj.weight" in state:  # timm's alone
        prefix, rows, stated = rotary_towers.of_bare_timm(checkpoint, assumed)
    elif "visual.trunk.embeds.proj.weight" in state:
        prefix, rows, stated = _naflex(checkpoint, cfg)
    elif "visual.trunk.patch_embed.proj.weight" in state:  # timm's inside open_clip
        prefix, rows = "visual.", formats.timm_image_in_open_clip()
        norm_eps = 1e-5 if "visual.trunk.norm_pre.weight" in state else 1e-6  # CLIP towers; others
        assumed.append(f"norm epsilon {norm_eps:g}, timm's")
        pool = "class" if "visual.trunk.cls_token" in state else "mean"
        # The name of the timm model decides between exact and tanh GELU.
        stated = Stated(norm_eps, fallback="gelu", pool=pool)
    elif patches is not None:
        prefix, rows = "vision_model.", formats.hf_image(flat_patches=patches.ndim == 2)
        is_siglip = "vision_model.embeddings.class_embedding" not in state
        stated = _stated_by_hf(checkpoint, "vision", is_siglip, "class", 12)
    else:
        raise ConvertError(
            "no image tower; expected visual.conv1.weight (OpenAI, open_clip), visual.trunk.* (timm),"
            " vision_model.* or vision_encoder.* (Hugging Face)"
        )
    pixels, keys = checkpoint.pixels, ("pixel_mean", "pixel_std")
    if pixels is None:
        is_siglip = "image_pool/probe" in Entries(state, rows)
        pixels = towers.SIGLIP_PIXELS if is_siglip else towers.CLIP_PIXELS
        who = f"{'SigLIP' if is_siglip else 'CLIP'} does"
        if "pixel_mean" in stated.fields:
            pixels, who = tuple(stated.fields[key] for key in keys), "such towers do"
        assumed.append(f"pixels normalised as {who}, mean {pixels[0]}")
    return prefix, rows, stated._replace(fields={**stated.fields, **dict(zip(keys, pixels))})


def _naflex(checkpoint: Checkpoint, cfg: Mapping[str, Any]) -> tuple[str, list[NamePair], Stated]:
    """As `_image`, of timm's NaFlex transformer inside open_clip: SigLIP 2's, whose positions are resized bilinearly."""
    name, options = cfg.get("timm_model_name"), cfg.get("timm_model_kwargs")
    if name is not None and not re.fullmatch(r"naflexvit_\w+_siglip(\..*)?", name):
        raise ConvertError(
            f"vision_cfg.timm_model_name: got {name[:100]}, expected naflexvit_*_siglip: other NaFlex towers of timm resize"
            " positions bicubically or pool otherwise"
        )
    if options:
        raise ConvertError(
            f"vision_cfg.timm_model_kwargs: got {', '.join(options)[:100]}, expected none with {name}"
        )
    activation = "gelu_tanh" if name is not None else None
    stated = Stated(1e-6, "gelu_tanh", activation, pool="map")
    return "visual.", formats.timm_naflex_in_open_clip(), stated


def _text(checkpoint: Checkpoint, assumed: list[str]) -> tuple[str, list[NamePair], Stated]:
    """As `_image`, of a text tower."""
    state, cfg = checkpoint.state, group(checkpoint.open_clip, "text_cfg")
    if "text_encoder.token_embedding.weight" in state:
        return "text_encoder.", formats.tips_text(), _tips_text(checkpoint)
    own = next((x for x in ("text.", "") if f"{x}token_embedding.weight" in state), None)
    if own is not None:  # OpenAI's and open_clip's
        linear = f"{own}text_projection"
        prefix, rows = (
            own or "transformer.",
            formats.openai_text(own, f"{linear}.weight" not in state),
        )
        is_siglip = f"{linear}.bias" in state
        causal, norm_eps, pool = (
            not cfg.get("no_causal_mask"),
            1e-5,
            cfg.get("pool_type") or "argmax",
        )
        if is_siglip and not cfg:
            causal, pool, norm_eps = False, "last", 1e-6
            assumed.append("SigLIP's: bidirectional, read at the last position, norm epsilon 1e-6")
        heads = (cfg.get("heads") or 8) if cfg else None
        stated = _stated_by_open_clip(checkpoint, cfg, norm_eps, pool, heads)
    elif "text_model.embeddings.token_embedding.weight" in state:
        is_siglip = "text_model.head.weight" in state
        causal, pool, heads = (False, "last", 12) if is_siglip else (True, "end", 8)
        rows = formats.hf_text("text_model.head" if is_siglip else "text_projection")
        prefix, stated = "text_model.", _stated_by_hf(checkpoint, "text", is_siglip, pool, heads)
    else:
        raise ConvertError(
            "no text tower; expected token_embedding.weight (OpenAI, open_clip), text_model.* or text_encoder.*"
            " (Hugging Face); init.image reads an image tower alone"
        )
    vocab, _ = Entries(state, rows).shape("text/token_embed/embedding", 2)
    first_siglip = is_siglip and _is_first_siglip(checkpoint, vocab)
    pad_id = 1 if first_siglip else 0
    if not causal or stated.pool != "end":  # else no token attends to the padding
        family = "SigLIP" if pad_id else "SigLIP 2"
        assumed.append(f"texts padded with the id {pad_id}, as {family}'s")
    end_id = _end_id(checkpoint, vocab) if stated.pool == "end" else None
    cleaning = "canonical" if first_siglip else "lower"
    if end_id is not None:  # MetaCLIP 2
        said = cfg.get("pad_id") if cfg else _of_hf(checkpoint, "text").get("pad_token_id")
        pad_id = said if isinstance(said, int) else 1
        canonical = group(cfg, "tokenizer_kwargs").get("clean") == "canonicalize"
        cleaning = "canonical" if canonical else "none"
        if cfg and not canonical:
            assumed.append("texts as they are; open_clip repairs encodings and HTML entities")
    tokenizer = "clip"
    if vocab != _CLIP_VOCABULARY or is_siglip:
        wanted = ".model" if first_siglip else ".json"  # the one that the model was trained with
        files = sorted(checkpoint.tokenizers, key=lambda path: path.suffix != wanted)
        tokenizer = files[0].name if files else "tokenizer.json"
    fields = dict(causal=causal, tokenizer=tokenizer, pad_id=pad_id, end_id=end_id)
    return prefix, rows, stated._replace(fields=fields | dict(cleaning=cleaning))


def _is_first_siglip(checkpoint: Checkpoint, vocab: int) -> bool:
    """Whether the texts are SigLIP's and not SigLIP 2's, which at a fixed size calls itself siglip, too."""
    if checkpoint.tokenizer_class:
        return checkpoint.tokenizer_class.startswith("SiglipTokenizer")
    kind = checkpoint.hf.get("model_type") or ""
    return not kind.startswith("siglip2") and vocab != _GEMMA_VOCABULARY


def _end_id(checkpoint: Checkpoint, vocab: int) -> int | None:
    """The id that ends a text where the package looks for that id, and it is not the highest one."""
    cfg = _of_hf(checkpoint, "text")
    if checkpoint.hf:
        found = cfg.get("eos_token_id", _CLIP_END)
        if found == 2 and (checkpoint.hf.get("model_type") or "").startswith("clip"):
            return None  # transformers takes the highest id then
    else:
        cfg = group(checkpoint.open_clip, "text_cfg")
        found = cfg.get("eos_id", 2) if cfg.get("pool_type") == "eos" else None
    return found if isinstance(found, int) and 0 <= found < vocab - 1 else None


def _tips(checkpoint: Checkpoint, which: str, usual: Stated) -> tuple[Mapping[str, Any], Stated]:
    """The part of config.json of TIPS v2 about a tower, and what it says where it differs from `usual`."""
    if not checkpoint.hf:
        raise ConvertError("TIPS v2 without a config.json of its own beside it; expected one")
    cfg = _of_hf(checkpoint, which)
    activation = cfg.get("hidden_act") or usual.fallback
    return cfg, usual._replace(
        norm_eps=cfg.get("layer_norm_eps") or usual.norm_eps,
        activation=towers.OUR_ACTIVATION.get(activation, activation),
        heads=cfg.get("num_attention_heads") or usual.heads,
    )


def _tips_image(checkpoint: Checkpoint) -> tuple[str, list[NamePair], Stated]:
    """As `_image`, of TIPS v2: registers, layer scale, pixels in [0, 1], maybe gated MLPs."""
    cfg, stated = _tips(checkpoint, "vision", Stated(1e-6, "gelu", "gelu", 12, "class"))
    gated = bool(cfg.get("use_swiglu_ffn"))
    rows = formats.tips_image(gated=gated)
    mean, std = checkpoint.pixels or ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    fields: dict[str, Any] = dict(
        layer_scale_init=1.0,
        pixel_mean=mean,
        pixel_std=std,
    )
    stated = stated._replace(fields=fields)
    return "vision_encoder.", rows, _gated(checkpoint, rows, stated) if gated else stated


def _gated(checkpoint: Checkpoint, rows: list[NamePair], stated: Stated) -> Stated:
    """With the SwiGLU whose gate and other linear layer are one entry."""
    both = Entries(checkpoint.state, rows).shape("image/blocks/mlp/gate/bias", 1)[0]
    fields = {**stated.fields, "mlp_dim": both // 2}
    return stated._replace(fallback="silu", activation="silu", fields=fields)


def _tips_of_timm(checkpoint: Checkpoint) -> tuple[str, list[NamePair], Stated]:
    """As `_tips_image`, of timm, whose name for it tells the number of heads."""
    plain = Entries(checkpoint.state, formats.timm_tips(gated=False))
    (width,) = plain.shape("image/norm/scale", 1)
    (inner,) = plain.shape("image/blocks/mlp/in/bias", 1)
    gated = plain.shape("image/blocks/mlp/out/kernel", 2)[1] != inner
    heads = 16 if width == 1152 else max(width // 64, 1)
    fields = dict(layer_scale_init=1.0, pixel_mean=(0.0, 0.0, 0.0), pixel_std=(1.0, 1.0, 1.0))
    stated = Stated(1e-6, "gelu", "gelu", heads, "class", fields)
    rows = formats.timm_tips(gated=gated)
    return "", rows, _gated(checkpoint, rows, stated) if gated else stated


def _tips_text(checkpoint: Checkpoint) -> Stated:
    """What TIPS v2 has: constant positions, tokens scaled, the mean of those that are no padding."""
    cfg, stated = _tips(checkpoint, "text", Stated(1e-5, "relu", "relu", 12, "masked_mean"))
    scaled, length = cfg.get("scale_sqrt_depth"), cfg.get("max_position_embeddings") or 64
    if length > _LONGEST:  # no array bounds it
        raise ConvertError(
            f"text_config.max_position_embeddings: got {length}, expected at most {_LONGEST}"
        )
    fields: dict[str, Any] = dict(
        context_length=length,
        position_kind="sinusoidal",
        scale_tokens=scaled is None or scaled,
        causal=False,
        tokenizer=next((x.name for x in checkpoint.tokenizers), "tokenizer.json"),
        cleaning="none",  # tokenizer.json lowers the case
        pad_id=cfg.get("pad_token_id") or 0,
    )
    return stated._replace(fields=fields)


def _stated_by_open_clip(
    checkpoint: Checkpoint, cfg: Mapping[str, Any], norm_eps: float, pool: str, heads: int | None
) -> Stated:
    """What open_clip_config.json says of open_clip's own tower, or OpenAI's habit."""
    activation = None
    if checkpoint.openai or checkpoint.open_clip.get("quick_gelu"):
        activation = "quick_gelu"
    elif checkpoint.open_clip:
        tanh = group(cfg, "act_kwargs").get("approximate") == "tanh"
        activation = "gelu_tanh" if tanh else "gelu"
    eps = group(cfg, "norm_kwargs").get("eps") or norm_eps
    return Stated(eps, "gelu", activation, heads, _OUR_POOL.get(pool, pool))


def _of_hf(checkpoint: Checkpoint, which: str) -> Mapping[str, Any]:
    """The part of config.json about a tower, "vision" or "text"; the whole where it is of that tower alone."""
    if (checkpoint.hf.get("model_type") or "").endswith(f"_{which}_model"):
        return checkpoint.hf
    return group(checkpoint.hf, f"{which}_config")


def _stated_by_hf(
    checkpoint: Checkpoint, which: str, is_siglip: bool, pool: str, heads: int
) -> Stated:
    """What config.json says of a tower. It leaves out what equals the defaults of its class, maybe the whole part."""
    norm_eps, fallback = (1e-6, "gelu_tanh") if is_siglip else (1e-5, "quick_gelu")
    habit = Stated(norm_eps, fallback, pool=pool)
    if not checkpoint.hf:
        return habit
    cfg = _of_hf(checkpoint, which)
    activation = cfg.get("hidden_act") or habit.fallback
    return habit._replace(
        norm_eps=cfg.get("layer_norm_eps") or habit.norm_eps,
        activation=towers.OUR_ACTIVATION.get(activation, activation),
        heads=cfg.get("num_attention_heads") or heads,
    )
