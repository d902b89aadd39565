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
from grain_jax.convert import model_card, output, parity
from grain_jax.convert.exits import folder as exits
from grain_jax.convert.exits import hugging_face, needs, tokenizers
from grain_jax.convert.reference import module as torch_module
from grain_jax.convert.reference import names

WEIGHTS = "model.safetensors"
_MODELING = "modeling_grain.py"  # marks a folder of to-hf
# Patterns of the names of all files of such a folder.
_FILES = ("*.json", WEIGHTS, "*_grain.py", "spiece.model", "README.md")
CODE = epath.Path(__file__).parent / "hf_files"
# Tokenizer files; `grain_jax.load` reads the first two.
_TOKENIZER = ("spiece.model", "tokenizer.json", "tokenizer_config.json")
# The recipe of the paper (docs/method.md, Losses), for models without a run's config.
LOSSES = dict(
    image_caption=1.0,
    region_description=1.0,
    box=1.0,
    contrast="softmax",
    mask_duplicates=True,
    match_l1=5.0,
    match_giou=2.0,
    match_description=0.0,
    iou_epsilon=0.0,
    deep_supervision=False,
)
# What the modeling file lacks of a run's losses.
_NO_LOSSES = ("image_description", "box_description", "hard_negative", "group_size")
_REFERENCE_EPSILON = 1e-4  # of the IoU in a run with `reference`
_TEXTS = ["a photo of a wren", "Two DOGS  &amp; a cat's   bowl, 1998!", "", "long " * 100]


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
    stored_model, unknown = tokenizers.with_end(exits.read(source))
    lines = []
    if stored_model.model.decoder is None:
        kind, faults = needs.of_hugging_face(stored_model.model)
        if not faults:
            return hugging_face.write_towers(stored_model, folder, kind, repo, unknown)
        keys = [fault.partition(":")[0].removeprefix("model.") for fault in faults]
        lines = [f"for AutoModel with trust_remote_code: {kind.name} cannot hold {', '.join(keys)}"]
    names.refuse(stored_model.model, "to-hf")
    return _write(stored_model, output.check_free(folder, _MODELING), repo, lines, unknown)


def _write(
    source: exits.SourceModel, folder: epath.Path, repo: str | None, lines: list[str], unknown: str
) -> parity.Report:
    """A model with our modeling file; `lines` stand in the report, and what the parity cannot tell is `unknown`."""
    model = source.model
    run = model_card.read_run(source.folder)
    contrast = "softmax" if model.logit_bias_init is None else "sigmoid"
    stored = {"contrast": contrast} | run.config.get("loss", {})
    losses = {key: stored.get(key, value) for key, value in LOSSES.items()}
    if run.config.get("reference"):
        losses["iou_epsilon"] = _REFERENCE_EPSILON
    lacking = [name for name in _NO_LOSSES if stored.get(name)] + [*stored.get("terms", ())]
    if lacking:
        lines = [*lines, f"training in torch lacks of the run's losses: {', '.join(lacking)}"]
    token_files, missing, notes = tokenizers.of_transformers(model.text, source.folder)
    name = epath.Path(model.text.tokenizer).name
    if name != "clip":
        name = next((x for x in _TOKENIZER if x in token_files), name)
    text = dataclasses.replace(model.text, tokenizer=name)
    code = {path.name: path.read_text() for path in CODE.glob("*_grain.py")}
    files = code | _files(dataclasses.replace(model, text=text), losses) | token_files
    weights = {
        f"{module}.{name}": np.asarray(array, np.float32)
        for module, state in names.state_dicts(source.params).items()
        for name, array in state.items()
    }
    with output.replacing(folder, _MODELING) as new:
        exits.write_files(new, WEIGHTS, weights, files)
        proof = _prove_folder(new, source, has_tokenizer=bool(token_files)).but(unknown)
        card = model_card.write(model, run, proof, _use(model), missing, losses=losses, repo=repo)
        (new / "README.md").write_text(card)
    size = sum(array.size for array in weights.values())
    return proof.after(
        f"to-hf: {source.folder} -> {folder}",
        f"{WEIGHTS}: {size:,} values, float32",
        *lines,
        *notes,
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
    needs = "" if model.decoder is None else "; SciPy for the loss"
    if model.text.tokenizer.endswith(".model"):
        needs += "; sentencepiece and protobuf for the tokenizer"
    return _USE.replace("NEEDS", needs) + ("" if model.decoder is None else _USE_REGIONS)


def push(folder: epath.PathLike, repo: str, private: bool = False) -> str:
    """Publishes a folder of to-hf, its model card included, as ORG/NAME; returns the address. Raises hub.HubError."""
    with output.on_disk(epath.Path(folder)) as path:
        return hub.push(path, repo, _FILES, private)


def _files(model: config_lib.Model, losses: dict[str, Any]) -> dict[str, Any]:
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
            "losses": losses,
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


@exits.needing_packages
def _prove_folder(
    folder: epath.Path, source: exits.SourceModel, has_tokenizer: bool
) -> parity.Report:
    """Our model against transformers on a folder of to-hf, starting from raw images and texts."""
    import torch
    import transformers

    model = source.model
    batch = parity.inputs_of(model)
    ours = torch_module.outputs(model, source.params, batch)
    ours["pixels"] = exits.our_pixels(model.image)
    load = lambda auto: auto.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    module = load(transformers.AutoModel).eval()
    theirs = torch_module.run_module(module, batch)
    prepared = load(transformers.AutoImageProcessor)(exits.raw_images())
    theirs["pixels"] = prepared["pixel_values"].permute(0, 2, 3, 1).numpy()
    if has_tokenizer:
        processor = load(transformers.AutoProcessor)
        ids = lambda texts: processor(text=texts, padding="max_length")["input_ids"]
        theirs["token_ids"] = ids(_TEXTS).numpy()
        ours["token_ids"] = tokenizers.our_ids(model.text, source.folder, _TEXTS)
        ours["encode_text"] = tokenizers.our_embeddings(source)
        with torch.no_grad():
            embeds = module.get_text_features(ids(tokenizers.TEXTS))
        theirs["encode_text"] = torch.nn.functional.normalize(embeds, dim=-1).numpy()
    return parity.report(parity.compare(ours, theirs), torch_module.torch_versions(), batch)
