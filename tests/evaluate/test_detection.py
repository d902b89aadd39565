import contextlib
import copy
import io
import json
import sys

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from grain_jax import inference
from grain_jax.checkpoint import saved_model
from grain_jax.evaluate import __main__ as command
from grain_jax.evaluate import detection
from tests import perturbed, tiny
from tests.evaluate.stub import StubPredictor, measure, write_picture

KEYS = ("ap", "ap50", "ap75", "ar1", "ar10", "ar100")  # stats 0, 1, 2, 6, 7, 8 of pycocotools


def _random_set(seed):
    """Random truth and detections: crowds, ties of scores, images and classes without boxes."""
    rng = np.random.default_rng(seed)
    classes = [{"id": int(i), "name": f"c{i}"} for i in rng.choice(90, rng.integers(1, 5), False)]
    images = [{"id": int(i)} for i in rng.choice(1000, rng.integers(1, 5), False)]
    ids = [x["id"] for x in classes]
    truth, found = [], []
    for image in images:
        for _ in range(rng.integers(0, 7) * (rng.random() < 0.8)):
            x, y, w, h = rng.uniform(0, 200, 2).tolist() + rng.uniform(2, 150, 2).tolist()
            truth.append({"image_id": image["id"], "category_id": int(rng.choice(ids)), "bbox": [x, y, w, h]})
            truth[-1] |= {"area": w * h * rng.uniform(0.3, 1), "iscrowd": int(rng.random() < 0.15)}
            for _ in range(rng.integers(0, 4)):  # near it
                box = [x, y, w, h] + rng.normal(0, 0.1, 4) * [w, h, w, h]
                bbox = np.maximum(box, [-9, -9, 0.5, 0.5]).tolist()
                category = truth[-1]["category_id"] if rng.random() < 0.8 else int(rng.choice(ids))
                found.append({"image_id": image["id"], "category_id": category, "bbox": bbox})
        for _ in range(rng.choice([0, 3, 130], p=[0.3, 0.6, 0.1])):  # far from any
            bbox = rng.uniform(0, 200, 4).tolist()
            found.append({"image_id": image["id"], "category_id": int(rng.choice(ids)), "bbox": bbox})
    for x in found:
        x["score"] = float(rng.integers(0, 12) / 11) if seed % 2 else float(rng.random())
    if all(x["iscrowd"] for x in truth):
        truth.append({"image_id": images[0]["id"], "category_id": ids[0], "bbox": [1.0, 2.0, 10.0, 10.0]})
        truth[-1] |= {"iscrowd": 0, "area": 100.0}
    return {"images": images, "categories": classes, "annotations": truth}, found


def _expected(truth, found, class_ids=None):
    """The numbers of pycocotools."""
    with contextlib.redirect_stdout(io.StringIO()):
        sets = [COCO(), COCO()]
        for coco, items in zip(sets, (truth["annotations"], found)):
            area = lambda x: x["bbox"][2] * x["bbox"][3]
            numbered = [{"area": area(x), "iscrowd": 0, **x, "id": i} for i, x in enumerate(items, 1)]
            coco.dataset = copy.deepcopy({**truth, "annotations": numbered})
            coco.createIndex()
        counter = COCOeval(*sets, "bbox")
        if class_ids is not None:
            counter.params.catIds = class_ids
        counter.evaluate()
        counter.accumulate()
        counter.summarize()
    return dict(zip(KEYS, counter.stats[[0, 1, 2, 6, 7, 8]]))


def test_200_random_sets_have_the_numbers_of_pycocotools(capsys):
    splits = 0
    for seed in range(200):
        truth, found = _random_set(seed)
        precision, recall = detection.curves(truth, found)
        expected = pytest.approx(_expected(truth, found), abs=1e-9, rel=0)
        assert detection.means(precision, recall) == expected, seed
        ids = sorted(x["id"] for x in truth["categories"])
        seen = np.random.default_rng(seed).random(len(ids)) < 0.5
        for which in (seen, ~seen)[: 1 + seed % 2]:
            chosen = [i for i, use in zip(ids, which) if use]
            if any(x["category_id"] in chosen and not x["iscrowd"] for x in truth["annotations"]):
                splits += 1
                got = detection.means(precision[:, :, which], recall[:, which])
                assert got == pytest.approx(_expected(truth, found, chosen), abs=1e-9, rel=0), seed
    assert splits > 150 and capsys.readouterr() == ("", "")


