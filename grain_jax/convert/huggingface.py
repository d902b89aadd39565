"""The commands to-hf and from-hf: models as folders that transformers loads, and back.

A folder holds safetensors, config.json, the files of `hf_files/` (loaded with trust_remote_code, without
JAX), tokenizer and processor files, and a model card. Parameters have the PyTorch reference's names. Writing
needs safetensors and tokenizers; torch and transformers only run the parity.
"""

import dataclasses
import json
from typing import Any

import numpy as np
from etils import epath

from grain_jax import config as config_lib
from grain_jax.convert import archives, hf_tokenizer, model_card, output, parity
from grain_jax.convert.exits import folder as exits
from grain_jax.convert.exits import hugging_face, reasons
from grain_jax.convert.faults import ConvertError, needing, prefixed, raise_any
from grain_jax.convert.reference import module as torch_module
from grain_jax.convert.reference import names
from grain_jax.core import atomic, images, regular_file
from grain_jax.input_pipeline import clip_tokenizer
from grain_jax.runtime import pretrained
from grain_jax.runtime.pretrained import hub

WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"  # where transformers splits the weights into several files
_MODELING = "modeling_grain.py"  # marks a folder of to-hf
# Patterns of the names of all files of such a folder.
_FILES = ("*.json", WEIGHTS, "*_grain.py", "spiece.model", "README.md")
CODE = epath.Path(__file__).parent / "hf_files"
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
_TEXTS = ["a photo of a wren", "Two DOGS  &amp; a cat's   bowl, 1998!", "", "long " * 100]


def to_hf(
    source: epath.PathLike,
    folder: epath.PathLike,
    repo: str | None = None,
    part: str = "model",
) -> parity.Report:
    """to-hf: a model that `grain_jax.load` reads to a folder for `AutoModel` and `AutoProcessor`.

    A model without a region decoder becomes transformers' own CLIP or SigLIP.

    Args:
      source: a workdir (the model card reports its config and metrics), a checkpoint, or a converted folder.
      folder: new, or an older conversion.
      repo: ORG/NAME where `push` will publish it; the model card names it.
      part: "model"; "towers": without region decoder and box head, as CLIP or SigLIP; or "vision": the image tower
        alone, as a vision model of either.

    Raises:
      hub.HubError: `push` to that `repo` could not work.
      ConvertError: the modeling file cannot express the model, or the folder holds something else.
      checkpoint.CheckpointError: `source` cannot be read.
    """
    if repo is not None:
        hub.check_push(repo)
    found = exits.read(source)
    if part == "vision":
        return hugging_face.write_vision(found, folder, repo)
    if part == "towers":
        alone, lines = exits.towers_alone(found)
        return hugging_face.write_towers(alone, folder, repo).after(*lines)
    if found.model.decoder is None:
        return hugging_face.write_towers(found, folder, repo)
    folder = output.check_free(folder, _MODELING)
    model, params, read_from = found
    reasons.refuse(model, names.faults(model, "to-hf"))
    run = model_card.read_run(read_from)
    contrast = "softmax" if model.logit_bias_init is None else "sigmoid"
    stored = {"contrast": contrast} | run.config.get("loss", {})
    losses = {key: stored.get(key, value) for key, value in LOSSES.items()}
    has_tokenizer = model.text.vocab_size == clip_tokenizer.VOCAB_SIZE
    files = _files(model, losses)
    if has_tokenizer:
        files |= hf_tokenizer.files(model.text.context_length)
    texts = {n: json.dumps(x, indent=2, ensure_ascii=False) + "\n" for n, x in files.items()}
    texts |= {path.name: path.read_text() for path in CODE.glob("*_grain.py")}
    weights = {
        f"{module}.{name}": np.asarray(array, np.float32)
        for module, state in names.state_dicts(params).items()
        for name, array in state.items()
    }
    with output.writing(folder), needing("safetensors", folder / WEIGHTS):
        import safetensors.numpy

        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            atomic.write_text(folder / name, text)
        content = safetensors.numpy.save(weights, metadata={"format": "pt"})
        atomic.write_bytes(folder / WEIGHTS, content)
    proof = _prove_folder(folder, model, params, has_tokenizer)
    with output.writing(folder):
        card = model_card.write(model, losses, run, proof, has_tokenizer, repo)
        atomic.write_text(folder / "README.md", card)
    size = sum(array.size for array in weights.values())
    lines = [f"to-hf: {read_from} -> {folder}", f"{WEIGHTS}: {size:,} values, float32"]
    if not has_tokenizer:
        lines.append(
            f"no tokenizer files: a vocabulary of {model.text.vocab_size} is not CLIP's of"
            f" {clip_tokenizer.VOCAB_SIZE}; give the model token ids"
        )
    return proof.after(*lines)


def push(folder: epath.PathLike, repo: str, private: bool = False) -> str:
    """Publishes a folder of to-hf, its model card included, as ORG/NAME; returns the address. Raises hub.HubError."""
    with output.on_disk(epath.Path(folder)) as path:
        return hub.push(path, repo, _FILES, private)


