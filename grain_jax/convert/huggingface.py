"""The command to-hf: models as folders that transformers loads.

Two towers become CLIPModel or SiglipModel where these can hold them. Any other model goes with the files of
`hf_files/` (loaded with trust_remote_code, without JAX) and has the PyTorch reference's names. Writing needs
safetensors and tokenizers; torch and transformers only run the parity.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
from etils import epath

from grain_jax import config as config_lib
from grain_jax.checkpoint.saved_model import Stored
from grain_jax.convert import formats, from_hugging_face, output, parity, tables, towers
from grain_jax.convert.exits import folder as exits
from grain_jax.convert.exits import needs, tokenizers
from grain_jax.convert.faults import raise_any
from grain_jax.convert.reference import names
from grain_jax.convert.tables import Arrays
from grain_jax.models import grain

WEIGHTS = "model.safetensors"
CODE = epath.Path(__file__).parent / "hf_files"
# Tokenizer files; `grain_jax.load` reads the first two.
_TOKENIZER = ("spiece.model", "tokenizer.json", "tokenizer_config.json")
_UNCLEAN = ["Two DOGS  &amp; a cat's   bowl, 1998!", ""]
_PIXELS = (
    'images: AutoImageProcessor.from_pretrained(DIR, backend="pil") gives our pixels; the resize of'
    " torchvision, its default, differs by up to 1 of 255 levels"
)


def to_hf(source: epath.PathLike, folder: epath.PathLike, part: str = "all") -> parity.Report:
    """to-hf: a model that `grain_jax.load` reads to a folder for `AutoModel` and `AutoProcessor`.

    A model without a region decoder becomes transformers' own CLIP or SigLIP where these can hold it.

    The model card reports config and metrics of a workdir. `part`: "all", or "towers": without the regions
    that were added to a published model.

    Raises:
      ConvertError: a tower is of another package, or the folder holds something else.
      checkpoint.CheckpointError: `source` cannot be read.
    """
    stored = tokenizers.with_end((exits.read_towers if part == "towers" else exits.read)(source))
    model = stored.model
    raise_any(needs.MODELING.faults(model))
    target = output.check_free(folder, exits.MARK)
    token_files, missing = tokenizers.of_transformers(model.text, stored.folder)
    nearest, faults = needs.nearest(model, needs.CLIP, needs.SIGLIP)
    if faults:
        kind, use, lines = (
            "AutoModel",
            _USE_OWN + _USE_REGIONS * bool(model.decoder or model.boxes.proposals),
            [],
        )
        if model.decoder is None:
            keys = ", ".join(fault.partition(":")[0].removeprefix("model.") for fault in faults)
            lines = [f"for AutoModel with trust_remote_code: {nearest.name} cannot hold {keys}"]
        weights, files = names.state_dict(stored.params), _own_files(model, token_files)
    else:
        kind, use, lines = nearest.name, _USE.format(kind=nearest.name), [_PIXELS]
        weights, files = _weights(model, grain.flat(stored.params), kind), _config(model, kind)
    return exits.write(
        target,
        stored,
        (WEIGHTS, weights),
        files | token_files,
        lambda new: _prove(new, stored, kind, bool(token_files)),
        [f"to-hf: {stored.folder} -> {target}, {kind}", *lines, *filter(None, [missing])],
        use=use,
        missing=missing,
    )


_USE_OWN = """
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

