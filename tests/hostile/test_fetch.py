"""What a hostile package does to benchmarks.fetch: one line and status 2, and files below the output alone."""

import hashlib
import io
import os
import struct
import tarfile

import PIL.Image
import pytest

from benchmarks.fetch import fashion, gcompris, package
from benchmarks.fetch.__main__ import main
from tests.data import debian_packages
from tests.hostile import cases

LANG = "usr/share/gcompris-qt/rcc/lang.rcc"
COPYRIGHT = "usr/share/doc/gcompris-qt-data/copyright"
MOST = 1 << 21  # bytes that a package may unpack to, in these tests


def _png() -> bytes:
    out = io.BytesIO()
    PIL.Image.new("RGB", (8, 6), "teal").save(out, "PNG")
    return out.getvalue()


PNG = _png()
GOOD = debian_packages.gcompris(PNG)


def words(content: bytes):
    return debian_packages.gcompris(PNG, words=content)


def lang(content: bytes):
    return GOOD | {LANG: content}


def nested_folders(count: int) -> bytes:
    """A resource of folders in each other, with empty names."""
    names = struct.pack(">HI", 0, 0)
    nodes = b"".join(struct.pack(">IHIIQ", 0, 2, 1, n + 1, 0) for n in range(count))
    return b"qres" + struct.pack(">5I", 3, 24, 0, 24 + len(nodes), 0) + nodes + names


def declared(content: bytes, size: int) -> bytes:
    """The resource with another size before its zipped words."""
    at = content.index(b"\x78\x9c") - 4
    return content[:at] + struct.pack(">I", size) + content[at + 4 :]


