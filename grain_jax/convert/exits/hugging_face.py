"""Two towers as transformers' CLIPModel or SiglipModel, and an image tower alone as its vision model."""

from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from grain_jax import config as config_lib
from grain_jax import inference
from grain_jax.convert import formats, output, parity, towers
from grain_jax.convert.exits import arrays, folder, reasons, tokenizers
from grain_jax.convert.open_clip.comparison import hf_config
from grain_jax.convert.tables import Arrays, NamePair
from grain_jax.inference import jitted

WEIGHTS = "model.safetensors"
_SCALARS = [NamePair("logit_scale", "logit_scale"), NamePair("logit_bias", "logit_bias")]
_SIGLIP_CONTEXT = 64
_IMAGE_PARTS = ("image/", "image_pool/")


def write_towers(
    source: folder.Source, path: epath.PathLike, repo: str | None = None, unknown: str = ""
) -> parity.Report:
    """A two-tower model as a folder for CLIPModel or SiglipModel.

    Args:
      source: the model.
      path: the folder; new, or an older one of an exit.
      repo: ORG/NAME, for the card.
      unknown: what the parity cannot tell (`tokenizers.with_end`).

    Raises:
      ConvertError: neither can express the model, or the folder holds something else.
    """
    target = output.check_free(path, folder.MARK)
    kind, faults = reasons.of_hugging_face(source.model)
    reasons.refuse(source.model, faults)
    is_clip = kind is reasons.CLIP
    words, missing, told = tokenizers.of_transformers(source.model.text, source.folder)
    files = {
        "config.json": _config(source.model, is_clip),
        "preprocessor_config.json": _preprocessor(source.model.image, is_clip, whole=True),
        **words,
    }
    state = (_clip if is_clip else _siglip)(folder.flat(source), source.model)
    folder.write(target, WEIGHTS, state, files, source)
    proof = _prove_towers(target, source, kind.name, has_tokenizer=bool(words)).but(unknown)
    folder.finish(target, source, _USE.format(kind=kind.name), "transformers", proof, repo, missing)
    lines = [f"to-hf: {source.folder} -> {target}, {kind.name}", _size(state), _PIXELS]
    if not is_clip and source.model.text.context_length != _SIGLIP_CONTEXT:
        lines.append(
            f"texts: the pipeline of transformers pads SigLIP's to {_SIGLIP_CONTEXT} tokens, this model has"
            f" {source.model.text.context_length}; call processor and model instead"
        )
    return proof.after(*lines, *told)


def write_vision(
    source: folder.Source, path: epath.PathLike, repo: str | None = None
) -> parity.Report:
    """The image tower of any model as a folder for CLIPVisionModel or SiglipVisionModel.

    Raises:
      ConvertError: neither can express the tower, or the folder holds something else.
    """
    target = output.check_free(path, folder.MARK)
    model = source.model
    kind, faults = reasons.of_vision(model)
    reasons.refuse(model, faults)
    is_clip = kind is reasons.CLIP_VISION
    family = "clip" if is_clip else "siglip"
    config = _config(model, is_clip)["vision_config"]
    config |= {"architectures": [kind.name], "model_type": f"{family}_vision_model"}
    config["dtype"] = "float32"
    if not is_clip:
        config["vision_use_head"] = model.image.pool == "map"
    files = {
        "config.json": config,
        "preprocessor_config.json": _preprocessor(model.image, is_clip, whole=False),
    }
    parts = _IMAGE_PARTS[:1] if is_clip else _IMAGE_PARTS  # CLIP has no pooling head
    named = {n: x for n, x in folder.flat(source).items() if n.startswith(parts)}
    state = folder.entries(formats.hf_image(), _image(named, model, is_clip))
    folder.write(target, WEIGHTS, state, files, source)
    proof = _prove_vision(target, source, kind.name, is_clip)
    folder.finish(target, source, _USE_VISION.format(kind=kind.name), "transformers", proof, repo)
    return proof.after(
        f"to-hf --part vision: {source.folder} -> {target}, {kind.name}",
        _size(state),
        _PIXELS,
        f"left behind: {_left_behind(source)}",
    )


