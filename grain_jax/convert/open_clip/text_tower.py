"""The text tower of a CLIP or SigLIP checkpoint: its layout is recognised by an entry, its sizes by shapes."""

from typing import NamedTuple

from etils import epath

from grain_jax import config as config_lib
from grain_jax.convert import towers
from grain_jax.convert.faults import ConvertError, prefixed
from grain_jax.convert.open_clip import names
from grain_jax.convert.open_clip import settings as settings_lib
from grain_jax.convert.open_clip.checkpoint import Checkpoint, entry, group, layer_count
from grain_jax.convert.towers import Row, Settings, Tower

_CLIP_VOCABULARY = 49408
_SIGLIP_VOCABULARY = 32000  # SentencePiece, of SigLIP 1; SigLIP 2 has Gemma's, of 256,000


class _Layout(NamedTuple):
    """The names of one package, and the values that its configs state."""

    root: str  # of the entries that can only be this tower's
    token: str
    position: str
    layers: str
    layer: names.LayerNames
    norm: str
    projection: list[Row]
    is_siglip: bool
    causal: bool
    pool: str
    norm_eps: float
    heads: int | None
    activation: str | None
    fallback: str  # activation where neither config nor flag states it


def import_tower(checkpoint: Checkpoint, settings: Settings) -> Tower[config_lib.TextTower]:
    """The text tower of a checkpoint.

    Raises:
      ConvertError: there is none, or an entry is missing or does not fit.
    """
    with prefixed(f"{checkpoint.path}: "):
        assumed: list[str] = []
        return _import(checkpoint, _recognise(checkpoint, assumed), settings, assumed)


def _recognise(checkpoint: Checkpoint, assumed: list[str]) -> _Layout:
    for prefix in ("text.", ""):
        if f"{prefix}token_embedding.weight" in checkpoint.state:
            return _native(checkpoint, prefix, assumed)
    if "text_model.embeddings.token_embedding.weight" in checkpoint.state:
        return _hugging_face(checkpoint)
    raise ConvertError(
        "no text tower; expected token_embedding.weight (OpenAI, open_clip) or text_model.*"
        " (Hugging Face)"
    )


def _native(checkpoint: Checkpoint, prefix: str, assumed: list[str]) -> _Layout:
    """OpenAI's and open_clip's own."""
    state, cfg = checkpoint.state, group(checkpoint.open_clip, "text_cfg")
    linear = f"{prefix}text_projection"
    is_siglip = f"{linear}.bias" in state
    projection = [Row("text_projection/kernel", linear)]
    if f"{linear}.weight" in state:
        projection = names.linear("text_projection", linear, bias=is_siglip)
    causal, pool, norm_eps = not cfg.get("no_causal_mask"), cfg.get("pool_type") or "argmax", 1e-5
    if is_siglip and not cfg:
        causal, pool, norm_eps = False, "last", 1e-6
        assumed.append("SigLIP's: bidirectional, read at the last position, norm epsilon 1e-6")
    return _Layout(
        root=prefix or "transformer.",
        token=f"{prefix}token_embedding.weight",
        position=f"{prefix}positional_embedding",
        layers=f"{prefix}transformer.resblocks.",
        layer=names.NATIVE,
        norm=f"{prefix}ln_final",
        projection=projection,
        is_siglip=is_siglip,
        causal=causal,
        pool={"argmax": "end", "eos": "end"}.get(pool, pool),
        norm_eps=group(cfg, "norm_kwargs").get("eps") or norm_eps,
        heads=(cfg.get("heads") or 8) if cfg else None,
        activation=settings_lib.stated_by_open_clip(checkpoint, cfg),
        fallback="gelu",
    )


