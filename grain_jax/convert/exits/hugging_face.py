"""Two towers as transformers' CLIPModel or SiglipModel, an image tower alone as its vision model.

Models of images in their own shape become Siglip2Model, with the longest of their lengths as `max_num_patches`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from grain_jax import config as config_lib
from grain_jax import inference
from grain_jax.convert import formats, output, parity, towers
from grain_jax.convert.exits import arrays, folder, reasons, tokenizers
from grain_jax.convert.open_clip.comparison import hf_config, siglip2_inputs
from grain_jax.convert.tables import Arrays, NamePair
from grain_jax.inference import jitted

WEIGHTS = "model.safetensors"
_SCALARS = [NamePair("logit_scale", "logit_scale"), NamePair("logit_bias", "logit_bias")]
_SIGLIP_CONTEXT = 64
_IMAGE_PARTS = ("image/", "image_pool/")
# What is written -> its family in transformers.
_FAMILIES = {
    reasons.CLIP: "clip",
    reasons.CLIP_VISION: "clip",
    reasons.SIGLIP: "siglip",
    reasons.SIGLIP_VISION: "siglip",
    reasons.SIGLIP2: "siglip2",
    reasons.SIGLIP2_VISION: "siglip2",
}


def write_towers(
    source: folder.Source, path: epath.PathLike, repo: str | None = None, unknown: str = ""
) -> parity.Report:
    """A two-tower model as a folder for CLIPModel, SiglipModel or Siglip2Model.

    Args:
      source: the model.
      path: the folder; new, or an older one of an exit.
      repo: ORG/NAME, for the card.
      unknown: what the parity cannot tell (`tokenizers.with_end`).

    Raises:
      ConvertError: neither can express the model, or the folder holds something else.
    """
    target = output.check_free(path, folder.MARK)
    kind, faults = reasons.of_hugging_face(source.model, source.sequence_lengths)
    reasons.refuse(source.model, faults, source.sequence_lengths)
    family = _FAMILIES[kind]
    words, missing, told = tokenizers.of_transformers(source.model.text, source.folder)
    files = {
        "config.json": _config(source.model, family, kind.name),
        "preprocessor_config.json": _preprocessor(source, family, whole=True),
        **words,
    }
    state = _clip(source) if family == "clip" else _siglip(source, family)
    tokenizer = words["tokenizer_config.json"]["tokenizer_class"] if words else ""
    use = _USE_SHAPES if source.sequence_lengths else _USE
    use = use.format(kind=kind.name, tokenizer=tokenizer or "AutoTokenizer", **_sizes(source))
    with output.replacing(target, folder.MARK) as new:
        folder.write_files(new, WEIGHTS, state, files)
        proof = _prove_towers(new, source, kind.name, tokenizer).but(unknown)
        folder.finish(new, source, use, "transformers", proof, repo, missing)
    lines = [f"to-hf: {source.folder} -> {target}, {kind.name}", _size(state), *_pixels(source)]
    if family == "siglip2":
        lines.append(
            "processor: made as the card shows; AutoProcessor takes other patches, lengths and, of texts, Siglip2Tokenizer"
        )
    if family == "siglip" and source.model.text.context_length != _SIGLIP_CONTEXT:
        lines.append(
            f"texts: the pipeline of transformers pads SigLIP's to {_SIGLIP_CONTEXT} tokens, this model has"
            f" {source.model.text.context_length}; call processor and model instead"
        )
    return proof.after(*lines, *told)


def write_vision(
    source: folder.Source, path: epath.PathLike, repo: str | None = None
) -> parity.Report:
    """The image tower of any model as a folder for CLIPVisionModel, SiglipVisionModel or Siglip2VisionModel.

    Raises:
      ConvertError: none of them can express the tower, or the folder holds something else.
    """
    target = output.check_free(path, folder.MARK)
    model = source.model
    kind, faults = reasons.of_vision(model, source.sequence_lengths)
    reasons.refuse(model, faults, source.sequence_lengths)
    family, is_clip = _FAMILIES[kind], kind is reasons.CLIP_VISION
    config = _config(model, family, kind.name)["vision_config"]
    config |= {"architectures": [kind.name], "model_type": f"{family}_vision_model"}
    config["dtype"] = "float32"
    if not is_clip:
        config["vision_use_head"] = model.image.pool == "map"
    files = {
        "config.json": config,
        "preprocessor_config.json": _preprocessor(source, family, whole=False),
    }
    parts = _IMAGE_PARTS[:1] if is_clip else _IMAGE_PARTS  # CLIP has no pooling head
    named = {n: x for n, x in folder.flat(source).items() if n.startswith(parts)}
    rows = formats.hf_image(flat_patches=family == "siglip2")
    state = folder.entries(rows, _image(named, is_clip))
    with output.replacing(target, folder.MARK) as new:
        folder.write_files(new, WEIGHTS, state, files)
        proof = _prove_vision(new, source, kind.name, is_clip)
        use = _USE_VISION.format(kind=kind.name)
        folder.finish(new, source, use, "transformers", proof, repo)
    return proof.after(
        f"to-hf --part vision: {source.folder} -> {target}, {kind.name}",
        _size(state),
        *_pixels(source),
        f"left behind: {_left_behind(source)}",
    )


_PIXELS = (
    'images: AutoImageProcessor.from_pretrained(DIR, backend="pil") gives our pixels; the resize of torchvision, its'
    " default, differs by up to 1 of 255 levels"
)


def _pixels(source: folder.Source) -> list[str]:
    """Lines of the report about the images."""
    lengths = source.sequence_lengths
    if not lengths:
        return [_PIXELS]
    trained = " or ".join(map(str, lengths))
    return [
        f"images: in their own shape, {max(lengths)} patches at most; trained with {trained}",
        _PIXELS,
    ]


def _sizes(source: folder.Source) -> dict[str, int]:
    """What Siglip2Processor has to be told: it has sizes of its own, whatever the files say."""
    image, lengths = source.model.image, source.sequence_lengths
    context = source.model.text.context_length
    return dict(patch_size=image.patch_size, most=max(lengths, default=0), context=context)


_USE = """
import torch
from PIL import Image, ImageOps
from transformers import AutoProcessor, {kind}