def test_lvis_counts_only_where_a_class_was_looked_for():
    """A box of a class that nobody looked for in the image counts neither way; classes have groups."""
    images = [{"id": 1, "neg_category_ids": [2], "not_exhaustive_category_ids": []}]
    images += [{"id": 2, "neg_category_ids": [], "not_exhaustive_category_ids": [1]}]
    categories = [{"id": i, "name": str(i), "frequency": f} for i, f in ((1, "r"), (2, "f"))]
    box, far = [0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 10.0, 10.0]
    of = lambda image, category, bbox: {"image_id": image, "category_id": category, "bbox": bbox}
    truth = {"images": images, "categories": categories}
    truth["annotations"] = [of(1, 1, box), of(2, 1, box), of(2, 2, box)]
    # The second is not exhaustive and ignored, the fourth is negative: a false one.
    found = [of(1, 1, box), of(2, 1, far), of(2, 1, box), of(1, 2, far), of(2, 2, box)]
    found = [x | {"score": score} for x, score in zip(found, (0.5, 0.9, 0.4, 0.9, 0.5))]
    precision, recall = detection.curves(truth, found, detection.LVIS_LIMITS)
    assert precision[..., 0, -1].mean(axis=(0, 1)) == pytest.approx([1.0, 0.5])
    assert detection.means(precision, recall, detection.LVIS_LIMITS)["ar300"] == 1.0
    truth["images"][0]["neg_category_ids"] = []  # nobody looked for class 2 in the first image
    precision, _ = detection.curves(truth, found, detection.LVIS_LIMITS)
    assert precision[..., 0, -1].mean(axis=(0, 1)) == pytest.approx([1.0, 1.0])


CAT, DOG = [1.0, 0.0], [0.0, 1.0]


class Boxes(StubPredictor):
    """A box head that calls what lies left a cat, and other things a dog."""

    has_box_head, region_logit_scale, folder = True, 10.0, None
    text_scores, _calibration = inference.Predictor.text_scores, inference.Predictor._calibration

    def need_regions(self, argument):
        assert argument

    def encode_boxes(self, pictures, boxes):
        return [np.array([CAT if x[0] < 0.3 else DOG for x in each]).reshape(-1, 2) for each in boxes]