def _hugging_face(checkpoint: Checkpoint) -> _Layout:
    """transformers' CLIP, SigLIP and SigLIP 2."""
    state, prefix = checkpoint.state, "text_model."
    is_siglip = prefix + "head.weight" in state
    linear = prefix + "head" if is_siglip else "text_projection"
    default = "gelu_pytorch_tanh" if is_siglip else "quick_gelu"
    norm_eps, heads, activation = 1e-6 if is_siglip else 1e-5, None, None
    if (cfg := settings_lib.hf_config(checkpoint, "text")) is not None:
        norm_eps = cfg.get("layer_norm_eps") or norm_eps
        activation = cfg.get("hidden_act") or default
        heads = cfg.get("num_attention_heads") or (12 if is_siglip else 8)
    return _Layout(
        root=prefix,
        token=prefix + "embeddings.token_embedding.weight",
        position=prefix + "embeddings.position_embedding.weight",
        layers=prefix + "encoder.layers.",
        layer=names.HF,
        norm=prefix + "final_layer_norm",
        projection=names.linear("text_projection", linear, bias=f"{linear}.bias" in state),
        is_siglip=is_siglip,
        causal=not is_siglip,
        pool="last" if is_siglip else "end",
        norm_eps=norm_eps,
        heads=heads,
        activation=activation,
        fallback=settings_lib.our_activation(default),
    )


def _import(
    checkpoint: Checkpoint, layout: _Layout, settings: Settings, assumed: list[str]
) -> Tower[config_lib.TextTower]:
    state = checkpoint.state
    vocab, width = entry(state, layout.token, (2,)).shape
    depth = layer_count(state, layout.layers)
    has_projection = layout.projection[0].theirs in state
    first_siglip = layout.is_siglip and vocab == _SIGLIP_VOCABULARY
    pad_id = settings.pad_id
    if pad_id is None:
        pad_id = 1 if first_siglip else 0
        if not layout.causal or layout.pool != "end":  # else no token attends to the padding
            assumed.append(
                f"texts padded with the id {pad_id}, as {'SigLIP' if pad_id else 'SigLIP 2'}'s"
            )
    tokenizer, cleaning = "clip", "lower"
    if vocab != _CLIP_VOCABULARY or layout.is_siglip:
        file = _tokenizer(checkpoint, first_siglip)
        tokenizer = file.name if file else "tokenizer.json"
        cleaning = "canonical" if first_siglip else "lower"
    projection = "affine" if len(layout.projection) > 1 else "matrix"
    config = config_lib.TextTower(
        vocab_size=vocab,
        context_length=entry(state, layout.position, (2,)).shape[0],
        width=width,
        depth=depth,
        heads=settings_lib.settle_heads("text", width, layout.heads, settings, assumed),
        mlp_dim=entry(state, f"{layout.layers}0.{layout.layer.mlp[0]}.weight", (2,)).shape[0],
        norm_eps=layout.norm_eps,
        unroll=1,
        causal=layout.causal,
        activation=settings_lib.settle_activation(
            "text", layout.activation, layout.fallback, settings, assumed
        ),
        pool=layout.pool,
        projection=projection if has_projection else "none",
        tokenizer=tokenizer,
        cleaning=cleaning,
        pad_id=pad_id,
    )
    rows = [
        Row("text/token_embed/embedding", layout.token),
        Row("text/position_embed", layout.position),
        *names.blocks("text", layout.layers, layout.layer),
        *names.norm("text_norm", layout.norm),
        *(layout.projection if has_projection else []),
    ]
    sizes = dict(K=config.heads, h=width // config.heads)
    params, theirs = towers.arrange(state, rows, depth, sizes)
    return Tower(config, params, theirs, tuple(assumed), prefix=layout.root)


def _tokenizer(checkpoint: Checkpoint, first_siglip: bool) -> epath.Path | None:
    """The tokenizer file beside the checkpoint; if there are two, the one that the model was trained with."""
    wanted = ".model" if first_siglip else ".json"
    files = sorted(checkpoint.tokenizers, key=lambda path: path.suffix != wanted)
    return files[0] if files else None
