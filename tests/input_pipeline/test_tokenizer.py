"""The tokenizer against the reference's ids, on both backends."""

import gzip
import hashlib
import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grain_jax.input_pipeline import clip_tokenizer, text_cleaning
from grain_jax.input_pipeline.clip_tokenizer import END_OF_TEXT, START_OF_TEXT
from grain_jax.input_pipeline.text_cleaning import TokenizerError

GOLDENS = json.loads(
    (pathlib.Path(__file__).parents[1] / "goldens" / "tokenizer.json").read_text("utf-8")
)["strings"]
TEXTS = [golden["text"] for golden in GOLDENS]


@pytest.fixture(scope="session")
def instant():
    """The faster backend, where it has a wheel; else the other again."""
    has_wheel = sys.version_info < (3, 13)
    return clip_tokenizer.ClipTokenizer("instant" if has_wheel else "huggingface")


@pytest.fixture(scope="session")
def huggingface():
    return clip_tokenizer.ClipTokenizer("huggingface")


@pytest.fixture(params=["instant", "huggingface"])
def clip(request):
    return request.getfixturevalue(request.param)


def test_all_golden_strings_have_the_references_ids(clip):
    assert len(GOLDENS) == 338
    padded = clip(TEXTS)
    ids, lengths, too_long, _ = clip.encode(TEXTS, 77)
    assert padded.shape == (338, 77) and padded.dtype == ids.dtype == lengths.dtype == np.int32
    ragged = np.split(ids, np.cumsum(lengths)[:-1])
    wrong = [
        golden["text"]
        for golden, row, text_ids in zip(GOLDENS, padded.tolist(), ragged, strict=True)
        if text_ids.tolist() != golden["ids"]
        or row != golden["ids"] + [0] * (77 - len(golden["ids"]))
    ]
    assert wrong == []


def test_long_texts_keep_the_end_token(clip):
    texts = ["a bird", "a small brown bird with a long beak", "a <|endoftext|> b c d e f"]
    assert clip(texts, context_length=6).tolist() == [
        [START_OF_TEXT, 320, 3329, END_OF_TEXT, 0, 0],
        [START_OF_TEXT, 320, 2442, 2866, 3329, END_OF_TEXT],
        [START_OF_TEXT, 320, END_OF_TEXT, 321, 322, END_OF_TEXT],
    ]
    assert clip.encode(texts, 6).lengths.tolist() == [4, 6, 6]


def test_special_names_after_punctuation_are_ordinary_text(clip):
    # As in the reference, whose pattern takes the punctuation "!!<|" first.
    assert clip.encode(["!!<|endoftext|>"], 77).ids.tolist().count(END_OF_TEXT) == 1


def test_empty_text_empty_list_and_bytes(clip):
    assert clip(["", " \n"], 4).tolist() == [[START_OF_TEXT, END_OF_TEXT, 0, 0]] * 2
    assert clip([], 4).shape == (0, 4)
    assert clip.encode([], 4).ids.shape == clip.encode([], 4).lengths.shape == (0,)
    text = "caf\u00e9 &amp; th\u00e9"
    np.testing.assert_array_equal(clip([text.encode()]), clip([text]))


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(st.characters(max_codepoint=0x17F), max_size=40), max_size=5))
def test_the_backends_agree(instant, huggingface, texts):
    np.testing.assert_array_equal(instant(texts), huggingface(texts))


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("A Bird", "A Bird"),
        ("  two   spaces ", "two spaces"),
        ("tab\tand\nline", "tab and line"),
        ("black &amp;amp; white &lt;b&gt;", "black & white <b>"),
        ("caf\u00c3\u00a9", "caf\u00e9"),  # UTF-8 read as Latin-1
        ("\u201cquoted\u201d", '"quoted"'),
        ("lone \ud800 surrogate", "lone \ufffd surrogate"),
        (b"bytes \xc3\xa9", "bytes \u00e9"),
    ],
)
def test_clean(text, cleaned):
    assert text_cleaning.clean(text) == cleaned


@given(text=st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=60))
def test_the_short_way_of_clean_changes_nothing(text):
    # A non-ASCII word at the end sends the same text the long way.
    if "&" not in text:
        assert (
            text_cleaning.clean(text + " \u00e9") == f"{text_cleaning.clean(text)} \u00e9".strip()
        )


def test_text_id_is_of_the_cleaned_lowered_text(clip):
    ids = clip.text_id(["A red beak", " a  red BEAK", "a &#114;ed beak", "a red break", ""])
    assert ids.dtype == np.int32 and ids[0] == ids[1] == ids[2]
    assert len({*ids.tolist()}) == 3
    assert ids[[0, 4]].tolist() == [-1825863821, 634351890]  # by b2sum -l 32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t("one text"), "expected a list of texts"),
        (lambda t: t([None]), "got NoneType"),
        (lambda t: t([b"\xff"]), "not UTF-8"),
        (lambda t: t(["a"], 2), "context_length 2: expected 3"),
    ],
)
def test_wrong_input_is_one_line(clip, call, message):
    with pytest.raises(TokenizerError, match=message) as error:
        call(clip)
    assert "\n" not in str(error.value)


def test_unknown_backend_lists_the_known():
    with pytest.raises(TokenizerError, match=r"'sentencepiece': expected one of .*instant"):
        clip_tokenizer.ClipTokenizer("sentencepiece")


def test_the_vocabulary_is_that_of_clip():
    """With another one a model trains and loads without an error, and its tokens mean something else."""
    shipped = gzip.decompress(clip_tokenizer._VOCABULARY.read_bytes())
    (folder,) = importlib.util.find_spec("open_clip").submodule_search_locations
    theirs = pathlib.Path(folder, "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    assert hashlib.sha256(theirs).hexdigest().startswith("924691ac")
    assert gzip.decompress(theirs).startswith(shipped)
    assert shipped.count(b"\n") == clip_tokenizer.VOCAB_SIZE - 2 * 256 - 2 + 1


def test_the_faster_backend_is_taken_where_it_is_installed(monkeypatch, huggingface):
    monkeypatch.setattr(clip_tokenizer, "_installed", lambda package: False)
    default = clip_tokenizer.ClipTokenizer()
    assert default.backend == "huggingface"
    np.testing.assert_array_equal(default(["a bird"]), huggingface(["a bird"]))
    with pytest.raises(TokenizerError, match=r"grain_jax\[fast-tokenizer\]"):
        clip_tokenizer.ClipTokenizer("instant")
    monkeypatch.setattr(clip_tokenizer, "_installed", lambda package: True)
    monkeypatch.setitem(clip_tokenizer._BACKENDS, "instant", lambda: (None, None))
    assert clip_tokenizer.ClipTokenizer().backend == "instant"


def test_ids_are_decoded_as_transformers_does(clip):
    transformers = pytest.importorskip("transformers")
    tokens, merges = clip_tokenizer._tokens()
    theirs = transformers.CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=merges, pad_token="!"
    )
    rng = np.random.default_rng(0)
    rows = [golden["ids"] for golden in GOLDENS]
    rows += [rng.integers(0, 49408, 20).tolist() for _ in range(100)]  # halves of characters, too
    for ids in rows:
        expected = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert clip.decode(ids) == expected
    assert clip.special_ids == (START_OF_TEXT, END_OF_TEXT)
    with pytest.raises(TokenizerError, match="ids: got 49408, expected 0 to 49407"):
        clip.decode([320, 49408])
