"""Tokenizers that come as a file, against the libraries' own: SentencePiece, tokenizer.json, SigLIP's cleaning."""

import dataclasses
import shutil

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from grain_jax.input_pipeline import tokenizer
from tests import tiny

WORDS = ["a", "photo", "of", "wren", "with", "long", "orange", "beak"]
TEXTS = ["A photo of a wren,  with (long) beak!", "orange", "", "a " * 40]


@pytest.fixture(scope="module")
def json_file(tmp_path_factory):
    """A word tokenizer with specials around the text, as Hugging Face saves it."""
    vocab = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    library = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    library.save(str(path))
    return path


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A SentencePiece model with SigLIP's special ids: padding and end 1, unknown 2."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("spm")
    (folder / "corpus.txt").write_text("\n".join([" ".join(WORDS)] * 50))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "m"),
        vocab_size=40,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return folder / "m.model"


def test_tokenizer_json(json_file):
    ours = tokenizer.FileTokenizer(json_file, pad_id=0)
    ids = ours(TEXTS, 12)
    photo = [4, 5, 3, 6, 2, 7, 2, 8, 2, 10]  # of "photo of a wren , with ( long ) beak"
    assert ids.dtype == np.int32 and ids.shape == (4, 12)
    np.testing.assert_array_equal(ids[0], [3, *photo, 1])  # cut, with its end token
    np.testing.assert_array_equal(ids[1], [9, 1, *[0] * 10])
    np.testing.assert_array_equal(ids[2], [1, *[0] * 11])
    np.testing.assert_array_equal(ids[3], [3] * 11 + [1])
    tokens = ours.encode(TEXTS, 12)
    np.testing.assert_array_equal(tokens.lengths, [12, 2, 2, 12])
    np.testing.assert_array_equal(
        tokens.ids, np.concatenate([ids[0], ids[1, :2], ids[2, :2], ids[3]])
    )


def test_sentencepiece_is_the_librarys_with_a_sticky_end(model_file):
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    ours = tokenizer.FileTokenizer(model_file, "canonical", pad_id=1)
    ids = ours(TEXTS, 16)
    for row, text in zip(ids, ["a photo of a wren with long beak", "orange", "", "a " * 40]):
        expected = [*library.encode(text.strip())[:15], 1]
        np.testing.assert_array_equal(row, [*expected, *[1] * (16 - len(expected))])


def test_canonical_is_what_siglips_own_tokenizer_does(model_file):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.SiglipTokenizer(vocab_file=str(model_file))
    ours = tokenizer.FileTokenizer(model_file, "canonical", pad_id=1)
    texts = ["A photo, of a WREN!", "  orange -- beak\tlong ", "a.b"]
    expected = [[*ids, 1] if ids[-1:] != [1] else ids for ids in theirs(texts)["input_ids"]]
    found = ours.encode(texts, 64)
    np.testing.assert_array_equal(np.concatenate(expected), found.ids)


def test_text_ids_follow_the_cleaning(json_file):
    same = ["A  wren", "a wren"]
    lower, none = (tokenizer.FileTokenizer(json_file, x).text_id(same) for x in ("lower", "none"))
    assert lower[0] == lower[1] and none[0] != none[1]
    np.testing.assert_array_equal(lower, tokenizer.ClipTokenizer().text_id(same))
    canonical = tokenizer.FileTokenizer(json_file, "canonical").text_id(["a wren!", "A wren"])
    assert canonical[0] == canonical[1]
    assert tokenizer.FileTokenizer(json_file, "none").text_id([b"a wren"])[0] == none[1]


def test_each_tower_has_its_own(json_file):
    tower = tiny.config().model.text
    clip = tokenizer.of_tower(tower)
    assert isinstance(clip, tokenizer.ClipTokenizer)
    other = dataclasses.replace(tower, tokenizer="tokenizer.json", vocab_size=11)
    np.testing.assert_array_equal(
        tokenizer.of_tower(other, json_file.parent)(["a beak"], 4), [[3, 10, 1, 0]]
    )
    with pytest.raises(
        tokenizer.TokenizerError, match="tokenizer.json: no such file, .*; put the text"
    ):
        tokenizer.of_tower(dataclasses.replace(other, tokenizer="none/tokenizer.json"))
    with pytest.raises(
        tokenizer.TokenizerError, match="has ids up to 10, but model.text.vocab_size is 10"
    ):
        tokenizer.of_tower(dataclasses.replace(other, vocab_size=10), json_file.parent)
    with pytest.raises(tokenizer.TokenizerError, match="model.text.pad_id: got 1, expected 0"):
        tokenizer.of_tower(dataclasses.replace(tower, pad_id=1))


