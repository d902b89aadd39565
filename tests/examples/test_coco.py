"""examples/coco on a small set in TFDS's format, under its real name, with a small RefCOCO."""

import contextlib
import io
import json
import logging
import pickle
import re
import sys

import numpy as np
import PIL.Image
import pytest

from examples.coco import __main__ as coco
from tests import foreign

# TFDS 4.9.10 asks protobuf for a field's label; protobuf 6 has another name for it.
pytestmark = [pytest.mark.filterwarnings("ignore:label:DeprecationWarning"), pytest.mark.long]
OTHERS = [f"other {i}" for i in range(15)]
NAMES = [*coco.CLASSES["seen"], *coco.CLASSES["unseen"], *OTHERS]
BOX = [0.25, 0.125, 0.75, 0.5]  # y1, x1, y2, x2 of an image of 48 x 32
# Class of the objects of each image, and whether they are crowds.
_CARS = [[("car", True)], *[[("car", False)]] * 20]
TRAIN = [[("person", False), ("cat", False)], [("dog", False)], *_CARS]
VAL = [[("person", False), ("person", True)], [("cat", False)], [("other 3", False)]]


def write_tfds(data_dir):
    """coco/2017 as TFDS prepares it: the numbers of its images start at 1 in train, at 101 in validation."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_builders import adhoc_builder

    objects = dict(id=np.int64, area=np.int64, bbox=tfds.features.BBoxFeature())
    objects |= dict(label=tfds.features.ClassLabel(names=NAMES), is_crowd=np.bool_)
    features = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "image/filename": tfds.features.Text(),
        "image/id": np.int64,
        "objects": tfds.features.Sequence(objects),
    }
    box = tfds.features.BBox(*BOX)
    example = lambda number, items: {
        "image": np.random.default_rng(number).integers(0, 256, (32, 48, 3), np.uint8),
        "image/filename": f"{number:012d}.jpg",
        "image/id": number,
        "objects": [
            dict(id=i, area=200, bbox=box, label=name, is_crowd=is_crowd)
            for i, (name, is_crowd) in enumerate(items)
        ],
    }
    splits = {"train": (1, TRAIN), "validation": (101, VAL)}
    builder = adhoc_builder.AdhocBuilder(
        name="coco",
        version="1.1.0",
        config=tfds.core.BuilderConfig(name="2017"),
        features=tfds.features.FeaturesDict(features),
        split_datasets={
            split: [(f"{n}", example(n, items)) for n, items in enumerate(content, first)]
            for split, (first, content) in splits.items()
        },
        data_dir=str(data_dir),
    )
    logging.getLogger("absl").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        builder.download_and_prepare()


def write_refcoco(folder):
    """Two expressions for an object of the images 22 and 23; one image in val and testA, one in testB."""
    folder.mkdir()
    box = [6, 8, 18, 16]
    name = "COCO_train2014_{:012d}.jpg".format
    images = [dict(id=n, file_name=name(n), width=48, height=32) for n in (22, 23)]
    objects = [dict(id=n, image_id=n, bbox=box, category_id=0) for n in (22, 23)]
    content = dict(images=images, annotations=objects, categories=[])
    (folder / "instances.json").write_text(json.dumps(content))
    refs = [
        dict(ref_id=n, ann_id=n, image_id=n, split=split, sentences=[dict(sent="a wren")] * 2)
        for n, split in ((22, "val"), (22, "testA"), (23, "testB"))
    ]
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=0))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    write_tfds(root / "tfds")
    write_refcoco(root / "refcoco")
    return root


def test_the_classes_are_those_of_the_papers():
    seen, unseen = coco.CLASSES["seen"], coco.CLASSES["unseen"]
    assert (len(set(seen)), len(set(unseen)), len({*seen, *unseen})) == (48, 17, 65)


def test_seen_objects_are_trained_on_and_images_of_refcoco_are_not(data, tmp_path):
    refs = [str(data / "refcoco" / name) for name in ("refs(unc).p", "instances.json")]
    coco.prepare(str(data / "tfds"), tmp_path, refs)
    read = lambda split: json.loads((tmp_path / split / "instances.json").read_text())
    train, val = read("train"), read("val")
    assert sorted(x["id"] for x in train["images"]) == [1, *range(4, 22)]
    assert [x["name"] for x in train["categories"]] == coco.CLASSES["seen"]
    (first,) = [x for x in train["annotations"] if x["image_id"] == 1]
    assert (first["category_id"], first["bbox"], first["area"]) == (0, [6, 8, 18, 16], 200)
    assert sorted(x["id"] for x in val["images"]) == [101, 102] and len(val["categories"]) == 65
    crowds = {(x["image_id"], x["category_id"], x["iscrowd"]) for x in val["annotations"]}
    assert crowds == {(101, 0, 0), (101, 0, 1), (102, NAMES.index("cat"), 0)}
    apart = {x.name[-6:] for x in (tmp_path / "refcoco").iterdir()}
    assert apart == {"22.jpg", "23.jpg"}
    with PIL.Image.open(tmp_path / "val/images" / val["images"][0]["file_name"]) as image:
        assert image.size == (48, 32)


@pytest.mark.slow
def test_from_a_published_model_to_the_table(data, tmp_path, monkeypatch, capsys):
    foreign.published("siglip", tmp_path / "theirs")
    from grain_jax.convert.from_hugging_face import from_hf

    from_hf(tmp_path / "theirs", tmp_path / "start")
    words = ["--start", tmp_path / "start", "--workdir", tmp_path / "run", "--size", 40]
    words += ["--data-dir", data / "tfds", "--refcoco", data / "refcoco", "--topology", "v5e:2x2"]
    keys = dict(batch_size=8, total_epochs=None, total_steps=4, log_every=1, eval_every=0)
    keys |= {"optim.warmup_epochs": None, "optim.warmup_steps": 1}
    keys |= {f"model.decoder.{key}": 32 for key in ("width", "mlp_dim")}
    keys |= {"model.decoder.depth": 1, "model.decoder.heads": 2, "model.decoder.queries": 4}
    words += [f"--config.{key}={value}" for key, value in keys.items()]
    monkeypatch.setattr(sys, "argv", ["coco", *map(str, words)])
    coco.main()
    result = (tmp_path / "run/results.md").read_text()
    titles = re.findall(r"^\| (.*) \| \d[\d.e+]*(?:%| ms) \|$", result, re.M)
    steps = ["step of 8 images, median", "at best, by the plan for v5e:2x2"]
    assert titles == [*coco.ROWS, *steps]
    assert capsys.readouterr().out.endswith(result + "\n")
    coco.main()  # again: nothing is left to do, but the table
    printed = capsys.readouterr().out
    assert re.findall("^grain-jax (.*?) --", printed, re.M) == ["train"]
