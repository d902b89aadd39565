"""State dicts of OpenAI CLIP, open_clip, and Hugging Face's CLIP, SigLIP and SigLIP 2 as ours.

Sizes are read from the arrays. What these do not tell comes from a config.json or open_clip_config.json
beside them, by flag, or is assumed; the report says which. Nothing in a file is executed.
"""

import functools
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from grain_jax import config as config_lib
from grain_jax.convert import archives, parity, torchscript, towers
from grain_jax.convert import torch as torch_format
from grain_jax.convert import torch_names as names
from grain_jax.convert.towers import Row, Settings, Tower, TowerError
from grain_jax.files import regular_file

_SCALARS = {"logit_scale": "logit_scale", "logit_bias": "logit_bias"}
CLIP_PIXELS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIGLIP_PIXELS = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
_TOKENIZERS = ("tokenizer.json", "spiece.model")
_INTEGERS = {"I64": np.dtype("<i8"), "I32": np.dtype("<i4")}  # position ids, counters
# Entries that are no parameters: sizes that OpenAI's archives carry, masks and counters that can be rebuilt.
_NO_PARAMETERS = re.compile(
    r"input_resolution|context_length|vocab_size|(text\.)?attn_mask|.*\.position_ids"
)
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
_MOST_NESTED = 3  # state dicts in state dicts, as trainers save them; one may hold itself
_SIGLIP_VOCABULARY = 32000  # SigLIP 1's SentencePiece model; SigLIP 2 has Gemma's, of 256,000
_HEAD_WIDTHS = {1152: 72, 1536: 96}  # SigLIP's So400m and g-opt; all others have heads of 64


_GROUP = "an object", lambda x: isinstance(x, Mapping)
_TEXT = "a text", lambda x: isinstance(x, str)
_SIZE = "a whole number from 1 to 10^6", lambda x: type(x) is int and 0 < x <= 10**6
_POSITIVE = "a number from 0 to 1", lambda x: isinstance(x, int | float) and 0 < x < 1
_CHANNELS = (
    "three numbers",
    lambda x: (
        isinstance(x, list)
        and len(x) == 3
        and all(isinstance(c, int | float) and abs(c) < 1e3 for c in x)
    ),
)
# The packages that build the other side of a parity would take memory by it.
_ANY = "at most 10^6", lambda x: not isinstance(x, int | float) or abs(x) <= 10**6
# What is read of config.json, preprocessor_config.json and open_clip_config.json, in whatever group.
_TYPES = {
    **dict.fromkeys(("vision_config", "text_config", "model_cfg", "preprocess_cfg"), _GROUP),
    **dict.fromkeys(("vision_cfg", "text_cfg", "norm_kwargs", "act_kwargs"), _GROUP),
    **dict.fromkeys(("model_type", "hidden_act", "pool_type", "approximate"), _TEXT),
    **dict.fromkeys(("num_attention_heads", "width", "head_width", "heads"), _SIZE),
    **dict.fromkeys(("layer_norm_eps", "eps"), _POSITIVE),
    **dict.fromkeys(("image_mean", "image_std", "mean", "std"), _CHANNELS),
}


class Checkpoint(NamedTuple):
    """What was read: the arrays, and what the files beside them say."""

    path: epath.Path
    state: dict[str, np.ndarray]
    openai: bool  # carries the sizes that OpenAI's archives do
    hf: Mapping[str, Any]  # config.json of a model that we know, or {}
    open_clip: Mapping[str, Any]  # open_clip_config.json's model_cfg, or {}
    pixels: tuple[tuple[float, ...], tuple[float, ...]] | None
    tokenizers: tuple[epath.Path, ...]  # files that lie beside it


class _Parts(NamedTuple):
    """The names inside a layer; {kind} is weight or bias."""

    norms: tuple[str, str]
    qkv: tuple[str, ...]  # one entry for all three, or three
    out: str
    mlp: tuple[str, str]


_NATIVE = _Parts(
    ("ln_1", "ln_2"), ("attn.in_proj_{kind}",), "attn.out_proj", ("mlp.c_fc", "mlp.c_proj")
)
_TIMM = _Parts(("norm1", "norm2"), ("attn.qkv.{kind}",), "attn.proj", ("mlp.fc1", "mlp.fc2"))
_HF = _Parts(
    ("layer_norm1", "layer_norm2"),
    ("self_attn.q_proj.{kind}", "self_attn.k_proj.{kind}", "self_attn.v_proj.{kind}"),
    "self_attn.out_proj",
    ("mlp.fc1", "mlp.fc2"),
)
# By the number of entries that hold query, key and value: for each, (entry, part, parts of it).
_QKV = {
    1: ((0, 0, 3), (0, 1, 3), (0, 2, 3)),
    2: ((0, 0, 1), (1, 0, 2), (1, 1, 2)),
    3: ((0, 0, 1), (1, 0, 1), (2, 0, 1)),
}


