"""Tables as sources: the same records whatever file says it, columns by name, sets without captions."""

import json
import shutil
import unicodedata

import pyarrow as pa
import pyarrow.parquet
import pytest

from grain_jax.data import build, sources
from tests.data import test_sources
from tests.data.test_sources import COUNT, boxes, encoded, xywh

pytestmark = [pytest.mark.filterwarnings("ignore:label:DeprecationWarning"), pytest.mark.long]
NAMES = ["bird", "left wing"]


def classes(number):
    """The number of the class of each box."""
    return [number % 2, 1]


def labels(number):
    return [NAMES[k] for k in classes(number)]


def write_all(folder):
    """One set in each form: file -> (source, options). Texts are classes; every other image has a caption."""
    test_sources.write_pictures(folder / "images", "{:05d}.jpg")
    files = [f"{n:05d}.jpg" for n in range(COUNT)]
    texts = [f"a photo of {{}}: {n}" if n % 2 else None for n in range(COUNT)]
    with (folder / "A.jsonl").open("w") as out:
        for n, text in enumerate(texts):
            regions = [
                {"box": box, "description": f"a photo of a {name}", "score": 1}
                for box, name in zip(boxes(n), labels(n), strict=True)
            ]
            line = {"image": files[n], "caption": text, "regions": regions}
            out.write(json.dumps(line) + "\n")
    bbox = {"feature": {"dtype": "float32", "_type": "Value"}, "length": 4}
    category = {"names": NAMES, "_type": "ClassLabel"}
    feature = {"feature": {"bbox": bbox, "category": category}, "_type": "Sequence"}
    note = {"info": {"features": {"image": {"_type": "Image"}, "objects": feature}}}
    objects = [{"bbox": list(map(xywh, boxes(n))), "category": classes(n)} for n in range(COUNT)]
    images = [{"bytes": encoded(n), "path": files[n]} for n in range(COUNT)]
    table = pa.table({"image": images, "text": texts, "objects": objects})
    table = table.replace_schema_metadata({"huggingface": json.dumps(note)})
    pyarrow.parquet.write_table(table, folder / "hub.parquet", row_group_size=5)
    lists = [[{"box": b, "label": x} for b, x in zip(boxes(n), labels(n))] for n in range(COUNT)]
    paths = pa.table({"file": files, "caption": texts, "parts": lists})
    pyarrow.parquet.write_table(paths, folder / "paths.parquet")
    lines = ["file;text;box;label"]
    for n, text in enumerate(texts):
        lists = [f"'{json.dumps(values)}'" for values in (boxes(n), labels(n))]
        lines.append(";".join([files[n], text or "", *lists]).replace('"', '""').replace("'", '"'))
    (folder / "boxes.csv").write_text("\n".join(lines) + "\n")
    of_hub = dict(boxes="objects.bbox", labels="objects.category", box_format="xywh", caption="text")
    of_rows = dict(image="file", caption="text", boxes="box", labels="label", delimiter=";")
    members = []
    for n, text in enumerate(texts):
        parts = [{"bbox": xywh(b), "name": x} for b, x in zip(boxes(n), labels(n))]
        members += [(files[n], encoded(n)), (f"{n:05d}.json", {"caption": text, "parts": parts})]
    test_sources.write_tar(
        folder / "images/x.tar",
        [(k, v if isinstance(v, bytes) else json.dumps(v).encode()) for k, v in members],
    )
    of_tars = dict(boxes="parts.bbox", labels="parts.name", box_format="xywh")
    of_paths = dict(image="file", boxes="parts.box", labels="parts.label")
    return {
        "hub.parquet": ("parquet", of_hub),
        "paths.parquet": ("parquet", of_paths),
        "boxes.csv": ("csv", of_rows),
        "x.tar": ("webdataset", of_tars),
    }


