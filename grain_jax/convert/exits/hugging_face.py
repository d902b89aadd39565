"""Two towers as transformers' CLIPModel or SiglipModel."""

from typing import Any

import numpy as np
from etils import epath

from grain_jax import config as config_lib
from grain_jax.convert import formats, output, parity, towers
from grain_jax.convert.exits import arrays, folder, needs, tokenizers
from grain_jax.convert.library_configs import hf_config
from grain_jax.convert.tables import Arrays

WEIGHTS = "model.safetensors"
_SIGLIP_CONTEXT = 64  # tokens to which the pipeline of transformers pads SigLIP's texts


def write_towers(
    source: folder.SourceModel,
    path: epath.PathLike,
    kind: needs.Format,
    repo: str | None = None,
    unknown: str = "",
) -> parity.Report:
    """A two-tower model as a folder for CLIPModel or SiglipModel.

    Args:
      source: the model.
      path: the folder; new, or an older one of an export.
      kind: which of the two; it can hold the model.
      repo: ORG/NAME, for the card.
      unknown: what the parity cannot tell (`tokenizers.with_end`).

    Raises:
      ConvertError: the folder holds something else.
    """
    target, model, is_clip = output.check_free(path, folder.MARK), source.model, kind is needs.CLIP
    token_files, missing, notes = tokenizers.of_transformers(model.text, source.folder)
    files = {
        "config.json": _config(model, kind.name),
        "preprocessor_config.json": _preprocessor(model.image, kind.name),
        **token_files,
    }
    lines = [
        f"to-hf: {source.folder} -> {target}, {kind.name}",
        'images: AutoImageProcessor.from_pretrained(DIR, backend="pil") gives our pixels; the resize of torchvision,'
        " its default, differs by up to 1 of 255 levels",
    ]
    if not is_clip and model.text.context_length != _SIGLIP_CONTEXT:
        lines.append(
            f"texts: the pipeline of transformers pads SigLIP's to {_SIGLIP_CONTEXT} tokens, this model has"
            f" {model.text.context_length}; call processor and model instead"
        )
    return folder.write(
        target,
        source,
        (WEIGHTS, _clip(source) if is_clip else _siglip(source)),
        files,
        lambda new: _prove(new, source, kind.name, has_tokenizer=bool(token_files)).but(unknown),
        [*lines, *notes],
        use=_USE.format(kind=kind.name),
        missing=missing,
        repo=repo,
    )


_USE = """
import torch
from PIL import Image, ImageOps
from transformers import AutoProcessor, {kind}

model = {kind}.from_pretrained("FOLDER").eval()
processor = AutoProcessor.from_pretrained("FOLDER", backend="pil")
with torch.no_grad():
    image = ImageOps.exif_transpose(Image.open("bird.jpg"))
    inputs = processor(images=image, text=["a photo of a wren"], padding="max_length", truncation=True,
                       return_tensors="pt")
    scores = model(**inputs).logits_per_image
"""


def _config(model: config_lib.Model, kind: str) -> dict[str, Any]:
    """config.json of a class of transformers."""
    stated, family = hf_config(model), kind.removesuffix("Model").lower()
    for part in ("vision", "text"):
        stated[f"{part}_config"]["model_type"] = f"{family}_{part}_model"
    return {"model_type": family, "architectures": [kind], "dtype": "float32", **stated}


def _preprocessor(tower: config_lib.ImageTower, kind: str) -> dict[str, Any]:
    """preprocessor_config.json: squashed to a square by Pillow's bicubic filter, no crop."""
    name = kind.removesuffix("Model")
    return {
        "image_processor_type": f"{name}ImageProcessor",
        "processor_class": f"{name}Processor",
        "do_convert_rgb": True,
        "do_center_crop": False,
        "resample": 3,
        "size": {"height": tower.image_size, "width": tower.image_size},
        "image_mean": list(tower.pixel_mean),
        "image_std": list(tower.pixel_std),
    }


def _clip(source: folder.SourceModel) -> Arrays:
    """The arrays of CLIPModel, whose patches have no bias."""
    flat = arrays.without_patch_bias(folder.flat(source))
    for tower in towers.TOWERS:
        width = getattr(source.model, tower).width
        flat = arrays.with_projection(flat, tower, width, bias=False)
    rows = [*formats.hf_image(), *formats.hf_text("text_projection"), *folder.SCALARS]
    return folder.entries(rows, flat)


def _siglip(source: folder.SourceModel) -> Arrays:
    """The arrays of SiglipModel, whose patches have one."""
    flat = arrays.with_patch_bias(folder.flat(source))
    flat = {"logit_bias": np.zeros((), np.float32), **flat}
    flat = arrays.with_projection(flat, "text", source.model.text.width, bias=True)
    rows = [*formats.hf_image(), *formats.hf_text("text_model.head"), *folder.SCALARS]
    state = folder.entries(rows, flat)
    return state | {row.theirs: state[row.theirs].reshape(1) for row in folder.SCALARS}


@folder.needing_packages
def _prove(
    target: epath.Path, source: folder.SourceModel, kind: str, has_tokenizer: bool
) -> parity.Report:
    """Our model against the class of transformers on the folder, from raw images and texts."""
    import torch
    import transformers

    inputs, path = parity.inputs_of(source.model), str(target)
    ours = folder.our_outputs(source, inputs)
    load = lambda auto, **options: auto.from_pretrained(path, local_files_only=True, **options)
    with torch.no_grad():
        module = load(getattr(transformers, kind)).eval()
        images = {"pixel_values": torch.tensor(inputs.images).permute(0, 3, 1, 2)}
        out = module(input_ids=torch.from_numpy(inputs.token_ids).long(), **images)
        processor = load(transformers.AutoImageProcessor, backend="pil")
        pixels = processor(folder.raw_images(), return_tensors="pt")["pixel_values"]
        theirs = {
            "image_embed": out.image_embeds.numpy(),
            "text_embed": out.text_embeds.numpy(),
            "logits": out.logits_per_image.numpy(),
            "pixels": pixels.permute(0, 2, 3, 1).numpy(),
        }
        if has_tokenizer:
            options: Any = dict(padding="max_length", truncation=True, return_tensors="np")
            processor = load(transformers.AutoProcessor, backend="pil")
            ids = processor(text=tokenizers.TEXTS, **options)["input_ids"]
            ours["token_ids"] = tokenizers.our_ids(source.model.text, source.folder)
            ours["encode_text"] = tokenizers.our_embeddings(source)
            out = module(input_ids=torch.from_numpy(ids).long(), **images)
            theirs |= {"token_ids": ids, "encode_text": out.text_embeds.numpy()}
    other = f"{kind}, transformers {transformers.__version__}, torch {torch.__version__}"
    return parity.report(parity.compare(ours, theirs), other, inputs)
