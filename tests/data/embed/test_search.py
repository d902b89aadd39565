"""grain-jax search: the table, the page, and what is said where images are gone."""

import re
import shutil
import types

import numpy as np
import pytest

from grain_jax import inference
from grain_jax.core import errors, schema
from grain_jax.data.aviary.samples import birds
from grain_jax.data.embed import __main__ as embed
from grain_jax.data.embed import embeddings, parts, search, stored
from grain_jax.data.embed import search_command as command
from tests import browser, embedded, perturbed, record_sets

COUNT = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(images, embeddings) of drawn birds, and the birds."""
    root = tmp_path_factory.mktemp("search")
    drawn = birds(COUNT)
    (root / "images").mkdir()
    for number, bird in enumerate(drawn):
        bird.image.save(root / "images" / f"{number:05d}.png")
    words = [root / "images", "--checkpoint=aviary-tiny", f"--output={root / 'out'}"]
    assert embed.main(list(map(str, words))) == 0
    return root / "images", root / "out", drawn


def run(*words):
    return command.main(list(map(str, words)))


def rows(text):
    """(id, score, box or None) of each line of a table."""
    pattern = r"^ +\d+ +(-?\d\.\d+)  (\S+) +(the whole image|[\d ]+)$"
    found = re.findall(pattern, text, re.MULTILINE)
    return [
        (name, float(score), None if "w" in box else list(map(int, box.split())))
        for score, name, box in found
    ]


def test_the_table_has_the_best_region_of_each_image(folders, capsys):
    images, out, drawn = folders
    text = drawn[2].descriptions[0]
    assert run(out, "--text", text, "--top", "4") == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{text}\nrank   score  id")
    model = inference.load("aviary-tiny", "float32")
    regions = model.encode_regions([bird.image for bird in drawn])
    scores = regions.embed @ model.encode_text([text])[0]  # [N, Q]
    best = np.argsort(-scores.max(axis=1))[:4]
    size = drawn[0].image.size
    for (name, score, box), image in zip(rows(said), best, strict=True):
        assert name == f"{image:05d}.png"
        assert score == pytest.approx(scores[image].max(), abs=6e-4)
        expected = regions.boxes_xyxy[image, scores[image].argmax()] * [*size, *size]
        np.testing.assert_allclose(box, expected, atol=0.51)


def test_an_image_finds_itself_and_so_does_a_region(folders, capsys):
    images, out, drawn = folders
    assert run(out, "--image", images / "00007.png", "--top=2") == 0
    (first, score, box), _ = rows(capsys.readouterr().out)
    assert (first, score, box) == ("00007.png", 1.0, None)
    box_xyxy = np.array(next(iter(drawn[7].boxes_xyxy.values())))
    words = ["--box", ",".join(map(str, box_xyxy * 64)), "--top=1", "--faiss"]
    assert run(out, "--image", images / "00007.png", *words) == 0
    ((first, score, found),) = rows(capsys.readouterr().out)
    model = inference.load("aviary-tiny", "float32")
    ((embed,),) = model.encode_boxes([drawn[7].image], [[box_xyxy]])
    cosines = model.encode_regions([bird.image for bird in drawn]).embed @ embed
    assert first == f"{cosines.max(axis=1).argmax():05d}.png" and found is not None
    assert score == pytest.approx(cosines.max(), abs=6e-4)


def test_without_a_box_head_the_region_nearest_to_a_box_asks(capsys):
    boxes = np.array([[[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1], [0.25, 0.25, 0.75, 0.75]]], np.float32)
    model = types.SimpleNamespace(
        model=types.SimpleNamespace(boxes=types.SimpleNamespace(kind="none"))
    )
    model.encode_regions = lambda images: schema.Regions(boxes, np.eye(3)[None])
    found, embed = command._region(model, birds(1)[0].image, boxes[0, 2] * 64)
    np.testing.assert_array_equal(found, boxes[0, 2])
    np.testing.assert_array_equal(embed, [0, 0, 1])
    assert capsys.readouterr().err == "--box: the nearest region has IoU 1.00 with it\n"


def test_the_page_shows_them_and_names_what_is_gone(folders, tmp_path, capsys):
    images, out, drawn = folders
    moved = tmp_path / "moved"
    shutil.copytree(images, moved)
    (moved / "00003.png").unlink()
    page = tmp_path / "x" / "found.html"
    words = [out, "--text", "<b>a beak</b>", f"--image={images / '00001.png'}", "--top", COUNT]
    assert run(*words, "--output", page, "--images", moved) == 0
    err = capsys.readouterr().err
    assert err.count("not shown") == 1 and "00003.png: no such file" in err
    text = page.read_text()
    assert text.count("<img ") == 2 * (COUNT - 1) + 1  # the question's own too
    assert text.count('class="none">00003.png: no such file') == 2
    assert "&lt;b&gt;a beak" in text and "<b>a beak" not in text
    assert text.count('<g class="best">') == COUNT - 1
    assert not re.search(r"https?://(?!www\.w3\.org)", text)


@pytest.mark.parametrize("kind", ["tars", "records"])
def test_images_of_tars_and_records_are_read_again(kind, tmp_path):
    source = tmp_path / "images"
    record_sets.write_annotations(source, 9)
    (source / "sub").mkdir()
    (source / "00008.png").rename(source / "sub" / "00008.png")
    if kind == "tars":
        embedded.write_tars(source, tmp_path / "set")
    else:
        (source / "sub" / "00008.png").rename(source / "00008.png")
        record_sets.build_set(source, tmp_path / "records", "--num-shards=2")
        (tmp_path / "records" / "tiny_set").rename(tmp_path / "set")
    job = embedded.job_of(tmp_path / "set", tmp_path / "out")
    embedded.go(job)
    table = embedded.read(tmp_path / "out")
    sources = [p.source for i, p in sorted(job.finished().items()) for _ in range(p.rows)]
    wanted = [(source, row["path"]) for source, row in zip(sources, table)]
    (tmp_path / "set").rename(tmp_path / "moved")
    found = parts.read_again(wanted, str(tmp_path / "moved"))
    originals = {path.read_bytes() for path in source.rglob("*.png")}
    assert {image.encoded for image in found.values()} == originals and len(found) == 9
    gone = parts.read_again(wanted)
    assert {fault.cause for fault in gone.values()} == {"no such file"} and len(gone) == 9


def test_a_library_answers_at_the_length_that_it_was_made_with(
    folders, tmp_path, capsys, monkeypatch
):
    model = perturbed.in_own_shape(tmp_path / "own", text__vocab_size=49408)
    short, long = tmp_path / "short", tmp_path / "long"
    words = ["embed", folders[0], f"--checkpoint={model}", f"--output={long}"]
    assert embed.main(list(map(str, words[1:]))) == 0
    words = [*map(str, words[1:3]), f"--output={short}", "--sequence-length=4"]
    assert embed.main(words) == 0
    image = f"--image={folders[0] / '00003.png'}"
    for folder in (short, long):
        assert run(folder, image, "--by=images", "--top=1") == 0
        ((name, score, _),) = rows(capsys.readouterr().out)
        assert name.endswith("00003.png") and score == pytest.approx(1)
    told = f"{short}: was made with sequence_length=4, got 12 (0: squares); expected the same, or"
    assert run(short, image, "--sequence-length=12") == 2
    assert told in capsys.readouterr().err
    index = search.Index(short)
    with pytest.raises(search.SearchError, match=re.escape(told)):
        search.search(index, "a beak", model=inference.load(model))
    # As embeddings of a teacher they are two.
    assert stored.digest(short) != stored.digest(long)
    opened = lambda folder, *_: types.SimpleNamespace(
        folder=folder, settings=embeddings.read_settings(folder)
    )
    monkeypatch.setattr(stored, "Stored", opened)
    sets = [("short", short, "train"), ("long", long, "train")]
    with pytest.raises(errors.UserError, match="long: sequence_length is not that of .*short;"):
        stored.of_sets(tmp_path, sets, apart=True)
    # Squares, and a model that has seen nothing else.
    words = [str(folders[0]), "--checkpoint=aviary-tiny", f"--output={tmp_path / 'out'}"]
    assert embed.main([*words, "--sequence-length=64"]) == 2
    err = capsys.readouterr().err
    assert "sequence_length: got 64 with aviary-tiny, which was trained with squares" in err
    assert run(folders[1], "--text=a beak", "--sequence-length=64") == 2
    assert "was made with sequence_length=0, got 64 (0: squares)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "expected --text TEXT or --image FILE"),
        (["--text=a", "--box=1,2,3,4"], "--box: expected it with one --image"),
        (["--image=a.png", "--box=3,2,1,4"], "--box: got '3,2,1,4', expected X1,Y1,X2,Y2 with"),
        (["--image=none.png"], "none.png: No such file or directory, expected a readable image"),
        (["--text=a", "--output=."], "is a folder, expected a file to write"),
    ],
)
def test_wrong_usage_is_one_line(words, said, folders, capsys):
    assert run(folders[1], *words) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("width, dark", [(1280, False), (420, True)])
def test_the_page_in_a_browser(folders, tmp_path, width, dark):
    images, out, drawn = folders
    page = tmp_path / "found.html"
    words = ["--text", drawn[0].descriptions[0], "--image", images / "00001.png", "--top=6"]
    assert run(out, *words, "--output", page) == 0
    with browser.opened(page.as_uri(), width=width, dark=dark) as opened:
        assert opened.page.locator(".cards .card").count() == 12
        assert opened.broken_pictures() == [] and opened.complaints() == []
        assert opened.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        image, box = (
            opened.page.locator(f".cards .card >> nth=0 >> {part} >> nth=0").bounding_box()
            for part in ("img", "g.best .line")
        )
        assert image["x"] - 1 <= box["x"] <= image["x"] + image["width"]
