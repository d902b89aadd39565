"""Each reader on a small sample in its public format, good and bad."""

import csv
import io
import json
import pathlib
import pickle
import tarfile

import pyarrow as pa
import pyarrow.parquet
import pytest
from etils import epath

from grain_jax.core import errors
from grain_jax.data import build, sources
from tests import record_sets

# TFDS 4.9.10 asks protobuf for a field's label; protobuf 6 has another name for it.
pytestmark = pytest.mark.filterwarnings("ignore:label:DeprecationWarning")

COUNT, SIZE = 16, (32, 24)


def boxes(number):
    """Two boxes in pixels; whole, so that no format rounds them."""
    return [(2, 3, 12, 15), (10 + number % 4, 4, 30, 20)]


def descriptions(number):
    return [f"the left part of {number}", f"a right part of {number}"]


def regions(number):
    return list(zip(boxes(number), descriptions(number), strict=True))


def caption(number):
    left, right = descriptions(number)
    return f"{left} beside {right}"


def encoded(number):
    file = io.BytesIO()
    record_sets.picture(number, SIZE).save(file, "JPEG")
    return file.getvalue()


def write_pictures(folder, name):
    """The images as files, called `name` with their number filled in."""
    for number in range(COUNT):
        path = folder / name.format(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number))


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return str(path)


def xywh(box):
    x1, y1, x2, y2 = box
    return [x1, y1, x2 - x1, y2 - y1]


def shares(box):
    return [box[0] / SIZE[0], box[1] / SIZE[1], box[2] / SIZE[0], box[3] / SIZE[1]]


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def options(folder, *paths, **fields):
    return sources.Options(
        images=str(folder / "images"),
        annotations=tuple(map(str, paths)),
        scratch=str(folder / "lists"),
        shard_size=6,
        **fields,
    )


def folder_sample(folder):
    write_pictures(folder / "images", "{:05d}.jpg")
    for number in range(COUNT):
        (folder / f"images/{number:05d}.txt").write_text(caption(number) + "\n")
    return options(folder)


def grit_sample(folder):
    for shard in range(2):
        members = []
        for number in range(shard * COUNT // 2, (shard + 1) * COUNT // 2):
            text, spans, key = caption(number), [], f"{shard:05d}{number:04d}"
            for box, description in regions(number):
                start = text.index(description)
                spans.append([start, start + len(description), *shares(box), 0.75])
            # As img2dataset writes them: numbers of such a column are all floats.
            item = {"caption": text, "key": key, "ref_exps": [list(map(float, span)) for span in spans]}
            item["noun_chunks"] = item["ref_exps"][:1]
            for ending, content in (("json", json.dumps(item)), ("txt", text)):
                members.append((f"{key}.{ending}", content.encode()))
            members.insert(-2, (f"{key}.jpg", encoded(number)))
        write_tar(folder / f"images/{shard:05d}.tar", members)
    return options(folder)


webdataset_sample = grit_sample  # which has more in its JSON


def write_objects(path, image=lambda n: {"file_name": f"{n:012d}.jpg"}, negatives=False):
    """A file of COCO's form with two objects an image; `image` says where it is."""
    images = [{"id": 7 + n, "width": SIZE[0], "height": SIZE[1]} | image(n) for n in range(COUNT)]
    names = sorted({text for n in range(COUNT) for text in descriptions(n)})
    names += [f"no {text}" for text in names] + ["x"]
    objects = []
    for number in range(COUNT):
        for box, text in regions(number):
            annotation = {"image_id": 7 + number, "bbox": xywh(box)}
            annotation["category_id"] = names.index(text)
            wrong = {"neg_category_ids": [names.index(f"no {text}"), len(names) - 1, 999]}
            objects.append(annotation | wrong if negatives else annotation)
    categories = [{"id": i, "name": name} for i, name in enumerate(names)]
    content = {"images": images, "annotations": objects, "categories": categories}
    return write_json(path, content)


def coco_sample(folder):
    write_pictures(folder / "images", "{:012d}.jpg")
    images = [{"id": n, "file_name": f"{n:012d}.jpg"} for n in range(COUNT)]
    captions = [{"image_id": n, "caption": caption(n) + "." * k} for n in range(COUNT) for k in (0, 1)]
    path = write_json(folder / "captions.json", {"images": images, "annotations": captions})
    return options(folder, path, write_objects(folder / "instances.json"))


def lvis_sample(folder):
    write_pictures(folder / "images", "val2017/{:012d}.jpg")
    address = "http://images.cocodataset.org/val2017/{:012d}.jpg"
    path = write_objects(folder / "lvis.json", lambda n: {"coco_url": address.format(n)})
    content = json.loads(pathlib.Path(path).read_text())
    for category in content["categories"]:
        category["name"] = category["name"].replace(" ", "_")
    return options(folder, write_json(folder / "lvis.json", content))


def fg_ovd_sample(folder):
    write_pictures(folder / "images", "{:012d}.jpg")
    return options(folder, write_objects(folder / "1_attributes.json", negatives=True))


def karpathy_sample(folder):
    write_pictures(folder / "images", "val2014/{}.jpg")
    images = [{"filename": f"{n}.jpg", "filepath": "val2014", "split": "test"} for n in range(COUNT)]
    for number, image in enumerate(images):
        image["sentences"] = [{"raw": caption(number), "tokens": ["a"]}] * 2
    return options(folder, write_json(folder / "dataset_coco.json", {"images": images}))


def visual_genome_sample(folder):
    write_pictures(folder / "images", "VG_100K_2/{}.jpg")
    items = []
    for number in range(COUNT):
        phrases = [
            {"region_id": 1, "phrase": text} | dict(zip(("x", "y", "width", "height"), xywh(box)))
            for box, text in regions(number)
        ]
        items.append({"id": number, "regions": phrases})
    sizes = [{"image_id": n, "width": SIZE[0], "height": SIZE[1]} for n in range(COUNT)]
    return options(
        folder,
        write_json(folder / "region_descriptions.json", items),
        write_json(folder / "image_data.json", sizes),
    )


def refcoco_sample(folder):
    write_pictures(folder / "images", "COCO_train2014_{:012d}.jpg")
    images, objects, refs = [], [], []
    for number in range(COUNT):
        name = f"COCO_train2014_{number:012d}.jpg"
        images.append({"id": number, "file_name": name, "width": SIZE[0], "height": SIZE[1]})
        for k, (box, text) in enumerate(regions(number)):
            ann_id = 100 * number + k
            objects.append({"id": ann_id, "image_id": number, "bbox": xywh(box)})
            ref = {"ref_id": ann_id, "ann_id": ann_id, "image_id": number}
            ref["split"] = "train" if number else "testA"
            ref["sentences"] = [{"sent": text, "raw": text}] * 2  # one region, two phrases
            refs.append(ref)
    path = folder / "refs(unc).p"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(refs, protocol=0))
    instances = {"images": images, "annotations": objects, "categories": []}
    return options(folder, path, write_json(folder / "instances.json", instances))


