"""The command to-open-clip: a folder for `open_clip.create_model_and_transforms("local-dir:DIR")`."""

import contextlib
import io
from typing import Any

import numpy as np
import PIL.Image
from etils import epath

from grain_jax import config as config_lib
from grain_jax.convert import formats, output, parity
from grain_jax.convert.exits import arrays, folder, needs, timm_trunk, tokenizers
from grain_jax.convert.faults import raise_any
from grain_jax.convert.library_configs import open_clip_config
from grain_jax.convert.tables import Arrays, NamePair

WEIGHTS = "open_clip_model.safetensors"
_SCALARS = [NamePair("logit_scale", "logit_scale"), NamePair("logit_bias", "logit_bias")]


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
    found, unknown = tokenizers.with_end(folder.read(source))
    kind, faults = needs.of_open_clip(found.model)
    raise_any(faults)
    is_own = kind is needs.OPEN_CLIP
    trunk = "" if is_own else timm_trunk.name_of(found.model.image)
    words, missing = tokenizers.files(found.model.text, found.folder)
    if words and found.model.text.cleaning == "none":
        words, missing = (
            {},
            (
                "no tokenizer files: model.text.cleaning: got none, open_clip joins white space; give the model token ids"
            ),
        )
    model_cfg = _config(found.model, trunk, has_tokenizer=bool(words))
    state = (_own if is_own else _with_trunk)(folder.flat(found), found.model)
    if found.model.text.tokenizer == "clip":
        words = {}  # it has CLIP's
    image = found.model.image
    files = {
        "open_clip_config.json": {
            "model_cfg": model_cfg,
            "preprocess_cfg": {
                "size": image.image_size,
                "mode": "RGB",
                "mean": list(image.pixel_mean),
                "std": list(image.pixel_std),
                "interpolation": "bicubic",
                "resize_mode": "squash",
            },
        },
        **words,
    }
    with output.replacing(target, folder.MARK) as new:
        folder.write_files(new, WEIGHTS, state, files)
        proof = _prove(new, found, has_tokenizer=not missing).but(unknown)
        folder.finish(new, found, _USE, proof, missing, library="open_clip")
    lines = [
        f"to-open-clip: {found.folder} -> {target}, {kind.name}{f', {trunk}' if trunk else ''}",
        f"{WEIGHTS}: {sum(array.size for array in state.values()):,} values, float32",
    ]
    return proof.after(*lines, *([missing] if missing else []))


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


def _config(model: config_lib.Model, trunk: str, has_tokenizer: bool) -> dict[str, Any]:
    """model_cfg of open_clip_config.json."""
    vision_cfg, text_cfg = open_clip_config(model)
    for cfg, tower in ((vision_cfg, model.image), (text_cfg, model.text)):
        if int(tower.width * cfg["mlp_ratio"]) != tower.mlp_dim:  # it cuts the product
            cfg["mlp_ratio"] = (tower.mlp_dim + 0.5) / tower.width
    if trunk:
        vision_cfg = {
            "image_size": model.image.image_size,
            "timm_model_name": trunk,
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none" if model.image.projection == "none" else "linear",
            "timm_proj_bias": model.image.projection == "affine",
        }
    if model.text.tokenizer != "clip":
        text_cfg["pad_id"] = model.text.pad_id
        if has_tokenizer:  # the files in the folder; any name says so
            text_cfg["hf_tokenizer_name"] = "local"
            text_cfg["tokenizer_kwargs"] = {"clean": "whitespace"}
    quick = (model.image.activation, model.text.activation)[bool(trunk)] == "quick_gelu"
    stated: dict[str, Any] = {"embed_dim": model.embed_dim, "quick_gelu": quick}
    if trunk:
        stated["custom_text"] = True
    if model.logit_bias_init is not None:
        stated["init_logit_bias"] = model.logit_bias_init
    return {**stated, "vision_cfg": vision_cfg, "text_cfg": text_cfg}


def _own(flat: Arrays, model: config_lib.Model) -> Arrays:
    """The arrays of open_clip's own towers."""
    flat = arrays.without_patch_bias(flat)
    flat = arrays.with_projection(flat, "image", model.image.width, bias=False)
    return folder.entries([*formats.openai_image(), *_text(flat, model), *_SCALARS], flat)


def _with_trunk(flat: Arrays, model: config_lib.Model) -> Arrays:
    """The arrays around a trunk of timm, whose two names of the text tower differ by a prefix."""
    flat = arrays.with_patch_bias(flat)
    rows = [*formats.timm_image_in_open_clip(), *_text(flat, model, "text."), *_SCALARS]
    return folder.entries(rows, flat)


def _text(flat: Arrays, model: config_lib.Model, prefix: str = "") -> list[NamePair]:
    """The table of the text tower; adds the identity to `flat` where the tower has no projection."""
    flat.update(arrays.with_projection(flat, "text", model.text.width, bias=False))
    return formats.openai_text(prefix, model.text.projection != "affine")


@folder.needing_packages
def _prove(target: epath.Path, source: folder.Source, has_tokenizer: bool) -> parity.Report:
    """Our model against what open_clip makes of the folder, from raw images and texts."""
    import open_clip
    import torch

    model = source.model
    given = parity.inputs_of(model)
    ours = folder.our_outputs(source, given) | {"pixels": folder.our_pixels(model.image)}
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        name = f"local-dir:{target}"
        module: Any
        module, _, preprocess = open_clip.create_model_and_transforms(name)
        module.eval()
        images = torch.from_numpy(given.images.transpose(0, 3, 1, 2).copy())
        ids = torch.from_numpy(given.token_ids).long()
        own: Any = preprocess
        pixels = torch.stack([own(PIL.Image.fromarray(x)) for x in folder.raw_images()])
        theirs = {
            "image_embed": module.encode_image(images, normalize=True).numpy(),
            "text_embed": module.encode_text(ids, normalize=True).numpy(),
            "logits": module.get_logits(images, ids)[0].numpy(),
            "pixels": pixels.permute(0, 2, 3, 1).numpy(),
        }
        if has_tokenizer:
            tokens: Any = open_clip.get_tokenizer(name)(tokenizers.TEXTS)
            theirs["token_ids"] = np.asarray(tokens)
            theirs["encode_text"] = module.encode_text(tokens, normalize=True).numpy()
            ours["token_ids"] = tokenizers.own_ids(model.text, source.folder)
            ours["encode_text"] = tokenizers.our_embeddings(source)
    other = f"open_clip {open_clip.__version__}, torch {torch.__version__}"
    return parity.report(parity.compare(ours, theirs), other, given)
