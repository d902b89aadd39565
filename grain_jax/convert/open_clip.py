"""from-open-clip and to-open-clip: CLIP and SigLIP of open_clip; from-open-clip reads PE-core, too.

open_clip's classes read the config: open_clip_config.json beside the weights, or the config of a model that
the user names. The model of open_clip, with the same weights, is the other side of the parity.
"""

import contextlib
import functools
import io
import re
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from etils import epath

from grain_jax import config as config_lib
from grain_jax.checkpoint.pretrained import hub
from grain_jax.checkpoint.saved_model import Stored
from grain_jax.convert import archives, formats, output, parity, tables, towers
from grain_jax.convert.exits import folder, needs, tokenizers
from grain_jax.convert.faults import ConvertError, needing, raise_any
from grain_jax.core import regular_file
from grain_jax.models import grain

_NAMES = ("open_clip_model", "open_clip_pytorch_model")
WEIGHTS = (*(f"{x}.safetensors" for x in _NAMES), f"{_NAMES[1]}.bin", "model.safetensors")
PACKAGES = ("open_clip_torch", "torch")
# timm's models with attention pooling, by width.
TRUNKS = {768: "base", 1024: "large", 1152: "so400m", 1536: "giantopt"}
_CONFIG = "open_clip_config.json"
_HEAD = "visual.trunk.head"  # the projection of PE-core
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


