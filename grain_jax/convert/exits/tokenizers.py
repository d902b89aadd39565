"""A model's tokenizer in the files of transformers."""

import dataclasses
import importlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from grain_jax import config as config_lib
from grain_jax import inference
from grain_jax.checkpoint.saved_model import Stored
from grain_jax.convert import parity
from grain_jax.convert.faults import ConvertError, needing
from grain_jax.core import images
from grain_jax.input_pipeline import clip_tokenizer, tokenizer

# Texts of the parity: nothing that the cleaning of our tokenizers alone would repair.
TEXTS = ["a photo of a wren", "Two DOGS and a cat's   bowl, 1998!", "x", "long " * 100]


def files(
    tower: config_lib.TextTower, folder: epath.PathLike | None, *, fast: bool = False
) -> tuple[dict[str, Any], str]:
    """The files by name (bytes, or JSON values), and a line that says why there are none, or "".

    CLIP's files pad with the end token. `fast`: a tokenizer.json in every case; else SigLIP's own pieces go
    out as SiglipTokenizer's.

    Raises:
      UserError: the file of the tokenizer cannot be read.
    """
    size, path = tower.vocab_size, None
    if tower.tokenizer == "clip" and size == clip_tokenizer.VOCAB_SIZE:
        return _of_clip(tower), ""
    if tower.tokenizer == "clip":
        why = f"a vocabulary of {size} is not CLIP's of {clip_tokenizer.VOCAB_SIZE}; give the model token ids"
    elif (path := tokenizer.own_file(tower, folder)) is None:
        # Model cards are published, so they name none of this machine's folders.
        name = epath.Path(tower.tokenizer).name
        why = f"{name} is no file in the folder of the model; put it there and convert again"
    else:
        library = tokenizer.of_tower(tower, folder)  # raises if it does not fit the tower
        is_json = path.suffix == ".json"
        made = _of_json(path, tower) if is_json else _of_sentencepiece(path, tower, fast)
        why = f"model.text.pad_id: got {tower.pad_id}, {path.name} has no such token"
        if not is_json and "tokenizer.json" in made:
            ids = [x.ids for x in complete(made, tower).encode_batch(TEXTS)]
            if ids != library(TEXTS, tower.context_length).tolist():
                made, why = {}, f"{path.name} as a tokenizer.json gives other token ids"
        if made:
            return made, ""
    return {}, f"no tokenizer files: {why}"


def alone(tower: config_lib.TextTower, folder: epath.PathLike | None) -> tuple[dict[str, Any], str]:
    """As `files`, a tokenizer.json that needs no other file: it cleans, cuts and pads texts for the tower."""
    token_files, missing = files(tower, folder, fast=True)
    if not token_files:
        return {}, missing
    return {"tokenizer.json": json.loads(complete(token_files, tower).to_str())}, ""


def complete(token_files: dict[str, Any], tower: config_lib.TextTower) -> Any:
    """The tokenizer in a tokenizer.json, which cuts and pads texts to the context length."""
    import tokenizers

    library = tokenizers.Tokenizer.from_str(json.dumps(token_files["tokenizer.json"]))
    library.enable_truncation(tower.context_length)
    pad = dict(pad_id=tower.pad_id, pad_token=library.id_to_token(tower.pad_id))
    library.enable_padding(length=tower.context_length, **pad)
    return library


