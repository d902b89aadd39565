"""The readers of the files that evaluations are compared on: Karpathy's splits, LVIS, FG-OVD."""

import io
import json

import PIL.Image
import pytest

from grain_jax.data import sources


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    PIL.Image.new("RGB", (32, 24)).save(file, "JPEG")
    path.write_bytes(file.getvalue())


def read_all(source, folder, content, split=""):
    path = folder / f"{source}.json"
    path.write_text(json.dumps(content))
    options = sources.Options(str(folder), (str(path),), split, str(folder / "lists"), 2)
    return [item for shard in sources.shards(source, options) for item in sources.read(shard)]


def karpathy(*images):
    names = ("filename", "split", "sentences", "filepath")
    found = [dict(zip(names, image)) for image in images]
    for image in found:
        sentences = [{"raw": text, "tokens": text.lower().split()} for text in image["sentences"]]
        image["sentences"] = sentences
    return {"dataset": "coco", "images": found}


def test_karpathy_split(tmp_path):
    five = [f"An image, {k}." for k in range(5)]
    for name in ("val2014/1.jpg", "val2014/2.jpg", "3.jpg"):
        picture(tmp_path / name)
    content = karpathy(
        ("1.jpg", "test", five, "val2014"),
        ("2.jpg", "restval", five, "val2014"),
        ("3.jpg", "test", [*five, " and one more "]),  # Flickr30k's have no folder
        ("4.jpg", "test", five),
    )
    first, second, fault = read_all("karpathy", tmp_path, content, "test")
    assert (first.image, first.captions, first.regions) == ("val2014/1.jpg", tuple(five), ())
    assert (second.image, second.captions) == ("3.jpg", (*five, "and one more"))
    assert (fault.image, fault.cause) == ("4.jpg", "no such file")
    assert len(read_all("karpathy", tmp_path, content)) == 4
    with pytest.raises(
        sources.SourceError, match="got --split dev, expected one of: restval, test"
    ):
        read_all("karpathy", tmp_path, content, "dev")
    with pytest.raises(sources.SourceError, match="field `split` .*expected dataset_flickr30k"):
        read_all("karpathy", tmp_path, {"images": [{"filename": "1.jpg"}]})


def test_lvis(tmp_path):
    for name in ("val2017/000000000007.jpg", "train2017/000000000008.jpg"):
        picture(tmp_path / name)
    address = "http://images.cocodataset.org/{}2017/00000000000{}.jpg"
    content = {
        "images": [
            {"id": i, "coco_url": address.format(part, i), "width": 32, "height": 24}
            for i, part in ((7, "val"), (8, "train"))
        ],
        "categories": [
            {"id": 3, "name": "bow_(weapon)", "frequency": "r"},
            {"id": 9, "name": "baseball_bat", "frequency": "f"},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 2, 10, 20]},
            {"id": 2, "image_id": 7, "category_id": 9, "bbox": [0, 0, 4, 4]},
            {"id": 3, "image_id": 6, "category_id": 9, "bbox": [0, 0, 4, 4]},
            {"id": 4, "image_id": 7, "category_id": 5, "bbox": [0, 0, 4, 4]},
        ],
    }
    fault, first, second = read_all("lvis", tmp_path, content)
    assert fault.cause == "bad annotation" and "image_id 6" in fault.detail
    assert first.image == "val2017/000000000007.jpg"
    assert [(r.box_xyxy, r.description, r.score) for r in first.regions] == [
        ((1, 2, 11, 22), "bow (weapon)", 1.0),
        ((0, 0, 4, 4), "baseball bat", 1.0),
    ]
    assert [left.cause for left in first.left_out] == ["no description"]
    assert (second.image, second.regions) == ("train2017/000000000008.jpg", ())
    with pytest.raises(sources.SourceError, match="field `coco_url` .*expected lvis_v1"):
        read_all("lvis", tmp_path, {"images": [{"id": 1}], "annotations": [], "categories": []})


def test_fg_ovd(tmp_path):
    picture(tmp_path / "val2017/7.jpg")
    content = {
        "images": [{"id": 7, "file_name": "val2017/7.jpg", "width": 32, "height": 24}],
        "categories": [
            {"id": 1, "name": "A red cup."},
            {"id": 2, "name": "A blue cup."},
            {"id": 3, "name": "A green cup."},
        ],
        "annotations": [
            {
                "image_id": 7,
                "category_id": 1,
                "neg_category_ids": [3, 2, 9],
                "bbox": [1, 2, 10, 20],
            },
            {"image_id": 7, "category_id": 2, "neg_category_ids": [], "bbox": [0, 0, 4, 4]},
            {"image_id": 6, "category_id": 2, "neg_category_ids": [1], "bbox": [0, 0, 4, 4]},
        ],
    }
    fault, found = read_all("fg_ovd", tmp_path, content)
    assert fault.cause == "bad annotation" and "image_id 6" in fault.detail
    assert [(r.box_xyxy, r.description, r.negatives) for r in found.regions] == [
        ((1, 2, 11, 22), "A red cup.", ("A green cup.", "A blue cup.")),
        ((0, 0, 4, 4), "A blue cup.", ()),
    ]
    with pytest.raises(sources.SourceError, match="got no categories, expected a benchmark of"):
        read_all("fg_ovd", tmp_path, {"images": [], "annotations": []})
