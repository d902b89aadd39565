"""What a hostile tar does to data.annotate: faults with their cause, in time, files in the output alone."""

import json
import tarfile

import pytest

from grain_jax.data import sources
from grain_jax.data.annotate import __main__ as command
from tests.hostile import image_files

PNG = image_files.encode("PNG", (20, 20))
GOOD = [("good.png", PNG), ("good.txt", b"A wren.")]


def member(name: str, content: bytes = b"", **fields) -> bytes:
    """A member's header and content; `fields` of TarInfo as they are to be in the header."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    out = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    return out + content + bytes(-len(content) % 512)


END = bytes(1024)
AFTER = b"".join(member(*file) for file in GOOD)
KEPT = ("00000/good.png", None)
# name, bytes before two good members, what the images come to: (image, cause or None).
ROWS = [
    ("a text of 2 MB", member("x.png", PNG) + member("x.txt", b"a" * (2 << 20)),
     [("00000/x.png", "too large"), KEPT]),
    ("out of the folder", member("../../x.png", PNG), [("00000/../../x.png", "bad annotation"), KEPT]),
    ("control characters", member("\x1b[2Jx.png", PNG), [("00000/\x1b[2Jx.png", "bad annotation"), KEPT]),
    ("a link", member("x.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"), [KEPT]),
    ("a name twice", member("x.png", PNG) + member("y.png", PNG) + member("x.png", PNG),
     [("00000/x.png", None), ("00000/y.png", None), ("00000/x.png", "bad annotation"), KEPT]),
    ("1 TB declared", member("x.png", PNG, size=1 << 40), [("00000.tar", "damaged shard")]),
    ("a PAX header of 2 MB", member("pax", b"a" * (2 << 20), type=tarfile.XHDTYPE),
     [("00000.tar", "damaged shard")]),
]  # fmt: skip


@pytest.mark.parametrize("name,content,expected", ROWS, ids=[row[0] for row in ROWS])
def test_a_tar(tmp_path, name, content, expected):
    (tmp_path / "00000.tar").write_bytes(content + AFTER + END)
    (shard,) = sources.shards("webdataset", sources.Options(str(tmp_path)))
    images = [
        (item.image, item.cause if isinstance(item, sources.Fault) else None) for item in sources.read(shard)
    ]
    assert images == expected


def test_a_job_writes_below_its_output_alone(tmp_path, capfd):
    """All at once, names that are each other's folders too; and again, which is what a restart does."""
    content = b"".join(content for _, content, expected in ROWS if expected[-1] == KEPT)
    content += member("f.png", PNG) + member("f.txt", b"A wren.")
    content += member("f.png/x.png", PNG) + member("f.png/x.txt", b"A wren.")
    content += member("g.png/x.png", PNG) + member("g.png/x.txt", b"A wren.")
    content += member("g.png", PNG) + member("g.txt", b"A wren.")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "00000.tar").write_bytes(content + AFTER + END)
    output = tmp_path / "in" / "out"
    arguments = [f"--images={tmp_path / 'in'}", f"--output={output}"]
    arguments += ["--passes=none", "--max-faults=1"]
    assert command.main(arguments) == 0
    lines = (output / "A.jsonl").read_text()
    images = [json.loads(line)["image"] for line in lines.splitlines()]
    letters = [json.loads(x) for x in (output / "failed.jsonl").read_text().splitlines()]
    written = {x.relative_to(output / "images").as_posix() for x in output.rglob("*.png") if x.is_file()}
    assert written == {x.replace("//", "/") for x in images}
    assert {"00000/f.png", "00000/g.png/x.png", "00000/good.png"} <= set(images)
    causes = {x["image"]: (x["cause"], x["detail"]) for x in letters}
    assert causes["00000/f.png/x.png"][0] == causes["00000/g.png"][0] == "bad annotation"
    assert "cannot be written as a file" in causes["00000/g.png"][1]
    assert "Traceback" not in capfd.readouterr().err
    assert {x.name for x in (tmp_path / "in").iterdir()} == {"00000.tar", "out"}
    assert command.main(arguments) == 0
    assert (output / "A.jsonl").read_text() == lines
