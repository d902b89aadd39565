"""from-open-clip: CLIP and SigLIP of open_clip.

open_clip's classes read the config: open_clip_config.json beside the weights, or the config of a model that
the user names. The model of open_clip, with the same weights, is the other side of the parity.
"""

import functools
import re
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from grain_jax import config as config_lib
from grain_jax.checkpoint.pretrained import hub
from grain_jax.convert import archives, formats, output, parity, towers
from grain_jax.convert.faults import ConvertError, needing
from grain_jax.core import regular_file

WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
)
PACKAGES = ("open_clip_torch", "torch")
_CONFIG = "open_clip_config.json"
_NOT_WEIGHTS = (
    *("input_resolution", "context_length", "vocab_size"),  # in OpenAI's state dicts
    *("attn_mask", "text.attn_mask"),
)
_POOLS = {"tok": "class", "token": "class", "avg": "mean", "argmax": "end", "eos": "end"}


class OpenClipCheckpoint(NamedTuple):
    """A checkpoint of open_clip."""

    path: epath.Path  # the folder or the file of weights
    state: dict[str, np.ndarray]
    config: dict[str, Any]  # `model_cfg` of open_clip_config.json
    pixels: tuple[Any, Any]  # their mean and standard deviation

    @property
    def is_custom(self) -> bool:
        """Whether it is open_clip's CustomTextCLIP, which keeps the text tower in a module of its own."""
        return "text.token_embedding.weight" in self.state


def from_open_clip(source: epath.PathLike, folder: epath.PathLike, name: str | None = None) -> parity.Report:
    """from-open-clip: a folder or a file of weights to a two-tower model in `folder`.

    Args:
      source: the weights, or hf://ORG/NAME.
      folder: to write.
      name: of the model in open_clip, where no config lies beside the weights.

    Raises:
      ConvertError: the checkpoint cannot be converted, or the folder holds something else.
    """
    target = output.check_free(folder)
    checkpoint = _read(hub.local(str(source)), name)
    with archives.reading(checkpoint.path, "what open_clip takes, by the config"):
        imported = towers.build(_towers(checkpoint), checkpoint.state)
    proof = _prove(checkpoint, imported)
    return towers.write("from-open-clip", checkpoint.path, target, imported, proof)


def _read(path: epath.Path, name: str | None) -> OpenClipCheckpoint:
    state = archives.read_weights(path, WEIGHTS)
    if any(x.startswith(("vision_model.", "text_model.")) for x in state):
        raise ConvertError(f"{path}: got weights of transformers; grain-jax convert from-hf reads them")
    state = {key: x for key, x in state.items() if key not in _NOT_WEIGHTS}
    pixels, file = towers.CLIP_PIXELS, (path if path.is_dir() else path.parent) / _CONFIG
    with needing("open_clip", path):
        import open_clip
    if name is not None:
        if name not in open_clip.list_models():
            raise ConvertError(f"--model: got {name!r}, expected a name of open_clip.list_models()")
        config: Any = open_clip.get_model_config(name)
        pixels = towers.SIGLIP_PIXELS if "SigLIP" in name else pixels
    elif regular_file.is_one(file):
        stated = regular_file.read_json(file, dict[str, Any], "open_clip's config")
        with archives.reading(file, "open_clip's config"):
            config, processor = stated["model_cfg"], stated.get("preprocess_cfg", {})
            mean, std = (processor.get(key, x) for key, x in zip(("mean", "std"), pixels))
            pixels = tuple(mean), tuple(std)
    else:
        raise ConvertError(
            f"{path}: has no {_CONFIG} beside it; --model NAME says which model of open_clip it is,"
            " such as ViT-B-32"
        )
    return OpenClipCheckpoint(path, state, config, pixels)


def _configs(config: dict[str, Any]) -> tuple[Any, Any]:
    """What open_clip reads of the two parts of a config; nothing is downloaded for them."""
    from open_clip import model as library

    vision = library.CLIPVisionCfg(**config["vision_cfg"] | {"timm_model_pretrained": False})
    return vision, library.CLIPTextCfg(**config["text_cfg"])


def _module(checkpoint: OpenClipCheckpoint) -> Any:
    """The model of open_clip with random weights."""
    from open_clip import model as library

    config = checkpoint.config
    options: Any = dict(quick_gelu=bool(config.get("quick_gelu")), init_logit_bias=config.get("init_logit_bias"))
    kind = library.CustomTextCLIP if checkpoint.is_custom else library.CLIP
    return kind(config["embed_dim"], *_configs(config), **options)


