"""The towers of a CLIP or SigLIP checkpoint: an entry tells the package, whose table and habits are stated here."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from grain_jax import config as config_lib
from grain_jax.convert import formats, towers
from grain_jax.convert.faults import ConvertError, prefixed
from grain_jax.convert.open_clip.checkpoint import Checkpoint, group
from grain_jax.convert.tables import Entries
from grain_jax.convert.towers import Settings, Stated, Tower

_CLIP_VOCABULARY = 49408
_SIGLIP_VOCABULARY = 32000  # SentencePiece, of SigLIP 1; SigLIP 2 has Gemma's, of 256,000
_OUR_ACTIVATION = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


def import_image(checkpoint: Checkpoint, settings: Settings) -> Tower[config_lib.ImageTower]:
    """The image tower of a checkpoint.

    Raises:
      ConvertError: there is none, or an entry that gives a size is missing or does not fit.
    """
    with prefixed(f"{checkpoint.path}: "):
        assumed: list[str] = []
        prefix, rows, stated = _image(checkpoint, assumed)
        config = towers.image_tower(
            checkpoint.state, rows, stated, settings, assumed, checkpoint.pixels
        )
        return Tower(config, rows, prefix, assumed)


def import_text(checkpoint: Checkpoint, settings: Settings) -> Tower[config_lib.TextTower]:
    """The text tower of a checkpoint; raises as `import_image`."""
    with prefixed(f"{checkpoint.path}: "):
        assumed: list[str] = []
        prefix, rows, stated, causal, is_siglip = _text(checkpoint, assumed)
        vocab, _ = Entries(checkpoint.state, rows).shape("text/token_embed/embedding", 2)
        first_siglip = is_siglip and vocab == _SIGLIP_VOCABULARY
        pad_id = 1 if first_siglip else 0
        if not causal or stated.pool != "end":  # else no token attends to the padding
            family = "SigLIP" if pad_id else "SigLIP 2"
            assumed.append(f"texts padded with the id {pad_id}, as {family}'s")
        tokenizer = "clip"
        if vocab != _CLIP_VOCABULARY or is_siglip:
            file = _tokenizer(checkpoint, first_siglip)
            tokenizer = file.name if file else "tokenizer.json"
        config = towers.text_tower(
            checkpoint.state,
            rows,
            stated,
            settings,
            assumed,
            causal=causal,
            tokenizer=tokenizer,
            cleaning="canonical" if first_siglip else "lower",
            pad_id=pad_id,
        )
        return Tower(config, rows, prefix, assumed)


def _image(checkpoint: Checkpoint, assumed: list[str]) -> tuple[str, list, Stated]:
    """The prefix of an image tower's names, its table, and what its package states."""
    state, cfg = checkpoint.state, group(checkpoint.open_clip, "vision_cfg")
    if "visual.conv1.weight" in state:  # OpenAI's and open_clip's own
        pool = cfg.get("pool_type") or "tok"
        pool = {"tok": "class", "avg": "mean"}.get(pool, pool)
        if pool == "mean" and cfg.get("final_ln_after_pool"):
            raise ConvertError(
                "vision_cfg: final_ln_after_pool with pool_type avg is not supported"
            )
        heads = (cfg.get("width") or 768) // (cfg.get("head_width") or 64) if cfg else None
        stated = _stated_by_open_clip(checkpoint, cfg, 1e-5)._replace(pool=pool, heads=heads)
        return "visual.", formats.openai_image(), stated
    if (
        "visual.trunk.patch_embed.proj.weight" in state
    ):  # a vision transformer of timm inside open_clip
        norm_eps = 1e-5 if "visual.trunk.norm_pre.weight" in state else 1e-6  # CLIP towers; others
        assumed.append(f"norm epsilon {norm_eps:g}, timm's")
        pool = "class" if "visual.trunk.cls_token" in state else "mean"
        # The name of the timm model decides between exact and tanh GELU.
        stated = Stated(norm_eps, fallback="gelu", pool=pool)
        return "visual.", formats.timm_image_in_open_clip(), stated
    patches = state.get("vision_model.embeddings.patch_embedding.weight")
    if patches is None:
        raise ConvertError(
            "no image tower; expected visual.conv1.weight (OpenAI, open_clip), visual.trunk.* (timm) or"
            " vision_model.* (Hugging Face)"
        )
    is_siglip = "vision_model.embeddings.class_embedding" not in state
    stated = _stated_by_hf(checkpoint, "vision", is_siglip, heads=12)._replace(pool="class")
    return "vision_model.", formats.hf_image(flat_patches=patches.ndim == 2), stated


