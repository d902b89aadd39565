"""Two towers as transformers' CLIPModel or SiglipModel."""

from typing import Any

import numpy as np
from etils import epath

from grain_jax import config as config_lib
from grain_jax.convert import formats, output, parity, towers
from grain_jax.convert.exits import arrays, folder, needs, tokenizers
from grain_jax.convert.reference import module as torch_module
from grain_jax.convert.tables import Arrays

WEIGHTS = "model.safetensors"
_UNCLEAN = ["Two DOGS  &amp; a cat's   bowl, 1998!", ""]
_SIGLIP_CONTEXT = 64  # tokens to which the pipeline of transformers pads SigLIP's texts


def write_towers(
    source: folder.SourceModel,
    path: epath.PathLike,
    kind: needs.Format,
    repo: str | None = None,
) -> parity.Report:
    """A two-tower model as a folder for CLIPModel or SiglipModel.

    Args:
      source: the model.
      path: the folder; new, or an older one of an export.
      kind: which of the two; it can hold the model.
      repo: ORG/NAME, for the card.

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
        lambda new: prove(new, source, kind.name, has_tokenizer=bool(token_files)),
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
    """config.json of CLIPModel or SiglipModel."""
    family = kind.removesuffix("Model").lower()
    image, text = model.image, model.text
    shared = lambda tower: dict(
        hidden_size=tower.width,
        intermediate_size=tower.mlp_dim,
        num_hidden_layers=tower.depth,
        num_attention_heads=tower.heads,
        hidden_act={"gelu_tanh": "gelu_pytorch_tanh"}.get(tower.activation, tower.activation),
        layer_norm_eps=tower.norm_eps,
        projection_dim=model.embed_dim,
    )
    vision = dict(
        image_size=image.image_size,
        patch_size=image.patch_size,
        num_channels=3,
    )
    text_keys = dict(
        vocab_size=text.vocab_size,
        max_position_embeddings=text.context_length,
        projection_size=model.embed_dim,
        bos_token_id=text.vocab_size - 2,
        eos_token_id=2 if text.end_id is None else text.end_id,  # 2: CLIPModel takes the highest id
        pad_token_id=text.pad_id,
    )
    return dict(
        model_type=family,
        architectures=[kind],
        dtype="float32",
        projection_dim=model.embed_dim,
        vision_config=shared(image) | vision | dict(model_type=f"{family}_vision_model"),
        text_config=shared(text) | text_keys | dict(model_type=f"{family}_text_model"),
    )


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
    rows = [*formats.hf_image(), *formats.hf_text("text_projection"), *towers.SCALARS]
    return folder.entries(rows, flat)


def _siglip(source: folder.SourceModel) -> Arrays:
    """The arrays of SiglipModel, whose patches have one."""
    flat = arrays.with_patch_bias(folder.flat(source))
    flat = {"logit_bias": np.zeros((), np.float32), **flat}
    flat = arrays.with_projection(flat, "text", source.model.text.width, bias=True)
    rows = [*formats.hf_image(), *formats.hf_text("text_model.head"), *towers.SCALARS]
    state = folder.entries(rows, flat)
    return state | {row.theirs: state[row.theirs].reshape(1) for row in towers.SCALARS}


@folder.needing_packages
def prove(
    target: epath.Path, source: folder.SourceModel, kind: str, has_tokenizer: bool
) -> parity.Report:
    """Our model against a class of transformers on the folder, from raw images and texts.

    `AutoModel` is our modeling file, which has regions and boxes, too, and whose processor cleans texts.
    """
    import torch
    import transformers

    inputs, path, is_own = parity.inputs_of(source.model), str(target), kind == "AutoModel"
    options = dict(trust_remote_code=True) if is_own else dict(backend="pil")
    load = lambda auto, **more: auto.from_pretrained(path, local_files_only=True, **more)
    module = load(getattr(transformers, kind), **(options if is_own else {})).eval()
    images, ids = parity.for_torch(inputs)
    run = lambda ids: module(input_ids=torch.as_tensor(ids).long(), pixel_values=images)
    with torch.no_grad():
        if is_own:
            ours = torch_module.outputs(source.model, source.params, inputs)
            ours["pixels"] = folder.our_pixels(source.model.image)
            theirs = torch_module.run_module(module, inputs)
        else:
            ours, out = folder.our_outputs(source, inputs), run(ids)
            theirs = dict(image_embed=out.image_embeds.numpy(), text_embed=out.text_embeds.numpy())
            theirs["logits"] = out.logits_per_image.numpy()
        processor = load(transformers.AutoImageProcessor, **options)
        pixels = processor(folder.raw_images(), return_tensors="pt")["pixel_values"]
        theirs["pixels"] = pixels.permute(0, 2, 3, 1).numpy()
        if has_tokenizer:
            texts = [*tokenizers.TEXTS, *(_UNCLEAN if is_own else ())]
            processor, padded = (
                load(transformers.AutoProcessor, **options),
                dict(padding="max_length"),
            )
            ids = processor(text=texts, truncation=True, return_tensors="np", **padded)["input_ids"]
            ours["token_ids"] = tokenizers.our_ids(source.model.text, source.folder, texts)
            ours["encode_text"] = tokenizers.our_embeddings(source)
            embeds = run(ids[: len(tokenizers.TEXTS)]).text_embeds
            theirs |= {"token_ids": ids, "encode_text": embeds.numpy()}
    other = f"{kind}, {torch_module.torch_versions()}"
    return parity.report(parity.compare(ours, theirs), other, inputs)
