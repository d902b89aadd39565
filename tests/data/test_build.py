import errno
import hashlib
import json

import numpy as np
import PIL.Image
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from grain_jax.core import images
from grain_jax.data import build, duplicates, example, survey
from grain_jax.input_pipeline import record_writer
from tests import record_sets

# TFDS 4.9.10 asks protobuf for a field's label; protobuf 6 has another name for it.
pytestmark = pytest.mark.filterwarnings("ignore:label:DeprecationWarning")


def read_back(output, name="tiny_set"):
    builder = tfds.builder_from_directory(output / name / "1.0.0")
    examples = tfds.as_numpy(builder.as_dataset(split="train"))
    return builder, {e["id"].decode(): e for e in examples}


def test_tfds_reads_what_was_built(tmp_path):
    lines = record_sets.write_annotations(tmp_path / "in", 20)
    assert record_sets.build_set(tmp_path / "in", tmp_path / "out", "--num-shards=5") == 0
    builder, examples = read_back(tmp_path / "out")
    assert builder.info.splits["train"].shard_lengths == [4] * 5
    assert len(examples) == 20
    for number, line in enumerate(lines):
        got = examples[f"id{number}"]
        np.testing.assert_array_equal(got["image"], np.asarray(record_sets.picture(number)))
        assert [c.decode() for c in got["captions"]] == [line["caption"], *line["captions"]]
        assert got["synthetic_caption"].decode() == line["synthetic_caption"]
        descriptions = [d.decode() for d in got["regions"]["description"]]
        assert descriptions == [r["description"] for r in line["regions"]]
        boxes = np.array([r["box"] for r in line["regions"]]).reshape(-1, 4)
        expected = (boxes / [16, 12, 16, 12])[:, [1, 0, 3, 2]]
        np.testing.assert_allclose(got["regions"]["bbox"], expected, atol=1e-7)
        np.testing.assert_allclose(got["regions"]["score"], [r["score"] for r in line["regions"]])


def test_two_builds_write_the_same_bytes(tmp_path):
    record_sets.write_annotations(tmp_path / "in", 300)  # two parts
    contents = []
    for workers in (0, 2):  # 0: this process
        output = tmp_path / str(workers)
        flags = ["--num-shards=2", *([f"--workers={workers}"] if workers else [])]
        assert record_sets.build_set(tmp_path / "in", output, *flags) == 0
        files = [path for path in output.rglob("*") if path.is_file()]
        contents.append({path.relative_to(output): path.read_bytes() for path in files})
    assert contents[0] == contents[1]
    for path in (tmp_path / "0").rglob("*.tfrecord-*"):
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            # Protobuf orders the fields of a map anew in each process, unless it is asked to sort them.
            example = tf.train.Example.FromString(record)
            assert record == example.SerializeToString(deterministic=True)


def changed(**fields):
    return json.dumps(record_sets.annotation(3) | fields).encode()


OUTSIDE = [{"box": [12, 0, 24, 8], "description": "a part", "score": 0.5}]
MALFORMED = {
    "broken JSON": (b'{"image": "00003.png", ', "not JSON: "),
    "no such picture": (changed(image="gone.png"), 'image: got "gone.png", there is no '),
    "truncated": (changed(image="short.png"), 'image: got "short.png", image file is truncated'),
    "mostly outside": (changed(regions=OUTSIDE), "at least 50% of it in the image of 16 x 12"),
    "no caption": (changed(caption=None, captions=[" "], synthetic_caption="", regions=[]), "no caption:"),
    "same id": (changed(id="id0"), 'id: got "id0", which line 1 has already'),
}  # fmt: skip


