"""Files of others: what is too long, of another form or outside its folder is one line."""

from typing import Annotated

import msgspec
import pytest

from grain_jax.core import regular_file


class Note(msgspec.Struct):
    dim: Annotated[int, msgspec.Meta(ge=1)]
    names: list[str]


def test_a_declared_form_is_read_and_other_keys_are_left_out(tmp_path):
    path = tmp_path / "note.json"
    path.write_text('{"dim": 3, "names": ["a"], "other": 1}')
    assert regular_file.read_json(path, Note, "a note") == Note(3, ["a"])


@pytest.mark.parametrize(
    "content,line",
    [
        (b"", "truncated"),
        (b"\xff{}", "malformed"),
        (b'{"dim": 0, "names": []}', r"`int` >= 1 - at `\$.dim`"),
        (b'{"dim": 3}', "missing required field `names`"),
        (b'{"dim": 1' + b"0" * 5000 + b', "names": []}', "out of range"),
        (b'{"dim": 3, "names": ' + b"[" * 10**6, "Expected `str`, got `array`"),
        (b'{"names": [], "x": ' + b"[" * 10**6, "nested too deep"),
    ],
)
def test_another_form_is_one_line(tmp_path, content, line):
    path = tmp_path / "note.json"
    path.write_bytes(content)
    with pytest.raises(regular_file.FileError, match=line) as error:
        regular_file.read_json(path, Note, "a note")
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value).splitlines()) == 1 and "a note" in str(error.value)


def test_what_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "long").write_bytes(b"1234\n\n12\xff4")
    for name, line in (
        (".", "got a folder, pipe or device"),
        ("gone", "no such file"),
        ("long", "got over 9 bytes, expected a text of at most 9"),
        ("long/below", "Not a directory"),
        ("a\0b", "null byte"),
    ):
        with pytest.raises(regular_file.FileError, match=line):
            regular_file.read(tmp_path / name, 9, "a text")
    path = tmp_path / "long"
    assert regular_file.read(path, 10, "a text") == b"1234\n\n12\xff4"
    assert list(regular_file.lines(path, "lines", 5)) == [b"1234\n", b"\n", b"12\xff4"]
    with pytest.raises(regular_file.FileError, match="got a line of over 4 bytes, expected lines"):
        list(regular_file.lines(path, "lines", 4))
    with pytest.raises(regular_file.FileError, match="not UTF-8 text, expected a text"):
        regular_file.read_text(path, "a text")


def test_a_name_stays_below_its_folder(tmp_path):
    folder = tmp_path / "in"
    (folder / "a").mkdir(parents=True)
    (folder / "out").symlink_to(tmp_path)
    assert str(regular_file.below(folder, "a/./b.png", "f")) == str(folder / "a/b.png")
    assert regular_file.inside("a/./out/../b") == "a/b" and regular_file.inside("out/x") == "out/x"
    for name in ("..", "a/../../x", "/etc/passwd", "a\0", "gs://b/x"):
        assert regular_file.inside(name) == ""
    for name in ("", ".", "..", "a/../../x", "/etc/passwd", "a\0", "out/x", "gs://b/x", "out"):
        with pytest.raises(regular_file.FileError, match="^f: got the name"):
            regular_file.below(folder, name, "f")