@pytest.fixture
def files(tmp_path):
    """Two images of 20 x 10 pixels: a cat left and a dog right in the first, and a cat in the second."""
    for i in (0, 1):
        write_picture(tmp_path / "val2017" / f"{i}.png", i, (20, 10))
    left, right, below = [0, 0, 10, 10], [10, 0, 10, 10], "images/v1/val2017"
    content = {"categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}], "annotations": []}
    content["images"] = [{"id": 12, "file_name": f"{below}/1.png"}]
    content["images"] += [{"id": 11, "file_name": f"{below}/0.png", "width": 20, "height": 10}]
    for n, (i, k, box) in enumerate([(11, 3, left), (11, 7, right), (12, 3, left)]):
        one = {"image_id": i, "category_id": k, "bbox": box, "id": n, "segmentation": []}
        content["annotations"].append(one)
    (tmp_path / "truth.json").write_text(json.dumps(content))
    (tmp_path / "templates.txt").write_text("a {}\n")
    (tmp_path / "seen.txt").write_text("Cat\n")
    regions = {
        0: ([[0, 0, 0.5, 1], [0.5, 0, 1, 1]], [CAT, DOG]),
        1: ([[0, 0, 0.5, 1], [0.5, 0, 1, 1]], [CAT, CAT]),  # one too many
    }
    predictor = Boxes({0: CAT, 1: CAT}, {"a cat": CAT, "a dog": DOG}, regions)
    options = dict(images=tmp_path, annotations=tmp_path / "truth.json")
    return predictor, options | dict(templates=tmp_path / "templates.txt"), tmp_path


def test_queries(files):
    predictor, options, folder = files
    got = measure("detection", predictor, **options, seen=folder / "seen.txt")
    assert (got["images"], got["boxes"], got["classes"]) == (2, 3, 2)
    assert got["most_boxes_per_image"] == 2
    # The dog comes first of its class; the first image has the first of three sure cats (ties: by image).
    assert got["per_class"]["dog"] == 1.0 and got["unseen"]["ap"] == 1.0
    assert got["seen"]["boxes"] == 2 and got["seen"]["ar1"] == 1.0
    assert got["seen"]["ap"] == got["per_class"]["cat"] == pytest.approx(1.0)
    assert got["ap"] == pytest.approx((got["per_class"]["cat"] + 1) / 2)
    json.dumps(got)
    # Objects of an image that cannot be read do not count.
    (folder / "val2017/1.png").write_bytes(b"no image")
    got = measure("detection", predictor, **options)
    assert (got["images"], got["unreadable"], got["boxes"]) == (1, 1, 2)
    assert got["ap"] == got["ar100"] == 1.0


def test_a_file_of_lvis(files):
    """Its images have URLs, an image has up to 300 detections, and classes have groups."""
    predictor, options, folder = files
    content = json.loads((folder / "truth.json").read_text())
    urls = "http://images.cocodataset.org/val2017"
    content["images"] = [{"id": i, "coco_url": f"{urls}/{n}.png"} for i, n in ((12, 1), (11, 0))]
    content["images"][0]["neg_category_ids"] = [7]
    for category, frequency in zip(content["categories"], "rf"):
        category["frequency"] = frequency
    options["annotations"].write_text(json.dumps(content))
    got = measure("detection", predictor, **options)
    assert got["rare"]["ap"] == got["per_class"]["dog"] == 1.0 == got["ar300"]
    assert got["frequent"]["boxes"] == 2 and "common" not in got and "seen" not in got


def test_proposals(files):
    predictor, options, folder = files
    path = folder / "proposals.json"
    items = [{"image_id": 11, "bbox": [0, 0, 10, 10], "score": 0.5}]
    items += [{"image_id": 11, "bbox": [10, 0, 10, 10], "score": 0.9, "category_id": 1}]
    items += [{"image_id": 12, "bbox": [0, 0, 10, 10]}, {"image_id": 99, "bbox": [0, 0, 1, 1]}]
    items += [{"image_id": 12, "bbox": [5, 0, 12, 10], "score": 0.1}]
    path.write_text(json.dumps(items))
    got = measure("detection", predictor, **options, proposals=path)
    assert (got["ap"], got["ar1"], got["ar100"]) == (1.0, 1.0, 1.0)
    # Half of the boxes: half of the cats are found.
    path.write_text(json.dumps(items[:2]))
    got = measure("detection", predictor, **options, proposals=path)
    assert got["per_class"]["dog"] == 1.0 and got["ar100"] == 0.75
    assert got["per_class"]["cat"] == pytest.approx(51 / 101)
    path.write_text("[]")
    got = measure("detection", predictor, **options, proposals=path)
    assert [got[key] for key in KEYS] == [0.0] * 6 and got["boxes"] == 3
    assert detection.Detection().needs and not detection.Detection(proposals="p.json").needs


def _run(folder, output, *more):
    flags = ["--images", str(folder), "--annotations", str(folder / "truth.json"), *more]
    return command.main(["detection", *flags, "--checkpoint", str(folder / "model"), "--output", output])


def test_the_command(files, capsys):
    *_, folder = files
    c = tiny.config(**tiny.SHALLOW)
    saved_model.save_model(folder / "model", c.model, perturbed.params(c.model), source="test")
    output = folder / "out.json"
    assert _run(folder, str(output), "--seen", str(folder / "seen.txt")) == 0
    out, err = capsys.readouterr()
    result = json.loads(output.read_text())
    assert result["kind"] == "detection" and result["boxes"] == 3
    assert 0 <= result["ap"] <= result["ap50"] <= 1 and result["seen"]["boxes"] == 2
    assert result["most_boxes_per_image"] == c.model.decoder.queries
    assert "detection: unseen/ar100" in out and "oading" not in out + err


FAULTS = {
    "no annotation": (dict(annotations=[]), "truth.json: got no annotation, expected boxes"),
    "no image": (dict(images=[{"id": 11}, {"id": 12}]), "none of the 2 images"),
    "other id": (dict(categories=[]), "annotations[0]: got image_id 11 and category_id 3, expected"),
    "no box": (dict(annotations=[{"image_id": 1}]), "missing required field `bbox`"),
    "wide": (dict(annotations=[{"image_id": 1, "bbox": [0, 0, -1, 1]}]), ">= 0"),
    "seen": ("elk\n", "seen.txt: got 1 names that no class has, the first: 'elk'"),
    "proposals": ('[{"image_id": 5, "bbox": [0, 0, 1, 1]}]', "got image_id 5, expected images"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_one_line(files, capsys, fault):
    *_, folder = files
    (folder / "model").mkdir()
    change, message = FAULTS[fault]
    more = []
    if isinstance(change, str):
        (folder / f"{fault}.txt").write_text(change)
        more = [f"--{fault}", str(folder / f"{fault}.txt")]
    else:
        content = json.loads((folder / "truth.json").read_text())
        (folder / "truth.json").write_text(json.dumps(content | change))
    assert _run(folder, str(folder / "o.json"), *more) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err


def test_the_missing_package_is_named(files, capsys, monkeypatch):
    *_, folder = files
    (folder / "model").mkdir()
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    monkeypatch.setattr(detection.importlib.util, "find_spec", lambda name: None)
    assert _run(folder, str(folder / "o.json")) == 2
    said = "detection: needs faster-coco-eval: pip install 'grain_jax[detection]'\n"
    assert capsys.readouterr().err == said
