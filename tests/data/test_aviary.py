"""The embedded dataset: exact boxes, honest noise rates, a fair split, reproducible files."""

import dataclasses
import hashlib
import itertools
import json
import pathlib
import random
import re

import numpy as np
import pytest
from etils import epath
from PIL import Image

from grain_jax.data import build, staging
from grain_jax.data.aviary import annotations, drawing, generate, masks, vocabulary
from grain_jax.data.aviary.__main__ import main
from grain_jax.data.aviary.annotations import EXACT, Noise
from grain_jax.data.aviary.settings import Settings
from grain_jax.data.aviary.species import distance, species_of
from grain_jax.data.aviary.vocabulary import PARTS, Trait

pytestmark = pytest.mark.quick

FEW = dict(genera=4, species_per_genus=3, held_out_genera=2, held_out_species_per_genus=2)
SMALL = Settings(images=70, seen_per_species=1, unseen_per_species=1, test_images=10, **FEW)


def _draw(species, seed="0", size=64):
    return drawing.draw(species, rng=random.Random(seed), size=size)


def _words(text):
    return set(re.findall(r"[a-z]+", text.lower()))


def _hashes(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in pathlib.Path(folder).rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def aviary():
    return species_of(Settings())


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aviary") / "small"
    assert generate.write(folder, SMALL)
    return folder


@pytest.fixture(scope="module")
def drawn(aviary):
    """(species, image, key) of a hundred images, drawn once."""
    settings = Settings(images=100)
    tasks = itertools.islice(generate.tasks_of(settings), 100)
    draw = lambda task: generate.drawing_of(settings, "training", task.index, task.species)
    return [(task.species, draw(task), f"key{task.index}") for task in tasks]


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_names_and_combinations_are_new(seed):
    aviary = species_of(Settings(seed=seed))
    everyone = aviary.training + aviary.held_out
    assert len({species.name for species in everyone}) == 160
    assert len({species.traits for species in everyone}) == 160
    known = {trait for species in aviary.training for trait in species.traits}
    assert {trait for species in aviary.held_out for trait in species.traits} <= known
    assert min(distance(a, b) for a, b in itertools.combinations(everyone, 2)) == 3


@pytest.mark.parametrize("part", PARTS)
def test_box_holds_exactly_what_another_colour_changes(aviary, part):
    """A part in another colour changes pixels up to each edge of its box, and none outside."""
    for number in range(3):
        species = aviary.training[number * 34]
        old = species[part]
        plain = "black" if old.colour != "black" else "white"
        before = _draw(species, number)
        traits = tuple(Trait(part, t.shape, plain) if t == old else t for t in species.traits)
        after = _draw(dataclasses.replace(species, traits=traits), number)
        assert before.boxes_xyxy == after.boxes_xyxy
        differs = np.any(np.asarray(before.image) != np.asarray(after.image), -1)
        ys, xs = np.nonzero(differs)
        x1, y1, x2, y2 = before.boxes_xyxy[part]
        assert np.mean(before.labels == 1 + PARTS.index(part)) == before.areas[part]
        assert int(x1) <= xs.min() and int(y1) <= ys.min()
        assert xs.max() < x2 and ys.max() < y2
        # Thin outlines average away in a border pixel: at most one pixel less than the box.
        assert xs.min() <= x1 + 1 and ys.min() <= y1 + 1
        assert xs.max() + 1 >= x2 - 1 and ys.max() + 1 >= y2 - 1


def _regions(drawn, repeats=10, **noise):
    """(species, image, region) of all regions of the drawn images, annotated repeatedly with that noise."""
    noise = dataclasses.replace(EXACT, **noise)
    return [
        (species, picture, region)
        for species, picture, key in drawn
        for turn in range(repeats)
        for region in annotations.regions(species, picture, f"{key}/{turn}", noise)
    ]


def test_exact_annotations_and_the_rate_of_misses(drawn):
    regions = _regions(drawn)
    assert len(regions) / 1000 == pytest.approx(4, abs=0.1)  # 3 to 5 parts
    for species, picture, region in regions:
        (part,) = (x.part for x in species.traits if x.phrase == region["description"])
        assert region["box"] == list(picture.boxes_xyxy[part])
    assert len(_regions(drawn, misses=0.3)) / len(regions) == pytest.approx(0.7, abs=0.03)


def test_negatives_are_never_true_of_the_bird(drawn, aviary):
    taken = 0
    for species, picture, key in drawn:
        true = {trait.phrase for trait in species.traits}
        for region in annotations.regions(species, picture, key, Noise(wrong_descriptions=0.5)):
            said = region["description"]
            ten = annotations.negatives(species, said, key, 10)
            assert len(set(ten)) == 10 and not true & set(ten) and said not in ten
            assert annotations.negatives(species, said, key, 2) == ten[:2]
            near = vocabulary.hard_negatives(said)
            wrong = {text for text, trait in near if trait in species.traits}
            assert not wrong & set(ten)
            taken += len(wrong)
    assert taken  # a wrong description whose hard negative is true of the bird


def test_files_are_what_users_bring(small):
    lines = [json.loads(line) for line in (small / "A.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == [f"images/{n:06d}.png" for n in range(70)]
    for line in lines:
        with Image.open(small / line["image"]) as image:
            assert image.size == (64, 64)
    aviary = generate.species_of(SMALL)
    for name, group in (("seen", aviary.training), ("unseen", aviary.held_out)):
        descriptions = json.loads((small / f"{name}.json").read_text())
        assert descriptions == {species.name: species.descriptions for species in group}
        assert {path.name for path in (small / name).iterdir()} == set(descriptions)
        halves = (small / "test" / f"{name}.jsonl").read_text().splitlines()
        assert len(halves) == 5
    test = [json.loads(line) for line in (small / "test/A.jsonl").read_text().splitlines()]
    assert len(test) == 10 and all((small / "test" / line["image"]).exists() for line in test)
    assert all(region["score"] == 1.0 for line in test for region in line["regions"])


def test_nothing_held_out_is_in_training_and_all_its_words_are():
    """The annotations of the default dataset (without drawing it: all parts are visible)."""
    settings = Settings(images=600)
    aviary = generate.species_of(settings)
    picture = _draw(aviary.training[0])
    lines = [
        json.dumps(generate.record_of(settings, task, picture))
        for task in itertools.islice(generate.tasks_of(settings), settings.images)
    ]
    words_seen = _words(" ".join(lines))
    assert not words_seen & {species.name for species in aviary.held_out}
    for species in aviary.held_out:
        assert _words(" ".join(species.descriptions)) <= words_seen
    assert {species.name for species in aviary.training} <= words_seen


def test_pictures_depend_on_seed_and_number_only(small, tmp_path):
    """Other processes and another number of images: the same images and lines."""
    generate.write(tmp_path / "other", dataclasses.replace(SMALL, images=50), processes=2)
    before, after = _hashes(small), _hashes(tmp_path / "other")
    different = {name for name, digest in after.items() if before[name] != digest}
    assert different == {"A.jsonl", "settings.json"}
    lines = (small / "A.jsonl").read_text().splitlines()
    assert (tmp_path / "other" / "A.jsonl").read_text().splitlines() == lines[:50]


def test_complete_folder_is_left_alone_and_another_is_refused(small, tmp_path, capsys):
    assert not generate.write(small, SMALL)
    (tmp_path / "A.jsonl").write_text("{}\n")
    for folder in (small, tmp_path):
        with pytest.raises(ValueError, match="holds another dataset"):
            generate.write(folder, dataclasses.replace(SMALL, seed=1))
    assert main(["--output", str(small)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_kill_before_any_write_is_made_good_by_the_same_command(tmp_path, monkeypatch):
    classes = dict(seen_per_species=0, unseen_per_species=0)
    settings = dataclasses.replace(SMALL, images=1, test_images=2, **classes)
    kind, left = type(epath.Path()), [0]

    def counted(write):
        def before(path, content):
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            return write(path, content)

        return before

    for name in ("write_text", "write_bytes"):
        monkeypatch.setattr(kind, name, counted(getattr(kind, name)))
    generate.write(tmp_path / "whole", settings)
    writes = -left[0]
    assert writes > 15
    for number in range(1, writes + 1):
        left[0] = number
        with pytest.raises(KeyboardInterrupt):
            generate.write(tmp_path / str(number), settings)
        assert generate.write(tmp_path / str(number), settings)
        assert _hashes(tmp_path / str(number)) == _hashes(tmp_path / "whole")


TWO = "--images 2 --seen-per-species 0 --unseen-per-species 0 --test-images 0 --genera 2"
TWO += " --species-per-genus 1 --held-out-genera 0 --processes 1"


def test_records_are_built_unless_they_are_whole_or_another_process_has_them(tmp_path, monkeypatch, capsys):
    asked, target = [], epath.Path(tmp_path / "r" / "birds" / "1.0.0")
    arguments = ["--output", str(tmp_path / "x"), "--records", str(tmp_path / "r")]
    arguments += ["--name", "birds", "--size=160", *TWO.split()]
    with monkeypatch.context() as patch:
        patch.setattr(build, "build", lambda flags: asked.append(flags) or "")
        assert main(arguments) == 0 and len(asked) == 1
        with Image.open(tmp_path / "x" / "images" / "000001.jpg") as image:
            assert image.size == (160, 160) and image.format == "JPEG"
        (target.parent / "incomplete.new_1.0.0").mkdir(parents=True)  # of a build that was cut off
        assert main(arguments) == 0 and len(asked) == 2
    old = target.parent / "incomplete.old_1.0.0"
    with staging.locked(target):
        old.mkdir()  # between the two renames of a build
        assert main(arguments) == 2 and old.exists() and not target.exists()
    assert f"{target}: in use by another process; " in capsys.readouterr().err
    assert main(arguments) == 0 and (target / "dataset_info.json").exists() and not old.exists()
    monkeypatch.setattr(build, "build", lambda flags: pytest.fail("it was built"))
    assert main(arguments) == 0


def test_an_image_stays_the_same_to_the_bit(aviary):
    before = hashlib.sha256(_draw(aviary.training[0]).image.tobytes()).hexdigest()
    assert before == "37b3b5662f0355fbc7755e79f7ca49e327f1663bc8b79d6a477a2845ff90315c"


def test_label_images_are_of_each_group(small):
    held_out = {species.name for species in generate.species_of(SMALL).held_out}
    assert [line.split(", ")[0] for line in masks.CLASSES] == ["background", *PARTS]
    assert sum(line.count(", ") for line in masks.CLASSES) == 101  # commas divide names of a class
    for task in [task for task in generate.tasks_of(SMALL) if task.split == "test"]:
        group = "unseen" if task.species.name in held_out else "seen"
        folder, name = small / masks.FOLDER / group, task.image.rpartition("/")[2]
        assert len(list((folder / "images").iterdir())) == 5
        assert (folder / "classes.txt").read_text().splitlines() == list(masks.CLASSES)
        assert (folder / "images" / name).read_bytes() == (small / "test/images" / name).read_bytes()
        with Image.open(folder / "masks" / name) as opened:
            assert opened.mode == "L" and opened.size == (64, 64)
            drawn = generate.drawing_of(SMALL, task.split, task.index, task.species)
            np.testing.assert_array_equal(np.asarray(opened), drawn.part_mask())
