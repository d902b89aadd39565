"""`benchmarks.fetch` on stand-ins: packages, the measures of parts on hand-made silhouettes, the folders."""

import hashlib
import io
import json
import os

import numpy as np
import PIL.Image
import pytest

from benchmarks.claim import data as claim_data
from benchmarks.fetch import fashion, gcompris, package, qt
from benchmarks.fetch.__main__ import main
from benchmarks.fetch.looks import parts
from grain_jax.core import errors
from grain_jax.data import example
from tests.data import debian_packages

DARK = 200


def picture(*boxes, ink=DARK):
    """Ink in boxes (x1, y1, x2, y2), or (x1, y1, x2, y2, darkness); later boxes replace earlier ones."""
    out = np.zeros((28, 28), np.uint8)
    for x1, y1, x2, y2, *other in boxes:
        out[y1:y2, x1:x2] = other[0] if other else ink
    return out


T_SHIRT = picture((8, 0, 20, 28), (3, 0, 25, 9))
PULLOVER = picture((9, 0, 19, 28), (5, 2, 23, 26), (8, 8, 9, 26, 90), (19, 8, 20, 26, 90))
TANK = picture((9, 0, 19, 28))
DRESS = picture((10, 0, 18, 15), (8, 15, 20, 20), (6, 20, 22, 28), (12, 0, 16, 4, 0))
TROUSERS = picture((8, 0, 20, 28), (13, 10, 15, 28, 0))
SNEAKER = picture((0, 14, 28, 22), (14, 9, 28, 14))
HEEL = picture((0, 20, 10, 24), (10, 14, 28, 18), (25, 18, 28, 24), (26, 4, 28, 14), (20, 4, 28, 6))
BOOT = picture((0, 16, 28, 24), (14, 2, 28, 16))
BAG = picture((4, 12, 24, 26), (9, 2, 11, 12), (17, 2, 19, 12), (9, 2, 19, 4))


def looks(ink, kind):
    return {part.description for part in parts(ink, kind)}


# What is measured

EVERY_OTHER_ROW = np.arange(28)[:, None] // 2 % 2 * np.ones((1, 28))
CHECKS = (np.arange(28)[:, None] + np.arange(28)) % 2
PLAIN = (TANK > 0) * 1


# Ink, class, parts that it has, words that none of its parts has.
@pytest.mark.parametrize(
    "ink,kind,has,has_not",
    [
        (T_SHIRT, "T-shirt", [((3, 1, 8, 9), "a short sleeve"), ((20, 1, 25, 9), "a short sleeve")], "arm"),
        (T_SHIRT, "T-shirt", [((8, 22, 20, 28), "a straight hem")], "long"),
        (PULLOVER, "pullover", [((5, 1, 8, 26), "a long sleeve"), ((20, 1, 23, 26), "a long sleeve")], "short"),
        (TANK, "T-shirt", ["a bare armhole", "a dark surface"], "sleeve"),
        (TANK, "dress", ["a slim body"], "sleeve"),
        (DRESS, "dress", [((11, 0, 17, 5), "a deep neckline"), ((6, 22, 22, 28), "a flared hem")], "collar"),
        (TROUSERS, "trouser", [((8, 10, 13, 28), "a wide leg"), ((15, 10, 20, 28), "a wide leg")], "narrow"),
        (picture((9, 0, 19, 28), (12, 10, 16, 28, 0)), "trouser", ["a narrow leg"], "wide"),
        (SNEAKER, "sneaker", ["a sole flat on the ground", "a low cut", "a closed toe", "a dark surface"], "shaft"),
        (HEEL, "sandal", [((24, 16, 28, 24), "a high thin heel"), "open straps"], "flat"),
        (BOOT, "ankle boot", [((14, 2, 28, 14), "a tall shaft"), ((0, 21, 28, 24), "a sole flat on the ground")], "low"),
        (BAG, "bag", [((9, 2, 19, 13), "a long handle"), ((4, 12, 24, 26), "a wide flat body")], "tall"),
        (picture((6, 2, 20, 26)), "bag", ["a tall body"], "handle"),
        (picture((4, 12, 24, 26)), "bag", ["a wide flat body"], "handle"),
        (PLAIN * 60, "T-shirt", ["a light surface"], "dark"),
        (PLAIN * 140, "T-shirt", [], "surface"),
        (PLAIN * (100 + 120 * EVERY_OTHER_ROW), "T-shirt", ["a striped surface"], "dark"),
        (PLAIN * (100 + 120 * CHECKS), "T-shirt", ["a patterned surface"], "dark"),
    ],
)  # fmt: skip
def test_parts(ink, kind, has, has_not):
    found = parts(ink.astype(np.uint8), kind)
    assert not [part for part in found if has_not in part.description]
    for part in has:
        assert part in (found if isinstance(part, tuple) else [one.description for one in found])
    if kind == "sneaker":
        assert len(found) == len(has)