def tar_of(*members: tuple[str, bytes, bytes]) -> bytes:
    """A package of members (name, type, content) behind good ones."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:xz") as archive:
        for name, kind, content in members:
            entry = tarfile.TarInfo(name)
            entry.size, entry.type = len(content), kind
            archive.addfile(entry, io.BytesIO(content))
    return debian_packages.deb(out.getvalue())


FILE, LINK = tarfile.REGTYPE, tarfile.SYMTYPE
# name, the package (its files, or its bytes), the line that is said.
ROWS = [
    ("deep words", words(b"[" * 100_000), "words_sample.json: .*Expected `object`"),
    ("deep below a key", words(b'[{"x": ' + b"[" * 100_000), "nested too deep"),
    ("words of numbers", words(b'[{"content": [{"name": "animal", "content": [1]}]}]'), "Expected `object`, got `int`"),
    ("a list as description", words(b'[{"content": [{"name": "animal", "content": [{"image": "a", "description": [1]}]}]}]'), "Expected `str`, got `array`"),
    ("half a surrogate", words(b'[{"content": [{"name": "animal", "content": [{"image": "a", "description": "\\ud800"}]}]}]'), "words_sample.json"),
    ("no drawing", debian_packages.gcompris(PNG, more={"lang/resource/words_sample/f.webp": b"GIF89a"}), "no known image format"),
    ("2,000 folders in each other", lang(nested_folders(2000)), "lang.rcc: has a path of over 300 characters"),
    ("a loop", lang(nested_folders(1).replace(struct.pack(">II", 1, 1), struct.pack(">II", 1, 0))), "has a loop"),
    ("4 GB declared", lang(declared(GOOD[LANG], 2**32 - 1)), "lang.rcc: unpacks to too many bytes"),
    ("a byte declared", lang(declared(GOOD[LANG], 1)), "words_sample.json"),
    ("more than is there", lang(declared(GOOD[LANG], 9999)), "lang.rcc: is cut off"),
    ("names of half surrogates", lang(GOOD[LANG].replace("bee".encode("utf-16-be"), b"\xd8\0" * 3)), None),
    ("a long copyright", GOOD | {COPYRIGHT: b"a" * (gcompris._MOST_COPYRIGHT + 1)}, "got over"),
    ("4 MB of a file that is wanted", GOOD | {LANG: bytes(2 * MOST)}, "unpacks to"),
    ("4 MB of a file that nobody wants", tar_of(("./x", FILE, bytes(2 * MOST))), "unpacks to"),
    ("4 MB in many files", tar_of(*((f"./{n}", FILE, bytes(MOST // 4)) for n in range(8))), "unpacks to over"),
    ("a PAX header of 4 MB", tar_of(("p", tarfile.XHDTYPE, bytes(2 * MOST)), ("./x", FILE, b"")), "unpacks to over"),
    ("a long name of 4 MB", tar_of(("p", tarfile.GNUTYPE_LONGNAME, b"a" * 2 * MOST), ("./x", FILE, b"")), "unpacks to over"),
    ("300 files", tar_of(*((f"./{n}", FILE, b"") for n in range(300))), "more than 200 files"),
    ("a PAX size below zero", tar_of(("p", tarfile.XHDTYPE, b"13 size=-512\n"), ("./x", FILE, b"")), "expected the Debian package gcompris-qt-data"),
    ("a link to a file of the machine", tar_of((f"./{COPYRIGHT}", LINK, b"")), "has no usr"),
    ("nothing", b"", "expected the Debian package"),
    ("a member without a size", b"!<arch>\n" + b"data.tar" + b" " * 52, "expected the Debian package"),
    ("damaged within", (lambda x: x[:-200] + b"?" * 99 + x[-101:])(debian_packages.deb(GOOD)), "expected the Debian package gcompris-qt-data"),
]  # fmt: skip


@pytest.fixture
def bounds(monkeypatch):
    monkeypatch.setattr(package, "_MOST", MOST)
    monkeypatch.setattr(package, "_MEMBERS", 200)


@pytest.mark.parametrize("files,line", [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_a_package(tmp_path, bounds, files, line):
    path = tmp_path / "g.deb"
    path.write_bytes(files if isinstance(files, bytes) else debian_packages.deb(files))
    outcome = cases.run(main, ["gcompris", f"--output={tmp_path / 'out'}", f"--deb={path}"])
    if line is None:
        line = "cut off|is damaged"
    cases.check(outcome, line)
    assert len(outcome.err.splitlines()) == 1
    assert {x.name for x in tmp_path.iterdir()} <= {"g.deb", "out"}


@pytest.mark.parametrize(
    "word,made",
    [
        (("f.webp", "../../../evil"), "_________evil/lang-f.png"),
        (("f.webp", "/etc/cron.d/evil"), "_etc_cron_d_evil/lang-f.png"),
        (("f.webp", ".."), "__/lang-f.png"),
        (("f.webp", "a\0b\x1b[2J\n\tc"), "a_b__2J__c/lang-f.png"),
        (("f.webp", "a" * 10**5), "a" * 60 + "/lang-f.png"),
        (("..\x1b\t.webp", "fly"), "fly/lang-____.png"),
        (("b" * 200 + ".webp", "fly"), "fly/lang-" + "b" * 60 + ".png"),
    ],
)
def test_names_of_a_package_become_files_below_the_output(tmp_path, word, made):
    path, out = tmp_path / "g.deb", tmp_path / "a/b/c/out"
    path.write_bytes(debian_packages.deb(debian_packages.gcompris(PNG, word=word)))
    outcome = cases.run(main, ["gcompris", f"--output={out}", f"--deb={path}"])
    assert outcome.status == 0, outcome.err
    files = [x.relative_to(out) for x in tmp_path.rglob("*") if x.is_file() and x != path]
    drawings = [str(x) for x in files if x.parts[0] == "drawings"]
    assert drawings == [f"drawings/{made}"]
    table = (out / "licences.tsv").read_text().split("\n")
    assert len(table) == 6 and all(line.count("\t") == 5 for line in table[:-1])


def _fifo(path):
    os.mkfifo(path)


@pytest.mark.parametrize(
    "make,line",
    [
        (_fifo, "got a folder, pipe or device, expected the package"),
        (lambda path: path.symlink_to("/dev/zero"), "got a folder, pipe or device"),
        (lambda path: path.mkdir(), "got a folder, pipe or device"),
        (lambda path: path.write_bytes(bytes(MOST + 1)), "expected the package .* of at most"),
        (lambda path: None, "no such file"),
    ],
)
def test_what_is_no_file(tmp_path, bounds, make, line):
    make(tmp_path / "g.deb")
    outcome = cases.run(
        main, ["gcompris", f"--output={tmp_path / 'out'}", f"--deb={tmp_path / 'g.deb'}"]
    )
    cases.check(outcome, line)


def test_an_output_that_cannot_be_written(tmp_path):
    path = tmp_path / "g.deb"
    path.write_bytes(debian_packages.deb(GOOD))
    for kind in ("gcompris", "fashion"):
        outcome = cases.run(main, [kind, f"--output={path}/x", f"--deb={path}"])
        cases.check(outcome, "Not a directory|Debian package")
    outcome = cases.run(main, ["gcompris", f"--output={path}", f"--deb={path}"])
    cases.check(outcome, "g.deb: Not a directory; make room, or give another --output")


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"\x1f\x8b\x08" + bytes(60), None],
    ids=["none", "text", "zeros", "4 MB"],
)
def test_numbers_of_fashion(tmp_path, monkeypatch, content):
    files, unpacked = debian_packages.fashion([[[0] * 28] * 28], [0])
    for name, one in unpacked.items():
        monkeypatch.setitem(fashion.SHA256, name, hashlib.sha256(one).hexdigest())
    monkeypatch.setattr(fashion, "_LARGEST", MOST)
    name = "usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz"
    files[name] = debian_packages.gzip.compress(bytes(2 * MOST)) if content is None else content
    (tmp_path / "f.deb").write_bytes(debian_packages.deb(files))
    arguments = ["fashion", f"--output={tmp_path / 'out'}", f"--deb={tmp_path / 'f.deb'}"]
    cases.check(cases.run(main, arguments), "train-images-idx3-ubyte: .*expected the package")