model = {kind}.from_pretrained("FOLDER").eval()
processor = AutoProcessor.from_pretrained("FOLDER", backend="pil")
with torch.no_grad():
    image = ImageOps.exif_transpose(Image.open("bird.jpg"))
    given = processor(images=image, text=["a photo of a wren"], padding="max_length", truncation=True,
                      return_tensors="pt")
    scores = model(**given).logits_per_image
"""
_USE_SHAPES = """
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, {kind}, Siglip2Processor, {tokenizer}

model = {kind}.from_pretrained("FOLDER").eval()
images = AutoImageProcessor.from_pretrained("FOLDER", backend="pil")
processor = Siglip2Processor(images, {tokenizer}.from_pretrained("FOLDER"))
with torch.no_grad():
    image = ImageOps.exif_transpose(Image.open("bird.jpg"))
    given = processor(images=image, text=["a photo of a wren"], max_num_patches={most},
                      patch_size={patch_size}, max_length={context}, return_tensors="pt")
    scores = model(**given).logits_per_image
"""
_USE_VISION = """
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, {kind}

model = {kind}.from_pretrained("FOLDER").eval()
processor = AutoImageProcessor.from_pretrained("FOLDER", backend="pil")
with torch.no_grad():
    image = ImageOps.exif_transpose(Image.open("bird.jpg"))
    tokens = model(**processor(image, return_tensors="pt")).last_hidden_state