def test_the_file_to_copy_lies_in_the_models_folder(json_file, tmp_path):
    tower = tiny.config().model.text
    found = lambda folder, name: tokenizer.own_file(
        dataclasses.replace(tower, tokenizer=str(name)), folder
    )
    assert found(json_file.parent, "tokenizer.json") == found(json_file.parent, json_file)
    assert found(json_file.parent, "tokenizer.json").read_bytes() == json_file.read_bytes()
    assert found(None, json_file) is None and found(json_file.parent, "other.json") is None
    # huggingface_hub's cache links to its blobs; a folder of another kind, or a link elsewhere, is a stranger's.
    for repository, inside in (("models--a--b", True), ("unpacked", False)):
        folder = tmp_path / repository / "snapshots" / "1"
        blob = tmp_path / repository / "blobs" / "2"
        for each in (folder, blob.parent):
            each.mkdir(parents=True)
        shutil.copy(json_file, blob)
        (folder / "t.json").symlink_to("../../blobs/2")
        assert (found(folder, "t.json") == folder / "t.json") == inside
        (folder / "link.json").symlink_to(json_file)
        assert found(folder, "link.json") is None
    workdir = tmp_path / "run"
    (workdir / "checkpoints" / "3").mkdir(parents=True)
    names = "gs://no-bucket/t.json", "/gs/no-bucket/t.json", "/elsewhere/t.json"
    assert not any(found(workdir / "checkpoints" / "3", name) for name in names)
    shutil.copy(json_file, workdir / "t.json")
    for name in names:  # the trainer's copy
        assert found(workdir / "checkpoints" / "3", name) == workdir / "t.json"


@pytest.mark.parametrize(
    "vocabulary, end, highest",
    [
        ({"[UNK]": 0, "wren": 49409}, None, 49409),
        ({"[UNK]": 0, "wren": 10**6}, None, 10**6),
        ({"[UNK]": 0, "wren": 1}, 2**32 - 1, 2**32 - 1),  # of the post-processor alone
        ({"[UNK]": 0, "wren": 7}, 8, None),
    ],
)
def test_no_id_of_a_file_is_beyond_the_embeddings(vocabulary, end, highest, tmp_path):
    library = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    if end is not None:
        library.post_processor = processors.TemplateProcessing(
            single="$A [E]", special_tokens=[("[E]", end)]
        )
    library.save(str(tmp_path / "tokenizer.json"))
    tower = dataclasses.replace(
        tiny.config().model.text, tokenizer="tokenizer.json", vocab_size=9, pad_id=0
    )
    if highest is None:
        assert tokenizer.of_tower(tower, tmp_path)(["wren"], 3).tolist() == [[7, 8, 0]]
        return
    with pytest.raises(tokenizer.TokenizerError, match=f"has ids up to {highest}, but .* is 9;"):
        tokenizer.of_tower(tower, tmp_path)


def test_ids_are_decoded_as_the_libraries_do(json_file, model_file, tmp_path):
    import sentencepiece

    ours = tokenizer.FileTokenizer(json_file)
    theirs = tokenizers.Tokenizer.from_file(str(json_file))
    ids = theirs.encode("a photo of a wren").ids
    assert ours.decode(ids) == theirs.decode(ids[:-1]) == "a photo of a wren"
    assert ours.special_ids == (1,)
    theirs.post_processor = processors.TemplateProcessing(
        single="<pad> $A </s> </s>", special_tokens=[("</s>", 1), ("<pad>", 0)]
    )
    theirs.add_special_tokens(["<unk>"])
    theirs.save(str(tmp_path / "tokenizer.json"))
    both = tokenizer.FileTokenizer(tmp_path / "tokenizer.json")
    assert both.special_ids == (0, 1, 2)
    assert both.decode([0, 6, 2, 10, 1, 1]) == "wren beak"
    library = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    pieces = tokenizer.FileTokenizer(model_file, "canonical", pad_id=1)
    ids = library.encode("a photo of a wren")
    assert pieces.decode([*ids, 1, 1]) == library.decode(ids) == "a photo of a wren"
    assert pieces.special_ids == (0, 1, 2)
    with pytest.raises(tokenizer.TokenizerError, match="ids: got -1, expected 0 to 10"):
        ours.decode([-1])
