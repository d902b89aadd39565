"""The tokenizer against the reference's ids, on both backends."""

import gzip
import importlib.machinery
import importlib.util
import json
import pathlib
import subprocess
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


def _vocabulary_in_instant() -> bytes | None:
    """The merges that instant-clip-tokenizer compiles in: so no test needs another package."""
    spec = importlib.util.find_spec("instant_clip_tokenizer")
    for folder in (spec and spec.submodule_search_locations) or ():
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            for library in pathlib.Path(folder).glob(f"*{suffix}"):
                content = library.read_bytes()
                begin = content.find(b'"bpe_simple_vocab_16e6.txt#version')
                if begin >= 0:
                    return b"\n".join(content[begin : begin + 4_000_000].split(b"\n")[:48_895])
    return None


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory):
    """A file of CLIP's merges; None lets the tokenizer look for an installed one (Python 3.13)."""
    content = _vocabulary_in_instant()
    if content is None:
        return None
    path = tmp_path_factory.mktemp("vocabulary") / "bpe_simple_vocab_16e6.txt.gz"
    path.write_bytes(gzip.compress(content, compresslevel=1))
    return path


@pytest.fixture(scope="session")
def instant():
    pytest.importorskip("instant_clip_tokenizer", reason="has no wheel for this Python")
    return clip_tokenizer.ClipTokenizer("instant")


@pytest.fixture(scope="session")
def huggingface(vocabulary):
    pytest.importorskip("tokenizers", reason="dev extra is not installed")
    return clip_tokenizer.ClipTokenizer("huggingface", vocabulary)


@pytest.fixture(params=["instant", "huggingface"])
def clip(request):
    return request.getfixturevalue(request.param)


def test_all_golden_strings_have_the_references_ids(clip):
    assert len(GOLDENS) == 338
    padded = clip(TEXTS)
    ids, lengths, too_long = clip.encode(TEXTS, 77)
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


def test_text_id_hardly_collides(clip):
    texts = [f"a bird with a {i} beak" for i in range(4000)]
    assert len(np.unique(clip.text_id(texts))) == 4000


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


def test_vocabulary_by_environment_variable(vocabulary, huggingface, monkeypatch):
    if vocabulary is None:
        pytest.skip("needs a vocabulary file")
    monkeypatch.setenv(clip_tokenizer.VOCABULARY_VARIABLE, str(vocabulary))
    np.testing.assert_array_equal(
        clip_tokenizer.ClipTokenizer("huggingface")(["a bird"]), huggingface(["a bird"])
    )


def test_another_vocabulary_is_refused(huggingface, tmp_path):
    path = tmp_path / "merges.txt"
    path.write_text("#version: 0.2\ni n\nt h\n")
    with pytest.raises(TokenizerError, match=r"merges.txt is not CLIP's vocabulary"):
        clip_tokenizer.ClipTokenizer("huggingface", path)
    with pytest.raises(TokenizerError, match=r"cannot read CLIP's vocabulary .*absent.txt"):
        clip_tokenizer.ClipTokenizer("huggingface", tmp_path / "absent.txt")


def test_missing_libraries_say_what_to_install(monkeypatch):
    installed = {"tokenizers"}
    find_spec = importlib.util.find_spec
    monkeypatch.delenv(clip_tokenizer.VOCABULARY_VARIABLE, raising=False)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: find_spec(name) if name in installed else None
    )
    with pytest.raises(TokenizerError, match="pip install --no-deps open_clip_torch"):
        clip_tokenizer.ClipTokenizer()
    installed.clear()
    with pytest.raises(TokenizerError, match="pip install tokenizers"):
        clip_tokenizer.ClipTokenizer()
    with pytest.raises(TokenizerError, match="pip install instant-clip-tokenizer"):
        clip_tokenizer.ClipTokenizer("instant")


def test_vocabulary_is_found_in_a_package_without_importing_it(vocabulary, tmp_path, huggingface):
    if vocabulary is None:
        pytest.skip("needs a vocabulary file")
    package = tmp_path / "open_clip"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    (package / vocabulary.name).write_bytes(vocabulary.read_bytes())
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from grain_jax.input_pipeline.clip_tokenizer import ClipTokenizer\n"
        "print(ClipTokenizer('huggingface')(['a bird'], 5).tolist())\n"
        "assert not {'jax', 'tensorflow', 'torch', 'open_clip'} & set(sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == str(huggingface(["a bird"], 5).tolist())