# Needs torch, transformers 5 and Pillow. With ftfy, texts with broken encodings are repaired as in training.
model = AutoModel.from_pretrained("FOLDER", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("FOLDER", trust_remote_code=True)
with torch.no_grad():
    pixels = processor(images=Image.open("bird.jpg"))["pixel_values"]
    texts = [processor(text=[f"a photo of a {c}"])["input_ids"] for c in ("wren", "owl")]
    scores = model.zero_shot_logits(pixels, model.class_features(texts))
"""
_USE_REGIONS = "    regions = model.get_regions(pixels)  # .boxes_xyxy in [0, 1], .embeds, .priors\n"

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


def _own_files(model: config_lib.Model, token_files: dict[str, Any]) -> dict[str, Any]:
    """Our modeling file, and the JSON files that tell transformers what is in the folder."""
    name = epath.Path(model.text.tokenizer).name
    if name != "clip":
        name = next((x for x in _TOKENIZER if x in token_files), name)
    text = dataclasses.replace(model.text, tokenizer=name)
    kinds = ("AutoModel", "AutoModelForZeroShotImageClassification")
    processor = {"AutoProcessor": "processing_grain.GrainProcessor"}
    both = processor | {"AutoImageProcessor": "processing_grain.GrainImageProcessor"}
    return {
        **{path.name: path.read_text() for path in CODE.glob("*_grain.py")},
        "config.json": {
            "model_type": "grain",
            "architectures": ["GrainModel"],
            "auto_map": {
                "AutoConfig": "configuration_grain.GrainConfig",
                **dict.fromkeys(kinds, "modeling_grain.GrainModel"),
            },
            "dtype": "float32",
            "towers": dataclasses.asdict(dataclasses.replace(model, text=text)),
        },
        "preprocessor_config.json": _preprocessor(model.image, "Grain") | {"auto_map": both},
        "processor_config.json": {
            "processor_class": "GrainProcessor",
            "auto_map": processor,
            "cleaning": model.text.cleaning,
        },
    }


def _config(model: config_lib.Model, kind: str) -> dict[str, Any]:
    """config.json and preprocessor_config.json of CLIPModel or SiglipModel: squashed to a square, no crop."""
    name, text = kind.removesuffix("Model"), model.text
    shared = lambda part, tower: {
        "model_type": f"{name.lower()}_{part}_model",
        **{theirs: getattr(tower, ours) for ours, theirs in from_hugging_face.SIZES.items()},
        "hidden_act": {"gelu_tanh": "gelu_pytorch_tanh"}.get(tower.activation, tower.activation),
        "projection_dim": model.embed_dim,
    }
    sizes = dict(image_size=model.image.image_size, patch_size=model.image.patch_size)
    text_keys = dict(
        vocab_size=text.vocab_size,
        max_position_embeddings=text.context_length,
        projection_size=model.embed_dim,
        bos_token_id=text.vocab_size - 2,
        eos_token_id=2 if text.end_id is None else text.end_id,  # 2: CLIPModel takes the highest id
        pad_token_id=text.pad_id,
    )
    config = dict(
        model_type=name.lower(),
        architectures=[kind],
        dtype="float32",
        projection_dim=model.embed_dim,
        vision_config=shared("vision", model.image) | sizes,
        text_config=shared("text", text) | text_keys,
    )
    of_pillow = dict(do_convert_rgb=True, do_center_crop=False, resample=3)  # 3: bicubic
    preprocessor = _preprocessor(model.image, name) | of_pillow
    return {"config.json": config, "preprocessor_config.json": preprocessor}


def _preprocessor(tower: config_lib.ImageTower, name: str) -> dict[str, Any]:
    return {
        "image_processor_type": f"{name}ImageProcessor",
        "processor_class": f"{name}Processor",
        "size": {"height": tower.image_size, "width": tower.image_size},
        "image_mean": list(tower.pixel_mean),
        "image_std": list(tower.pixel_std),
    }


def _weights(model: config_lib.Model, flat: Arrays, kind: str) -> Arrays:
    """The arrays of CLIPModel, whose patches have no bias, or of SiglipModel, whose patches have one."""
    if kind == "CLIPModel":
        flat = tables.without_patch_bias(flat)
        for tower in towers.TOWERS:
            flat = tables.with_projection(flat, tower, getattr(model, tower).width, bias=False)
        return tables.write([*formats.hf_image(), *formats.hf_text("text_projection"), *towers.SCALARS], flat)
    flat = {"logit_bias": np.zeros((), np.float32), **tables.with_patch_bias(flat)}
    flat = tables.with_projection(flat, "text", model.text.width, bias=True)
    state = tables.write([*formats.hf_image(), *formats.hf_text("text_model.head"), *towers.SCALARS], flat)
    return state | {row.theirs: state[row.theirs].reshape(1) for row in towers.SCALARS}


def _prove(target: epath.Path, source: Stored, kind: str, has_tokenizer: bool) -> parity.Report:
    """Our model against a class of transformers; `AutoModel` is our modeling file, whose processor cleans."""
    is_own = kind == "AutoModel"
    options: Any = dict(local_files_only=True) | (dict(trust_remote_code=True) if is_own else {})

    def opened() -> tuple[Any, Any, Any]:
        import transformers

        module = getattr(transformers, kind).from_pretrained(str(target), **options).eval()
        backend = {} if is_own else dict(backend="pil")
        load = lambda auto: auto.from_pretrained(str(target), **options, **backend)
        pixels = load(transformers.AutoImageProcessor)
        as_ours = dict(truncation=True, padding="max_length", return_tensors="np")
        return (
            functools.partial(parity.clip_outputs, module),
            lambda raw: pixels(raw, return_tensors="pt")["pixel_values"].permute(0, 2, 3, 1).numpy(),
            lambda texts: load(transformers.AutoProcessor)(text=texts, **as_ours)["input_ids"],
        )

    texts = [*tokenizers.TEXTS, *_UNCLEAN * is_own] if has_tokenizer else None
    packages = ("transformers", "torch")
    return tokenizers.prove(source, kind, packages, opened, texts, pads_with_end=True)