_PIXELS = (
    'images: AutoImageProcessor.from_pretrained(DIR, backend="pil") gives our pixels; the resize of torchvision, its'
    " default, differs by up to 1 of 255 levels"
)
_USE = """
import torch
from PIL import Image
from transformers import AutoProcessor, {kind}

model = {kind}.from_pretrained("FOLDER").eval()
processor = AutoProcessor.from_pretrained("FOLDER", backend="pil")
with torch.no_grad():
    given = processor(images=Image.open("bird.jpg"), text=["a photo of a wren"], padding="max_length", truncation=True,
                      return_tensors="pt")
    scores = model(**given).logits_per_image
"""
_USE_VISION = """
import torch
from PIL import Image
from transformers import AutoImageProcessor, {kind}

model = {kind}.from_pretrained("FOLDER").eval()
processor = AutoImageProcessor.from_pretrained("FOLDER", backend="pil")
with torch.no_grad():
    tokens = model(**processor(Image.open("bird.jpg"), return_tensors="pt")).last_hidden_state
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


def _config(model: config_lib.Model, is_clip: bool) -> dict[str, Any]:
    """config.json of CLIPModel or SiglipModel."""
    family, kind = ("clip", "CLIPModel") if is_clip else ("siglip", "SiglipModel")
    stated = hf_config(model)
    for part in ("vision", "text"):
        stated[f"{part}_config"]["model_type"] = f"{family}_{part}_model"
    return {"model_type": family, "architectures": [kind], "dtype": "float32", **stated}


def _preprocessor(tower: config_lib.ImageTower, is_clip: bool, whole: bool) -> dict[str, Any]:
    name = "CLIP" if is_clip else "Siglip"
    return {
        "image_processor_type": f"{name}ImageProcessor",
        **({"processor_class": f"{name}Processor"} if whole else {}),
        "do_convert_rgb": True,
        "do_resize": True,
        "do_center_crop": False,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 3,  # Pillow's bicubic
        "rescale_factor": 1 / 255,
        "size": {"height": tower.image_size, "width": tower.image_size},
        "crop_size": {"height": tower.image_size, "width": tower.image_size},
        "image_mean": list(tower.pixel_mean),
        "image_std": list(tower.pixel_std),
    }


def _image(flat: Arrays, model: config_lib.Model, is_clip: bool) -> Arrays:
    """CLIP's patches have no bias, SigLIP's have one."""
    if is_clip:
        return arrays.without_patch_bias(flat, leading=1)
    return arrays.with_patch_bias(flat)


def _clip(flat: Arrays, model: config_lib.Model) -> Arrays:
    """The arrays of CLIPModel."""
    flat = _image(flat, model, is_clip=True)
    for tower in towers.TOWERS:
        width = getattr(model, tower).width
        flat = arrays.with_projection(flat, tower, width, bias=False)
    rows = [*formats.hf_image(), *formats.hf_text("text_projection"), *_SCALARS]
    return folder.entries(rows, flat)


def _siglip(flat: Arrays, model: config_lib.Model) -> Arrays:
    """The arrays of SiglipModel."""
    flat = {"logit_bias": np.zeros((), np.float32), **_image(flat, model, is_clip=False)}
    flat = arrays.with_projection(flat, "text", model.text.width, bias=True)
    rows = [*formats.hf_image(), *formats.hf_text("text_model.head"), *_SCALARS]
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


def _their_pixels(path: str) -> np.ndarray:
    import transformers

    load = transformers.AutoImageProcessor.from_pretrained
    processor: Any = load(path, local_files_only=True, backend="pil")
    pixels = processor(folder.raw_images(), return_tensors="pt")["pixel_values"]
    return pixels.permute(0, 2, 3, 1).numpy()


@folder.needing_packages
def _prove(
    target: epath.Path, source: folder.Source, kind: str, outputs: Callable[..., tuple[Any, Any]]
) -> parity.Report:
    """Our model against the class of transformers on the folder, from raw images.

    Args:
      target: the folder.
      source: the model.
      kind: the class.
      outputs: (module, inputs of the parity, the same as tensors, path) -> our outputs and theirs, by name.
    """
    import torch
    import transformers  # noqa: F401 (without torch it imports, but has no models)

    given = parity.inputs_of(source.model)
    with output.on_disk(target) as path, torch.no_grad():
        images = torch.from_numpy(given.images.transpose(0, 3, 1, 2).copy())
        tensors = images, torch.from_numpy(given.token_ids).long()
        ours, theirs = outputs(_loaded(kind, path), given, tensors, path)
        theirs["pixels"] = _their_pixels(path)
    ours["pixels"] = folder.our_pixels(source.model.image)
    other = f"{kind}, {_versions()} on {target}"
    return parity.report(parity.compare(ours, theirs), other, given)


def _prove_towers(
    target: epath.Path, source: folder.Source, kind: str, has_tokenizer: bool
) -> parity.Report:
    """Embeddings and logits; of texts their ids, and their embeddings from end to end."""

    def outputs(module, given, tensors, path):
        out = module(pixel_values=tensors[0], input_ids=tensors[1])
        ours = folder.our_outputs(source, given)
        theirs = {
            "image_embed": out.image_embeds.numpy(),
            "text_embed": out.text_embeds.numpy(),
            "logits": out.logits_per_image.numpy(),
        }
        if has_tokenizer:
            import torch
            import transformers

            load = transformers.AutoProcessor.from_pretrained
            processor: Any = load(path, local_files_only=True, backend="pil")
            options: Any = dict(padding="max_length", truncation=True, return_tensors="np")
            ids = processor(text=tokenizers.TEXTS, **options)["input_ids"]
            ours["token_ids"] = tokenizers.our_ids(source.model.text, source.folder)
            ours["encode_text"] = tokenizers.our_embeddings(source)
            out = module(pixel_values=tensors[0], input_ids=torch.from_numpy(ids).long())
            theirs |= {"token_ids": ids, "encode_text": out.text_embeds.numpy()}
        return ours, theirs

    return _prove(target, source, kind, outputs)


def _prove_vision(
    target: epath.Path, source: folder.Source, kind: str, is_clip: bool
) -> parity.Report:
    """The tokens of our image tower, and what is pooled of them."""
    model = source.model

    def outputs(module, given, tensors, path):
        predictor = inference.Predictor(model, source.params)
        program = jitted.program(model, "float32", "image_tokens")
        tokens = np.asarray(program(predictor.params, given.images))
        ours = {"tokens": tokens}
        out = module(pixel_values=tensors[0])
        last = out.last_hidden_state
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
