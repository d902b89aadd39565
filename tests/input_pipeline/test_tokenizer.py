"""Tokenizers: CLIP's against the reference's ids, those in files against the libraries' own."""

import dataclasses
import gzip
import hashlib
import importlib.util
import json
import pathlib
import shutil
import string

import numpy as np
import open_clip
import pytest
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers, processors

from grain_jax.convert import towers
from grain_jax.convert.exits import tokenizers as exits_tokenizers
from grain_jax.convert.hf_files import processing_grain
from grain_jax.core import errors
from grain_jax.input_pipeline import clip_tokenizer, text_cleaning, tokenizer
from grain_jax.input_pipeline.clip_tokenizer import END_OF_TEXT, START_OF_TEXT
from tests import perturbed, tiny
from tests.paths import ROOT

GOLDENS = json.loads((ROOT / "tests/goldens/tokenizer.json").read_text("utf-8"))["strings"]
CLIP = tokenizer.ClipTokenizer()
WORDS = ["a", "photo", "of", "wren", "with", "long", "orange", "beak"]
TEXTS = ["A photo of a wren,  with (long) beak!", "orange", "", "a " * 40]


def test_all_golden_strings_have_the_references_ids():
    assert len(GOLDENS) == 338
    texts, expected = zip(*((golden["text"], golden["ids"]) for golden in GOLDENS))
    np.testing.assert_array_equal(CLIP(texts), [row + [0] * (77 - len(row)) for row in expected])


def test_long_texts_keep_the_end_token():
    texts = ["a bird", "a small brown bird with a long beak", "a <|endoftext|> b c d e f"]
    assert CLIP(texts, context_length=6).tolist() == [
        [START_OF_TEXT, 320, 3329, END_OF_TEXT, 0, 0],
        [START_OF_TEXT, 320, 2442, 2866, 3329, END_OF_TEXT],
        [START_OF_TEXT, 320, END_OF_TEXT, 321, 322, END_OF_TEXT],
    ]
    tokens = CLIP.encode(texts, 6)
    assert tokens.lengths.tolist() == [4, 6, 6] and tokens.too_long.tolist() == [False, True, True]
    # As in the reference, whose pattern takes the punctuation "!!<|" first.
    assert CLIP.encode(["!!<|endoftext|>"], 77).ids.tolist().count(END_OF_TEXT) == 1


def test_empty_text_empty_list_and_bytes():
    assert CLIP(["", " \n"], 4).tolist() == [[START_OF_TEXT, END_OF_TEXT, 0, 0]] * 2
    assert CLIP([], 4).shape == (0, 4)
    assert CLIP.encode([], 4).ids.shape == CLIP.encode([], 4).lengths.shape == (0,)
    text = "caf\u00e9 &amp; th\u00e9"
    np.testing.assert_array_equal(CLIP([text.encode()]), CLIP([text]))


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("tab\tand\nline", "tab and line"),
        ("black &amp;amp; white &lt;b&gt;", "black & white <b>"),
        ("caf\u00c3\u00a9", "caf\u00e9"),  # UTF-8 read as Latin-1
        ("lone \ud800 surrogate", "lone \ufffd surrogate"),
        (b"bytes \xc3\xa9", "bytes \u00e9"),
    ],
)
def test_clean(text, cleaned):
    assert text_cleaning.clean(text) == cleaned


def test_text_ids_are_of_the_cleaned_lowered_text():
    texts = ["A red beak", " a  red BEAK", "a &#114;ed beak", "a red break", ""]
    ids = CLIP.encode(texts, 77).text_ids
    assert ids.dtype == np.int32 and ids[0] == ids[1] == ids[2]
    assert ids[[0, 4]].tolist() == [-1825863821, 634351890]  # by b2sum -l 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("one text",), "expected a list of texts"), (([None],), "got NoneType"), (([b"\xff"],), "not UTF-8")],
)
def test_wrong_input_is_one_line(arguments, message):
    with pytest.raises(text_cleaning.TokenizerError, match=message) as error:
        CLIP(*arguments)
    assert "\n" not in str(error.value)