def from_hf(source: epath.PathLike, folder: epath.PathLike) -> parity.Report:
    """from-hf: a folder of to-hf, also one that transformers trained further, to a folder for `grain_jax.load`.

    Raises:
      ConvertError: entries or files that are missing, damaged, unknown or of another shape; a line each.
      config.ConfigError: sizes that are no model's, such as heads that do not divide the width.
    """
    source, folder = pretrained.folder_of(source), output.check_free(folder)
    model, params, states = _read(source)
    # Its code is untrusted: the other side is our own torch module with the arrays of the folder.
    proof = torch_module.prove(model, params, states)
    output.save(folder, model, params, source, proof)
    return proof.after(f"from-hf: {source} -> {folder}")


def read(folder: epath.Path) -> tuple[config_lib.Model, Any]:
    """The model in a folder of to-hf, and its parameters; raises as `from_hf`."""
    return _read(folder)[:2]


def _read(folder: epath.Path) -> tuple[config_lib.Model, Any, dict[str, dict[str, np.ndarray]]]:
    """(model, our parameters, the same under the names of the reference); runs no code of the folder."""
    model = _read_config(folder / "config.json")
    weights, index = folder / WEIGHTS, folder / _INDEX
    files = [weights]
    if not regular_file.is_one(weights) and regular_file.is_one(index):
        weights, files = index, archives.files_of_index(index)
    states: dict[str, dict[str, np.ndarray]] = {"backbone": {}, "decoder": {}}
    faults = []
    for file in files:
        if not regular_file.is_one(file):
            raise ConvertError(f"{file}: no such file; expected a folder written by to-hf")
        for name, array in archives.read_safetensors(file).items():
            module, _, rest = name.partition(".")
            if module in states:
                states[module][rest] = array
            else:
                faults.append(f"{file}: {name}: unknown key, shape {array.shape}")
    raise_any(faults)
    with prefixed(f"{weights}: "):
        return model, names.to_params(states["backbone"], states["decoder"], model), states


def _files(model: config_lib.Model, losses: dict[str, Any]) -> dict[str, Any]:
    """The JSON files that tell transformers what is in the folder."""
    image = model.image
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
                "AutoModel": "modeling_grain.GrainModel",
                "AutoModelForZeroShotImageClassification": "modeling_grain.GrainModel",
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
        },
    }


def _read_config(path: epath.Path) -> config_lib.Model:
    expected = "to-hf's config.json"
    stored = regular_file.read_json(path, dict[str, Any], expected)
    towers = stored.get("towers")
    if not isinstance(towers, dict):
        hint = ""
        if str(stored.get("model_type")).startswith(("clip", "siglip")):
            hint = f"; {pretrained.conversion(path.parent)}"
        raise ConvertError(f"{path}: got no sizes under towers, expected {expected}{hint}")
    with prefixed(f"{path}: "):
        model = config_lib.model_from_dict(towers)
    names.refuse(model, "to-hf")
    return model


def _prove_folder(
    folder: epath.Path, model: config_lib.Model, params: Any, has_tokenizer: bool
) -> parity.Report:
    """Our model against transformers on a folder of to-hf, starting from raw images and texts."""
    try:
        import torch  # noqa: F401 (without it transformers imports, but has no models)
        import transformers
    except ImportError as error:
        return parity.not_proven(params, f"{error}; pip install 'grain_jax[interop]'")
    given = parity.inputs_of(model)
    ours = torch_module.outputs(model, params, given)
    rng = np.random.default_rng(1)
    raw = [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in ((37, 53), (300, 200))]
    resized = np.stack([images.resize(x, model.image.image_size) for x in raw])
    mean, std = np.array(model.image.pixel_mean), np.array(model.image.pixel_std)
    ours["pixels"] = (resized / 255 - mean) / std
    if has_tokenizer:
        context = model.text.context_length
        ids = clip_tokenizer.ClipTokenizer()(_TEXTS, context)
        # Ours pads with 0, transformers with the end token; the model reads neither.
        after = np.arange(context) > ids.argmax(axis=1)[:, None]
        ours["token_ids"] = np.where(after, clip_tokenizer.END_OF_TEXT, ids)

    with output.on_disk(folder) as path:
        load = lambda auto: auto.from_pretrained(
            path, trust_remote_code=True, local_files_only=True
        )
        theirs = torch_module.run_module(load(transformers.AutoModel).eval(), given)
        pixels = load(transformers.AutoImageProcessor)(raw)["pixel_values"]
        theirs["pixels"] = pixels.permute(0, 2, 3, 1).numpy()
        if has_tokenizer:
            inputs = load(transformers.AutoProcessor)(text=_TEXTS, padding="max_length")
            theirs["token_ids"] = inputs["input_ids"].numpy()
    found = parity.compare(ours, theirs)
    return parity.report(found, f"{torch_module.torch_versions()} on {folder}", given)
