"""Models to folders that transformers loads, and back: `to-hf`, `from-hf`.

The folder holds safetensors, config.json, the files of `hf_files/` (loaded with trust_remote_code, no
JAX), tokenizer and processor files, and a model card. Parameters keep the PyTorch reference's names.
Writing needs safetensors and tokenizers; torch and transformers only prove what was written.
"""

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from grain_jax import config as config_lib
from grain_jax.convert import archives, model_card, parity
from grain_jax.convert import torch as reference
from grain_jax.convert import torch_names as names
from grain_jax.files import images, regular_file
from grain_jax.input_pipeline import clip_tokenizer as tokenizers_lib
from grain_jax.runtime import checkpoint

WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"  # of weights that transformers cut into several files
_MODELING = "modeling_grain.py"  # a folder that has it is one of ours
CODE = epath.Path(__file__).parent / "hf_files"
# GRAIN's recipe (docs/method.md, Losses), for models whose own run is not known.
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


def to_hf(source: epath.PathLike, folder: epath.PathLike) -> parity.Report:
    """to-hf: what `grain_jax.load` reads, to a folder for `AutoModel` and `AutoProcessor`.

    Args:
      source: a workdir (its config, metrics and results go into the model card), a checkpoint, or a
        converted folder.
      folder: new, or an older conversion.

    Raises:
      ConvertError: a model that the modeling file cannot express, or the folder holds something else.
      checkpoint.CheckpointError: nothing to read.
      text_cleaning.TokenizerError: CLIP's vocabulary is not found.
    """
    folder = epath.Path(folder)
    reference.check_free(folder, _MODELING)
    model, params, read_from = checkpoint.load_model(source)
    _check(model)
    run = model_card.read_run(read_from)
    contrast = "softmax" if model.logit_bias_init is None else "sigmoid"
    stored = {"contrast": contrast} | run.config.get("loss", {})
    losses = {key: stored.get(key, value) for key, value in LOSSES.items()}
    has_tokenizer = model.text.vocab_size == tokenizers_lib.VOCAB_SIZE
    files = {"config.json": _config(model, losses)}
    files |= _processor_files(model)
    if has_tokenizer:
        files |= _tokenizer_files(model.text.context_length)
    states = names.state_dicts(params, reference.sizes_of(model))
    texts = {n: json.dumps(x, indent=2, ensure_ascii=False) + "\n" for n, x in files.items()}
    texts |= {path.name: path.read_text() for path in CODE.glob("*_grain.py")}
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text)
        _write_weights(folder / WEIGHTS, states)
    proof = _prove_folder(folder, model, params, has_tokenizer)
    with _writing(folder):
        card = model_card.write(model, losses, run, proof, has_tokenizer)
        (folder / "README.md").write_text(card)
    size = sum(array.size for state in states.values() for array in state.values())
    lines = [f"to-hf: {read_from} -> {folder}", f"{WEIGHTS}: {size:,} values, float32"]
    if not has_tokenizer:
        lines.append(
            f"no tokenizer files: a vocabulary of {model.text.vocab_size} is not CLIP's of"
            f" {tokenizers_lib.VOCAB_SIZE}; give the model token ids"
        )
    return proof._replace(text="\n".join([*lines, "", proof.text]))


def from_hf(source: epath.PathLike, folder: epath.PathLike) -> parity.Report:
    """from-hf: a folder of `to_hf`, also one that was trained on and saved by transformers, to ours.

    Raises:
      ConvertError: what is missing, damaged, unknown or has another shape; a line each.
      config.ConfigError: sizes that are no model's, such as heads that do not divide the width.
    """
    source, folder = epath.Path(source), epath.Path(folder)
    reference.check_free(folder, "params")
    model = _read_config(source / "config.json")
    weights = source / WEIGHTS
    if not regular_file.is_one(weights) and regular_file.is_one(source / _INDEX):
        weights = source / _INDEX
    states = _read_weights(weights)
    try:
        params = reference.to_params(states["backbone"], states["decoder"], model)
    except reference.ConvertError as error:
        raise reference.in_file(weights, error) from error
    # The folder may come from anyone: transformers reads none of it, and none of its code is run.
    proof = reference.prove(model, params, states)
    reference.save(folder, model, params, source, proof)
    return proof._replace(text=f"from-hf: {source} -> {folder}\n\n{proof.text}")


