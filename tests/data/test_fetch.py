"""`grain-jax fetch` on stand-ins: packages, the measures of parts on hand-made silhouettes, the folders."""

import hashlib
import io
import json

import numpy as np
import PIL.Image
import pytest
from grain_jax.data import example
from grain_jax.data.fetch import fashion, gcompris, licences, package, resources
from grain_jax.data.fetch.__main__ import main
from grain_jax.data.fetch.parts import parts

from benchmarks.claim import data as claim_data
from grain_jax import errors
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


def test_sleeves_are_told_by_the_outline_and_by_a_seam():
    found = parts(T_SHIRT, "T-shirt")
    assert [p for p in found if p.description == "a short sleeve"] == [
        ((3, 1, 8, 9), "a short sleeve"),
        ((20, 1, 25, 9), "a short sleeve"),
    ]
    assert ((8, 22, 20, 28), "a straight hem") in found
    assert [p for p in parts(PULLOVER, "pullover") if p.description == "a long sleeve"] == [
        ((5, 1, 8, 26), "a long sleeve"),
        ((20, 1, 23, 26), "a long sleeve"),
    ]
    assert "a bare armhole" in looks(TANK, "T-shirt")
    for ink in (T_SHIRT, PULLOVER, TANK):
        assert len({look for look in looks(ink, "coat") if "sleeve" in look or "arm" in look}) == 1


def test_body_neck_and_hem_of_a_dress():
    found = parts(DRESS, "dress")
    assert ((11, 0, 17, 5), "a deep neckline") in found
    assert ((6, 22, 22, 28), "a flared hem") in found
    assert "a slim body" in looks(TANK, "dress")


def test_legs_are_split_by_the_gap():
    assert parts(TROUSERS, "trouser")[:2] == [
        ((8, 10, 13, 28), "a wide leg"),
        ((15, 10, 20, 28), "a wide leg"),
    ]
    narrow = picture((9, 0, 19, 28), (12, 10, 16, 28, 0))
    assert "a narrow leg" in looks(narrow, "trouser")


def test_shoes():
    sneaker = {"a sole flat on the ground", "a low cut", "a closed toe", "a dark surface"}
    assert looks(SNEAKER, "sneaker") == sneaker
    assert ((24, 16, 28, 24), "a high thin heel") in parts(HEEL, "sandal")
    assert "open straps" in looks(HEEL, "sandal")
    found = parts(BOOT, "ankle boot")
    assert ((14, 2, 28, 14), "a tall shaft") in found
    assert ((0, 21, 28, 24), "a sole flat on the ground") in found
    assert "a tall shaft" not in looks(SNEAKER, "sneaker")


def test_a_bag_has_a_handle_above_its_body():
    found = parts(BAG, "bag")
    assert found[:2] == [((9, 2, 19, 13), "a long handle"), ((4, 12, 24, 26), "a wide flat body")]
    assert "a tall body" in looks(picture((6, 2, 20, 26)), "bag")
    assert not {look for look in looks(picture((4, 12, 24, 26)), "bag") if "handle" in look}


def test_surfaces():
    rows = np.arange(28)[:, None] // 2 % 2 * np.ones((1, 28))
    checks = (np.arange(28)[:, None] + np.arange(28)) % 2
    plain = TANK > 0
    assert "a dark surface" in looks(TANK, "T-shirt")
    assert "a light surface" in looks((plain * 60).astype(np.uint8), "T-shirt")
    assert not {
        look for look in looks((plain * 140).astype(np.uint8), "T-shirt") if "surface" in look
    }
    assert "a striped surface" in looks((plain * (100 + 120 * rows)).astype(np.uint8), "T-shirt")
    assert "a patterned surface" in looks(
        (plain * (100 + 120 * checks)).astype(np.uint8), "T-shirt"
    )


def test_nothing_is_measured_in_an_empty_picture_and_every_box_lies_inside():
    assert parts(np.zeros((28, 28), np.uint8), "bag") == []
    with pytest.raises(ValueError, match="expected a class of Fashion-MNIST"):
        parts(TANK, "hat")
    noise = np.random.default_rng(0)
    for _ in range(40):
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
    labels = [name for name, made in MADE.items() for _ in made]
    for identity, line in lines.items():
        split, _, number = identity.partition("-")
        assert split == "train" and labels[int(number)] not in fashion.HELD_OUT
        assert labels[int(number)] in line["caption"]
        said = " ".join([line["synthetic_caption"], *(r["description"] for r in line["regions"])])
        assert not any(name.lower() in said.lower() for name in fashion.CLASSES)
        image = np.asarray(PIL.Image.open(folder / line["image"]))
        np.testing.assert_array_equal(
            image, 255 - [m for k in MADE.values() for m in k][int(number)]
        )
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
    known = {
        look
        for made in MADE.values()
        for ink in made
        for k in fashion.CLASSES
        for look in looks(ink, k)
    }
    checks = (np.arange(28)[:, None] + np.arange(28)) % 2 * 120 + 100
    known |= looks(((TANK > 0) * checks).astype(np.uint8), "bag")
    known |= looks(picture((0, 20, 10, 24), (10, 14, 28, 18), (22, 18, 28, 24)), "sandal")
    assert fashion.KINDS == (*fashion.HALVES[0], *fashion.HALVES[1])
    assert len(fashion.HALVES[0]) == len(fashion.HALVES[1])  # the claim splits unseen.json there
    for kinds in fashion.HALVES:
        for one in kinds:
            assert set(one.descriptions) <= known
            assert not any(
                set(one.descriptions) <= set(other.descriptions) for other in kinds if other != one
            )