def test_the_vocabulary_is_that_of_clip():
    """With another one a model trains and loads without an error, and its tokens mean something else."""
    shipped = gzip.decompress(clip_tokenizer._VOCABULARY.read_bytes())
    (folder,) = importlib.util.find_spec("open_clip").submodule_search_locations
    theirs = pathlib.Path(folder, "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    assert hashlib.sha256(theirs).hexdigest().startswith("924691ac")
    assert gzip.decompress(theirs).startswith(shipped)
    assert shipped.count(b"\n") == clip_tokenizer.VOCAB_SIZE - 2 * 256 - 2 + 1


@pytest.fixture(scope="module")
def json_file(tmp_path_factory):
    """A word tokenizer with an end token after the text, as Hugging Face saves it."""
    vocab = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    library = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    library.save(str(path))
    return path


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A SentencePiece model with SigLIP's special ids: padding and end 1, unknown 2."""
    folder = tmp_path_factory.mktemp("spm")
    perturbed.write_sentencepiece(folder)
    return folder / "siglip.model"


def test_tokenizer_json(json_file):
    ours = tokenizer.FileTokenizer(json_file, pad_id=0)
    ids = ours(TEXTS, 12)
    photo = [4, 5, 3, 6, 2, 7, 2, 8, 2, 10]  # of "photo of a wren , with ( long ) beak"
    assert ids.dtype == np.int32 and ids.shape == (4, 12)
    np.testing.assert_array_equal(ids[0], [3, *photo, 1])  # cut, with its end token
    np.testing.assert_array_equal(ids[1], [9, 1, *[0] * 10])
    np.testing.assert_array_equal(ids[2], [1, *[0] * 11])
    np.testing.assert_array_equal(ids[3], [3] * 11 + [1])
    np.testing.assert_array_equal(ours.encode(TEXTS, 12).lengths, [12, 2, 1, 12])


def test_sentencepiece_is_the_librarys_with_a_sticky_end(model_file):
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    ours = tokenizer.FileTokenizer(model_file, "siglip", pad_id=1)
    ids = ours(TEXTS, 16)
    for row, text in zip(ids, ["a photo of a wren with long beak", "orange", "", "a " * 40]):
        expected = [*library.encode(text.strip())[:15], 1]
        np.testing.assert_array_equal(row, [*expected, *[1] * (16 - len(expected))])


def _siglip(text):
    tokens = object.__new__(transformers.SiglipTokenizer)  # without a file
    tokens.__dict__["do_lower_case"] = True
    return tokens.canonicalize_text(text)


def _siglip2(text):
    normalizer = transformers.Siglip2Tokenizer()._tokenizer.normalizer
    return normalizer.normalize_str(text).replace("\u2581", " ")


OWNERS = {"canonical": open_clip.tokenizer.canonicalize_text, "siglip": _siglip, "siglip2": _siglip2}


@pytest.mark.parametrize("name", OWNERS)
def test_a_cleaning_is_its_owners(name):
    """In our tokenizers, and in the two kinds of files that exports write."""
    rng = np.random.default_rng(0)
    characters = [
        *string.punctuation,
        *"  __\t\naBc\u00c9\u00df\u0130\u03a3\u0301\u00a0\u2003\u0085\x1c\u201c",
    ]
    texts = ["".join(rng.choice(characters, rng.integers(20))) for _ in range(1000)]
    texts += ["black_footed  albatross", "ODYSSE\u03a5\u03a3 \u03a3", "caf\u00e9, cafe\u0301"]
    expected = [*map(OWNERS[name], texts)]
    assert text_cleaning.clean_all(texts, name) == expected
    assert [*map(processing_grain.CLEANINGS[name], texts)] == expected
    library = tokenizers.Tokenizer(models.BPE())
    exits_tokenizers._fast(library, tower(cleaning=name), [], {})
    for text, cleaned in zip(texts, expected):  # the library knows no final sigma
        assert library.normalizer.normalize_str(text) == cleaned or "\u03a3" in text


def test_a_text_of_siglip2_has_the_ids_of_transformers(tmp_path):
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{i:02X}>" for i in range(256))]
    vocab = {
        piece: i for i, piece in enumerate([*pieces, *"\u2581abcdefABC\u00e9\u0301", "\u2581\u2581", "ab"])
    }
    files = dict(vocab=vocab, merges=[("\u2581", "\u2581"), ("a", "b")])
    transformers.GemmaTokenizer(**files).save_pretrained(tmp_path)  # as it is published
    fields = towers.text_fields(tmp_path, 256000, siglip=True)
    path = tmp_path / fields["tokenizer"]
    ours = tokenizer.FileTokenizer(path, fields["cleaning"], fields["pad_id"])
    texts = ["ab  Cab", " caf\u00e9  cafe\u0301 ", "a &amp; b_c, \tB", "FACADE"]
    tokens = ours.encode(texts, 64)
    theirs = transformers.Siglip2Tokenizer(**files)(texts)["input_ids"]
    assert tokens.ids.tolist() == [i for row in theirs for i in row]


def tower(**changes):
    return dataclasses.replace(tiny.config().model.text, **changes)


def test_each_tower_has_its_own(json_file, tmp_path):
    assert isinstance(tokenizer.of_tower(tower()), tokenizer.ClipTokenizer)
    other = tower(tokenizer="tokenizer.json", vocab_size=11)
    np.testing.assert_array_equal(tokenizer.of_tower(other, json_file.parent)(["a beak"], 4), [[3, 10, 1, 0]])
    repeated = tmp_path / "tokenizer.json"  # special tokens that leave no room for the text
    template = processors.TemplateProcessing(
        single=" ".join(["</s>"] * 99) + " $A", special_tokens=[("</s>", 1)]
    )
    library = tokenizers.Tokenizer.from_file(str(json_file))
    library.post_processor = template
    library.save(str(repeated))
    for folder, changes, line in (
        (
            json_file.parent,
            dict(tokenizer="none/tokenizer.json"),
            "no such file, expected the file that model.text.tok",
        ),
        (json_file.parent, dict(tokenizer="t.txt"), "expected a tokenizer.json or"),
        (json_file.parent, dict(vocab_size=10), "ids up to 10, but model.text.vocab_size is 10"),
        (None, dict(tokenizer="clip", pad_id=1), "model.text.pad_id: got 1, expected 0"),
        (tmp_path, {}, "tokenizer.json: got a text of [0-9]+ tokens|fails on a text"),
    ):
        with pytest.raises(errors.UserError, match=line) as error:
            tokenizer.of_tower(dataclasses.replace(other, **changes), folder)(["a wren"], 8)
        assert "\n" not in str(error.value)


def test_the_file_to_copy_lies_in_the_models_folder(json_file, tmp_path):
    own_file = lambda folder, name: tokenizer.own_file(tower(tokenizer=str(name)), folder)
    assert own_file(json_file.parent, "tokenizer.json") == own_file(json_file.parent, json_file)
    # huggingface_hub's cache links to its blobs; another folder, or a link elsewhere, is a stranger's.
    for repository, inside in (("models--a--b", True), ("unpacked", False)):
        folder = tmp_path / repository / "snapshots" / "1"
        blob = tmp_path / repository / "blobs" / "2"
        for each in (folder, blob.parent):
            each.mkdir(parents=True)
        shutil.copy(json_file, blob)
        (folder / "t.json").symlink_to("../../blobs/2")
        assert (own_file(folder, "t.json") == folder / "t.json") == inside
        (folder / "link.json").symlink_to(json_file)
        assert own_file(folder, "link.json") is None
    names = "gs://no-bucket/t.json", "/gs/no-bucket/t.json"
    assert not any(own_file(tmp_path / "checkpoints" / "3", name) for name in names)


@pytest.mark.parametrize("word, end, highest", [(49409, 1, 49409), (1, 2**32 - 1, 2**32 - 1)])
def test_no_id_of_a_file_is_beyond_the_embeddings(word, end, highest, tmp_path):
    """Neither of its words nor of what its post-processor adds."""
    library = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "wren": word}, unk_token="[UNK]"))
    library.post_processor = processors.TemplateProcessing(single="$A [E]", special_tokens=[("[E]", end)])
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(tokenizer.TokenizerError, match=f"has ids up to {highest}, but .* is 9;"):
        tokenizer.of_tower(tower(tokenizer="tokenizer.json", vocab_size=9, pad_id=0), tmp_path)