def flickr30k_entities_sample(folder):
    write_pictures(folder / "images", "{}.jpg")
    for name in ("Sentences", "Annotations"):
        (folder / name).mkdir(parents=True)
    for number in range(COUNT):
        left, right = descriptions(number)
        sentence = f"[/EN#1{number}/people/other {left}] beside [/EN#2{number}/scene {right}]\n"
        sentence += "[/EN#0/notvisual It] is a drawing .\n"
        (folder / f"Sentences/{number}.txt").write_text(sentence)
        objects = "<object><name>77</name><scene>1</scene><nobndbox>1</nobndbox></object>"
        for chain, (x1, y1, x2, y2) in enumerate(boxes(number), 1):
            corners = {"xmin": x1 + 1, "ymin": y1 + 1, "xmax": x2, "ymax": y2}
            inside = "".join(f"<{tag}>{value}</{tag}>" for tag, value in corners.items())
            objects += f"<object><name>{chain}{number}</name><bndbox>{inside}</bndbox></object>"
        size = f"<size><width>{SIZE[0]}</width><height>{SIZE[1]}</height><depth>3</depth></size>"
        text = f"<annotation>{size}{objects}</annotation>"
        (folder / f"Annotations/{number}.xml").write_text(text)
    return options(folder, folder)


def finehard_sample(folder):
    write_pictures(folder / "images", "grit-12m/coyo_image_0/00000/{:09d}.jpg")
    items = [
        {
            "caption": f"A long text about {caption(n)}.",
            "short_caption": caption(n),
            "f_path": f"grit-12m/coyo_image_0/00000/{n:09d}.jpg",
            "bbox_info": [
                {"bbox": [*shares(box), 0.75], "short_expr": text, "long_expr": f"{text}, at length"}
                | {"flag_short_neg": 1, "short_expr_negs": {"0": f"no {text}", "1": text, "2": "x"}}
                for box, text in regions(n)
            ],
        }
        for n in range(COUNT)
    ]
    write_json(folder / "jsonfiles/2024_results_0.json", items[:9])
    write_json(folder / "jsonfiles/2024_results_1.json", items[9:])
    return options(folder, folder / "jsonfiles")


