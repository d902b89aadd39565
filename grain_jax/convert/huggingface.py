"""The command to-hf: models as folders that transformers loads.

Two towers become CLIPModel or SiglipModel where these can hold them. Any other model goes with the files of `hf_files/`
(loaded with trust_remote_code, without JAX) and has the PyTorch reference's names. Writing needs safetensors and
tokenizers; torch and transformers only run the parity.
"""

import dataclasses
from typing import Any

import numpy as np
from etils import epath

from grain_jax import config as config_lib
from grain_jax.checkpoint.pretrained import hub
from grain_jax.convert import formats, output, parity, towers
from grain_jax.convert.exits import arrays, needs, tokenizers
from grain_jax.convert.exits import folder as exits
from grain_jax.convert.faults import raise_any
from grain_jax.convert.reference import names
from grain_jax.convert.tables import Arrays

WEIGHTS = "model.safetensors"
# Patterns of the names of all files of such a folder.
_FILES = ("*.json", WEIGHTS, "*_grain.py", "spiece.model", "README.md")
CODE = epath.Path(__file__).parent / "hf_files"
# Tokenizer files; `grain_jax.load` reads the first two.
_TOKENIZER = ("spiece.model", "tokenizer.json", "tokenizer_config.json")
_UNCLEAN = ["Two DOGS  &amp; a cat's   bowl, 1998!", ""]
_SIGLIP_CONTEXT = 64  # tokens to which the pipeline of transformers pads SigLIP's texts


def to_hf(
    source: epath.PathLike, folder: epath.PathLike, repo: str | None = None, part: str = "all"
) -> parity.Report:
    """to-hf: a model that `grain_jax.load` reads to a folder for `AutoModel` and `AutoProcessor`.

    A model without a region decoder becomes transformers' own CLIP or SigLIP where these can hold it.

    Args:
      source: a workdir (the model card reports its config and metrics), a checkpoint, or a converted folder.
      folder: new, or an older conversion.
      repo: ORG/NAME where `push` will publish it; the model card names it.
      part: "all", or "towers": without the regions that were added to a published model.

    Raises:
      hub.HubError: `push` to that `repo` could not work.
      ConvertError: a tower is of another package, or the folder holds something else.
      checkpoint.CheckpointError: `source` cannot be read.
    """
    if repo is not None:
        hub.check_push(repo)
    stored = tokenizers.with_end((exits.read_towers if part == "towers" else exits.read)(source))
    model, kind, lines = stored.model, "AutoModel", []
    if model.decoder is None:
        nearest, faults = needs.nearest(model, needs.CLIP, needs.SIGLIP)
        kind = "AutoModel" if faults else nearest.name
        keys = ", ".join(fault.partition(":")[0].removeprefix("model.") for fault in faults)
        if faults:
            lines = [f"for AutoModel with trust_remote_code: {nearest.name} cannot hold {keys}"]
    raise_any(needs.MODELING.faults(model))
    target = output.check_free(folder, exits.MARK)
    token_files, missing, notes = tokenizers.of_transformers(model.text, stored.folder)
    if kind == "AutoModel":
        weights, use = _own_weights(stored), _use_own(model)
        files = _own_files(model, token_files)
    else:
        weights = (_clip if kind == "CLIPModel" else _siglip)(stored)
        use, lines = _USE.format(kind=kind), _advice(model, kind)
        files = {
            "config.json": _config(model, kind),
            "preprocessor_config.json": _preprocessor(model.image, kind),
        }
    return exits.write(
        target,
        stored,
        (WEIGHTS, weights),
        files | token_files,
        lambda new: _prove(new, stored, kind, bool(token_files)),
        [f"to-hf: {stored.folder} -> {target}, {kind}", *lines, *notes],
        use=use,
        missing=missing,
        repo=repo,
    )


def _advice(model: config_lib.Model, kind: str) -> list[str]:
    """The lines of the report on what transformers prepares otherwise."""
    lines = [
        'images: AutoImageProcessor.from_pretrained(DIR, backend="pil") gives our pixels; the resize of torchvision,'
        " its default, differs by up to 1 of 255 levels",
    ]
    if kind == "SiglipModel" and model.text.context_length != _SIGLIP_CONTEXT:
        lines.append(
            f"texts: the pipeline of transformers pads SigLIP's to {_SIGLIP_CONTEXT} tokens, this model has"
            f" {model.text.context_length}; call processor and model instead"
        )
    return lines


def _own_weights(source: exits.SourceModel) -> Arrays:
    """The arrays of our modeling file."""
    return {
        f"{module}.{name}": np.asarray(array, np.float32)
        for module, state in names.state_dicts(source.params).items()
        for name, array in state.items()
    }


_USE_OWN = """
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

# Needs torch, transformers 5 and PillowNEEDS. With ftfy, texts with broken encodings are repaired as in training.
model = AutoModel.from_pretrained("FOLDER", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("FOLDER", trust_remote_code=True)
with torch.no_grad():
    pixels = processor(images=Image.open("bird.jpg"))["pixel_values"]
    texts = [processor(text=[f"a photo of a {c}"])["input_ids"] for c in ("wren", "owl")]
    scores = model.zero_shot_logits(pixels, model.class_features(texts))
"""
_USE_REGIONS = "    regions = model.get_regions(pixels)  # .boxes_xyxy in [0, 1], .embeds\n"