def _text(checkpoint: Checkpoint, assumed: list[str]) -> tuple[str, list, Stated, bool, bool]:
    """As `_image`, of a text tower; also whether it is causal, and whether it is SigLIP's."""
    state, cfg = checkpoint.state, group(checkpoint.open_clip, "text_cfg")
    for prefix in ("text.", ""):
        if f"{prefix}token_embedding.weight" not in state:
            continue
        linear = f"{prefix}text_projection"
        is_siglip = f"{linear}.bias" in state
        causal, norm_eps = not cfg.get("no_causal_mask"), 1e-5
        pool = cfg.get("pool_type") or "argmax"
        if is_siglip and not cfg:
            causal, pool, norm_eps = False, "last", 1e-6
            assumed.append("SigLIP's: bidirectional, read at the last position, norm epsilon 1e-6")
        stated = _stated_by_open_clip(checkpoint, cfg, norm_eps)._replace(
            heads=(cfg.get("heads") or 8) if cfg else None,
            pool={"argmax": "end", "eos": "end"}.get(pool, pool),
        )
        rows = formats.openai_text(prefix, matrix=f"{linear}.weight" not in state)
        return prefix or "transformer.", rows, stated, causal, is_siglip
    if "text_model.embeddings.token_embedding.weight" not in state:
        raise ConvertError(
            "no text tower; expected token_embedding.weight (OpenAI, open_clip) or text_model.*"
            " (Hugging Face)"
        )
    is_siglip = "text_model.head.weight" in state
    stated = _stated_by_hf(checkpoint, "text", is_siglip, heads=12 if is_siglip else 8)
    stated = stated._replace(pool="last" if is_siglip else "end")
    rows = formats.hf_text("text_model.head" if is_siglip else "text_projection")
    return "text_model.", rows, stated, not is_siglip, is_siglip


def _stated_by_open_clip(checkpoint: Checkpoint, cfg: Mapping[str, Any], norm_eps: float) -> Stated:
    """What open_clip_config.json says of open_clip's own tower, or OpenAI's habit."""
    activation = None
    if checkpoint.openai or checkpoint.open_clip.get("quick_gelu"):
        activation = "quick_gelu"
    elif checkpoint.open_clip:
        tanh = group(cfg, "act_kwargs").get("approximate") == "tanh"
        activation = "gelu_tanh" if tanh else "gelu"
    eps = group(cfg, "norm_kwargs").get("eps") or norm_eps
    return Stated(eps, fallback="gelu", activation=activation)


def _stated_by_hf(checkpoint: Checkpoint, which: str, is_siglip: bool, heads: int) -> Stated:
    """What config.json says of a tower. It leaves out what equals the defaults of its class, maybe the whole part."""
    habit = Stated(*((1e-6, "gelu_tanh") if is_siglip else (1e-5, "quick_gelu")))
    cfg = checkpoint.hf
    if not cfg:
        return habit
    if not (cfg.get("model_type") or "").endswith(f"_{which}_model"):  # not of a single tower
        cfg = group(cfg, f"{which}_config")
    activation = cfg.get("hidden_act") or habit.fallback
    return habit._replace(
        norm_eps=cfg.get("layer_norm_eps") or habit.norm_eps,
        activation=_OUR_ACTIVATION.get(activation, activation),
        heads=cfg.get("num_attention_heads") or heads,
    )


def _tokenizer(checkpoint: Checkpoint, first_siglip: bool) -> epath.Path | None:
    """The tokenizer file beside the checkpoint; if there are two, the one that the model was trained with."""
    wanted = ".model" if first_siglip else ".json"
    files = sorted(checkpoint.tokenizers, key=lambda path: path.suffix != wanted)
    return files[0] if files else None
