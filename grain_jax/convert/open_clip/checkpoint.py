"""Reading of a CLIP or SigLIP checkpoint: its arrays, and the configs beside it, whose types are checked."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from grain_jax.checkpoint.pretrained import hub
from grain_jax.convert import archives, torchscript
from grain_jax.convert.faults import ConvertError, prefixed, raise_any
from grain_jax.core import regular_file

SCALARS = {"logit_scale": "logit_scale", "logit_bias": "logit_bias"}  # ours -> theirs
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
# Entries that are not parameters: sizes in the archives of OpenAI, masks and position ids; the token of pretraining.
_NOT_PARAMETERS = re.compile(
    r"input_resolution|context_length|vocab_size|(text\.)?attn_mask|.*\.position_ids|(embeddings\.)?mask_token"
)
# model_type of config.json, in front of _vision_model and _text_model for a tower alone.
_FAMILIES = "clip|siglip2?|metaclip_2|dinov3_vit"
_OF_HF = ("vision_model.", "text_model.", "embeddings.")
_REGISTERS = "embeddings.register_tokens"
_MAX_NESTING = 3  # state dicts in state dicts, as trainers save them; one may contain itself
_GROUP = "an object", lambda x: isinstance(x, Mapping)
_TEXT = "a text", lambda x: isinstance(x, str)
_SIZE = "a whole number from 1 to 10^6", lambda x: type(x) is int and 0 < x <= 10**6
_POSITIVE = "a number from 0 to 1", lambda x: isinstance(x, int | float) and 0 < x < 1
_COUNT = "a whole number from 0 to 10^6", lambda x: type(x) is int and 0 <= x <= 10**6
_IDS = (
    "a whole number up to 10^6, or a list",
    lambda x: isinstance(x, list) or (type(x) is int and abs(x) <= 10**6),
)
_CHANNELS = (
    "three numbers",
    lambda x: (
        isinstance(x, list)
        and len(x) == 3
        and all(isinstance(c, int | float) and abs(c) < 1e3 for c in x)
    ),
)
# Larger sizes would make the packages of the parity comparison take all memory.
_ANY = "at most 10^6", lambda x: not isinstance(x, int | float) or abs(x) <= 10**6
# Keys that are read of config.json, preprocessor_config.json and open_clip_config.json, in any group.
_TYPES = {
    **dict.fromkeys(("vision_config", "text_config", "model_cfg", "preprocess_cfg"), _GROUP),
    "image_processor": _GROUP,
    **dict.fromkeys(("vision_cfg", "text_cfg", "norm_kwargs", "act_kwargs"), _GROUP),
    **dict.fromkeys(("model_type", "hidden_act", "pool_type", "approximate"), _TEXT),
    **dict.fromkeys(("timm_model_name", "tokenizer_class"), _TEXT),
    "rope_theta": (
        "a number from 1 to 10^6",
        lambda x: type(x) in (int, float) and 1 <= x <= 10**6,
    ),
    **dict.fromkeys(("num_attention_heads", "width", "head_width", "heads"), _SIZE),
    **dict.fromkeys(("layer_norm_eps", "eps"), _POSITIVE),
    "max_position_embeddings": _SIZE,
    **dict.fromkeys(("eos_id", "pad_id"), _COUNT),
    **dict.fromkeys(("eos_token_id", "pad_token_id"), _IDS),
    **{"tokenizer_kwargs": _GROUP, "clean": _TEXT},
    **dict.fromkeys(("image_mean", "image_std", "mean", "std"), _CHANNELS),
}


class Checkpoint(NamedTuple):
    """The arrays of a checkpoint and the contents of the files beside it."""

    path: epath.Path
    state: dict[str, np.ndarray]
    openai: bool  # an archive of OpenAI, by the sizes among its entries
    hf: Mapping[str, Any]  # config.json of a family that is known, or {}
    open_clip: Mapping[str, Any]  # open_clip_config.json's model_cfg, or {}
    pixels: tuple[tuple[float, ...], tuple[float, ...]] | None  # mean and standard deviation
    tokenizers: tuple[epath.Path, ...]  # tokenizer files beside it
    tokenizer_class: str = ""  # of tokenizer_config.json

    @property
    def is_hf(self) -> bool:
        """Whether the arrays have the names of transformers."""
        return any(name.startswith(_OF_HF) for name in self.state)

    @property
    def is_dinov3(self) -> bool:
        """Whether it is DINOv3 of transformers: an image tower alone."""
        return "embeddings.patch_embeddings.weight" in self.state


def read(path: epath.PathLike, library: str = "") -> Checkpoint:
    """A .pt, .bin or .safetensors file, a folder with one, or hf://ORG/NAME, as float32 arrays.

    Args:
      path: the file, the folder or the name.
      library: "open_clip": whose files are taken where a folder has those of transformers, too.

    Raises:
      ConvertError: no such file, a damaged one, or one that asks to run code; nothing in it is executed.
      hub.HubError: the Hub refuses.
    """
    path = hub.local(str(path))
    if path.is_dir():
        found = [path / name for name in _WEIGHTS if regular_file.is_one(path / name)]
        found.sort(key=lambda path: not path.name.startswith(library))
        if not found:
            raise ConvertError(f"{path}: holds no weights; expected one of {', '.join(_WEIGHTS)}")
        path = found[0]
    if not regular_file.is_one(path):
        raise ConvertError(f"{path}: no such file; expected a .pt, .bin or .safetensors")
    if path.suffix in (".safetensors", ".json"):
        parts = archives.files_of_index(path) if path.suffix == ".json" else [path]
        read_part = lambda part: archives.read_safetensors(part, _INTEGERS)
        state = {name: array for part in parts for name, array in read_part(part).items()}
    else:
        state = _pickled(path)
    beside = path.parent
    hf, native = _json(beside / "config.json"), _json(beside / "open_clip_config.json")
    of_tokenizer = _json(beside / "tokenizer_config.json")
    # A processor of transformers 5 keeps that of images in its own file.
    whole = group(_json(beside / "processor_config.json"), "image_processor")
    preprocessor = _json(beside / "preprocessor_config.json") or whole
    state = _whole_names(state, hf)
    if not re.fullmatch(f"({_FAMILIES})(_(vision|text)_model)?", hf.get("model_type") or ""):
        hf = {}
    is_hf = any(name.startswith(_OF_HF) for name in state)
    hf, native = (hf, {}) if is_hf else ({}, native)  # a folder may have those of both packages
    if _REGISTERS in state and not state[_REGISTERS].size:  # DINOv3 without any
        del state[_REGISTERS]
    mean, std = preprocessor.get("image_mean"), preprocessor.get("image_std")
    if mean is None or std is None:
        mean, std = (group(native, "preprocess_cfg").get(key) for key in ("mean", "std"))
    if preprocessor.get("do_normalize") is False:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return Checkpoint(
        path,
        {k: v for k, v in state.items() if not _NOT_PARAMETERS.fullmatch(k)},
        "input_resolution" in state,
        hf,
        group(native, "model_cfg"),
        None if mean is None or std is None else (tuple(mean), tuple(std)),
        tuple(beside / name for name in _TOKENIZERS if regular_file.is_one(beside / name)),
        of_tokenizer.get("tokenizer_class") or "",
    )


def _whole_names(state: dict[str, np.ndarray], hf: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Names as in a whole model: transformers 5 saves a single tower without the first part of its names."""
    for prefix in ("vision_model", "text_model"):
        alone = (hf.get("model_type") or "").endswith(f"_{prefix}")
        if alone and not any(name.startswith(f"{prefix}.") for name in state):
            return {f"{prefix}.{name}": array for name, array in state.items()}
    return state


