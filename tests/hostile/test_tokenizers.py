"""Tokenizer files from strangers: a line, at once, whatever they hold."""

import json

import pytest

from grain_jax.input_pipeline import file_tokenizer
from tests.hostile import cases

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


def replace(old, new, kind="String"):
    return {"type": "Replace", "pattern": {kind: old}, "content": new}


A, X = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "[X]", "type_id": 0}}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [X] * 99 + [A],
    "pair": [A, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"[X]": {"id": "[X]", "ids": [2], "tokens": ["[X]"]}},
}
DOUBLED = {"type": "Sequence", "normalizers": [replace("a", "aa")] * 41}
FILES = [  # keys of a tokenizer.json; the line
    (dict(normalizer=DOUBLED), "up to 2.2e.12 times longer, expected at most 1000"),
    (dict(normalizer=replace("x*", "y" * 1001, "Regex")), "up to 1e.03 times longer"),
    (dict(post_processor=TEMPLATE), "got [0-9]+ tokens of a text"),
]


@pytest.mark.parametrize("keys,line", FILES, ids=["doubled", "a pattern", "a template"])
def test_tokenizer_json(tmp_path, keys, line):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(PLAIN | keys))
    read = lambda _: file_tokenizer.FileTokenizer(path)(["a b zz " * 9], 8) and None
    cases.check(cases.run(read, []), f"tokenizer.json: .*{line}")


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