def test_nothing_is_measured_in_an_empty_picture_and_every_box_lies_inside():
    assert parts(np.zeros((28, 28), np.uint8), "bag") == []
    with pytest.raises(ValueError, match="expected a class of Fashion-MNIST"):
        parts(TANK, "hat")
    noise = np.random.default_rng(0)
    for _ in range(20):
        ink = noise.integers(0, 256, (28, 28)).astype(np.uint8)
        ink[noise.random((28, 28)) < noise.random()] = 0
        ink = ink[:: noise.choice([1, -1])] * (np.arange(28) < noise.integers(1, 29))
        for kind in fashion.CLASSES:
            for (x1, y1, x2, y2), _ in parts(ink.astype(np.uint8), kind):
                assert 0 <= x1 < x2 <= 28 and 0 <= y1 < y2 <= 28


# The folder of fashion

MADE = {
    "T-shirt": (T_SHIRT, TANK, picture((7, 0, 21, 28), (3, 0, 25, 11), ink=80)),
    "trouser": (TROUSERS, picture((9, 0, 19, 28), (12, 10, 16, 28, 0)), TROUSERS),
    "pullover": (PULLOVER, PULLOVER, PULLOVER // 2),
    "dress": (DRESS, picture((9, 0, 19, 28), (4, 0, 24, 8), (6, 20, 22, 28)), DRESS),
    "coat": (PULLOVER, PULLOVER, PULLOVER // 2),
    "sandal": (HEEL, HEEL // 2, HEEL),
    "shirt": (PULLOVER, T_SHIRT, T_SHIRT),
    "sneaker": (SNEAKER, BOOT, SNEAKER),
    "bag": (BAG, BAG, picture((6, 12, 20, 28), (9, 1, 10, 12), (16, 1, 17, 12), (9, 1, 17, 3))),
    "ankle boot": (BOOT, BOOT, SNEAKER),
}


@pytest.fixture
def fashion_deb(tmp_path, monkeypatch):
    ink = [one for made in MADE.values() for one in made]
    labels = [fashion.CLASSES.index(name) for name, made in MADE.items() for _ in made]
    files, unpacked = debian_packages.fashion(ink, labels)
    for name, content in unpacked.items():
        monkeypatch.setitem(fashion.SHA256, name, hashlib.sha256(content).hexdigest())
    path = tmp_path / "fashion.deb"
    path.write_bytes(debian_packages.deb(files))
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_folder_is_one_that_the_claim_reads(fashion_deb, tmp_path, capsys):
    folder = tmp_path / "made"
    flags = ["fashion", f"--output={folder}", f"--deb={fashion_deb}", "--processes=1"]
    assert main([*flags, "--seen-per-class=2"]) == 0
    assert [part for part in claim_data.PARTS if not (folder / part).exists()] == []
    for name in ("A.jsonl", "test/seen.jsonl", "test/unseen.jsonl"):
        above = (folder / name).parent
        for line in (folder / name).read_bytes().splitlines():
            assert example.check_line(line, above).faults == []
    lines = {line["id"]: line for line in read_lines(folder / "A.jsonl")}
    every = [ink for made in MADE.values() for ink in made]
    labels = [name for name, made in MADE.items() for _ in made]
    for identity, line in lines.items():
        split, _, number = identity.partition("-")
        assert split == "train" and labels[int(number)] not in fashion.HELD_OUT
        assert labels[int(number)] in line["caption"]
        said = " ".join([line["synthetic_caption"], *(r["description"] for r in line["regions"])])
        assert not any(name.lower() in said.lower() for name in fashion.CLASSES)
        image = np.asarray(PIL.Image.open(folder / line["image"]))
        np.testing.assert_array_equal(image, 255 - every[int(number)])
    shirt = lines[f"train-{labels.index('T-shirt')}"]
    texts = [region["description"] for region in shirt["regions"]]
    assert [[texts[i] for i in phrase] for phrase in shirt["phrases"]][0] == ["a short sleeve"] * 2
    assert sorted(path.name for path in (folder / "seen").iterdir()) == sorted(
        name.lower() for name in MADE if name not in fashion.HELD_OUT
    )
    kinds = {"bag_2", "boot_1", "dress_2", "dress_4", "sandal_1"}
    assert {path.name for path in (folder / "unseen").iterdir()} == kinds
    words = json.loads((folder / "unseen.json").read_text())
    assert words["dress_2"] == ["a short sleeve", "a flared hem", "a dark surface"]
    tests = read_lines(folder / "test/A.jsonl")
    assert len({line["caption"] for line in tests}) == len(tests) > 0
    assert not {line["id"] for line in tests} & set(lines)
    # Bags of the held-out combination are in no training image.
    assert f"train-{labels.index('bag') + 2}" not in lines

    before = (folder / "A.jsonl").read_bytes()
    assert main([*flags, "--seen-per-class=2"]) == 0
    assert "already complete" in capsys.readouterr().err
    assert main(flags) == 2
    assert "holds another data set" in capsys.readouterr().err
    again = tmp_path / "again"
    assert fashion.write(again, fashion.Settings(seen_per_class=2), deb=str(fashion_deb))
    assert (again / "A.jsonl").read_bytes() == before


def test_every_description_of_a_kind_is_one_that_is_measured_and_kinds_of_a_half_differ():
    every = [ink for made in MADE.values() for ink in made]
    known = {look for ink in every for kind in fashion.CLASSES for look in looks(ink, kind)}
    known |= looks((PLAIN * (100 + 120 * CHECKS)).astype(np.uint8), "bag")
    known |= looks(picture((0, 20, 10, 24), (10, 14, 28, 18), (22, 18, 28, 24)), "sandal")
    assert fashion.KINDS == (*fashion.HALVES[0], *fashion.HALVES[1])
    assert len(fashion.HALVES[0]) == len(fashion.HALVES[1])  # the claim splits unseen.json there
    for kinds in fashion.HALVES:
        for one in kinds:
            assert set(one.descriptions) <= known
            others = [set(other.descriptions) for other in kinds if other != one]
            assert not any(set(one.descriptions) <= other for other in others)


def test_another_file_is_refused(fashion_deb, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(fashion.SHA256, "train-labels-idx1-ubyte", "0" * 64)
    assert main(["fashion", f"--output={tmp_path / 'x'}", f"--deb={fashion_deb}"]) == 2
    assert "its SHA-256 is not that of Fashion-MNIST" in capsys.readouterr().err


# Packages


@pytest.mark.parametrize("compression", ["xz", "gz"])
def test_files_of_a_package(compression, tmp_path):
    path = tmp_path / "one.deb"
    files = {"usr/a": b"12", "usr/b/c": b"3", "usr/d": b""}
    path.write_bytes(debian_packages.deb(files, compression))
    found = package.read("one", str(path), {"usr/a": "numbers", "usr/b/c": "another"})
    assert found == {"usr/a": b"12", "usr/b/c": b"3"}
    with pytest.raises(package.PackageError, match=r"has no usr/e \(letters\); expected the"):
        package.read("one", str(path), {"usr/e": "letters"})


def test_what_is_no_package_is_an_error_of_one_line(tmp_path, monkeypatch):
    path = tmp_path / "one.deb"
    whole = debian_packages.deb({"usr/a": b"12" * 99})
    for content, said in (
        (b"hello" * 20, "is not a Debian format archive; expected the Debian package one"),
        (whole[:-20], "expected the Debian package one"),
        (whole.replace(b"data.tar.xz ", b"data.tar.abc"), "expected the Debian package one"),
        (whole.replace(b"\xfd7zXZ", b"\xfd7zXY"), "expected the Debian package one"),
    ):
        path.write_bytes(content)
        with pytest.raises(package.PackageError, match=said) as caught:
            package.read("one", str(path), {"usr/a": "numbers"})
        assert "\n" not in str(caught.value)
    with pytest.raises(errors.UserError, match="no such file, expected the package one"):
        package.read("one", str(tmp_path / "none.deb"), {"usr/a": "numbers"})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(package.PackageError, match="no apt-get; give its file with --deb"):
        package.read("one", None, {"usr/a": "numbers"})
    with pytest.raises(package.PackageError, match="no dpkg-deb; install dpkg"):
        package.read("one", str(path), {"usr/a": "numbers"})


def test_a_package_by_apt(tmp_path, monkeypatch):
    made = tmp_path / "made.deb"
    made.write_bytes(debian_packages.deb({"usr/a": b"12"}))
    apt = tmp_path / "apt-get"
    apt.write_text(
        f'#!/bin/sh\n[ "$1 $2" = "download one" ] || {{ echo "E: no $2" >&2; exit 100; }}\n/bin/cp {made} .\n'
    )
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert package.read("one", None, {"usr/a": "numbers"}) == {"usr/a": b"12"}
    with pytest.raises(package.PackageError, match=r"two: apt-get download failed \(E: no two\)"):
        package.read("two", None, {"usr/a": "numbers"})


# GCompris


def _webp(color, mode="RGB"):
    out = io.BytesIO()
    PIL.Image.new(mode, (8, 6), color).save(out, "WEBP", lossless=True, exact=True)
    return out.getvalue()


@pytest.mark.parametrize("version", [1, 2, 3])
def test_files_of_a_resource(version):
    files = {"a/b.txt": b"one", "a/c/d.json": b"{}" * 50, "e": b""}
    assert dict(qt.files(debian_packages.resource(files, version), 200)) == files


def test_a_damaged_resource_is_named():
    whole = debian_packages.resource({"a/b.txt": b"one"})
    with pytest.raises(qt.ResourceError, match="no Qt resource"):
        list(qt.files(b"hello", 99))
    for length in range(4, len(whole)):
        try:
            assert dict(qt.files(whole[:length], 99)) == {"a/b.txt": b"one"}
        except qt.ResourceError as error:
            assert "damaged" in str(error) or "cut off" in str(error)


def test_names_in_words():
    stems = "hammer7 measuringTape12 polar_bear solar2 solar4 monument2 IndiaGate".split()
    names = [
        "hammer",
        "measuring tape",
        "polar bear",
        "solar cooker",
        "solar panel",
        "",
        "india gate",
    ]
    assert list(map(gcompris.name_of, stems)) == names


COPYRIGHT = """Format: 1.0

Files: *
Copyright: 2010 Somebody
           2011 Another
License: GPL-3+

Files: src/activities/erase/resource/bee.jpg
       src/activities/erase/resource/cow*.png
Copyright: none
License: public-domain
Comment: a place
"""


def test_licences():
    known = gcompris.licences(COPYRIGHT)
    bee = gcompris.licence_of("src/activities/erase/resource/bee.webp", known)
    assert bee[:3] == ("public-domain", "none", "a place")
    assert (
        gcompris.licence_of("src/activities/erase/resource/cow2.webp", known).name
        == "public-domain"
    )
    other = gcompris.licence_of("src/activities/erase/resource/bees.webp", known)
    assert other == ("GPL-3+", "2010 Somebody; 2011 Another", "", "*")


def test_the_folder_of_gcompris(tmp_path, capsys):
    lesson = {"name": "animal", "content": [{"description": "flies", "image": "f.webp"}]}
    files = {
        "erase/resource/bee.webp": _webp("red"),
        "erase/resource/eraser.wav": b"",
        "explore_farm_animals/resource/animals/cow.webp": _webp("blue"),
        "explore_world_animals/resource/animals/bee.webp": _webp("lime"),
        "categorization/resource/images/tools/plier1.webp": _webp("red"),
        "categorization/resource/images/monuments/monument2.webp": _webp("red"),
        "explore_monuments/resource/india/hawaMahal.webp": _webp("red"),
        "lang/resource/words_sample/f.webp": _webp((0, 0, 0, 0), "RGBA"),
        "lang/resource/words_sample/ten.webp": _webp("red"),
        "lang/resource/words_sample.json": json.dumps([{"content": [lesson]}]).encode(),
    }
    installed = {"usr/share/doc/gcompris-qt-data/copyright": COPYRIGHT.encode()}
    for name in {path.partition("/")[0] for path in files}:
        own = {p: content for p, content in files.items() if p.startswith(f"{name}/")}
        own = {f"gcompris/src/activities/{p}": content for p, content in own.items()}
        installed[f"usr/share/gcompris-qt/rcc/{name}.rcc"] = debian_packages.resource(own)
    path, folder = tmp_path / "g.deb", tmp_path / "made"
    path.write_bytes(debian_packages.deb(installed))
    flags = ["gcompris", f"--output={folder}", f"--deb={path}"]
    assert main(flags) == 0
    assert "3 animals, 1 things, 1 monuments, 1 drawings" in capsys.readouterr().err
    made = {str(path.relative_to(folder)) for path in folder.glob("*/*/*")}
    assert made == {
        "animals/bee/erase-bee.webp",
        "animals/bee/explore_world_animals-bee.webp",
        "animals/cow/explore_farm_animals-cow.webp",
        "things/pliers/categorization-plier1.webp",
        "monuments/hawa_mahal/explore_monuments-hawaMahal.webp",
        "drawings/fly/lang-f.png",
    }
    assert (folder / "animals/bee/erase-bee.webp").read_bytes() == files["erase/resource/bee.webp"]
    drawing = PIL.Image.open(folder / "drawings/fly/lang-f.png")
    assert (drawing.mode, drawing.getpixel((0, 0))) == ("RGB", (255, 255, 255))
    captions = {line["caption"]: line["image"] for line in read_lines(folder / "A.jsonl")}
    assert len(captions) == 5 and captions["a drawing of fly"] == "drawings/fly/lang-f.png"
    table = [line.split("\t") for line in (folder / "licences.tsv").read_text().splitlines()]
    assert table[0] == ["file", "name", "licence", "holders", "source", "listed as"]
    assert table[1][:5] == ["animals/bee/erase-bee.webp", "bee", "public-domain", "none", "a place"]
    assert table[2][2:] == ["GPL-3+", "see copyright", "", "*"]
    assert main(flags) == 0 and "already complete" in capsys.readouterr().err
    (folder / "README.md").unlink()
    assert main(flags) == 2 and "is not empty" in capsys.readouterr().err