def read(path: epath.PathLike) -> Checkpoint:
    """A .pt, .bin or .safetensors file, or a folder with one, as float32 arrays.

    Raises:
      TowerError: no such file, a damaged one, or one that asks to run code.
    """
    path = epath.Path(path)
    if path.is_dir():
        found = [path / name for name in _WEIGHTS if regular_file.is_one(path / name)]
        if not found:
            raise TowerError(f"{path}: holds no weights; expected one of {', '.join(_WEIGHTS)}")
        path = found[0]
    if not regular_file.is_one(path):
        raise TowerError(f"{path}: no such file; expected a .pt, .bin or .safetensors")
    if path.name.endswith(".index.json"):
        with archives.reading(path, TowerError):
            parts = archives.files_of_index(path)
        state = {k: v for part in parts for k, v in _safetensors(part).items()}
    else:
        state = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
    beside = path.parent
    hf, native = _json(beside / "config.json"), _json(beside / "open_clip_config.json")
    preprocessor = _json(beside / "preprocessor_config.json")
    state = _whole_names(state, hf)
    stated = (preprocessor.get("image_mean"), preprocessor.get("image_std"))
    if None in stated:
        stated = tuple(_of(native, "preprocess_cfg").get(key) for key in ("mean", "std"))
    return Checkpoint(
        path,
        {k: v for k, v in state.items() if not _NO_PARAMETERS.fullmatch(k)},
        "input_resolution" in state,
        hf
        if re.fullmatch("(clip|siglip2?)(_(vision|text)_model)?", hf.get("model_type") or "")
        else {},
        _of(native, "model_cfg"),
        None if None in stated else (tuple(stated[0]), tuple(stated[1])),
        tuple(beside / name for name in _TOKENIZERS if regular_file.is_one(beside / name)),
    )