def _json(path: epath.Path) -> dict:
    """The JSON object in a file, its values checked by `_TYPES`; {} if there is no file."""
    if not regular_file.is_one(path):
        return {}
    value = regular_file.read_json(path, dict[str, Any], "a JSON object")
    with prefixed(f"{path}: "):
        raise_any(list(_type_faults(value)))
    return value


def _type_faults(value: Mapping[str, Any], where: str = "") -> Iterator[str]:
    for key, got in value.items():
        expected, fits = _TYPES.get(key, _ANY)
        if got is None:  # the same as a missing key
            continue
        if not fits(got):
            yield f"{where}{key}: got {str(got)[:100]}, expected {expected}"
        elif isinstance(got, Mapping):
            yield from _type_faults(got, f"{where}{key}.")


def _pickled(path: epath.Path) -> dict[str, np.ndarray]:
    with archives.reading(path, archives.TENSORS):
        with path.open("rb") as file:
            if torchscript.is_archive(file):
                return {k: v.astype(np.float32) for k, v in torchscript.read(file).items()}
        stored = archives.load_torch(path)
        for _ in range(_MAX_NESTING):
            if isinstance(stored, Mapping) and isinstance(stored.get("state_dict"), Mapping):
                stored = stored["state_dict"]
        if not isinstance(stored, Mapping) or not any(hasattr(v, "dtype") for v in stored.values()):
            raise ConvertError(f"got a {type(stored).__name__}, expected a state dict of tensors")
        return archives.tensors_to_float32(path, stored)


def group(cfg: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A group of keys in a config; {} if it is missing or null."""
    return cfg.get(key) or {}