def with_end(source: Stored) -> Stored:
    """The model with the id that ends its texts, if its tower seeks it and its tokenizer's file tells it.

    Ours reads a text where its tokenizer ends it; exported files at the first `end_id`, or the highest id.

    Raises:
      ConvertError: the tokenizer ends texts otherwise.
      UserError: the file of the tokenizer cannot be read.
    """
    tower = source.model.text
    path = tokenizer.own_file(tower, source.folder) if tower.seeks_end else None
    if path is None or tower.tokenizer == "clip":
        return source
    library = tokenizer.FileTokenizer(path, tower.cleaning, tower.pad_id)
    ids = library(TEXTS, tower.context_length)
    ends = library.encode(TEXTS, tower.context_length).lengths - 1
    last = set(ids[np.arange(len(ids)), ends].tolist())
    last = {-1} if tower.end_id == -1 else last
    if tower.end_id is None and len(last) == 1 and last != {library.vocab_size - 1}:
        tower = dataclasses.replace(tower, end_id=min(last))
    if len(last) != 1 or (tower.ends(ids) != ends).any():
        raise ConvertError(
            f"model.text.end_id: got {tower.end_id}, but {path} ends texts with the ids {sorted(last)[:5]};"
            " set model.text.end_id to the one that ends each text, or model.text.tokenizer to another file"
        )
    return source._replace(model=dataclasses.replace(source.model, text=tower))


def of_transformers(tower: config_lib.TextTower, folder: epath.PathLike) -> tuple[dict[str, Any], str]:
    """As `files`, but no CLIP tokenizer for a tower that sees its padding."""
    token_files, missing = files(tower, folder)
    if token_files and tower.tokenizer == "clip" and not (tower.packable and tower.seeks_end):
        return {}, (
            "no tokenizer files: CLIP's tokenizer of transformers pads with the end token, and this tower"
            f" sees its padding, the id {tower.pad_id}; give the model token ids"
        )
    return token_files, missing


def _config(kind: str, tower: config_lib.TextTower, **more: Any) -> dict[str, Any]:
    """tokenizer_config.json."""
    return {
        "tokenizer_class": kind,
        "model_max_length": tower.context_length,
        "model_input_names": ["input_ids"],
        "padding_side": "right",
        **more,
    }


def _of_clip(tower: config_lib.TextTower) -> dict[str, Any]:
    """The files of a fast tokenizer; texts are padded with the end token, as in CLIP's of transformers."""
    from tokenizers import AddedToken, decoders, normalizers, processors

    start, end = clip_tokenizer.SPECIAL
    library = clip_tokenizer.byte_pairs()
    library.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[*clip_tokenizer.SPECIAL.items()]
    )
    library.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    # Normalised: the reference reads these names as special tokens in upper and lower case.
    library.add_special_tokens([AddedToken(t, special=True, normalized=True) for t in (start, end)])
    tokens = dict(bos_token=start, eos_token=end, pad_token=end)
    return _fast(library, tower, [normalizers.NFC()], tokens)


def _of_sentencepiece(path: epath.Path, tower: config_lib.TextTower, fast: bool) -> dict[str, Any]:
    """The files of SiglipTokenizer, or, if `fast` or cleaned otherwise, of a fast tokenizer of the same ids.

    {} if the file has no token with the id of the padding.
    """
    from tokenizers import processors

    with needing("transformers or protobuf", path):
        library: Any = importlib.import_module("transformers.convert_slow_tokenizer")
        messages: Any = importlib.import_module("transformers.utils.sentencepiece_model_pb2_new")
    content = tokenizer.content_of(path)
    model = messages.ModelProto.FromString(content)
    pieces, trained = [(piece.piece, piece.score) for piece in model.pieces], model.trainer_spec
    ids = {piece: i for i, (piece, _) in enumerate(pieces)}
    if tower.pad_id >= len(pieces):
        return {}
    end = trained.eos_piece
    tokens = dict(eos_token=end, pad_token=pieces[tower.pad_id][0])
    if tower.cleaning == "siglip" and not fast:
        stated = _config("SiglipTokenizer", tower, unk_token=trained.unk_piece, **tokens)
        return {"spiece.model": content, "tokenizer_config.json": stated}
    made = library.SpmConverter.build_tokenizer_from_spm_proto(
        model, ids if trained.model_type == trained.BPE else pieces
    )
    special = [(end, ids[end])]
    made.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=special)
    return _fast(made, tower, [], tokens)


