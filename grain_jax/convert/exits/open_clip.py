"""The command to-open-clip: a folder for `open_clip.create_model_and_transforms("local-dir:DIR")`."""

import contextlib
import io
from typing import Any

import numpy as np
import PIL.Image
from etils import epath

from grain_jax import config as config_lib
from grain_jax.convert import formats, from_open_clip, output, parity, tables, towers
from grain_jax.convert.exits import arrays, folder, needs, tokenizers
from grain_jax.convert.faults import ConvertError, needing, raise_any
from grain_jax.convert.tables import Arrays
from grain_jax.models import grain

WEIGHTS = "open_clip_model.safetensors"
TRUNKS = {
    768: "base",
    1024: "large",
    1152: "so400m",
    1536: "giantopt",
}  # of timm's models with attention pooling, by width


def to_open_clip(source: epath.PathLike, path: epath.PathLike) -> parity.Report:
    """to-open-clip: a two-tower model that `grain_jax.load` reads to a folder of open_clip.

    Args:
      source: a workdir, a checkpoint or a converted folder.
      path: the folder; new, or an older one of this command.

    Raises:
      ConvertError: open_clip cannot express the model, or the folder holds something else.
      checkpoint.CheckpointError: `source` cannot be read.
    """
    target = output.check_free(path, folder.MARK)
    stored = tokenizers.with_end(folder.read_towers(source))
    model, image = stored.model, stored.model.image
    kind, faults = needs.nearest(model, needs.OPEN_CLIP, needs.OPEN_CLIP_TIMM)
    raise_any(faults)
    trunk = "" if kind is needs.OPEN_CLIP else trunk_of(image)
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
    model_cfg = _config(model, trunk, has_tokenizer=not missing)
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    to = f"to-open-clip: {stored.folder} -> {target}, {kind.name}{f', {trunk}' if trunk else ''}"
    return folder.write(
        target,
        stored,
        (WEIGHTS, _arrays(grain.flat(stored.params), model, bool(trunk))),
        {"open_clip_config.json": config, **token_files},
        lambda new: _prove(new, stored, has_tokenizer=not missing),
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


def trunk_of(image: config_lib.ImageTower) -> str:
    """The name of the model of timm that is this tower: open_clip takes trunks by name alone.

    Raises:
      ConvertError: timm is missing, or has no such model; one line.
    """
    with needing("timm", "model.image.pool: open_clip has map with a trunk of timm"):
        import timm
        import torch
    size = TRUNKS.get(image.width, "none")
    name = f"vit_{size}_patch{image.patch_size}_siglip_{image.image_size}"
    if timm.is_model(name):
        with torch.device("meta"):
            trunk: Any = timm.create_model(name, pretrained=False, num_classes=0)
        fields = from_open_clip.timm_fields(trunk)
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
    stated: dict[str, Any] = {"embed_dim": model.embed_dim, "quick_gelu": quick}
    if model.logit_bias_init is not None:
        stated["init_logit_bias"] = model.logit_bias_init
    vision_cfg = _shared(image) | dict(
        image_size=image.image_size,
        head_width=image.width // image.heads,
        patch_size=image.patch_size,
        no_ln_pre=not image.pre_norm,
        pool_type="avg" if image.pool == "mean" else "tok",
        qk_norm=image.qk_norm,
    )
    if trunk:
        stated["custom_text"] = True
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
    return {**stated, "vision_cfg": vision_cfg, "text_cfg": text_cfg}


def _shared(tower: Any) -> dict[str, Any]:
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


def _arrays(flat: Arrays, model: config_lib.Model, has_trunk: bool) -> Arrays:
    """The arrays of open_clip's towers, or around a trunk of timm; the identity stands for no projection."""
    flat = arrays.with_projection(flat, "text", model.text.width, bias=False)
    has_matrix = model.text.projection != "affine"
    if has_trunk:
        flat, image = arrays.with_patch_bias(flat), formats.timm_image_in_open_clip()
    else:
        flat, image = arrays.without_patch_bias(flat), formats.openai_image()
        flat = arrays.with_projection(flat, "image", model.image.width, bias=False)
    text = formats.openai_text("text." * has_trunk, has_matrix)
    return tables.write([*image, *text, *towers.SCALARS], flat)


def _prove(target: epath.Path, source: folder.SourceModel, has_tokenizer: bool) -> parity.Report:
    """Our model against what open_clip makes of the folder, from raw images and texts."""
    ours = {"pixels": folder.our_pixels(source.model.image)}
    if has_tokenizer:
        ours |= tokenizers.ours(source, tokenizers.TEXTS, pads_with_end=False)

    def run(inputs: parity.Inputs) -> dict[str, np.ndarray]:
        import open_clip
        import torch

        with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            loaded: Any = open_clip.create_model_and_transforms(f"local-dir:{target}")
            module, _, preprocess = loaded
            module.eval()
            pixels = torch.stack([preprocess(PIL.Image.fromarray(x)) for x in folder.raw_images()])
            theirs = from_open_clip.module_outputs(module, inputs)
            theirs["pixels"] = pixels.permute(0, 2, 3, 1).numpy()
            if has_tokenizer:
                tokens: Any = open_clip.get_tokenizer(f"local-dir:{target}")(tokenizers.TEXTS)
                theirs["token_ids"] = np.asarray(tokens)
                theirs["encode_text"] = module.encode_text(tokens, normalize=True).numpy()
        return theirs

    packages = from_open_clip.PACKAGES
    return parity.prove(source.model, source.params, "open_clip", packages, run, ours)