def _use_own(model: config_lib.Model) -> str:
    """The code of the card."""
    needs = ""
    if model.text.tokenizer.endswith(".model"):
        needs = "; sentencepiece and protobuf for the tokenizer"
    return _USE_OWN.replace("NEEDS", needs) + ("" if model.decoder is None else _USE_REGIONS)


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


def push(folder: epath.PathLike, repo: str, private: bool = False) -> str:
    """Publishes a folder of to-hf, its model card included, as ORG/NAME; returns the address. Raises hub.HubError."""
    return hub.push(str(folder), repo, _FILES, private)


def _own_files(model: config_lib.Model, token_files: dict[str, Any]) -> dict[str, Any]:
    """Our modeling file, and the JSON files that tell transformers what is in the folder."""
    name = epath.Path(model.text.tokenizer).name
    if name != "clip":
        name = next((x for x in _TOKENIZER if x in token_files), name)
    text = dataclasses.replace(model.text, tokenizer=name)
    code = {path.name: path.read_text() for path in CODE.glob("*_grain.py")}
    image = model.image
    auto = ("AutoModel", "AutoModelForZeroShotImageClassification")
    processors = {
        "AutoImageProcessor": "processing_grain.GrainImageProcessor",
        "AutoProcessor": "processing_grain.GrainProcessor",
    }
    return code | {
        "config.json": {
            "model_type": "grain",
            "architectures": ["GrainModel"],
            "auto_map": {
                "AutoConfig": "configuration_grain.GrainConfig",
                **dict.fromkeys(auto, "modeling_grain.GrainModel"),
            },
            "dtype": "float32",
            "towers": dataclasses.asdict(dataclasses.replace(model, text=text)),
        },
        "preprocessor_config.json": {
            "image_processor_type": "GrainImageProcessor",
            "processor_class": "GrainProcessor",
            "auto_map": processors,
            "size": {"height": image.image_size, "width": image.image_size},
            "image_mean": list(image.pixel_mean),
            "image_std": list(image.pixel_std),
        },
        "processor_config.json": {
            "processor_class": "GrainProcessor",
            "auto_map": {"AutoProcessor": processors["AutoProcessor"]},
            "cleaning": model.text.cleaning,
        },
    }


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


def _clip(source: exits.SourceModel) -> Arrays:
    """The arrays of CLIPModel, whose patches have no bias."""
    flat = arrays.without_patch_bias(exits.flat(source))
    for tower in towers.TOWERS:
        width = getattr(source.model, tower).width
        flat = arrays.with_projection(flat, tower, width, bias=False)
    rows = [*formats.hf_image(), *formats.hf_text("text_projection"), *towers.SCALARS]
    return exits.entries(rows, flat)


def _siglip(source: exits.SourceModel) -> Arrays:
    """The arrays of SiglipModel, whose patches have one."""
    flat = arrays.with_patch_bias(exits.flat(source))
    flat = {"logit_bias": np.zeros((), np.float32), **flat}
    flat = arrays.with_projection(flat, "text", source.model.text.width, bias=True)
    rows = [*formats.hf_image(), *formats.hf_text("text_model.head"), *towers.SCALARS]
    state = exits.entries(rows, flat)
    return state | {row.theirs: state[row.theirs].reshape(1) for row in towers.SCALARS}


def _prove(
    target: epath.Path, source: exits.SourceModel, kind: str, has_tokenizer: bool
) -> parity.Report:
    """Our model against a class of transformers on the folder, from raw images and texts.

    `AutoModel` is our modeling file, whose processor cleans texts.
    """
    options: Any = dict(local_files_only=True)
    is_own = kind == "AutoModel"
    texts = [*tokenizers.TEXTS, *(_UNCLEAN if is_own else ())]
    ours = {"pixels": exits.our_pixels(source.model.image)}
    if has_tokenizer:
        ours |= tokenizers.ours(source, texts, pads_with_end=True)

    def run(inputs: parity.Inputs) -> dict[str, np.ndarray]:
        import transformers

        of_processor = options | (dict(trust_remote_code=True) if is_own else dict(backend="pil"))
        of_model = of_processor if is_own else options
        module = getattr(transformers, kind).from_pretrained(str(target), **of_model).eval()
        theirs = parity.clip_outputs(module, inputs)
        load = lambda auto: auto.from_pretrained(str(target), **of_processor)
        processor = load(transformers.AutoImageProcessor)
        pixels = processor(exits.raw_images(), return_tensors="pt")["pixel_values"]
        theirs["pixels"] = pixels.permute(0, 2, 3, 1).numpy()
        if has_tokenizer:
            as_ours = dict(truncation=True, padding="max_length", return_tensors="np")
            ids = load(transformers.AutoProcessor)(text=texts, **as_ours)["input_ids"]
            cleaned = ids[: len(tokenizers.TEXTS)]
            images = np.repeat(inputs.images[:1], len(cleaned), axis=0)
            theirs["encode_text"] = parity.clip_outputs(module, parity.Inputs(images, cleaned))[
                "text_embed"
            ]
            theirs["token_ids"] = ids
        return theirs

    return parity.prove(source.model, source.params, kind, ("transformers", "torch"), run, ours)