def _whole_names(state: dict[str, np.ndarray], hf: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The names in a whole model; transformers 5 saves a tower of its own without their first part."""
    for prefix in ("vision_model", "text_model"):
        alone = (hf.get("model_type") or "").endswith(f"_{prefix}")
        if alone and not any(name.startswith(f"{prefix}.") for name in state):
            return {f"{prefix}.{name}": array for name, array in state.items()}
    return state


def _json(path: epath.Path) -> dict:
    """The file's object, with the types that `_TYPES` gives to its keys; {} where there is none."""
    if not regular_file.is_one(path):
        return {}
    with archives.reading(path, TowerError):
        value = archives.read_json(path)
        faults = list(_type_faults(value))
        if faults:
            raise archives.ArchiveError("\n".join(faults))
    return value


def _type_faults(value: Mapping[str, Any], where: str = "") -> Iterator[str]:
    for key, got in value.items():
        expected, fits = _TYPES.get(key, _ANY)
        if got is None:  # as left out
            continue
        if not fits(got):
            yield f"{where}{key}: got {str(got)[:100]}, expected {expected}"
        elif isinstance(got, Mapping):
            yield from _type_faults(got, f"{where}{key}.")


def _safetensors(path: epath.Path) -> dict[str, np.ndarray]:
    try:
        with archives.reading(path, TowerError):
            return archives.read_safetensors(path, _INTEGERS)
    except ImportError:
        raise TowerError(f"{path}: needs `pip install safetensors`") from None


def _pickled(path: epath.Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        torch = None  # OpenAI's archives need none
    try:
        with archives.reading(path, TowerError):
            with path.open("rb") as file:
                if torchscript.is_archive(file):
                    return {k: v.astype(np.float32) for k, v in torchscript.read(file).items()}
            stored = None if torch is None else archives.load_torch(path)
    except TowerError:
        raise
    except Exception as error:  # a damaged or hostile pickle may raise anything
        raise TowerError(
            f"{path}: not a checkpoint of plain tensors ({torch_format.refusal(error)})"
        ) from None
    if torch is None:
        raise TowerError(
            f"{path}: PyTorch is needed to read it; pip install 'grain_jax[torch]', or give a .safetensors"
        )
    for _ in range(_MOST_NESTED):
        if isinstance(stored, Mapping) and isinstance(stored.get("state_dict"), Mapping):
            stored = stored["state_dict"]
    if not isinstance(stored, Mapping) or not any(torch.is_tensor(v) for v in stored.values()):
        raise TowerError(f"{path}: got a {type(stored).__name__}, expected a state dict of tensors")
    with archives.reading(path, TowerError):
        return archives.tensors_to_float32(path, stored)


def import_tower(checkpoint: Checkpoint, which: str, settings: Settings) -> Tower:
    """The "image" or "text" tower of a checkpoint.

    Raises:
      TowerError: there is none, or an entry is missing or does not fit.
    """
    with towers.naming(f"{checkpoint.path}: "):
        return {"image": _image, "text": _text}[which](checkpoint, settings)


def _entry(state, name: str, axes: tuple[int, ...]) -> np.ndarray:
    if name not in state:
        raise TowerError(f"{name}: missing")
    if state[name].ndim not in axes or 0 in state[name].shape:
        raise TowerError(
            f"{name}: got shape {state[name].shape}, expected {' or '.join(map(str, axes))} axes"
        )
    return state[name]


def _depth(state, prefix: str) -> int:
    found = [int(m[1]) for name in state if (m := re.match(re.escape(prefix) + r"(\d+)\.", name))]
    if not found or max(found) > 1000:
        raise TowerError(f"{prefix}0: no such layer")
    return 1 + max(found)


def _linear(ours: str, theirs: str, *, bias: bool = True) -> list[Row]:
    rows = [Row(f"{ours}/kernel", f"{theirs}.weight", names.LINEAR)]
    return rows + [Row(f"{ours}/bias", f"{theirs}.bias")] * bias


def _norm(ours: str, theirs: str) -> list[Row]:
    return [Row(f"{ours}/scale", f"{theirs}.weight"), Row(f"{ours}/bias", f"{theirs}.bias")]


def _attention(ours: str, qkv: tuple[str, ...], out: str) -> list[Row]:
    rows = [
        Row(
            f"{ours}/{name}/{leaf}",
            qkv[entry].replace("{kind}", kind),
            names.HEADS_IN,
            (part, parts),
        )
        for name, (entry, part, parts) in zip(("query", "key", "value"), _QKV[len(qkv)])
        for leaf, kind in (("kernel", "weight"), ("bias", "bias"))
    ]
    return [
        *rows,
        Row(f"{ours}/out/kernel", f"{out}.weight", names.HEADS_OUT),
        Row(f"{ours}/out/bias", f"{out}.bias"),
    ]


def _blocks(tower: str, prefix: str, parts: _Parts) -> list[Row]:
    ours, layer = f"{tower}/blocks", prefix + "{}."
    return [
        *_norm(f"{ours}/norm_1", layer + parts.norms[0]),
        *_attention(f"{ours}/attention", tuple(layer + x for x in parts.qkv), layer + parts.out),
        *_norm(f"{ours}/norm_2", layer + parts.norms[1]),
        *_linear(f"{ours}/mlp/in", layer + parts.mlp[0]),
        *_linear(f"{ours}/mlp/out", layer + parts.mlp[1]),
    ]


def _pool(theirs: str, probe: str, qkv: tuple[str, ...], out: str, norm: str) -> list[Row]:
    return [
        Row("image_pool/probe", theirs + probe, names.TOKEN),
        *_attention("image_pool/attention", tuple(theirs + x for x in qkv), theirs + out),
        *_norm("image_pool/norm", theirs + norm),
        *_linear("image_pool/mlp/in", theirs + "mlp.fc1"),
        *_linear("image_pool/mlp/out", theirs + "mlp.fc2"),
    ]


def _heads(
    which: str, width: int, stated: int | None, settings: Settings, assumed: list[str]
) -> int:
    heads = towers.settled(f"{which} heads", settings.heads.get(which), stated)
    usual = max(width // _HEAD_WIDTHS.get(width, 64), 1)
    if heads is None:
        heads = usual
        assumed.append(f"{heads} heads; --{which}-heads says otherwise")
    elif stated is None and heads != usual:  # any divisor fits the arrays
        assumed.append(f"{heads} heads, as told; towers of width {width} have {usual} as a rule")
    if heads < 1 or width % heads:
        raise TowerError(f"{which} heads: got {heads}, expected a divisor of the width {width}")
    return heads


def _activation(
    which: str, stated: str | None, fallback: str, settings: Settings, assumed: list[str]
) -> str:
    stated = _ACTIVATIONS.get(stated, stated)
    activation = towers.settled(f"{which} activation", settings.activation.get(which), stated)
    if activation is None:
        activation = fallback
        assumed.append(f"activation {fallback}; --{which}-activation says otherwise")
    elif stated is None and activation != fallback:
        assumed.append(f"activation {activation}, as told; such towers have {fallback} as a rule")
    if activation not in config_lib.ACTIVATIONS:
        raise TowerError(
            f"{which} activation: got {activation!r}, expected one of"
            f" {', '.join(config_lib.ACTIVATIONS)}"
        )
    return activation


def _stated_activation(checkpoint: Checkpoint, tower_cfg: Mapping[str, Any]) -> str | None:
    """What open_clip_config.json means for a tower of open_clip's own, or OpenAI's activation; else None."""
    if checkpoint.openai or checkpoint.open_clip.get("quick_gelu"):
        return "quick_gelu"
    if not checkpoint.open_clip:
        return None
    tanh = _of(tower_cfg, "act_kwargs").get("approximate") == "tanh"
    return "gelu_tanh" if tanh else "gelu"


def _of(cfg: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A group of keys in a config, which may be left out or null."""
    return cfg.get(key) or {}


def _hf_config(checkpoint: Checkpoint, which: str) -> Mapping[str, Any] | None:
    """What config.json says of a tower, which may be the whole model; None where there is no config.json."""
    if (checkpoint.hf.get("model_type") or "").endswith(f"_{which}_model"):
        return checkpoint.hf
    group = f"{which}_config"
    # A config.json leaves out what equals its class's defaults, all of the group maybe.
    return _of(checkpoint.hf, group) if checkpoint.hf else None


def _image(checkpoint: Checkpoint, settings: Settings) -> Tower:
    state, assumed = checkpoint.state, []
    oc = _of(checkpoint.open_clip, "vision_cfg")
    if "visual.conv1.weight" in state:
        root = "visual."
        patch, position = "visual.conv1", "visual.positional_embedding"
        layers, parts, token = "visual.transformer.resblocks.", _NATIVE, "visual.class_embedding"
        pre, final = "visual.ln_pre", "visual.ln_post"
        head, projection = None, [Row("image_projection/kernel", "visual.proj")]
        eps = _of(oc, "norm_kwargs").get("eps") or 1e-5
        stated, fallback = _stated_activation(checkpoint, oc), "gelu"
        heads = (oc.get("width") or 768) // (oc.get("head_width") or 64) if oc else None
        pool = {"tok": "class", "avg": "mean"}.get(name := oc.get("pool_type") or "tok", name)
        if pool == "mean" and oc.get("final_ln_after_pool"):
            raise TowerError("vision_cfg: final_ln_after_pool with pool_type avg is not supported")
    elif "visual.trunk.patch_embed.proj.weight" in state:
        root, prefix = "visual.", "visual.trunk."
        patch, position = prefix + "patch_embed.proj", prefix + "pos_embed"
        layers, parts, token = prefix + "blocks.", _TIMM, prefix + "cls_token"
        pre, final = prefix + "norm_pre", prefix + "norm"
        head = _pool(prefix + "attn_pool.", "latent", ("q.{kind}", "kv.{kind}"), "proj", "norm")
        projection = _linear("image_projection", "visual.head.proj", bias=False)
        if "visual.head.proj.bias" in state:
            projection = _linear("image_projection", "visual.head.proj")
        # timm's names of its models decide between exact and tanh; only the flag can tell.
        stated, fallback, heads = None, "gelu", None
        eps = 1e-5 if f"{pre}.weight" in state else 1e-6  # timm's CLIP towers; all others
        pool = "class" if token in state else "mean"
        assumed.append(f"norm epsilon {eps:g}, timm's")
    elif "vision_model.embeddings.patch_embedding.weight" in state:
        root = prefix = "vision_model."
        patch, position = (
            prefix + "embeddings.patch_embedding",
            prefix + "embeddings.position_embedding.weight",
        )
        layers, parts, token = (
            prefix + "encoder.layers.",
            _HF,
            prefix + "embeddings.class_embedding",
        )
        pre, final = prefix + "pre_layrnorm", prefix + "post_layernorm"
        fused = ("attention.in_proj_{kind}",)
        head = _pool(prefix + "head.", "probe", fused, "attention.out_proj", "layernorm")
        projection = _linear("image_projection", "visual_projection", bias=False)
        of_siglip = token not in state
        default = "gelu_pytorch_tanh" if of_siglip else "quick_gelu"
        fallback = _ACTIVATIONS.get(default, default)
        eps, stated, heads = 1e-6 if of_siglip else 1e-5, None, None
        if (hf := _hf_config(checkpoint, "vision")) is not None:
            eps = hf.get("layer_norm_eps") or eps
            stated = hf.get("hidden_act") or default
            heads = hf.get("num_attention_heads") or 12
        pool = "class"
    else:
        raise TowerError(
            "no image tower; expected visual.conv1.weight (OpenAI, open_clip), visual.trunk.* (timm) or"
            " vision_model.* (Hugging Face)"
        )
    kernel = _entry(state, f"{patch}.weight", (2, 4))
    positions = _entry(state, position, (2, 3))
    width, depth = kernel.shape[0], _depth(state, layers)
    side = kernel.shape[-1] if kernel.ndim == 4 else round((kernel.shape[1] / 3) ** 0.5)
    has_token, has_head = token in state, head is not None and head[0].theirs in state
    count = positions.shape[-2]
    grid = towers.side_of_grid(position, count, has_token)
    if checkpoint.pixels:
        mean, std = checkpoint.pixels
    else:
        mean, std = SIGLIP_PIXELS if has_head else CLIP_PIXELS
        assumed.append(f"pixels normalised as {'SigLIP' if has_head else 'CLIP'} does, mean {mean}")
    projected = projection[0].theirs in state
    qk_norm = f"{layers}0.attn.q_norm.weight" in state
    config = config_lib.ImageTower(
        image_size=grid * side,
        patch_size=side,
        width=width,
        depth=depth,
        heads=_heads("image", width, heads, settings, assumed),
        mlp_dim=_entry(state, f"{layers}0.{parts.mlp[0]}.weight", (2,)).shape[0],
        qk_norm=qk_norm,
        norm_eps=eps,
        position_init="normal",
        position_period=1e4,
        block_init="trunc_normal",
        unroll=1,
        class_token=has_token,
        patch_bias=f"{patch}.bias" in state,
        pre_norm=f"{pre}.weight" in state,
        activation=_activation("image", stated, fallback, settings, assumed),
        pool="map" if has_head else pool,
        projection=("affine" if len(projection) > 1 else "matrix") if projected else "none",
        pixel_mean=tuple(mean),
        pixel_std=tuple(std),
    )
    rows = [
        Row(
            "image/patch_embed/kernel",
            f"{patch}.weight",
            names.PATCHES if kernel.ndim == 4 else names.LINEAR,
        ),
        Row("image/position_embed", position, names.BATCHED if positions.ndim == 3 else names.SAME),
        *([Row("image/patch_embed/bias", f"{patch}.bias")] if config.patch_bias else []),
        *(_norm("image/pre_norm", pre) if config.pre_norm else []),
        *_blocks("image", layers, parts),
        *_norm("image/norm", final),
        *(head if has_head else []),
        *(projection if projected else []),
    ]
    if has_token:
        form = names.TOKEN if state[token].ndim == 3 else names.SAME
        rows.append(Row("image/class_token", token, form))
    if qk_norm:
        for ours, theirs in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
            rows += _norm(f"image/blocks/attention/{ours}", f"{layers}{{}}.attn.{theirs}")
    params, theirs = towers.arrange(state, rows, depth, _sizes(config, side))
    params["image/position_embed"] = towers.with_class_position(
        params["image/position_embed"], grid, has_token
    )
    return Tower(config, params, theirs, tuple(assumed), prefix=root)


def _sizes(config, patch: int = 0) -> dict[str, int]:
    return dict(K=config.heads, h=config.width // config.heads, p=patch)


def _text(checkpoint: Checkpoint, settings: Settings) -> Tower:
    state, assumed = checkpoint.state, []
    oc = _of(checkpoint.open_clip, "text_cfg")
    prefix = "text." if "text.token_embedding.weight" in state else ""
    if f"{prefix}token_embedding.weight" in state:
        token, position = f"{prefix}token_embedding.weight", f"{prefix}positional_embedding"
        layers, parts, final = f"{prefix}transformer.resblocks.", _NATIVE, f"{prefix}ln_final"
        projection = [Row("text_projection/kernel", f"{prefix}text_projection")]
        linear = f"{prefix}text_projection"
        if f"{linear}.weight" in state:
            projection = _linear("text_projection", linear, bias=f"{linear}.bias" in state)
        siglip = f"{linear}.bias" in state
        root, fallback = prefix or "transformer.", "gelu"
        stated, heads = _stated_activation(checkpoint, oc), (oc.get("heads") or 8) if oc else None
        causal, pool, eps = not oc.get("no_causal_mask"), oc.get("pool_type") or "argmax", 1e-5
        if siglip and not oc:
            causal, pool, eps = False, "last", 1e-6
            assumed.append("SigLIP's: bidirectional, read at the last position, norm epsilon 1e-6")
        pool = {"argmax": "end", "eos": "end"}.get(pool, pool)
        eps = _of(oc, "norm_kwargs").get("eps") or eps
    elif "text_model.embeddings.token_embedding.weight" in state:
        token = "text_model.embeddings.token_embedding.weight"
        position = "text_model.embeddings.position_embedding.weight"
        layers, parts, final = "text_model.encoder.layers.", _HF, "text_model.final_layer_norm"
        root = "text_model."
        siglip = "text_model.head.weight" in state
        linear = "text_model.head" if siglip else "text_projection"
        projection = _linear("text_projection", linear, bias=f"{linear}.bias" in state)
        causal, pool = not siglip, "last" if siglip else "end"
        default = "gelu_pytorch_tanh" if siglip else "quick_gelu"
        fallback = _ACTIVATIONS.get(default, default)
        eps, stated, heads = 1e-6 if siglip else 1e-5, None, None
        if (hf := _hf_config(checkpoint, "text")) is not None:
            eps = hf.get("layer_norm_eps") or eps
            stated = hf.get("hidden_act") or default
            heads = hf.get("num_attention_heads") or (12 if siglip else 8)
    else:
        raise TowerError(
            "no text tower; expected token_embedding.weight (OpenAI, open_clip) or text_model.*"
            " (Hugging Face)"
        )
    vocab, width = _entry(state, token, (2,)).shape
    depth = _depth(state, layers)
    projected = projection[0].theirs in state
    first_siglip = siglip and vocab == _SIGLIP_VOCABULARY
    pad_id = settings.pad_id
    if pad_id is None:
        pad_id = 1 if first_siglip else 0
        if not causal or pool != "end":  # else the padding is never looked at
            assumed.append(
                f"texts padded with the id {pad_id}, as {'SigLIP' if pad_id else 'SigLIP 2'}'s"
            )
    tokenizer, cleaning = "clip", "lower"
    if vocab != 49408 or siglip:
        found = _tokenizer(checkpoint, first_siglip)
        tokenizer = found.name if found else "tokenizer.json"
        cleaning = "canonical" if first_siglip else "lower"
    config = config_lib.TextTower(
        vocab_size=vocab,
        context_length=_entry(state, position, (2,)).shape[0],
        width=width,
        depth=depth,
        heads=_heads("text", width, heads, settings, assumed),
        mlp_dim=_entry(state, f"{layers}0.{parts.mlp[0]}.weight", (2,)).shape[0],
        norm_eps=eps,
        unroll=1,
        causal=causal,
        activation=_activation("text", stated, fallback, settings, assumed),
        pool=pool,
        projection=("affine" if len(projection) > 1 else "matrix") if projected else "none",
        tokenizer=tokenizer,
        cleaning=cleaning,
        pad_id=pad_id,
    )
    rows = [
        Row("text/token_embed/embedding", token),
        Row("text/position_embed", position),
        *_blocks("text", layers, parts),
        *_norm("text_norm", final),
        *(projection if projected else []),
    ]
    params, theirs = towers.arrange(state, rows, depth, _sizes(config))
    return Tower(config, params, theirs, tuple(assumed), prefix=root)


def _tokenizer(checkpoint: Checkpoint, first_siglip: bool) -> epath.Path | None:
    """The tokenizer's file beside the checkpoint; of SigLIP's two, the one that it was trained with."""
    wanted = ".model" if first_siglip else ".json"
    files = sorted(checkpoint.tokenizers, key=lambda path: path.suffix != wanted)
    return files[0] if files else None


def unused(checkpoint: Checkpoint, *used: Tower) -> list[str]:
    """The entries that none of these towers took, sorted."""
    taken = set()
    for tower in used:
        for name in tower.theirs.values():
            taken |= {name.format(i) for i in range(tower.config.depth)}
    return sorted(checkpoint.state.keys() - taken)


def convert(source: epath.PathLike, folder: epath.PathLike, settings: Settings) -> parity.Report:
    """Converts `source` and writes a two-tower model to `folder`; the report ends with the parity.

    Raises:
      TowerError: the checkpoint cannot be converted, or the folder holds something else.
    """
    folder = towers.check_output(folder)
    checkpoint = read(source)
    image, text = (import_tower(checkpoint, which, settings) for which in towers.TOWERS)
    left = [name for name in unused(checkpoint, image, text) if name not in _SCALARS]
    if left:
        raise TowerError("\n".join(f"{checkpoint.path}: {name}: unknown key" for name in left))
    with towers.naming(f"{checkpoint.path}: "):
        scalars = towers.scalars(checkpoint.state, _SCALARS)
        model, params = towers.two_tower_model(image, text, scalars)
    proof = _parity(checkpoint, model, params)
    towers.save(folder, model, params, str(source), proof)
    lines = [f"from-open-clip: {checkpoint.path} -> {folder}", *towers.describe(model, image, text)]
    if not checkpoint.hf and not checkpoint.open_clip:
        lines.append(
            "NOT PROVEN by the parity below: heads and activations that are assumed or told above, since"
            " there is no config and the other side is built with the same"
        )
    if model.text.tokenizer != "clip":
        file = next((x for x in checkpoint.tokenizers if x.name == model.text.tokenizer), None)
        if file:
            file.copy(folder / file.name, overwrite=True)
            lines.append(f"tokenizer {file}, copied")
        else:
            lines.append(
                f"tokenizer NOT FOUND; copy the tower's to {folder / model.text.tokenizer}"
            )
    return proof._replace(text="\n".join([*lines, "", proof.text]))


def _parity(checkpoint: Checkpoint, model: config_lib.Model, params: dict) -> parity.Report:
    """Ours against the checkpoint's own architecture, built by its own package and loaded strictly."""
    given = parity.inputs(model.image.image_size, model.text.vocab_size, model.text.context_length)
    hf = "text_model.embeddings.token_embedding.weight" in checkpoint.state
    _check_sizes(checkpoint, model)
    try:
        import torch

        package, module, encode = (_build_hf if hf else _build_open_clip)(checkpoint, model)
    except ImportError as error:
        return parity.not_proven(
            params, f"{error.name} is not installed, so nothing could be compared."
        )
    except TowerError:
        raise
    except Exception as error:  # the packages raise many kinds for a config that is none
        reason = " ".join(str(error).split())[:200]
        raise TowerError(
            f"{checkpoint.path}: its own package does not take the config beside it"
            f" ({type(error).__name__}: {reason})"
        ) from None
    state = {k: torch.from_numpy(np.array(v)) for k, v in checkpoint.state.items()}
    own = module.state_dict()
    scalar = {k: v.reshape(own[k].shape) for k, v in state.items() if k in own and k in _SCALARS}
    try:
        module.load_state_dict(state | scalar)
    except RuntimeError as error:
        fault = str(error).splitlines()[1].strip()
        raise TowerError(
            f"{checkpoint.path}: does not fit {package} of its config ({fault})"
        ) from None
    pictures = torch.from_numpy(given.pictures.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        image, text = encode(module.eval(), pictures, torch.from_numpy(given.token_ids).long())
    theirs = dict(image_embed=image.numpy(), text_embed=text.numpy())
    return parity.report(
        parity.compare(parity.outputs(model, params, given), theirs), package, given
    )


def _check_sizes(checkpoint: Checkpoint, model: config_lib.Model) -> None:
    """Raises TowerError where the config beside the weights has other sizes, or names another model.

    The other side of the parity is built by that config: with 10^6 layers it would take all memory, and
    a model's name would be looked up on the internet.
    """
    image, text = model.image, model.text
    hf_sizes = lambda t: dict(  # noqa: E731
        hidden_size=t.width, intermediate_size=t.mlp_dim, num_hidden_layers=t.depth
    )
    oc_sizes = lambda t: dict(width=t.width, layers=t.depth)  # noqa: E731
    grid = image.image_size // image.patch_size
    pixels = dict(patch_size=image.patch_size, num_channels=3, num_patches=grid * grid)
    words = dict(vocab_size=text.vocab_size, max_position_embeddings=text.context_length)
    vision_cfg = _of(checkpoint.open_clip, "vision_cfg")
    timm = vision_cfg.get("timm_model_name")  # its trunk's sizes are the name's
    groups = {
        "vision_config": (
            checkpoint.hf,
            hf_sizes(image) | pixels | dict(image_size=image.image_size),
        ),
        "text_config": (checkpoint.hf, hf_sizes(text) | words),
        "vision_cfg": (
            checkpoint.open_clip,
            {} if timm else oc_sizes(image) | dict(patch_size=image.patch_size),
        ),
        "text_cfg": (
            checkpoint.open_clip,
            oc_sizes(text) | dict(vocab_size=text.vocab_size, context_length=text.context_length),
        ),
    }
    faults = []
    for group, (config, sizes) in groups.items():
        said = _of(config, group)
        for key, size in sizes.items():
            if said.get(key, size) not in (size, [size, size], None):
                faults.append(
                    f"{group}.{key}: got {str(said[key])[:100]}, but the arrays have {size}"
                )
    for group, tower in (("vision_cfg", image), ("text_cfg", text)):
        ratio = _of(checkpoint.open_clip, group).get("mlp_ratio")
        if ratio is not None and not timm:
            if (
                not isinstance(ratio, int | float)
                or abs(ratio - tower.mlp_dim / tower.width) > 0.01
            ):
                faults.append(
                    f"{group}.mlp_ratio: got {str(ratio)[:100]}, but the arrays have"
                    f" {tower.mlp_dim / tower.width:g}"
                )
    if timm is not None and not (isinstance(timm, str) and re.fullmatch(r"[\w.]+", timm)):
        faults.append(
            f"vision_cfg.timm_model_name: got {str(timm)[:100]!r}, expected a name of timm's"
        )
    for group in ("vision_cfg", "text_cfg"):
        if _of(checkpoint.open_clip, group).get("hf_model_name") is not None:
            faults.append(f"{group}.hf_model_name: got one, expected a tower of open_clip's own")
    if faults:
        raise TowerError("\n".join(f"{checkpoint.path}: {fault}" for fault in faults))


def _build_hf(checkpoint: Checkpoint, model: config_lib.Model):
    """transformers' own class for the arrays, of its config.json, or of what we assumed where there is none."""
    import transformers

    image = model.image
    flat_patches = checkpoint.state["vision_model.embeddings.patch_embedding.weight"].ndim == 2
    kind = "CLIP" if image.pool == "class" else "Siglip2" if flat_patches else "Siglip"
    stated = checkpoint.hf or _hf_assumed(model, flat_patches)
    config = getattr(transformers, f"{kind}Config").from_dict(dict(stated))
    module = getattr(transformers, f"{kind}Model")(config).float()
    grid = image.image_size // image.patch_size

    def encode(module, pictures, ids):
        inputs = dict(pixel_values=pictures)
        if flat_patches:
            import torch

            p = image.patch_size
            x = pictures.unfold(2, p, p).unfold(3, p, p)  # [N, 3, grid, grid, p, p]
            x = x.permute(0, 2, 3, 4, 5, 1).reshape(len(x), grid * grid, -1)
            inputs = dict(
                pixel_values=x,
                pixel_attention_mask=torch.ones(x.shape[:2], dtype=torch.int32),
                spatial_shapes=torch.tensor([[grid, grid]] * len(x)),
            )
        out = module(input_ids=ids, **inputs)
        return out.image_embeds, out.text_embeds

    return f"transformers {transformers.__version__}'s {kind}Model", module, encode


def _hf_assumed(model: config_lib.Model, flat_patches: bool) -> dict[str, Any]:
    image, text = model.image, model.text
    shared = lambda t: dict(  # noqa: E731
        hidden_size=t.width,
        intermediate_size=t.mlp_dim,
        num_hidden_layers=t.depth,
        num_attention_heads=t.heads,
        hidden_act={"gelu_tanh": "gelu_pytorch_tanh"}.get(t.activation, t.activation),
        layer_norm_eps=t.norm_eps,
        projection_dim=model.embed_dim,
    )
    grid = image.image_size // image.patch_size
    return dict(
        projection_dim=model.embed_dim,
        vision_config=dict(shared(image), patch_size=image.patch_size)
        | (dict(num_patches=grid * grid) if flat_patches else dict(image_size=image.image_size)),
        text_config=dict(
            shared(text),
            vocab_size=text.vocab_size,
            max_position_embeddings=text.context_length,
            projection_size=model.embed_dim,
            bos_token_id=text.vocab_size - 2,
            eos_token_id=text.vocab_size - 1,
            pad_token_id=text.pad_id,
        ),
    )


def _build_open_clip(checkpoint: Checkpoint, model: config_lib.Model):
    """open_clip's own model for the arrays, of its config, or of what we assumed where there is none."""
    import open_clip
    from open_clip import model as library

    image, stated = model.image, checkpoint.open_clip
    vision_cfg, text_cfg = _open_clip_assumed(model)
    quick_gelu = image.activation == "quick_gelu"
    if stated:
        size = dict(image_size=image.image_size, timm_model_pretrained=False)
        vision_cfg, text_cfg = dict(_of(stated, "vision_cfg")) | size, dict(_of(stated, "text_cfg"))
        quick_gelu = bool(stated.get("quick_gelu"))
    custom = "text.token_embedding.weight" in checkpoint.state
    module = (library.CustomTextCLIP if custom else library.CLIP)(
        model.embed_dim,
        vision_cfg,
        text_cfg,
        quick_gelu=quick_gelu,
        init_logit_bias=model.logit_bias_init,
    )
    if "visual.trunk.patch_embed.proj.weight" in checkpoint.state and not stated:
        module.visual = _timm_trunk(image)
    return (
        f"open_clip {open_clip.__version__}",
        module,
        lambda module, pictures, ids: (
            module.encode_image(pictures, normalize=True),
            module.encode_text(ids, normalize=True),
        ),
    )


def _open_clip_assumed(model: config_lib.Model) -> tuple[dict[str, Any], dict[str, Any]]:
    image, text = model.image, model.text
    vision_cfg = dict(
        image_size=image.image_size,
        layers=image.depth,
        width=image.width,
        head_width=image.width // image.heads,
        mlp_ratio=image.mlp_dim / image.width,
        patch_size=image.patch_size,
        no_ln_pre=not image.pre_norm,
        pool_type="avg" if image.pool == "mean" else "tok",
    )
    text_cfg = dict(
        context_length=text.context_length,
        vocab_size=text.vocab_size,
        width=text.width,
        heads=text.heads,
        layers=text.depth,
        mlp_ratio=text.mlp_dim / text.width,
        no_causal_mask=not text.causal,
        proj_bias=text.projection == "affine",
        pool_type="argmax" if text.pool == "end" else text.pool,
        norm_kwargs=dict(eps=text.norm_eps),
    )
    for tower, cfg in ((image, vision_cfg), (text, text_cfg)):
        if tower.activation == "gelu_tanh":
            cfg["act_kwargs"] = dict(approximate="tanh")
    return vision_cfg, text_cfg


def _timm_trunk(image: config_lib.ImageTower):
    """timm's vision transformer where open_clip keeps it; by sizes, since its name is not in the checkpoint."""
    import torch
    from timm.models.vision_transformer import VisionTransformer

    trunk = VisionTransformer(
        img_size=image.image_size,
        patch_size=image.patch_size,
        embed_dim=image.width,
        depth=image.depth,
        num_heads=image.heads,
        mlp_ratio=image.mlp_dim / image.width,
        qk_norm=image.qk_norm,
        class_token=image.class_token,
        pre_norm=image.pre_norm,
        global_pool={"map": "map", "class": "token", "mean": "avg"}[image.pool],
        num_classes=0,
        act_layer=image.activation,  # timm has our names
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=image.norm_eps),
    )
    return torch.nn.Sequential(OrderedDict(trunk=trunk))
