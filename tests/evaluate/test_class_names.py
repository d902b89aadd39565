import collections
import hashlib
import json

import pytest
import tensorflow_datasets as tfds

from grain_jax.core import errors
from grain_jax.evaluate import class_names, segmentation, zeroshot
from grain_jax.inference import prompts

# TFDS 4.9.10 asks protobuf for a field's label; protobuf 6 has another name for it.
pytestmark = pytest.mark.filterwarnings("ignore:label:DeprecationWarning")

SETS = dict(caltech101=102, caltech_birds2011=200, cars196=196, cifar10=10, cifar100=100)
MASKED = ["ade20k", "pascal_voc"]
SETS |= dict(imagenet2012=1000, oxford_flowers102=102, places365_small=365, sun397=397)


def file(tmp_path, *lines):
    path = tmp_path / "classes.txt"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def fault(labels, count, classes):
    with pytest.raises(errors.UserError) as caught:
        class_names.for_labels(labels, count, classes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name, count", SETS.items())
def test_shipped_names_are_those_of_the_tfds_set(name, count, tmp_path):
    feature = tfds.builder(name, data_dir=str(tmp_path)).info.features["label"]
    assert feature.num_classes == count
    names = class_names.for_labels(feature.names, count, name)
    assert names == class_names.for_labels(None, count, name)  # its order is TFDS's
    assert len(names) == count
    assert collections.Counter(n.lower() for n in names).most_common(1)[0][1] == 1
    assert not [n for n in names if set(n) & set("_?\t") or n != " ".join(n.split())]
    assert [prompts.class_texts(n, ["{}"])[0] for n in names] == names  # no PARENT/CLASS


def test_class_files_of_sets_with_masks_and_of_lvis():
    for name, count in zip(MASKED, (150, 21)):
        assert len(class_names.read(name)) == count == len({line.label for line in class_names.read(name)})
        assert len(set(segmentation.class_labels(name)[1])) == count
    assert class_names.shipped() == ", ".join(sorted([*SETS, *MASKED, "lvis"]))
    lines = class_names.read("lvis")
    counts = dict(rare=337, common=461, frequent=405)
    assert collections.Counter(line.group for line in lines) == counts
    assert lines[135] == ("bow_(weapon)", "bow (weapon)", "rare")
    assert len({line.name.lower() for line in lines}) == len(lines) == 1203


NAMES = {
    ("cifar100", 1): "aquarium fish",
    ("caltech_birds2011", 8): "Brewer's Blackbird",
    ("imagenet2012", 134): "crane bird",
    ("imagenet2012", 639): "one-piece bathing suit",
    ("sun397", 8): "outdoor apartment building",
    ("places365_small", 234): "snowy mountain",
    ("cars196", 173): "2012 Ram C-V Cargo Van Minivan",
}
READABLE = {
    "apple_pie": "apple pie",
    "/a/apartment_building/outdoor": "outdoor apartment building",
    "/a/abbey": "abbey",
    "stadium/baseball": "baseball stadium",
    "polka-dotted": "polka-dotted",
    "Ram C/V Cargo Van": "Ram C-V Cargo Van",
    "001.Black_footed_Albatross": "Black footed Albatross",
    "n02085620-chihuahua": "chihuahua",
}


def test_names():
    assert {key: class_names.read(key[0])[key[1]].name for key in NAMES} == NAMES
    assert {label: class_names.readable(label) for label in READABLE} == READABLE


def test_stems_are_what_published_descriptions_are_called_by(tmp_path):
    assert class_names.stems(["/a/apse/indoor", "b_c"], None) == ["apse/indoor", "b_c"]
    assert class_names.stems(["0", "1"], None) is None
    assert class_names.stems(None, "caltech_birds2011")[8] == "Brewer_Blackbird"
    assert class_names.stems(["n01440764"], "imagenet2012") == ["tench"]
    assert class_names.stems(None, file(tmp_path, "dog", "cat")) is None  # names alone


def test_labels_without_a_file():
    assert "no such file" in fault(None, 2, "nowhere/cifar10")
    assert class_names.for_labels(["b_c", "a"], 2, None) == ["b c", "a"]
    assert "two labels that read 'b c'" in fault(["b_c", "b c"], 2, None)
    assert "got 2 classes without names" in fault(["0", "1"], 2, None)  # as TFDS gives them
    assert "labels such as n01440764" in fault(["n01440764", "n01443537"], 2, None)


def test_names_are_found_by_label_or_have_the_order_of_the_labels(tmp_path):
    path = file(tmp_path, "# a comment", "", "dog\thound", "cat\tlong cat", "cow\tox/cattle")
    assert class_names.for_labels(["cat", "dog"], 2, path) == ["long cat", "hound"]
    assert class_names.for_labels(None, 3, path) == ["hound", "long cat", "ox/cattle"]
    assert "the first: 'pig'" in fault(["cat", "pig"], 2, path)
    # Two of ImageNet's classes, as in TFDS's imagenette.
    names = class_names.for_labels(["n01440764", "n02102040"], 2, "imagenet2012")
    assert names == ["tench", "English Springer Spaniel"]
    path = file(tmp_path, "Dog", "a new name", "cat")
    assert class_names.for_labels(["dog", "old", "cat"], 3, path) == ["Dog", "a new name", "cat"]
    assert "got 'Dog' as class 0" in fault(["cat", "dog", "old"], 3, path)
    assert "got 3 classes, expected" in fault(None, 4, path)
    assert "got no class or an empty name" in fault(None, 2, file(tmp_path))
    assert "lines of several forms" in fault(None, 2, file(tmp_path, "cat\tcat", "dog"))
    twice = file(tmp_path, "M\u00f6we\ta", "Mo\u0308we\tb")
    assert "the label 'M\u00f6we' twice" in fault(None, 2, twice)


def test_imagenet_takes_the_published_descriptions(tmp_path):
    lines = class_names.read("imagenet2012")
    published, wnids = [line.name for line in lines], [line.label for line in lines]
    # Keys, in order, of descriptors_imagenet.json in sachit-menon/classify_by_description_release at d1a3d89.
    digest = hashlib.sha256("\n".join(published).encode()).hexdigest()
    assert digest == "3f33991cc57a5c65c4361866171b6fad1a49d93385c7e1948a351d6ed2daaf07"
    later = [class_names.OPEN_CLIP_NAMES.get(x.label, x.name) for x in lines]
    assert sum(a != b for a, b in zip(published, later)) == 4
    for of_file in (published, later):
        path = tmp_path / "D.json"
        path.write_text(json.dumps({name: [f"like {name}"] for name in of_file}))
        names = class_names.for_labels(wnids, 1000, "imagenet2012")
        stems = class_names.stems(wnids, "imagenet2012")
        described = zeroshot.read_descriptions(path, names, stems)
        assert described == [[f"like {name}"] for name in of_file]
