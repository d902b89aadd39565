"""A model's tokenizer in the files of transformers."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from grain_jax import config as config_lib
from grain_jax import inference
from grain_jax.convert import hf_tokenizer
from grain_jax.convert.exits.folder import Source
from grain_jax.convert.faults import ConvertError
from grain_jax.input_pipeline import clip_tokenizer, tokenizer

# Of the parity: nothing that the cleaning of our tokenizers alone would repair.
TEXTS = ["a photo of a wren", "Two DOGS and a cat's   bowl, 1998!", "x", "long " * 100]

NAMES = ("tokenizer.json", "tokenizer_config.json", "spiece.model")  # of the files


def files(tower: config_lib.TextTower, folder: epath.PathLike) -> tuple[dict[str, Any], str]:
    """The files by name (bytes, or JSON values), and a line that says why there are none, or "".

    CLIP's pad with the end token.

    Args:
      tower: the text tower.
      folder: of the model, where the file of its tokenizer is looked for.

    Raises:
      UserError: the file of the tokenizer cannot be read.
    """
    if tower.tokenizer == "clip":
        if tower.vocab_size == clip_tokenizer.VOCAB_SIZE:
            return hf_tokenizer.files(tower.context_length), ""
        return {}, (
            f"no tokenizer files: a vocabulary of {tower.vocab_size} is not CLIP's of"
            f" {clip_tokenizer.VOCAB_SIZE}; give the model token ids"
        )
    name = epath.Path(tower.tokenizer).name  # cards are published: none of this machine's paths
    path = tokenizer.own_file(tower, folder)
    if path is None:
        return {}, (
            f"no tokenizer files: {name} is no file in the folder of the model; put it there and convert again"
        )
    tokenizer.of_tower(tower, folder)  # raises where it does not fit the tower
    content = tokenizer.content_of(path)
    if path.suffix == ".json":
        return _of_json(content, tower, path)
    if tower.cleaning != "canonical":
        return {}, (
            f"no tokenizer files: model.text.cleaning: got {tower.cleaning}, transformers' SiglipTokenizer has canonical"
        )
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_proto=content)
    if tower.pad_id >= library.vocab_size():
        return {}, _no_pad(tower, path)
    return _of_sentencepiece(content, library, tower), ""


def with_end(source: Source) -> tuple[Source, str]:
    """The model with the id that ends its texts, where the tower is read there, and why it is not known, or "".

    Ours reads a text where its tokenizer ends it, a file at the first `end_id`, or the highest id where there is none.

    Raises:
      ConvertError: the tokenizer ends texts otherwise.
      UserError: the file of the tokenizer cannot be read.
    """
    tower = source.model.text
    if not tower.seeks_end or tower.tokenizer == "clip":
        return source, ""
    path = tokenizer.own_file(tower, source.folder)
    if path is None:
        if tower.end_id is not None:
            return source, ""
        return source, (
            f"Texts: {epath.Path(tower.tokenizer).name} is no file in the folder of the model, so nobody knows whether they end with the highest id; put"
            " it there, or set model.text.end_id"
        )
    own = tokenizer.FileTokenizer(path, tower.cleaning, tower.pad_id)
    ids, ends = (
        own(TEXTS, tower.context_length),
        own.encode(TEXTS, tower.context_length).lengths - 1,
    )
    last = set(ids[np.arange(len(ids)), ends].tolist())
    if tower.end_id is None and len(last) == 1 and last != {own.vocab_size - 1}:
        tower = dataclasses.replace(tower, end_id=min(last))
    if len(last) != 1 or (tower.ends(ids) != ends).any():
        raise ConvertError(
            f"model.text.end_id: got {tower.end_id}, but {path} ends texts with the ids {sorted(last)[:5]}; set"
            " model.text.end_id to the one id that ends each text, or model.text.tokenizer to another file"
        )
    return source._replace(model=dataclasses.replace(source.model, text=tower)), ""


def of_transformers(
    tower: config_lib.TextTower, folder: epath.PathLike
) -> tuple[dict[str, Any], str, list[str]]:
    """As `files`, but for a tower that sees its padding none of CLIP's; and lines for the report."""
    words, missing = files(tower, folder)
    if words and _knows_padding(tower):
        missing = (
            "no tokenizer files: CLIP's tokenizer of transformers pads with the end token, and this tower sees its"
            f" padding, the id {tower.pad_id}; give the model token ids"
        )
    if missing:
        return {}, missing, [missing]
    needs = "tokenizer: SiglipTokenizer, which needs the packages sentencepiece and protobuf"
    return words, "", [needs] if "spiece.model" in words else []