def _of_json(path: epath.Path, tower: config_lib.TextTower) -> dict[str, Any]:
    """The files of a fast tokenizer; {} if the file has no token with the id of the padding."""
    import tokenizers

    library = tokenizers.Tokenizer.from_str(tokenizer.content_of(path).decode())
    library.no_padding()
    library.no_truncation()
    pad = library.id_to_token(tower.pad_id)
    return {} if pad is None else _fast(library, tower, [], dict(pad_token=pad))


def _fast(
    library: Any, tower: config_lib.TextTower, first: list[Any], tokens: dict[str, Any]
) -> dict[str, Any]:
    """The files of a tokenizer that cleans texts as the tower's, without repairs of encodings and HTML."""
    from tokenizers import Regex, normalizers

    spaces = [normalizers.Replace(Regex(r"[\s\x1c-\x1f]+"), " "), normalizers.Strip()]
    punctuation = normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), "")
    siglip = [normalizers.Lowercase(), punctuation, *spaces]
    cleaning = {
        "none": [],
        "lower": [*spaces, normalizers.Lowercase()],
        "canonical": [normalizers.Replace("_", " "), *siglip],
        "siglip": siglip,
        "siglip2": [normalizers.Lowercase()],
    }[tower.cleaning]
    rest = [library.normalizer] if library.normalizer else []
    library.normalizer = normalizers.Sequence([*first, *cleaning, *rest])
    tokens = dict(tokens, clean_up_tokenization_spaces=False)
    return {
        "tokenizer.json": json.loads(library.to_str()),
        "tokenizer_config.json": _config("PreTrainedTokenizerFast", tower, **tokens),
    }


def prove(
    source: Stored,
    kind: str,
    packages: Sequence[str],
    opened: Callable[[], tuple[Callable, Callable, Callable]],
    texts: Sequence[str] | None,
    *,
    pads_with_end: bool = False,
) -> parity.Report:
    """The parity of an exported folder: our model from raw images and texts against what a library loads.

    Args:
      source: our model.
      kind, packages: as of `parity.prove`.
      opened: loads the folder and gives its functions: of `parity.Inputs` to all outputs, of raw images to
        pixels [N, S, S, 3], of texts to token ids [N, L].
      texts: begin with TEXTS; None: the folder has no tokenizer.
      pads_with_end: whether the files pad CLIP's texts with the end token; no model reads it.
    """
    tower = source.model.text
    mean, std = np.array(source.model.image.pixel_mean), np.array(source.model.image.pixel_std)
    rng = np.random.default_rng(1)
    raw = [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in ((37, 53), (300, 200))]
    resized = np.stack([images.resize(image, source.model.image.image_size) for image in raw])
    ours = {"pixels": (resized / 255 - mean) / std}
    if texts is not None:
        ids = tokenizer.of_tower(tower, source.folder)(texts, tower.context_length)
        if pads_with_end and tower.tokenizer == "clip":
            after = np.arange(tower.context_length) > ids.argmax(axis=1)[:, None]
            ids = np.where(after, clip_tokenizer.END_OF_TEXT, ids)
        predictor = inference.Predictor(source.model, source.params, folder=source.folder)
        ours |= {"token_ids": ids, "encode_text": predictor.encode_text(TEXTS)}  # each read where it ends

    def run(inputs: parity.Inputs) -> dict[str, np.ndarray]:
        outputs, pixels, token_ids = opened()
        theirs = outputs(inputs) | {"pixels": pixels(raw)}
        if texts is not None:
            theirs["token_ids"] = np.asarray(token_ids(texts))
            cleaned = theirs["token_ids"][: len(TEXTS)]
            batch = parity.Inputs(np.repeat(inputs.images[:1], len(cleaned), axis=0), cleaned)
            theirs["encode_text"] = outputs(batch)["text_embed"]
        return theirs

    return parity.prove(source.model, source.params, kind, packages, run, ours)
