"""The command to-hf: models as folders that transformers loads.

A folder holds safetensors, config.json, the files of `hf_files/` (loaded with trust_remote_code, without
JAX), tokenizer and processor files, and a model card. Parameters have the PyTorch reference's names. Writing
needs safetensors and tokenizers; torch and transformers only run the parity.
"""

import dataclasses
from typing import Any

import numpy as np
from etils import epath

from grain_jax import config as config_lib
from grain_jax.checkpoint.pretrained import hub
from grain_jax.convert import output, parity
from grain_jax.convert.exits import folder as exits
from grain_jax.convert.exits import hugging_face, needs, tokenizers
from grain_jax.convert.faults import raise_any
from grain_jax.convert.reference import names

# Patterns of the names of all files of such a folder.
_FILES = ("*.json", hugging_face.WEIGHTS, "*_grain.py", "spiece.model", "README.md")
CODE = epath.Path(__file__).parent / "hf_files"
# Tokenizer files; `grain_jax.load` reads the first two.
_TOKENIZER = ("spiece.model", "tokenizer.json", "tokenizer_config.json")


def to_hf(source: epath.PathLike, folder: epath.PathLike, repo: str | None = None) -> parity.Report:
    """to-hf: a model that `grain_jax.load` reads to a folder for `AutoModel` and `AutoProcessor`.

    A model without a region decoder becomes transformers' own CLIP or SigLIP where these can hold it.

    Args:
      source: a workdir (the model card reports its config and metrics), a checkpoint, or a converted folder.
      folder: new, or an older conversion.
      repo: ORG/NAME where `push` will publish it; the model card names it.

    Raises:
      hub.HubError: `push` to that `repo` could not work.
      ConvertError: a tower is of another package, or the folder holds something else.
      checkpoint.CheckpointError: `source` cannot be read.
    """
    if repo is not None:
        hub.check_push(repo)
    stored_model = tokenizers.with_end(exits.read(source))
    lines = []
    if stored_model.model.decoder is None:
        kind, faults = needs.nearest(stored_model.model, needs.CLIP, needs.SIGLIP)
        if not faults:
            return hugging_face.write_towers(stored_model, folder, kind, repo)
        keys = [fault.partition(":")[0].removeprefix("model.") for fault in faults]
        lines = [f"for AutoModel with trust_remote_code: {kind.name} cannot hold {', '.join(keys)}"]
    raise_any(needs.MODELING.faults(stored_model.model))
    return _write(stored_model, output.check_free(folder, exits.MARK), repo, lines)


def _write(
    source: exits.SourceModel, folder: epath.Path, repo: str | None, lines: list[str]
) -> parity.Report:
    """A model with our modeling file; `lines` stand in the report."""
    model = source.model
    token_files, missing, notes = tokenizers.of_transformers(model.text, source.folder)
    name = epath.Path(model.text.tokenizer).name
    if name != "clip":
        name = next((x for x in _TOKENIZER if x in token_files), name)
    text = dataclasses.replace(model.text, tokenizer=name)
    code = {path.name: path.read_text() for path in CODE.glob("*_grain.py")}
    weights = {
        f"{module}.{name}": np.asarray(array, np.float32)
        for module, state in names.state_dicts(source.params).items()
        for name, array in state.items()
    }
    return exits.write(
        folder,
        source,
        (hugging_face.WEIGHTS, weights),
        code | _files(dataclasses.replace(model, text=text)) | token_files,
        lambda new: hugging_face.prove(new, source, "AutoModel", bool(token_files)),
        [f"to-hf: {source.folder} -> {folder}", *lines, *notes],
        use=_use(model),
        missing=missing,
        repo=repo,
    )


_USE = """
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


def _use(model: config_lib.Model) -> str:
    """The code of the card."""
    needs = ""
    if model.text.tokenizer.endswith(".model"):
        needs = "; sentencepiece and protobuf for the tokenizer"
    return _USE.replace("NEEDS", needs) + ("" if model.decoder is None else _USE_REGIONS)


def push(folder: epath.PathLike, repo: str, private: bool = False) -> str:
    """Publishes a folder of to-hf, its model card included, as ORG/NAME; returns the address. Raises hub.HubError."""
    return hub.push(str(folder), repo, _FILES, private)


def _files(model: config_lib.Model) -> dict[str, Any]:
    """The JSON files that tell transformers what is in the folder."""
    image = model.image
    auto = ("AutoModel", "AutoModelForZeroShotImageClassification")
    processors = {
        "AutoImageProcessor": "processing_grain.GrainImageProcessor",
        "AutoProcessor": "processing_grain.GrainProcessor",
    }
    return {
        "config.json": {
            "model_type": "grain",
            "architectures": ["GrainModel"],
            "auto_map": {
                "AutoConfig": "configuration_grain.GrainConfig",
                **dict.fromkeys(auto, "modeling_grain.GrainModel"),
            },
            "dtype": "float32",
            "towers": dataclasses.asdict(model),
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