def annotations_sample(folder):
    write_pictures(folder / "images", "{:05d}.jpg")
    lines = []
    for number in range(COUNT):
        described = [
            {"box": box, "description": text, "score": 0.75, "negatives": [f"no {text}", "x"]}
            for box, text in regions(number)
        ]
        line = {"image": f"{number:05d}.jpg", "caption": caption(number), "regions": described}
        lines.append(json.dumps(line) + "\n")
    (folder / "A.jsonl").write_text("\n".join(lines))  # blank lines between them
    return options(folder, folder / "A.jsonl")


def tfds_sample(folder):
    sample = annotations_sample(folder)
    arguments = ["--annotations", sample.annotations[0], "--images", sample.images]
    assert build.main([*arguments, "--output", str(folder), "--name=small"]) == 0
    return sample._replace(images=str(folder / "small"), annotations=())


def csv_sample(folder):
    write_pictures(folder / "images", "{:05d}.jpg")
    with open(folder / "boxes.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption", "boxes", "descriptions"])
        for n in range(COUNT):
            lists = json.dumps(boxes(n)), json.dumps(descriptions(n))
            rows.writerow([f"{n:05d}.jpg", caption(n), *lists])
    return options(folder, folder / "boxes.csv")


def table_of_pictures():
    """As the Hub has them: the bytes and the path of the image in a struct, boxes and texts in another."""
    return pa.table(
        {
            "image": [{"bytes": encoded(n), "path": f"{n:05d}.jpg"} for n in range(COUNT)],
            "caption": [caption(n) for n in range(COUNT)],
            "boxes": [boxes(n) for n in range(COUNT)],
            "descriptions": [descriptions(n) for n in range(COUNT)],
        }
    )


def parquet_sample(folder):
    folder.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table_of_pictures(), folder / "a.parquet", row_group_size=3)
    return options(folder, folder / "a.parquet")


def hf_dataset_sample(folder):
    """What `datasets.DatasetDict.save_to_disk` writes: Arrow's stream format, and JSON files."""
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": None}
    write_json(folder / "saved/train/state.json", state | {"_fingerprint": "0123456789abcdef"})
    write_json(folder / "saved/train/dataset_info.json", {"features": {}})
    write_json(folder / "saved/dataset_dict.json", {"splits": ["train"]})
    table = table_of_pictures()
    with pa.OSFile(str(folder / "saved/train/data-00000-of-00001.arrow"), "wb") as file:
        with pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=7)
    return options(folder, folder / "saved")


SAMPLES = {name: globals()[f"{name.replace('-', '_')}_sample"] for name in sources.SOURCES}
SCORES = {"annotations": 0.75, "finehard": 0.75, "grit": 0.75, "tfds": 0.75}
NEGATIVES = ("annotations", "fg_ovd", "finehard", "tfds")
WITHOUT_CAPTIONS = ("fg_ovd", "lvis", "refcoco", "visual_genome")
WITHOUT_REGIONS = ("folder", "karpathy", "webdataset")


def read_all(source, sample):
    return [item for shard in sources.shards(source, sample) for item in sources.read(shard)]


@pytest.mark.parametrize("source", SAMPLES)
def test_reads_its_public_format(source, tmp_path):
    sample = SAMPLES[source](tmp_path)
    shards = sources.shards(source, sample)
    assert shards == sources.shards(source, sample)  # stable over runs
    names = [shard.name for shard in shards]
    assert names == sorted(set(names)) and not any("/" in name for name in names)
    pictures = [picture for shard in shards for picture in sources.read(shard)]
    assert all(isinstance(picture, sources.Image) for picture in pictures), pictures
    assert len({picture.image for picture in pictures}) == len(pictures) == COUNT
    assert read_all(source, sample._replace(shard_size=5)) == pictures
    if sources.make(source).images_are_files:
        files = [(epath.Path(sample.images) / p.image).read_bytes() for p in pictures]
        assert [p.encoded for p in pictures] == files
    numbers = {encoded(number): number for number in range(COUNT)}
    for picture in pictures:
        number = numbers[picture.encoded]
        if source not in WITHOUT_CAPTIONS:
            assert picture.captions[0] == caption(number)
        else:
            assert picture.captions == ()
        assert not picture.left_out
        expected = [] if source in WITHOUT_REGIONS else descriptions(number)
        assert [region.description for region in picture.regions] == expected
        for region, box in zip(picture.regions, boxes(number), strict=False):
            assert region.box_xyxy == pytest.approx(box, abs=1e-5)
            assert region.score == SCORES.get(source, 1.0)
            negatives = (f"no {region.description}", "x")
            assert region.negatives == (negatives if source in NEGATIVES else ())


def causes(items):
    return {item.image: item.cause for item in items if isinstance(item, sources.Fault)}


