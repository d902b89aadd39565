"""Tokenizer files from strangers: a line, at once, whatever they hold."""

import base64
import json
import os
import pathlib

import pytest

from grain_jax.core import errors, printable, regular_file
from grain_jax.input_pipeline import file_tokenizer, tokenizer
from tests import tiny
from tests.hostile import cases

A, X = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "[X]", "type_id": 0}}
PAIR = [A, {"Sequence": {"id": "B", "type_id": 1}}]
PLAIN = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "[U]": 2}, "unk_token": "[U]"},
}


def sequence(*parts):
    return {"type": "Sequence", "normalizers": list(parts)}


def replace(old, new, kind="String"):
    return {"type": "Replace", "pattern": {kind: old}, "content": new}


def charsmap(text):
    trie = b"\0" * 4
    content = len(trie).to_bytes(4, "little") + trie + text + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()}


def template(single, number):
    tokens = {"[X]": {"id": "[X]", "ids": [number], "tokens": ["[X]"]}}
    kind = "TemplateProcessing"
    return {"type": kind, "single": single, "pair": PAIR, "special_tokens": tokens}


def bpe(**keys):
    return {"type": "BPE", "vocab": {"a": 0, "aa": 1}, "merges": [["a", "a"]], **keys}


def write(path, **keys):
    path.write_text(json.dumps(PLAIN | keys))
    return path


nested = replace("a", "aa")
for _ in range(40):
    nested = sequence(nested, replace("a", "aa"))

FILES = [  # keys of a tokenizer.json; the line
    (dict(normalizer=nested), "up to 2.2e.12 times longer, expected at most 1000"),
    (dict(normalizer=sequence(*[replace("a", "a" * 9999)] * 99)), "up to inf times longer"),
    (dict(normalizer=replace("x*", "y" * 1001, "Regex")), "up to 1e.03 times longer"),
    (dict(normalizer=replace("", "y" * 1001)), "up to 1e.03 times longer"),
    (dict(normalizer={"type": "Prepend", "prepend": "a" * 10**6}), "up to 1e.06 times longer"),
    (dict(normalizer=charsmap(b"a" * 2000)), "up to 2e.03 times longer"),
    (dict(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "not a tokenizer"),
    (dict(normalizer="NFC"), r"Expected `object \| null`, got `str` - at `\$.normalizer`"),
    (dict(normalizer=replace("(", "", "Regex")), "not a tokenizer.json .*parenthesis"),
    (dict(normalizer=sequence(replace(1, ""))), r"at `\$.normalizer.normalizers\[0\].pattern"),
    (dict(model=bpe(dropout=0.5)), "model.dropout: got 0.5, expected none"),
    (dict(model=[1]), r"got `array` - at `\$.model`"),
    (dict(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[U]"}), "fails on a text"),
    (dict(pre_tokenizer={"type": "FixedLength", "length": 0}), "fails on a text .*non-zero"),
    (dict(post_processor=template([A] * 3, 2)), "got 24 tokens of a text that is cut to 8"),
    (dict(post_processor=template([X] * 99 + [A], 2)), "got [0-9]+ tokens of a text"),
]


@pytest.mark.parametrize("keys,line", FILES, ids=lambda x: x[:24] if isinstance(x, str) else None)
def test_tokenizer_json(tmp_path, keys, line):
    path = write(tmp_path / "tokenizer.json", **keys)
    read = lambda _: file_tokenizer.FileTokenizer(path)(["a b zz " * 9], 8) and None
    cases.check(cases.run(read, []), f"tokenizer.json: .*{line}")


def test_what_published_files_do_is_read(tmp_path):
    spaces = sequence(replace(" {2,}", "\u2581", "Regex"), replace("``", '"'), {"type": "NFKD"})
    path = write(tmp_path / "tokenizer.json", normalizer=sequence(spaces, charsmap(b"a" * 18)))
    form = file_tokenizer._Json
    declared = regular_file.from_json(path.read_bytes(), form, str(path), "a tokenizer.json")
    assert file_tokenizer._growth(declared.normalizer) == 2 * 18
    sparse = {"type": "WordLevel", "vocab": {"a": 0, "b": 99, "[U]": 2}, "unk_token": "[U]"}
    found = file_tokenizer.FileTokenizer(write(path, normalizer=spaces, model=sparse))
    assert found.vocab_size == 100 and found(["a b"], 4).tolist() == [[0, 99, 0, 0]]


def _zero(path):
    path.symlink_to("/dev/zero")


def _long(path):
    with path.open("wb") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize("name", ["t.json", "t.model"])
@pytest.mark.parametrize("make", [os.mkfifo, _zero, os.mkdir, _long])
def test_what_is_no_regular_file_is_not_read(tmp_path, name, make):
    make(tmp_path / name)
    line = "got (a folder, pipe or device|1,099,511,627,776 bytes), expected a tokenizer.*; put the"
    cases.check(
        cases.run(lambda _: file_tokenizer.FileTokenizer(tmp_path / name) and None, []), line
    )
    tower = tiny.config(model__text__tokenizer=name).model.text
    (tmp_path / "run").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        keep = lambda _: tokenizer.keep_copy(tower, tmp_path / "run")
        cases.check(cases.run(keep, []), "got (a folder|1,099)")
    assert not list(pathlib.Path(tmp_path / "run").iterdir())


def test_a_sentencepiece_map_is_bounded(tmp_path):
    """ModelProto.normalizer_spec.precompiled_charsmap, in the bytes of protobuf."""

    def field(number, content):
        length, out = len(content), b""
        while length > 127:
            out, length = out + bytes([length & 127 | 128]), length >> 7
        return bytes([number << 3 | 2]) + out + bytes([length]) + content

    texts = (4).to_bytes(4, "little") + b"\0" * 4 + b"a" * 5000 + b"\0"
    path = tmp_path / "t.model"
    pieces = b"".join(
        field(1, field(1, name) + b"\x15\0\0\0\0" + kind)
        for name, kind in ((b"<unk>", b"\x18\2"), (b"<s>", b"\x18\3"), (b"</s>", b"\x18\3"))
    )
    path.write_bytes(pieces + field(3, field(2, texts)))
    with pytest.raises(file_tokenizer.TokenizerError, match="not a Sent|up to 5e.03 times longer"):
        file_tokenizer.FileTokenizer(path)
    assert list(file_tokenizer._fields(path.read_bytes(), 3)) == [field(2, texts)]
    assert file_tokenizer._growth_of_map(texts) == 5000


@pytest.mark.parametrize("cleaning", ["none", "canonical", "lower"])
@pytest.mark.parametrize("text", ["\ud800", b"\xff", 5, None])
def test_texts(tmp_path, cleaning, text):
    found = file_tokenizer.FileTokenizer(write(tmp_path / "t.json"), cleaning)
    if cleaning == "lower" and text == "\ud800":  # repaired
        assert found([text], 4).tolist() == [[2, 0, 0, 0]]
        return
    for call in (lambda: found([text], 4), lambda: found.text_id([text])):
        with pytest.raises(errors.UserError, match="text") as told:
            call()
        assert str(told.value) == printable.plain(str(told.value))