def test_another_file_is_refused(fashion_deb, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(fashion.SHA256, "train-labels-idx1-ubyte", "0" * 64)
    assert main(["fashion", f"--output={tmp_path / 'x'}", f"--deb={fashion_deb}"]) == 2
    assert "its SHA-256 is not that of Fashion-MNIST" in capsys.readouterr().err


# Packages


@pytest.mark.parametrize("compression", ["xz", "gz", "bz2"])
def test_files_of_a_package(compression, tmp_path):
    path = tmp_path / "one.deb"
    path.write_bytes(
        debian_packages.deb({"usr/a": b"12", "usr/b/c": b"3", "usr/d": b""}, compression)
    )
    found = package.read("one", str(path), {"usr/a": "numbers", "usr/b/c": "another"})
    assert found == {"usr/a": b"12", "usr/b/c": b"3"}
    with pytest.raises(
        package.PackageError, match=r"has no usr/e \(letters\); expected the Debian"
    ):
        package.read("one", str(path), {"usr/e": "letters"})


def test_what_is_no_package_is_an_error_of_one_line(tmp_path, monkeypatch):
    path = tmp_path / "one.deb"
    whole = debian_packages.deb({"usr/a": b"12" * 99})
    zst = whole.replace(b"data.tar.xz ", b"data.tar.zst")
    for content, said in (
        (b"hello", "is no Debian package"),
        (whole[:-20], "cut off"),
        (zst, "data.tar.zst, which Python cannot read"),
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


def test_a_package_by_apt(tmp_path, monkeypatch):
    made = tmp_path / "made.deb"
    made.write_bytes(debian_packages.deb({"usr/a": b"12"}))
    apt = tmp_path / "apt-get"
    apt.write_text(
        f'#!/bin/sh\n[ "$1 $2" = "download one" ] || {{ echo "E: no $2" >&2; exit 100; }}\n/bin/cp {made} .\n'
    )
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
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
    assert dict(resources.files(debian_packages.resource(files, version), 200)) == files


def test_a_damaged_resource_is_named():
    whole = debian_packages.resource({"a/b.txt": b"one"})
    with pytest.raises(resources.ResourceError, match="no Qt resource"):
        list(resources.files(b"hello", 99))
    for length in range(4, len(whole)):
        try:
            assert dict(resources.files(whole[:length], 99)) == {"a/b.txt": b"one"}
        except resources.ResourceError as error:
            assert "damaged" in str(error) or "cut off" in str(error)


def test_names_in_words():
    for stem, name in (
        ("hammer7", "hammer"),
        ("measuringTape12", "measuring tape"),
        ("polar_bear", "polar bear"),
        ("solar2", "solar cooker"),
        ("solar4", "solar panel"),
        ("monument2", ""),
        ("IndiaGate", "india gate"),
    ):
        assert gcompris.name_of(stem) == name


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
    known = licences.Copyright(COPYRIGHT)
    bee = known.of("src/activities/erase/resource/bee.webp")
    assert bee[:3] == ("public-domain", "none", "a place")
    assert known.of("src/activities/erase/resource/cow2.webp").name == "public-domain"
    other = known.of("src/activities/erase/resource/bees.webp")
    assert other == ("GPL-3+", "2010 Somebody; 2011 Another", "", "*")


def test_the_folder_of_gcompris(tmp_path, capsys):
    words = [
        {"content": [{"name": "animal", "content": [{"description": "flies", "image": "f.webp"}]}]}
    ]
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
        "lang/resource/words_sample.json": json.dumps(words).encode(),
    }
    installed = {"usr/share/doc/gcompris-qt-data/copyright": COPYRIGHT.encode()}
    for name in {path.partition("/")[0] for path in files}:
        own = {
            f"gcompris/src/activities/{p}": c for p, c in files.items() if p.startswith(f"{name}/")
        }
        installed[f"usr/share/gcompris-qt/rcc/{name}.rcc"] = debian_packages.resource(own)
    path, folder = tmp_path / "g.deb", tmp_path / "made"
    path.write_bytes(debian_packages.deb(installed))
    flags = ["gcompris", f"--output={folder}", f"--deb={path}"]
    assert main(flags) == 0
    assert "3 animals, 1 things, 1 monuments, 1 drawings" in capsys.readouterr().err
    made = {
        str(p.relative_to(folder)) for p in folder.rglob("*") if p.parent.parent.parent == folder
    }
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