def test_phrases_of_refcoco_and_of_entities(tmp_path):
    """Two people say the same of one object; one phrase has two boxes, and one has none."""
    sample = refcoco_sample(tmp_path / "refcoco")
    refs = pickle.loads((tmp_path / "refcoco/refs(unc).p").read_bytes())
    refs[1]["sentences"] = refs[0]["sentences"][:1]
    (tmp_path / "refcoco/refs(unc).p").write_bytes(pickle.dumps(refs, protocol=0))
    first, second, *_ = read_all("refcoco", sample)
    assert [region.description for region in first.regions] == [descriptions(0)[0]] * 2
    assert [region.box_xyxy for region in first.regions] == boxes(0)
    assert first.phrases == ((0,), (0,), (1,)) and second.phrases == ((0,), (0,), (1,), (1,))
    sample = flickr30k_entities_sample(tmp_path / "entities")
    path = tmp_path / "entities/Annotations/0.xml"
    path.write_text(path.read_text().replace("<name>20</name>", "<name>10</name>"))
    first, second, *_ = read_all("flickr30k_entities", sample)
    assert [region.box_xyxy for region in first.regions] == boxes(0)
    assert first.phrases == ((0, 1),) and second.phrases == ((0,), (1,))


def test_bad_regions_are_left_out_by_name_and_their_picture_stays(tmp_path):
    sample = coco_sample(tmp_path)
    path = tmp_path / "instances.json"
    content = json.loads(path.read_text())
    first = content["annotations"][0]
    content["annotations"] += [
        first | {"bbox": [2, 3, 0, 5]},
        first | {"bbox": [-20, 3, 30, 5]},
        first | {"bbox": [-4, 3, 20, 5], "score": 0.5},  # hangs over a little: stays, unclipped
        first | {"category_id": 999},
        first | {"iscrowd": 1},
        first | {"image_id": 999},
    ]
    content["images"][1]["width"] = 640
    content["images"][2]["file_name"] = "gone.jpg"
    content["images"][3]["file_name"] = "../outside.jpg"
    path.write_text(json.dumps(content))
    items = read_all("coco", sample)
    assert causes(items) == {
        f"{path}:annotations[{len(content['annotations']) - 1}]": "bad annotation",
        "gone.jpg": "no such file",
        "../outside.jpg": "bad annotation",
    }
    picture = next(item for item in items if item.image == "000000000000.jpg")
    expected = ["crowd", "bad box", "bad box", "no description"]
    assert [fault.cause for fault in picture.left_out] == expected
    line = "got box [-20.0, 3.0, 10.0, 8.0], expected at least 50%"
    assert picture.left_out[2].detail.startswith(line)
    assert picture.regions[-1].box_xyxy == (-4, 3, 16, 8) and picture.regions[-1].score == 0.5


def test_samples_of_tars_that_are_incomplete(tmp_path):
    members = [
        ("a/1.txt", b"alone"),
        ("a/2.jpg", encoded(2)),
        ("a/2.json", b"{broken"),
        ("a/3.seg.png", encoded(3)),
        ("a/3.jpg", encoded(3)),
        ("a/3.json", json.dumps({"caption": "of the json"}).encode()),
    ]
    write_tar(tmp_path / "images/00001.tar", members)
    items = read_all("webdataset", options(tmp_path))
    assert causes(items) == {"00001/a/1": "no image", "00001/a/2.jpg": "bad annotation"}
    assert items[-1].image == "00001/a/3.jpg" and items[-1].captions == ("of the json",)
    (shard,) = sources.shards("webdataset", options(tmp_path), {"captions": "captoin"})
    assert list(sources.read(shard))[-1].detail == "json: no captoin; did you mean caption?"


@pytest.mark.parametrize(
    "source, fields, own_options, line",
    [
        ("refcoco", {"split": "val"}, {}, "got --split val, expected one of: testA, train"),
        ("flickr30k_entities", {"split": "val"}, {}, "val.txt: no such file, expected a list of ids"),
        ("karpathy", {}, {}, "field `split` .*expected dataset_flickr30k"),
        ("csv", {}, {"bxoes": "b"}, "--option bxoes of .*: no such key; did you mean boxes"),
        ("webdataset", {}, {"boxes": "b"}, "webdataset: has no column labels or descriptions; --option"),
        ("csv", {}, {"unit": "inch"}, "Invalid enum value 'inch'"),
    ],
)
def test_wrong_input_is_one_line(source, fields, own_options, line, tmp_path):
    sample = SAMPLES.get(source, csv_sample)(tmp_path)._replace(**fields)
    if source == "karpathy":
        write_json(pathlib.Path(sample.annotations[0]), {"images": [{"filename": "1.jpg"}]})
    with pytest.raises(errors.UserError, match=line):
        sources.shards(source, sample, own_options)
