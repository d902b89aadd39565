"""The towers of a CLIP or SigLIP checkpoint: an entry tells the package, whose table and habits are stated here."""

from collections.abc import Mapping
from typing import Any

from grain_jax.config import ImageTower
from grain_jax.convert import formats, towers
from grain_jax.convert.faults import ConvertError, prefixed
from grain_jax.convert.open_clip.checkpoint import Checkpoint, group
from grain_jax.convert.tables import Entries, NamePair
from grain_jax.convert.towers import Settings, Stated, Tower

_CLIP_VOCABULARY = 49408
_CLIP_END = 49407  # what transformers assumes
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
        return towers.settle(which, checkpoint.state, rows, prefix, stated, settings, assumed)


def _image(checkpoint: Checkpoint, assumed: list[str]) -> tuple[str, list[NamePair], Stated]:
    """The prefix of an image tower's names, its table, and what its package states."""
    state, cfg = checkpoint.state, group(checkpoint.open_clip, "vision_cfg")
    patches = state.get("vision_model.embeddings.patch_embedding.weight")
    if "visual.trunk.embeds.proj.weight" in state or (patches is not None and patches.ndim == 2):
        raise ConvertError(
            "got a tower of images in their own shape (NaFlex), expected SigLIP 2 of a fixed size"
        )
    if "visual.conv1.weight" in state:  # OpenAI's and open_clip's own
        prefix, rows, pool = "visual.", formats.openai_image(), cfg.get("pool_type") or "tok"
        if pool == "avg" and cfg.get("final_ln_after_pool"):
            raise ConvertError(
                "vision_cfg: final_ln_after_pool with pool_type avg is not supported"
            )
        heads = (cfg.get("width") or 768) // (cfg.get("head_width") or 64) if cfg else None
        stated = _stated_by_open_clip(checkpoint, cfg, 1e-5, pool, heads)
    elif checkpoint.is_dinov3:
        prefix, rows, stated = _dinov3(checkpoint, assumed)
    elif "visual.trunk.patch_embed.proj.weight" in state:  # timm's inside open_clip
        prefix, rows = "visual.", formats.timm_image_in_open_clip()
        norm_eps = 1e-5 if "visual.trunk.norm_pre.weight" in state else 1e-6  # CLIP towers; others
        assumed.append(f"norm epsilon {norm_eps:g}, timm's")
        pool = "class" if "visual.trunk.cls_token" in state else "mean"
        # The name of the timm model decides between exact and tanh GELU.
        stated = Stated(norm_eps, fallback="gelu", pool=pool)
    elif patches is not None:
        prefix, rows = "vision_model.", formats.hf_image()
        is_siglip = "vision_model.embeddings.class_embedding" not in state
        stated = _stated_by_hf(checkpoint, "vision", is_siglip, "class", 12)
    else:
        raise ConvertError(
            "no image tower; expected visual.conv1.weight (OpenAI, open_clip), visual.trunk.* (timm in open_clip),"
            " vision_model.* or embeddings.* (Hugging Face)"
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


def _dinov3(checkpoint: Checkpoint, assumed: list[str]) -> tuple[str, list[NamePair], Stated]:
    """As `_image`, of DINOv3 in transformers; adds a line to `assumed` where there is no config.json."""
    state, cfg = checkpoint.state, checkpoint.hf
    rows = formats.hf_dinov3("model." if "model.layer.0.norm1.weight" in state else "")
    there = Entries(state, rows)
    fields: dict[str, Any] = dict(rope="centres", rope_theta=float(cfg.get("rope_theta") or 100))
    fields |= dict(key_bias="image/blocks/attention/key/bias" in there)
    fields |= dict(pixel_mean=ImageTower.pixel_mean, pixel_std=ImageTower.pixel_std)
    if not cfg:
        assumed.append("DINOv3: norm epsilon 1e-5, rotary positions of theta 100")
        gated = "image/blocks/mlp/gate/kernel" in there
        return "", rows, Stated(1e-5, "silu" if gated else "gelu", pool="class", fields=fields)
    activation = cfg.get("hidden_act") or "gelu"
    return (
        "",
        rows,
        Stated(
            cfg.get("layer_norm_eps") or 1e-5,
            "gelu",
            towers.OUR_ACTIVATION.get(activation, activation),
            cfg.get("num_attention_heads"),
            "class",
            fields,
        ),
    )


def _text(checkpoint: Checkpoint, assumed: list[str]) -> tuple[str, list[NamePair], Stated]:
    """As `_image`, of a text tower."""
    state, cfg = checkpoint.state, group(checkpoint.open_clip, "text_cfg")
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
            "no text tower; expected token_embedding.weight (OpenAI, open_clip), text_model.* (Hugging Face);"
            " init.image reads an image tower alone"
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
        stated_pad = cfg.get("pad_id") if cfg else _of_hf(checkpoint, "text").get("pad_token_id")
        pad_id = stated_pad if isinstance(stated_pad, int) else 1
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
