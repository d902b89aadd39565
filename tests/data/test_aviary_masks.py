"""Label images of the aviary against its boxes and shares, a count of one's own and the files that it had before."""

import random

import numpy as np
import pytest
from PIL import Image

from grain_jax.data.aviary import drawing, generate, masks
from grain_jax.data.aviary.settings import Settings
from grain_jax.data.aviary.vocabulary import PARTS

FEW = dict(genera=4, species_per_genus=3, held_out_genera=2, held_out_species_per_genus=2)
SMALL = Settings(images=3, seen_per_species=1, unseen_per_species=1, test_images=10, **FEW)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aviary") / "small"
    assert generate.write(folder, SMALL)
    return folder


def _tests():
    return [task for task in generate.tasks_of(SMALL) if task.split == "test"]


def _drawn(task):
    return generate.drawing_of(SMALL, task.split, task.index, task.species)


def test_labels_of_the_canvas_have_the_boxes_and_shares_of_the_annotations(size=100):
    for number, species in enumerate(generate.species_of(SMALL).training[:6]):
        drawn = drawing.draw(species, rng=random.Random(number), size=size)
        factor = len(drawn.labels) / size
        shown_parts = {part: drawn.labels == n for n, part in enumerate(PARTS, 1)}
        shown_parts = {part: shown for part, shown in shown_parts.items() if shown.any()}
        assert shown_parts.keys() == drawn.boxes_xyxy.keys()
        for part, shown in shown_parts.items():
            y, x = np.nonzero(shown)
            box = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) / factor
            np.testing.assert_array_equal(box, drawn.boxes_xyxy[part])
            assert shown.mean() == drawn.areas[part]


def test_the_files_are_a_set_of_each_group_and_kind(small):
    held_out = {species.name for species in generate.species_of(SMALL).held_out}
    for group in masks.GROUPS:
        images = small / masks.FOLDER / group / "images"
        assert len(list(images.iterdir())) == 5
    of_parts = [line.split(", ") for line in masks.CLASSES["masks"]]
    assert [line[0] for line in of_parts] == ["background", *PARTS]
    looks = [phrase for line in of_parts for phrase in line[1:]]
    assert ["background", *looks] == list(masks.CLASSES["looks"])
    assert not any("," in phrase for phrase in looks)  # commas divide names of a class
    for kind, count in {"masks": 9, "looks": 102}.items():
        names = list(masks.CLASSES[kind])
        assert len(names) == len(set(names)) == count and names[0] == "background"
        for task in _tests():
            group = "unseen" if task.species.name in held_out else "seen"
            folder, name = small / masks.FOLDER / group, task.image.rpartition("/")[2]
            assert (folder / masks.FILES[kind]).read_text().splitlines() == names
            image = (folder / "images" / name).read_bytes()
            assert image == (small / "test" / "images" / name).read_bytes()
            with Image.open(folder / kind / name) as opened:
                assert opened.mode == "L" and opened.size == (64, 64)
                mask = np.asarray(opened)
            parts = _drawn(task).part_mask()
            shown = [task.species[PARTS[n - 1]].phrase if n else "background" for n in parts.flat]
            expected = parts if kind == "masks" else [names.index(phrase) for phrase in shown]
            np.testing.assert_array_equal(mask.ravel(), np.ravel(expected))