@contextlib.contextmanager
def _writing(folder: epath.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise reference.ConvertError(f"{folder}: cannot be written ({error})") from error


@contextlib.contextmanager
def _on_disk(folder: epath.Path) -> Iterator[str]:
    """The folder, or a copy of its files where it is a URL, which transformers cannot open."""
    if "://" not in str(folder):
        yield str(folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        for path in folder.iterdir():
            path.copy(epath.Path(scratch) / path.name)
        yield scratch


def _check(model: config_lib.Model) -> None:
    """Raises ConvertError for what `hf_files/modeling_grain.py` does not have."""
    if model.decoder is None:
        raise reference.ConvertError(
            "model.decoder: got none; to-hf writes models with a region decoder (transformers has"
            " CLIP and SigLIP of its own)"
        )
    faults = [
        f"model.text.{name}: got {got}, to-hf writes text towers with {expected}"
        for name, got, expected in (
            ("causal", model.text.causal, True),
            ("pool", model.text.pool, "end"),
            ("projection", model.text.projection, "matrix"),
            ("tokenizer", model.text.tokenizer, "clip"),
        )
        if got != expected
    ]
    if faults:
        raise reference.ConvertError("\n".join(faults))


def _config(model: config_lib.Model, losses: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "grain",
        "architectures": ["GrainModel"],
        "auto_map": {
            "AutoConfig": "configuration_grain.GrainConfig",
            "AutoModel": "modeling_grain.GrainModel",
            "AutoModelForZeroShotImageClassification": "modeling_grain.GrainModel",
        },
        "dtype": "float32",
        "towers": dataclasses.asdict(model),
        "losses": dict(losses),
    }


def _processor_files(model: config_lib.Model) -> dict[str, Any]:
    image = model.image
    size = image.image_size
    auto_map = {
        "AutoImageProcessor": "processing_grain.GrainImageProcessor",
        "AutoProcessor": "processing_grain.GrainProcessor",
    }
    return {
        "preprocessor_config.json": {
            "image_processor_type": "GrainImageProcessor",
            "processor_class": "GrainProcessor",
            "auto_map": auto_map,
            "size": {"height": size, "width": size},
            "image_mean": list(image.pixel_mean),
            "image_std": list(image.pixel_std),
        },
        "processor_config.json": {
            "processor_class": "GrainProcessor",
            "auto_map": {"AutoProcessor": auto_map["AutoProcessor"]},
        },
    }


def _tokenizer_files(context_length: int) -> dict[str, Any]:
    """CLIP's byte pairs as transformers' fast tokenizer; padded with the end token, as CLIP's there."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    start, end = tokenizers_lib.SPECIAL
    merges = tokenizers_lib.read_merges(None)
    characters = tokenizers_lib.byte_characters()
    tokens = [*characters, *(c + "</w>" for c in characters), *("".join(m) for m in merges)]
    library = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate([*tokens, start, end])},
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
        )
    )
    word = Regex(tokenizers_lib.WORD)
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(word, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
            normalizers.Lowercase(),
        ]
    )
    library.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[
            (start, tokenizers_lib.START_OF_TEXT),
            (end, tokenizers_lib.END_OF_TEXT),
        ],
    )
    library.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    # Normalised: the reference takes these names for the special tokens in any case of letters.
    library.add_special_tokens([AddedToken(t, special=True, normalized=True) for t in (start, end)])
    return {
        "tokenizer.json": json.loads(library.to_str()),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": start,
            "eos_token": end,
            "pad_token": end,
            "model_max_length": context_length,
            "model_input_names": ["input_ids"],
            "clean_up_tokenization_spaces": False,
        },
    }


def _write_weights(path: epath.Path, states: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    flat = {
        f"{module}.{name}": np.asarray(array, np.float32, order="C")
        for module, state in states.items()
        for name, array in state.items()
    }
    path.write_bytes(_safetensors(path).numpy.save(flat, metadata={"format": "pt"}))


def _safetensors(path: epath.Path) -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise reference.ConvertError(
            f"{path}: the package safetensors is missing; pip install safetensors"
        ) from error
    return safetensors


def _read_weights(path: epath.Path) -> dict[str, dict[str, np.ndarray]]:
    """{"backbone": ..., "decoder": ...} of a safetensors file, or of those that an index lists."""
    files = [path]
    if path.name == _INDEX:
        with archives.reading(path, reference.ConvertError):
            files = archives.files_of_index(path)
    states: dict[str, dict[str, np.ndarray]] = {"backbone": {}, "decoder": {}}
    faults = []
    for file in files:
        for name, array in read_safetensors(file).items():
            module, _, rest = name.partition(".")
            if module in states:
                states[module][rest] = array
            else:
                faults.append(f"{file}: {name}: unknown key, shape {array.shape}")
    if faults:
        raise reference.ConvertError("\n".join(faults))
    return states


def read_safetensors(path: epath.Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, from any floating point type of 16 bits or more, as float32.

    Raises:
      ConvertError: no such file, not a whole one, or another type; a line each.
    """
    if not regular_file.is_one(path):
        raise reference.ConvertError(f"{path}: no such file; expected a folder written by to-hf")
    _safetensors(path)
    with archives.reading(path, reference.ConvertError):
        return archives.read_safetensors(path)


def _read_config(path: epath.Path) -> config_lib.Model:
    if not regular_file.is_one(path):
        raise reference.ConvertError(f"{path}: no such file; expected a folder written by to-hf")
    with archives.reading(path, reference.ConvertError):
        towers = archives.read_json(path).get("towers")
        if not isinstance(towers, dict):
            raise archives.ArchiveError("got no sizes under towers, expected to-hf's config.json")
    try:
        model = config_lib.model_from_dict(towers)
    except config_lib.ConfigError as error:
        raise reference.in_file(path, error) from None
    _check(model)
    return model


def _prove_folder(
    folder: epath.Path, model: config_lib.Model, params: Any, has_tokenizer: bool
) -> parity.Report:
    """Our model against what transformers makes of a folder of ours, from raw images and texts on."""
    try:
        import torch  # noqa: F401 (transformers loads without it, and then has no models)
        import transformers
    except ImportError as error:
        return parity.not_proven(params, f"{error}; pip install torch transformers")
    given = _inputs(model)
    ours = reference.outputs(model, params, given)
    rng = np.random.default_rng(1)
    pictures = [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in ((37, 53), (300, 200))]
    resized = np.stack([images.resize(p, model.image.image_size) for p in pictures])
    mean, std = np.array(model.image.pixel_mean), np.array(model.image.pixel_std)
    ours["pixels"] = (resized / 255 - mean) / std
    if has_tokenizer:
        context = model.text.context_length
        ids = tokenizers_lib.ClipTokenizer()(_TEXTS, context)
        # Ours pads with 0, transformers with the end token; neither is looked at.
        after = np.arange(context) > ids.argmax(axis=1)[:, None]
        ours["token_ids"] = np.where(after, tokenizers_lib.END_OF_TEXT, ids)

    with _on_disk(folder) as path:
        load = lambda auto: auto.from_pretrained(  # noqa: E731
            path, trust_remote_code=True, local_files_only=True
        )
        theirs = reference.run_module(load(transformers.AutoModel).eval(), given)
        pixels = load(transformers.AutoImageProcessor)(pictures)["pixel_values"]
        theirs["pixels"] = pixels.permute(0, 2, 3, 1).numpy()
        if has_tokenizer:
            inputs = load(transformers.AutoProcessor)(text=_TEXTS, padding="max_length")
            theirs["token_ids"] = inputs["input_ids"].numpy()
    found = parity.compare(ours, theirs)
    return parity.report(found, f"{reference.torch_versions()} on {folder}", given)


def _inputs(model: config_lib.Model) -> parity.Inputs:
    return parity.inputs(model.image.image_size, model.text.vocab_size, model.text.context_length)