def _towers(checkpoint: OpenClipCheckpoint) -> towers.Towers:
    """What config and modules of open_clip say of the towers."""
    import torch

    config, (mean, std) = checkpoint.config, checkpoint.pixels
    vision, text_config = _configs(config)
    quick = bool(config.get("quick_gelu"))
    if text_config.hf_model_name or re.search("[:/]", vision.timm_model_name or ""):
        raise ConvertError("got a tower of the Hub, expected open_clip's own or one of timm")
    if vision.final_ln_after_pool and vision.pool_type == "avg":
        raise ConvertError("vision_cfg: final_ln_after_pool with pool_type avg is not supported")
    if vision.timm_model_name:
        with torch.device("meta"):
            visual = _module(checkpoint).visual
        proj = getattr(visual.head, "proj", None)
        affine = proj is not None and proj.bias is not None
        fields = timm_fields(visual.trunk)
        fields |= dict(projection="none" if proj is None else "affine" if affine else "matrix", unroll=1)
        rows = formats.timm_image_in_open_clip()
    else:
        rows = formats.openai_image()
        fields = _sizes(vision, quick) | dict(
            heads=vision.width // vision.head_width,
            patch_size=vision.patch_size,
            qk_norm=vision.qk_norm,
            patch_bias=False,
            pre_norm=not vision.no_ln_pre,
            pool=_POOLS.get(vision.pool_type, vision.pool_type),
        )
    image = config_lib.ImageTower(**fields, image_size=vision.image_size, pixel_mean=mean, pixel_std=std)
    end_id = text_config.eos_id if text_config.pool_type == "eos" else None
    end_id = end_id if end_id is not None and 0 <= end_id < text_config.vocab_size - 1 else None
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    siglip = text_config.pool_type == "last" and text_config.proj_bias
    stated = towers.text_fields(folder, text_config.vocab_size, siglip=siglip, end_id=end_id)
    if end_id is not None:
        stated["pad_id"] = config["text_cfg"].get("pad_id", stated["pad_id"])
    clean = (text_config.tokenizer_kwargs or {}).get("clean")
    if clean == "canonicalize" and stated["tokenizer"] != "clip":
        stated["cleaning"] = "canonical"
    projection = "affine" if text_config.proj_bias else "matrix"
    text = config_lib.TextTower(
        **_sizes(text_config, quick),
        **stated,
        heads=text_config.heads,
        vocab_size=text_config.vocab_size,
        context_length=text_config.context_length,
        causal=not text_config.no_causal_mask,
        pool=_POOLS.get(text_config.pool_type, text_config.pool_type),
        projection="none" if text_config.proj_type == "none" else projection,
    )
    prefix = "text." if checkpoint.is_custom else ""
    rows = [*rows, *formats.openai_text(prefix, matrix=not text_config.proj_bias), *towers.SCALARS]
    return towers.Towers(config["embed_dim"], image, text, rows)


def _sizes(config: Any, quick_gelu: bool) -> dict[str, Any]:
    gelu = "gelu_tanh" if (config.act_kwargs or {}).get("approximate") == "tanh" else "gelu"
    return dict(
        width=config.width,
        depth=config.layers,
        mlp_dim=int(config.width * config.mlp_ratio),
        activation="quick_gelu" if quick_gelu else gelu,
        norm_eps=(config.norm_kwargs or {}).get("eps", 1e-5),
        unroll=1,
    )


def timm_fields(trunk: Any) -> dict[str, Any]:
    """The keys of an image tower that is a vision transformer of timm, read off its modules."""
    import torch

    block, act = trunk.blocks[0], trunk.blocks[0].mlp.act
    tanh = getattr(act, "approximate", "") == "tanh" or "Tanh" in type(act).__name__
    return dict(
        width=trunk.embed_dim,
        depth=len(trunk.blocks),
        heads=block.attn.num_heads,
        mlp_dim=block.mlp.fc1.out_features,
        activation="gelu_tanh" if tanh else "gelu",
        norm_eps=trunk.norm.eps if hasattr(trunk.norm, "eps") else trunk.fc_norm.eps,
        patch_size=trunk.patch_embed.patch_size[0],
        qk_norm=not isinstance(block.attn.q_norm, torch.nn.Identity),
        class_token=trunk.cls_token is not None,
        pre_norm=not isinstance(trunk.norm_pre, torch.nn.Identity),
        patch_bias=trunk.patch_embed.proj.bias is not None,
        pool=_POOLS.get(trunk.global_pool, trunk.global_pool),
    )


def _prove(checkpoint: OpenClipCheckpoint, imported: towers.Imported) -> parity.Report:
    """Our model against open_clip's, with the same weights."""
    import torch

    with archives.reading(checkpoint.path, "what open_clip takes, by the config"):
        module = _module(checkpoint).eval()
        module.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in checkpoint.state.items()})
    run = functools.partial(module_outputs, module)
    return parity.prove(imported.model, imported.params, "open_clip", PACKAGES, run)


def module_outputs(module: Any, inputs: parity.Inputs) -> dict[str, np.ndarray]:
    """The outputs of a module of open_clip."""
    import torch

    images, ids = parity.for_torch(inputs)
    with torch.no_grad():
        return {
            "image_embed": module.encode_image(images, normalize=True).numpy(),
            "text_embed": module.encode_text(ids, normalize=True).numpy(),
            "logits": module.get_logits(images, ids)[0].numpy(),
        }