def test_the_same_images_of_each_form(tmp_path):
    forms = write_all(tmp_path)
    expected = test_sources.read_all("annotations", options(tmp_path, tmp_path / "A.jsonl"))
    assert len(expected) == COUNT and expected[0].regions[1].description == "a photo of a left wing"
    assert [len(image.captions) for image in expected] == [0, 1] * (COUNT // 2)
    for name, (source, own_options) in forms.items():
        base_options = options(tmp_path, tmp_path / name, label_text="a photo of a {}")
        shards = sources.shards(source, base_options, own_options)
        images = [image for shard in shards for image in sources.read(shard)]
        prefix = "x/" * (source == "webdataset")
        assert [image._replace(where="") for image in images] == [
            image._replace(where="", image=prefix + image.image) for image in expected
        ], name


def options(folder, path, **fields):
    return sources.Options(str(folder / "images"), (str(path),), scratch=str(folder / "x"), **fields)


def test_what_columns_may_be(tmp_path):
    """Shares, scores, ids, several captions; a name that is there twice gets its row's."""
    box = [[0.5, 0.5, 0.5, 0.25]]
    table = {
        "image": [{"bytes": encoded(n), "path": "a.jpg"} for n in range(2)],
        "captions": [["one", "two"], []],
        "boxes": [box, []],
        "labels": [["left wing"], []],
        "scores": [[0.25], []],
        "id": [7, 8],
        "more": [None, None],
    }
    pyarrow.parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    own_options = {"box_format": "cxcywh", "unit": "share"}
    base_options = options(tmp_path, tmp_path / "a.parquet", label_text="the {}")
    (shard,) = sources.shards("parquet", base_options, own_options)
    first, second = sources.read(shard)
    assert first.captions == ("one", "two") and (first.id, second.id) == ("7", "8")
    width, height = test_sources.SIZE
    (region,) = first.regions
    assert region.box_xyxy == (0.25 * width, 0.375 * height, 0.75 * width, 0.625 * height)
    assert (region.description, region.score) == ("the left wing", 0.25)
    assert (first.image, second.image) == ("a.jpg", "000000001/a.jpg")
    assert (second.captions, second.regions) == ((), ())


def run_build(folder, capsys, *flags):
    """(status, lines on stderr) of a build of the flags, with images in FOLDER/images."""
    arguments = [f"--images={folder / 'images'}", f"--output={folder / 'out'}", "--name=x"]
    status = build.main([*map(str, flags), *arguments, "--overwrite"])
    return status, capsys.readouterr().err.splitlines()


def test_names_in_another_unicode_form(tmp_path, capsys):
    """The folder has "ü" in one form, the annotations in the other."""
    (tmp_path / "images/Müll").mkdir(parents=True)
    names = [unicodedata.normalize(form, "Müll/ö.jpg") for form in ("NFC", "NFD")]
    for there, named in (names, names[::-1]):
        shutil.rmtree(tmp_path / "images")
        file = tmp_path / "images" / there
        file.parent.mkdir(parents=True)
        file.write_bytes(encoded(0))
        (tmp_path / "A.jsonl").write_text(json.dumps({"image": named, "caption": "a"}))
        assert run_build(tmp_path, capsys, f"--annotations={tmp_path}/A.jsonl")[0] == 0


def test_a_fault_of_a_source_names_the_file_and_its_line(tmp_path, capsys):
    test_sources.write_pictures(tmp_path / "images", "{:05d}.jpg")
    (tmp_path / "a.csv").write_text("image,caption\n\n00000.jpg,a\n00001.jpg\ngone.jpg,a\n")
    gone = f"gone.jpg: no such file: there is no {tmp_path}/images/gone.jpg"
    cells = "bad annotation: got 1 cells, expected 2 as in the first row"
    path = tmp_path / "a.csv"
    flags = ["--source=csv", "--annotations", path, "--max-faults=0.9"]
    status, lines = run_build(tmp_path, capsys, *flags)
    assert status == 0 and sorted(lines[:2]) == [f"{path}:4: {cells}", f"{path}:5: {gone}"]


def test_boxes_in_another_format_are_an_error_that_names_the_right_one(tmp_path, capsys):
    test_sources.write_pictures(tmp_path / "images", "{:05d}.jpg")
    width, height = test_sources.SIZE
    far = [[width - 4, height - 4, 4, 4]]  # left, top, width, height
    table = {"image": ["00000.jpg", "00001.jpg"], "boxes": [far, far], "labels": [["wing"], ["tail"]]}
    table["caption"] = ["a bird", "a bird"]
    pyarrow.parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    flags = ["--source=parquet", f"--annotations={tmp_path}/a.parquet"]
    status, lines = run_build(tmp_path, capsys, *flags)
    assert status == 2, lines
    assert "100% of the boxes do not fit their images, more than --max-faults 0.01 allows" in lines[-1]
    assert "--option box_format=xywh fits all but 0 of the first 2 images' boxes" in lines[-1]
    assert run_build(tmp_path, capsys, *flags, "--option", "box_format=xywh")[0] == 0


@pytest.mark.parametrize("name", ["hub.parquet", "x.tar"])
def test_boxes_that_no_option_names_are_said(name, tmp_path, capsys):
    forms = write_all(tmp_path)
    source, named = forms[name]
    where = ["--max-faults=0.6", *([f"--annotations={tmp_path}/{name}"] * (source != "webdataset"))]
    where += ["--option", "caption=text"] * (source != "webdataset")
    status, lines = run_build(tmp_path, capsys, f"--source={source}", *where)
    assert status == 0
    boxes = (
        f"got no regions, but it has boxes; --option boxes={named['boxes']} labels={named['labels']} reads"
    )
    assert any(boxes in line for line in lines), lines