def test_every_fault_is_named_with_its_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(survey, "MOST_PRINTED", 5)
    record_sets.write_annotations(tmp_path / "in", 100)
    whole = (tmp_path / "in/00003.png").read_bytes()
    (tmp_path / "in/short.png").write_bytes(whole[: len(whole) * 2 // 3])
    lines, line_numbers = (tmp_path / "in/A.jsonl").read_bytes().splitlines(), {}
    for number, (name, (line, _)) in enumerate(MALFORMED.items()):
        line_numbers[name] = 10 + 2 * number
        lines.insert(line_numbers[name] - 1, line.replace(b'"id3"', b'"bad%d"' % number))
    (tmp_path / "in/A.jsonl").write_bytes(b"\n".join(lines) + b"\n\n")
    assert record_sets.build_set(tmp_path / "in", tmp_path / "out") == 2
    assert "more than --max-faults 0.01 allows" in capsys.readouterr().err.splitlines()[-1]
    assert [p.name for p in (tmp_path / "out/tiny_set").iterdir()] == ["faults.jsonl"]
    status = record_sets.build_set(tmp_path / "in", tmp_path / "out", "--max-faults=0.3")
    assert status == 0
    out = capsys.readouterr().err.splitlines()
    file, bad = tmp_path / "in/A.jsonl", len(MALFORMED)
    listed = [json.loads(x) for x in (tmp_path / "out/tiny_set/faults.jsonl").read_text().splitlines()]
    faults = {item["where"]: item["fault"] for item in listed}
    assert list(faults) == [f"{file}:{line}" for line in line_numbers.values()]
    for name, (_, expected) in MALFORMED.items():
        assert expected in faults[f"{file}:{line_numbers[name]}"], name
    assert out[:5] == [f"{where}: {fault}" for where, fault in faults.items()][:5]
    count = f"{bad} faults, {bad - 5} of them not shown"
    assert out[5:] == [f"{file}: {bad} of {len(lines)} lines faulty ({count})"]
    _, examples = read_back(tmp_path / "out")
    assert sorted(examples) == sorted(f"id{i}" for i in range(100))


SHARES = {  # source -> its file, with a box in shares of width and height
    "annotations": changed(
        image="00000.png",
        id=None,
        regions=[{"box": [0.25, 0, 0.5, 1.001], "description": "a part", "score": 1}],
    ).decode(),
    "coco": json.dumps(
        {
            "images": [{"id": 1, "file_name": "00000.png", "width": 16, "height": 12}],
            "annotations": [{"image_id": 1, "category_id": 1, "bbox": [0.25, 0, 0.25, 1]}],
            "categories": [{"id": 1, "name": "a part"}],
        }
    ),
    "csv": 'image,boxes,labels\n00000.png,"[[0.25, 0, 0.5, 1]]","[""a part""]"\n',
}


@pytest.mark.parametrize("source", SHARES)
def test_boxes_that_are_all_shares_are_an_error_that_names_the_option(source, tmp_path, capsys):
    record_sets.write_annotations(tmp_path, 4)  # A.jsonl has pixels
    (tmp_path / "shares").write_text(SHARES[source])
    flags = [f"--source={source}", f"--images={tmp_path}", "--name=x", f"--output={tmp_path}/out"]
    flags += ["--annotations", f"{tmp_path}/shares"]
    assert build.main([*flags, *[f"{tmp_path}/A.jsonl"] * (source == "annotations")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"{tmp_path}/shares: got boxes that all lie in [0, 1], as shares")
    assert "; --option unit=share " in line and not (tmp_path / "out/x/1.0.0").exists()
    assert build.main([*flags, "--option=unit=share"]) == 0
    (example,) = read_back(tmp_path / "out", "x")[1].values()
    np.testing.assert_allclose(example["regions"]["bbox"], [[0, 0.25, 1, 0.5]])


def test_boxes_are_clipped_and_unknown_keys_counted(tmp_path, capsys):
    folder = tmp_path / "in"
    record_sets.write_annotations(folder, 1)
    line = record_sets.annotation(0) | {"licence": "CC0"}
    line["regions"] = [{"box": [-2, 3, 8, 13], "description": "x", "score": 1, "mask": 0}]
    (folder / "A.jsonl").write_text(json.dumps(line))
    assert record_sets.build_set(folder, tmp_path / "out") == 0
    summary = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 1 boxes clipped to their image" in summary
    assert "unknown keys kept out: licence (1), regions.mask (1)" in summary
    _, examples = read_back(tmp_path / "out")
    np.testing.assert_allclose(examples["id0"]["regions"]["bbox"], [[0.25, 0, 1, 0.5]])


def test_stored_size_is_the_exact_resize(tmp_path):
    record_sets.write_annotations(tmp_path / "in", 4, size=(40, 31))
    arguments = ("--store-size=16", "--encoding=png")
    assert record_sets.build_set(tmp_path / "in", tmp_path / "out", *arguments) == 0
    _, examples = read_back(tmp_path / "out")
    for number in range(4):
        expected = images.resize(record_sets.picture(number, (40, 31)), 16)
        np.testing.assert_array_equal(examples[f"id{number}"]["image"], expected)


def test_encodings():
    rgb = record_sets.picture(5)

    def stored(picture, file_format, **fields):
        file = example.io.BytesIO()
        picture.save(file, file_format)
        encoded = file.getvalue()
        decoded = images.decode_image(encoded)
        out = example.encode_image(decoded, encoded, example.Encoding(**fields))
        return encoded, out, images.decode_image(out)

    encoded, out, _ = stored(rgb, "JPEG", kind="original")
    assert out == encoded
    _, _, webp = stored(rgb.convert("L"), "TIFF", kind="original")  # tf.data reads no TIFF
    assert webp.format == "PNG" and webp.mode == "RGB"
    encoded, out, jpeg = stored(rgb, "PNG", kind="jpeg", quality=90)
    assert jpeg.format == "JPEG" and jpeg.size == rgb.size
    encoded, out, same = stored(rgb.resize((16, 16)), "PNG", kind="original", size=16)
    assert out == encoded


def test_a_set_is_replaced_only_on_request_and_only_by_a_whole_one(tmp_path, monkeypatch, capsys):
    record_sets.write_annotations(tmp_path / "in", 3)
    assert record_sets.build_set(tmp_path / "in", tmp_path / "out") == 0
    assert record_sets.build_set(tmp_path / "in", tmp_path / "out") == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    record_sets.write_annotations(tmp_path / "in", 5)
    with (tmp_path / "in/A.jsonl").open("a") as file:
        file.write("{}\n")

    def fails(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "records")

    arguments, faults = ("--overwrite", "--max-faults=1"), tmp_path / "out/tiny_set/faults.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(record_writer, "write", fails)
        assert record_sets.build_set(tmp_path / "in", tmp_path / "out", *arguments) == 1
    assert "records: No space left on device; make room" in capsys.readouterr().err
    assert len(read_back(tmp_path / "out")[1]) == 3 and faults.read_text() == ""
    assert record_sets.build_set(tmp_path / "in", tmp_path / "out", *arguments) == 0
    assert len(read_back(tmp_path / "out")[1]) == 5 and faults.read_text()
    target = tmp_path / "out/tiny_set/1.0.0"
    old = target.rename(target.with_name("incomplete.old_1.0.0"))  # as a kill between the two renames
    assert record_sets.build_set(tmp_path / "in", tmp_path / "out") == 2
    assert len(read_back(tmp_path / "out")[1]) == 5
    old.mkdir()  # as a kill after them
    old.with_name("incomplete.ABC123_2.0.0").mkdir()  # of another version's build
    assert record_sets.build_set(tmp_path / "in", tmp_path / "out", *arguments) == 0
    names = sorted(path.name for path in target.parent.iterdir())
    assert names == ["1.0.0", "faults.jsonl", "incomplete.ABC123_2.0.0"]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--encoding=jpeg:101", "expected original, png or jpeg:Q"),
        ("--num-shards=9", "at most one shard each"),
        ("--holdout=1", "of 3 images 0 are left for train and 3 for validation"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(tmp_path, capsys, argument, expected):
    record_sets.write_annotations(tmp_path / "in", 3)
    assert record_sets.build_set(tmp_path / "in", tmp_path / "out", argument) == 2
    error = [x for x in capsys.readouterr().err.splitlines() if "0 of 3 lines faulty" not in x]
    assert len(error) == 1 and expected in error[0]


def noise(number):
    """An image of 9 x 8 grey places, told from others by its difference hash."""
    greys = np.random.default_rng(number).integers(0, 256, (8, 9), np.uint8)
    return PIL.Image.fromarray(greys).resize((72, 64), PIL.Image.Resampling.NEAREST)


def write_noise(folder, numbers):
    """A.jsonl and images; the id of each is its number."""
    folder.mkdir(parents=True)
    lines = []
    for number in numbers:
        noise(number).save(folder / f"{number}.png")
        lines.append({"image": f"{number}.png", "caption": "a", "id": str(number)})
    write_lines(folder, lines)
    return lines


def write_lines(folder, lines):
    (folder / "A.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def ids_of(output):
    """Ids of each split, sorted."""
    builder = tfds.builder_from_directory(output / "tiny_set/1.0.0")
    return {
        split: sorted(e["id"].decode() for e in tfds.as_numpy(builder.as_dataset(split=split)))
        for split in builder.info.splits
    }


@pytest.mark.parametrize("bits", [(), (3, 4, 5), (0, 16, 63), (0, 16, 32, 48), (3, 4, 5, 6)])
def test_up_to_three_different_bits_are_a_near_duplicate(bits):
    known = np.array([[1, 0x0123456789ABCDEF]], np.uint64)
    other = known ^ np.array([[2, sum(1 << bit for bit in bits)]], np.uint64)
    exact, near = duplicates.matches(other, known)
    assert (exact.tolist(), near.tolist()) == ([False], [len(bits) <= 3])


def test_a_held_out_share_is_chosen_by_hash(tmp_path):
    lines = write_noise(tmp_path / "in", range(80))
    for number in range(20):  # the same file, the same pixels, and the image at half its size
        noise(number).save(tmp_path / f"in/{number}b.png")
        noise(number).save(tmp_path / f"in/{number}.bmp")
        noise(number).resize((36, 32)).convert("RGB").save(tmp_path / f"in/{number}.jpg", quality=85)
        for kind in ("b.png", ".bmp", ".jpg"):
            line = {"image": f"{number}{kind}", "caption": "a", "id": f"{number}{kind}"}
            lines.append(line)
    write_lines(tmp_path / "in", lines)
    arguments = ("--holdout=0.3", "--store-size=16")
    assert record_sets.build_set(tmp_path / "in", tmp_path / "out", *arguments) == 0
    splits = ids_of(tmp_path / "out")
    held_out = set(splits["validation"])
    digests = [hashlib.sha256((tmp_path / "in" / line["image"]).read_bytes()) for line in lines]
    drawn = sum(int.from_bytes(digest.digest()[:8]) < 0.3 * 2**64 for digest in digests)
    assert len(held_out) > drawn
    assert splits["train"] == sorted({line["id"] for line in lines} - held_out)
    sides = [{f"{n}{kind}" in held_out for kind in ("", "b.png", ".bmp", ".jpg")} for n in range(20)]
    assert {True} in sides and {False} in sides and {True, False} not in sides


def test_pictures_of_another_set_are_left_out(tmp_path, capsys):
    write_noise(tmp_path / "other", range(20))
    arguments = ("--store-size=32", "--encoding=jpeg:90", "--holdout=0.3")
    assert record_sets.build_set(tmp_path / "other", tmp_path / "out", *arguments) == 0
    other = tmp_path / "out/tiny_set"
    lines = write_noise(tmp_path / "in", range(15, 40))
    noise(0).convert("RGB").save(tmp_path / "in/copy.jpg", quality=70)
    flat = PIL.Image.new("RGB", (32, 32), "white")
    flat.save(tmp_path / "in/flat.png")
    for name in ("copy.jpg", "flat.png"):
        lines.append({"image": name, "caption": "a", "id": name})
    write_lines(tmp_path / "in", lines)
    flag = f"--exclude-duplicates-of={other}"
    assert record_sets.build_set(tmp_path / "in", tmp_path / "new", flag) == 0
    error = capsys.readouterr().err
    assert "A.jsonl: 6 of 27 images are of other sets and left out" in error
    expected = sorted([*map(str, range(20, 40)), "flat.png"])
    assert ids_of(tmp_path / "new") == {"train": expected}
    lines = (tmp_path / "new/tiny_set/1.0.0/duplicates.jsonl").read_text().splitlines()
    assert [tuple(json.loads(x).values()) for x in lines] == [
        *((str(number), "exact", str(other)) for number in range(15, 20)),
        ("copy.jpg", "near", str(other)),
    ]
    (other / "1.0.0/fingerprints.npy").unlink()
    assert record_sets.build_set(tmp_path / "in", tmp_path / "again", flag) == 2


def test_a_killed_build_goes_on_with_its_whole_parts(tmp_path, monkeypatch, capsys):
    record_sets.write_annotations(tmp_path / "in", 6)
    monkeypatch.setattr(build, "IMAGES_PER_PART", 2)
    assert record_sets.build_set(tmp_path / "in", tmp_path / "whole") == 0
    made, checked = [], survey._checked

    def kill_in_the_third(shard):
        made.append(shard.arguments["first_line"])
        if len(made) == 3:
            raise KeyboardInterrupt
        return checked(shard)

    monkeypatch.setattr(survey, "_checked", kill_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        record_sets.build_set(tmp_path / "in", tmp_path / "out")
    with pytest.raises(tfds.core.DatasetNotFoundError):  # nothing looks complete
        tfds.builder("tiny_set", data_dir=tmp_path / "out")
    (parts,) = (tmp_path / "out/tiny_set").glob("incomplete.parts_*")
    damaged = min((parts / "parts").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    damaged.write_bytes(b"half")
    assert record_sets.build_set(tmp_path / "in", tmp_path / "out") == 0
    assert made == [1, 3, 5, 1, 5]  # the second part alone is whole
    assert f"{damaged}: damaged, not what was written; its shard is made again" in capsys.readouterr().err
    whole, out = (
        {p.relative_to(x): p.read_bytes() for p in x.rglob("*") if p.is_file()}
        for x in (tmp_path / "whole", tmp_path / "out")
    )
    assert whole == out