def from_open_clip(source: epath.PathLike, path: epath.PathLike, name: str | None = None) -> parity.Report:
    """from-open-clip: weights, or hf://ORG/NAME, to a two-tower model in the folder `path`.

    `name` is the model's in open_clip, where no config lies beside the weights.

    Raises:
      ConvertError: the checkpoint cannot be converted, or the folder holds something else.
    """
    target = output.check_free(path)
    checkpoint = _read(hub.local(str(source)), name)
    with archives.reading(checkpoint.path, "what open_clip takes, by the config"):
        stated = _towers(checkpoint)
        state = _as_our_rotation(checkpoint.state, stated.image)
        imported = towers.build(stated, state)
    proof = _prove_import(checkpoint, imported)
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
        pixels = towers.SIGLIP_PIXELS if re.search("SigLIP|PE-Core", name) else pixels
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
    options: Any = dict(quick_gelu=bool(config.get("quick_gelu")))
    options["init_logit_bias"] = config.get("init_logit_bias")
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
    text_rows = formats.openai_text("text." * checkpoint.is_custom, matrix=not text_config.proj_bias)
    rows = formats.openai_image()
    if vision.timm_model_name:
        is_in_trunk = f"{_HEAD}.weight" in checkpoint.state
        rows = formats.timm_image_in_open_clip("trunk.head" if is_in_trunk else "head.proj")
    entries = tables.Entries(checkpoint.state, [*rows, *text_rows])
    image = towers.image_sizes(entries) | dict(image_size=vision.image_size, pixel_mean=mean, pixel_std=std)
    if vision.timm_model_name:
        with torch.device("meta"):
            image |= _timm_fields(_module(checkpoint).visual.trunk)
    else:
        image |= _habits(vision, quick) | dict(heads=vision.width // vision.head_width)
    end_id = text_config.eos_id if text_config.pool_type == "eos" else None
    end_id = end_id if end_id is not None and 0 <= end_id < text_config.vocab_size - 1 else None
    beside = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    siglip = text_config.pool_type == "last" and text_config.proj_bias
    text = towers.text_sizes(entries) | _habits(text_config, quick) | dict(heads=text_config.heads)
    text |= towers.text_fields(beside, text_config.vocab_size, siglip=siglip, end_id=end_id)
    text |= dict(causal=not text_config.no_causal_mask)
    if end_id is not None:
        text["pad_id"] = config["text_cfg"].get("pad_id", text["pad_id"])
    if (text_config.tokenizer_kwargs or {}).get("clean") == "canonicalize" and text["tokenizer"] != "clip":
        text["cleaning"] = "canonical"
    both = config_lib.ImageTower(**image), config_lib.TextTower(**text)
    return towers.Towers(config["embed_dim"], *both, [*rows, *text_rows, *towers.SCALARS])


def _habits(config: Any, quick_gelu: bool) -> dict[str, Any]:
    """The keys of a tower of open_clip's own that no array tells."""
    gelu = "gelu_tanh" if (config.act_kwargs or {}).get("approximate") == "tanh" else "gelu"
    return dict(
        activation="quick_gelu" if quick_gelu else gelu,
        norm_eps=(config.norm_kwargs or {}).get("eps", 1e-5),
        pool=_POOLS.get(config.pool_type, config.pool_type),
    )


def _timm_fields(trunk: Any) -> dict[str, Any]:
    """The keys of an image tower that is a vision transformer of timm, read off its modules."""
    import torch

    block, act, rope = trunk.blocks[0], trunk.blocks[0].mlp.act, getattr(trunk, "rope", None)
    tanh = getattr(act, "approximate", "") == "tanh" or "Tanh" in type(act).__name__
    pool_heads = trunk.attn_pool.num_heads if trunk.attn_pool is not None else 0
    rotary = {}
    if rope is not None:
        grid = getattr(rope, "ref_feat_shape", None) or (0,)
        known = getattr(rope, "grid_indexing", ""), block.attn.rotate_half, grid
        if known != ("xy", False, grid[:1] * 2) or trunk.cls_token is not None and rope.grid_offset != 1:
            raise ConvertError("got a tower of timm with rotary positions, expected PE-core's")
        rotary = dict(rope="indices", rope_theta=rope.temperature, rope_grid=grid[0])
    return rotary | dict(
        pool_heads=pool_heads * (pool_heads != block.attn.num_heads),
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


def _as_our_rotation(state: tables.Arrays, image: config_lib.ImageTower) -> tables.Arrays:
    """PE-core's state with the channels of queries and keys in our order; the products do not change.

    In timm column precedes row, and channel 2 i turns with 2 i + 1. An MLP of the pool that is narrower than
    the tower's gets units of zeros.
    """
    if image.rope == "none":
        return state
    state, head_dim = dict(state), image.width // image.heads
    for name, x in state.items():
        if re.fullmatch(r"visual\.trunk\.blocks\.\d+\.attn\.qkv\.(weight|bias)", name):
            qk = x[: 2 * image.width].reshape(2 * image.heads, 2, head_dim // 4, 2, -1)
            qk = qk[:, ::-1].transpose(0, 3, 1, 2, 4).reshape(2 * image.width, *x.shape[1:])
            state[name] = np.concatenate([qk, x[2 * image.width :]])
    for leaf, axis in (("fc1.weight", 0), ("fc1.bias", 0), ("fc2.weight", 1)):
        name = f"visual.trunk.attn_pool.mlp.{leaf}"
        missing = max(image.mlp_dim - state[name].shape[axis], 0)
        state[name] = np.pad(state[name], [(0, missing * (i == axis)) for i in range(state[name].ndim)])
    return state


def _prove_import(checkpoint: OpenClipCheckpoint, imported: towers.Imported) -> parity.Report:
    """Our model against open_clip's, with the same weights."""
    import torch

    with archives.reading(checkpoint.path, "what open_clip takes, by the config"):
        module = _module(checkpoint).eval()
        module.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in checkpoint.state.items()})
    run = functools.partial(_outputs, module)
    return parity.prove(imported.model, imported.params, "open_clip", PACKAGES, run)


def _outputs(module: Any, inputs: parity.Inputs) -> dict[str, np.ndarray]:
    """The outputs of a module of open_clip."""
    import torch

    images, ids = parity.for_torch(inputs)
    with torch.no_grad():
        return {
            "image_embed": module.encode_image(images, normalize=True).numpy(),
            "text_embed": module.encode_text(ids, normalize=True).numpy(),
            "logits": module.get_logits(images, ids)[0].numpy(),
        }


def to_open_clip(source: epath.PathLike, path: epath.PathLike) -> parity.Report:
    """to-open-clip: a two-tower model that `grain_jax.load` reads to a folder of open_clip.

    Raises:
      ConvertError: open_clip cannot express the model, or the folder holds something else.
      checkpoint.CheckpointError: `source` cannot be read.
    """
    target = output.check_free(path, folder.MARK)
    stored = tokenizers.with_end(folder.read_towers(source))
    model, image = stored.model, stored.model.image
    kind, faults = needs.nearest(model, needs.OPEN_CLIP, needs.OPEN_CLIP_TIMM)
    raise_any(faults)
    trunk = "" if kind is needs.OPEN_CLIP else _trunk_of(image)
    token_files, missing = tokenizers.files(model.text, stored.folder)
    if token_files and (cleaning := model.text.cleaning) in ("none", "siglip2"):
        why = f"model.text.cleaning: got {cleaning}, open_clip joins white space; give the model token ids"
        token_files, missing = {}, f"no tokenizer files: {why}"
    if model.text.tokenizer == "clip":
        token_files = {}  # open_clip has CLIP's tokenizer
    preprocess_cfg = {
        "size": image.image_size,
        "mode": "RGB",
        "mean": list(image.pixel_mean),
        "std": list(image.pixel_std),
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }
    config = {"model_cfg": _config(model, trunk, not missing), "preprocess_cfg": preprocess_cfg}
    to = f"to-open-clip: {stored.folder} -> {target}, {kind.name}{f', {trunk}' if trunk else ''}"
    return folder.write(
        target,
        stored,
        (WEIGHTS[0], _arrays(grain.flat(stored.params), model, bool(trunk))),
        {"open_clip_config.json": config, **token_files},
        lambda new: _prove_export(new, stored, has_tokenizer=not missing),
        [to, missing] if missing else [to],
        use=_USE,
        missing=missing,
        library="open_clip",
    )


_USE = """
import open_clip
import torch
from PIL import Image, ImageOps

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")
with torch.no_grad():
    image = preprocess(ImageOps.exif_transpose(Image.open("bird.jpg")))[None]
    image = model.eval().encode_image(image, normalize=True)
    text = model.encode_text(tokenizer(["a photo of a wren"]), normalize=True)
"""


def _trunk_of(image: config_lib.ImageTower) -> str:
    """The name of the model of timm that is this tower, or ConvertError: open_clip takes trunks by name."""
    with needing("timm", "model.image.pool: open_clip has map with a trunk of timm"):
        import timm
        import torch
    size = TRUNKS.get(image.width, "none")
    name = f"vit_{size}_patch{image.patch_size}_siglip_{image.image_size}"
    if timm.is_model(name):
        with torch.device("meta"):
            trunk: Any = timm.create_model(name, pretrained=False, num_classes=0)
        fields = _timm_fields(trunk)
        del fields["patch_bias"]  # zeros stand in for none
        if all(getattr(image, key) == value for key, value in fields.items()):
            return name
    raise ConvertError(
        f"model.image: open_clip takes such towers of timm by name, and timm has no {name} of depth"
        f" {image.depth}, {image.heads} heads, MLP {image.mlp_dim} {image.activation} and norm epsilon"
        f" {image.norm_eps:g}"
    )


def _config(model: config_lib.Model, trunk: str, has_tokenizer: bool) -> dict[str, Any]:
    """model_cfg of open_clip_config.json."""
    image, text = model.image, model.text
    quick = (text if trunk else image).activation == "quick_gelu"
    bias = {} if model.logit_bias_init is None else {"init_logit_bias": model.logit_bias_init}
    vision_cfg = _shared(image) | dict(
        image_size=image.image_size,
        head_width=image.width // image.heads,
        patch_size=image.patch_size,
        no_ln_pre=not image.pre_norm,
        pool_type="avg" if image.pool == "mean" else "tok",
        qk_norm=image.qk_norm,
    )
    if trunk:
        vision_cfg = dict(
            image_size=image.image_size,
            timm_model_name=trunk,
            timm_model_pretrained=False,
            timm_pool="map",
            timm_proj="none" if image.projection == "none" else "linear",
            timm_proj_bias=image.projection == "affine",
        )
    text_cfg = _shared(text) | dict(
        context_length=text.context_length,
        vocab_size=text.vocab_size,
        heads=text.heads,
        no_causal_mask=not text.causal,
        proj_bias=text.projection == "affine",
        pool_type="argmax" if text.pool == "end" else text.pool,
    )
    if text.pool == "end" and text.end_id is not None:
        text_cfg |= dict(pool_type="eos", eos_id=text.end_id)
    if text.tokenizer != "clip":
        text_cfg["pad_id"] = text.pad_id
        if has_tokenizer:  # the files in the folder; any name says so
            text_cfg |= dict(hf_tokenizer_name="local", tokenizer_kwargs={"clean": "whitespace"})
    stated = dict(embed_dim=model.embed_dim, quick_gelu=quick, custom_text=bool(trunk))
    return {**stated, **bias, "vision_cfg": vision_cfg, "text_cfg": text_cfg}


def _shared(tower: Any) -> dict[str, Any]:
    """What the two parts of a config have in common."""
    ratio = tower.mlp_dim / tower.width
    if int(tower.width * ratio) != tower.mlp_dim:  # open_clip cuts the product
        ratio = (tower.mlp_dim + 0.5) / tower.width
    return dict(
        width=tower.width,
        layers=tower.depth,
        mlp_ratio=ratio,
        act_kwargs=dict(approximate="tanh") if tower.activation == "gelu_tanh" else {},
        norm_kwargs=dict(eps=tower.norm_eps),
    )


def _arrays(flat: tables.Arrays, model: config_lib.Model, has_trunk: bool) -> tables.Arrays:
    """The arrays of open_clip's towers, or around a trunk of timm; the identity stands for no projection."""
    flat = tables.with_projection(flat, "text", model.text.width, bias=False)
    has_matrix = model.text.projection != "affine"
    if has_trunk:
        flat, image = tables.with_patch_bias(flat), formats.timm_image_in_open_clip()
    else:
        flat, image = tables.without_patch_bias(flat), formats.openai_image()
        flat = tables.with_projection(flat, "image", model.image.width, bias=False)
    text = formats.openai_text("text." * has_trunk, has_matrix)
    return tables.write([*image, *text, *towers.SCALARS], flat)


def _prove_export(target: epath.Path, source: Stored, has_tokenizer: bool) -> parity.Report:
    """Our model against what open_clip makes of the folder."""

    def opened() -> tuple[Any, Any, Any]:
        import open_clip
        import torch

        with contextlib.redirect_stdout(io.StringIO()):
            loaded: Any = open_clip.create_model_and_transforms(f"local-dir:{target}")
        module, _, preprocess = loaded
        tokenizer: Any = open_clip.get_tokenizer(f"local-dir:{target}") if has_tokenizer else None
        pixels = lambda raw: torch.stack([preprocess(PIL.Image.fromarray(x)) for x in raw])
        outputs = functools.partial(_outputs, module.eval())
        return outputs, lambda raw: pixels(raw).permute(0, 2, 3, 1).numpy(), tokenizer

    texts = tokenizers.TEXTS if has_tokenizer else None
    return tokenizers.prove(source, "open_clip", PACKAGES, opened, texts)