"""


def _size(state: Arrays) -> str:
    return f"{WEIGHTS}: {sum(array.size for array in state.values()):,} values, float32"


def _left_behind(source: folder.Source) -> str:
    model, parts = source.model, ["text tower"]
    if model.image.class_token and model.image.pool == "map":
        parts.append("pooling head")
    if model.decoder is not None:
        parts.append("region decoder with its projections")
    elif model.image.projection != "none":
        parts.append("image projection")
    if model.boxes.kind != "none":
        parts.append("box head")
    if source.text_decoder is not None:
        parts.append("text decoder")
    return ", ".join(parts)


def _config(model: config_lib.Model, family: str, kind: str) -> dict[str, Any]:
    """config.json of a class of transformers."""
    stated = hf_config(model)
    del stated["vision_config"]["image_size" if family == "siglip2" else "num_patches"]
    for part in ("vision", "text"):
        stated[f"{part}_config"]["model_type"] = f"{family}_{part}_model"
    return {"model_type": family, "architectures": [kind], "dtype": "float32", **stated}


def _preprocessor(source: folder.Source, family: str, whole: bool) -> dict[str, Any]:
    tower, lengths = source.model.image, source.sequence_lengths
    name = {"clip": "CLIP", "siglip": "Siglip", "siglip2": "Siglip2"}[family]
    square = {"height": tower.image_size, "width": tower.image_size}
    if lengths:
        sizes = {
            "resample": 2,  # Pillow's bilinear
            "patch_size": tower.patch_size,
            "max_num_patches": max(lengths),
        }
    else:
        sizes = {
            "do_center_crop": False,
            "resample": 3,  # Pillow's bicubic
            "size": square,
            "crop_size": square,
        }
    return {
        "image_processor_type": f"{name}ImageProcessor",
        **({"processor_class": f"{name}Processor"} if whole else {}),
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        **sizes,
        "image_mean": list(tower.pixel_mean),
        "image_std": list(tower.pixel_std),
    }


def _image(flat: Arrays, is_clip: bool) -> Arrays:
    """CLIP's patches have no bias, SigLIP's have one."""
    if is_clip:
        return arrays.without_patch_bias(flat, leading=1)
    return arrays.with_patch_bias(flat)


def _clip(source: folder.Source) -> Arrays:
    """The arrays of CLIPModel."""
    flat = _image(folder.flat(source), is_clip=True)
    for tower in towers.TOWERS:
        width = getattr(source.model, tower).width
        flat = arrays.with_projection(flat, tower, width, bias=False)
    rows = [*formats.hf_image(), *formats.hf_text("text_projection"), *_SCALARS]
    return folder.entries(rows, flat)


def _siglip(source: folder.Source, family: str) -> Arrays:
    """The arrays of SiglipModel or Siglip2Model."""
    flat = _image(folder.flat(source), is_clip=False)
    flat = {"logit_bias": np.zeros((), np.float32), **flat}
    flat = arrays.with_projection(flat, "text", source.model.text.width, bias=True)
    images = formats.hf_image(flat_patches=family == "siglip2")
    rows = [*images, *formats.hf_text("text_model.head"), *_SCALARS]
    state = folder.entries(rows, flat)
    return state | {row.theirs: state[row.theirs].reshape(1) for row in _SCALARS}


def _loaded(kind: str, path: str) -> Any:
    """The model of that class in a folder. Raises ParityError where names or shapes do not fit."""
    import transformers

    module, found = getattr(transformers, kind).from_pretrained(
        path, local_files_only=True, output_loading_info=True
    )
    wrong = sorted(f"{what}: {name}" for what, names in found.items() for name in names or ())
    if wrong:
        raise parity.ParityError("\n".join(f"{kind}: {line}" for line in wrong))
    return module.eval()


def _versions() -> str:
    import torch
    import transformers

    return f"transformers {transformers.__version__}, torch {torch.__version__}"


def _compare_pixels(source: folder.Source, path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pixels of raw images, ours and the processor's; in their own shape the grids of patches, too."""
    import transformers

    load = transformers.AutoImageProcessor.from_pretrained
    processor: Any = load(path, local_files_only=True, backend="pil")
    found = processor(folder.raw_images(), return_tensors="pt")
    tower, lengths = source.model.image, source.sequence_lengths
    ours = {"pixels": folder.our_pixels(tower, lengths)}
    if not lengths:
        return ours, {"pixels": found["pixel_values"].permute(0, 2, 3, 1).numpy()}
    ours["grid"] = folder.our_patches(tower, lengths).grid
    return ours, {
        "pixels": found["pixel_values"].numpy(),
        "grid": found["spatial_shapes"].numpy(),
    }