def _knows_padding(tower: config_lib.TextTower) -> bool:
    """Whether it matters to a tower with CLIP's tokenizer which id the padding has."""
    return tower.tokenizer == "clip" and not (tower.packable and tower.seeks_end)


def _no_pad(tower: config_lib.TextTower, path: epath.Path) -> str:
    return (
        f"no tokenizer files: model.text.pad_id: got {tower.pad_id}, {path.name} has no such token"
    )


def _of_sentencepiece(content: bytes, library: Any, tower: config_lib.TextTower) -> dict[str, Any]:
    token = library.id_to_piece
    return {
        "spiece.model": content,
        "tokenizer_config.json": {
            "tokenizer_class": "SiglipTokenizer",
            "eos_token": token(library.eos_id()),
            "unk_token": token(library.unk_id()),
            "pad_token": token(tower.pad_id),
            "model_max_length": tower.context_length,
            "model_input_names": ["input_ids"],
            "padding_side": "right",
        },
    }


def _of_json(
    content: bytes, tower: config_lib.TextTower, path: epath.Path
) -> tuple[dict[str, Any], str]:
    """A tokenizer.json that cleans texts as the tower's does, but for broken encodings and HTML entities."""
    import tokenizers
    from tokenizers import normalizers

    library = tokenizers.Tokenizer.from_str(content.decode())
    library.no_padding()
    library.no_truncation()
    pad = library.id_to_token(tower.pad_id)
    if pad is None:
        return {}, _no_pad(tower, path)
    cleaning = {
        "none": [],
        "lower": [*_spaces(), normalizers.Lowercase()],
        "canonical": [
            normalizers.Lowercase(),
            normalizers.Replace(tokenizers.Regex(r"[!-/:-@\[-`{-~]"), ""),
            *_spaces(),
        ],
    }[tower.cleaning]
    stored = json.loads(library.to_str())
    library.normalizer = normalizers.Sequence(cleaning)
    first = json.loads(library.to_str())["normalizer"]["normalizers"]
    own = stored["normalizer"] or {"normalizers": []}
    own = own.get("normalizers", [own])
    if own[: len(first)] != first:  # not one that went out before
        stored["normalizer"] = {"type": "Sequence", "normalizers": [*first, *own]}
    return {
        "tokenizer.json": stored,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": pad,
            "model_max_length": tower.context_length,
            "model_input_names": ["input_ids"],
            "padding_side": "right",
            "clean_up_tokenization_spaces": False,
        },
    }, ""


def _spaces() -> list[Any]:
    import tokenizers
    from tokenizers import normalizers

    return [normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Strip()]


def own_ids(
    tower: config_lib.TextTower, folder: epath.PathLike, texts: Sequence[str] = TEXTS
) -> np.ndarray:
    """The ids of texts by our tokenizer, int32 [N, L]."""
    return tokenizer.of_tower(tower, folder)(texts, tower.context_length)


def our_embeddings(source: Source) -> np.ndarray:
    """Our embeddings of TEXTS, each read where our tokenizer ends it, float32 [N, D] of unit length."""
    return inference.Predictor(source.model, source.params, folder=source.folder).encode_text(TEXTS)


def our_ids(
    tower: config_lib.TextTower, folder: epath.PathLike, texts: Sequence[str] = TEXTS
) -> np.ndarray:
    """As `own_ids`, with the padding of the files."""
    ids = own_ids(tower, folder, texts)
    if tower.tokenizer != "clip" or _knows_padding(tower):
        return ids
    # Ours pads with 0, transformers with the end token; the model reads neither.
    after = np.arange(tower.context_length) > ids.argmax(axis=1)[:, None]
    return np.where(after, clip_tokenizer.END_OF_TEXT, ids)