@folder.needing_packages
def _prove(
    target: epath.Path, source: folder.Source, kind: str, outputs: Callable[..., tuple[Any, Any]]
) -> parity.Report:
    """Our model against the class of transformers on the folder, from raw images.

    Args:
      target: the folder.
      source: the model.
      kind: the class.
      outputs: (module, inputs of the parity, the images as the module takes them, path) -> our outputs and theirs, by
        name.
    """
    import torch
    import transformers  # noqa: F401 (without torch it imports, but has no models)

    given = parity.inputs_of(source.model, source.sequence_lengths)
    path = str(target)
    with torch.no_grad():
        if source.sequence_lengths:
            pixels, grid = map(torch.from_numpy, given.images)
            images = siglip2_inputs(pixels, grid.long())
        else:
            images = {"pixel_values": torch.tensor(given.images).permute(0, 3, 1, 2)}
        both = outputs(_loaded(kind, path), given, images, path)
        pixels = _compare_pixels(source, path)
    ours, theirs = (one | other for one, other in zip(both, pixels))
    return parity.report(parity.compare(ours, theirs), f"{kind}, {_versions()}", given)


def _prove_towers(
    target: epath.Path, source: folder.Source, kind: str, tokenizer: str
) -> parity.Report:
    """Embeddings and logits; of texts their ids, and their embeddings from end to end.

    `tokenizer` is its class in transformers, "" where the folder has none.
    """

    def outputs(module, given, images, path):
        import torch

        out = module(input_ids=torch.from_numpy(given.token_ids).long(), **images)
        ours = folder.our_outputs(source, given)
        theirs = {
            "image_embed": out.image_embeds.numpy(),
            "text_embed": out.text_embeds.numpy(),
            "logits": out.logits_per_image.numpy(),
        }
        if tokenizer:
            processor: Any = _processor(source, tokenizer, path)
            options: Any = dict(padding="max_length", truncation=True, return_tensors="np")
            if source.sequence_lengths:
                options["max_length"] = _sizes(source)["context"]
            ids = processor(text=tokenizers.TEXTS, **options)["input_ids"]
            ours["token_ids"] = tokenizers.our_ids(source.model.text, source.folder)
            ours["encode_text"] = tokenizers.our_embeddings(source)
            out = module(input_ids=torch.from_numpy(ids).long(), **images)
            theirs |= {"token_ids": ids, "encode_text": out.text_embeds.numpy()}
        return ours, theirs

    return _prove(target, source, kind, outputs)


def _processor(source: folder.Source, tokenizer: str, path: str) -> Any:
    """The processor as the card says: AutoProcessor of SigLIP 2 would take a tokenizer of another class."""
    import transformers

    load = lambda kind, **options: kind.from_pretrained(path, local_files_only=True, **options)
    if not source.sequence_lengths:
        return load(transformers.AutoProcessor, backend="pil")
    images = load(transformers.AutoImageProcessor, backend="pil")
    return transformers.Siglip2Processor(images, load(getattr(transformers, tokenizer)))


def _prove_vision(
    target: epath.Path, source: folder.Source, kind: str, is_clip: bool
) -> parity.Report:
    """The tokens of our image tower, and what is pooled of them."""
    model = source.model

    def outputs(module, given, images, path):
        length = given.sequence_length
        predictor = inference.Predictor(model, source.params, sequence_length=length)
        program = jitted.program(model, "float32", "image_tokens")
        tokens = np.asarray(program(predictor.params, given.images))
        out = module(**images)
        last = out.last_hidden_state
        if source.sequence_lengths:  # the others are anything
            real = images["pixel_attention_mask"].bool()
            tokens, last = tokens[real.numpy()], last[real]
        ours = {"tokens": tokens}
        if is_clip:  # its last norm is on the class token alone
            last = getattr(module, "vision_model", module).post_layernorm(last)
            ours["class_token"] = tokens[:, 0]
        theirs = {"tokens": last.numpy()}
        if is_clip:
            theirs["class_token"] = out.pooler_output.numpy()
        elif model.image.pool == "map" and model.image.projection == "none":
            pooled = out.pooler_output
            theirs["image_embed"] = (pooled / pooled.norm(dim=-1, keepdim=True)).numpy()
            ours["image_embed"] = predictor.encode_image(given.images)
        return ours, theirs

    return _prove(target, source, kind, outputs)
