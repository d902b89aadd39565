"""`evaluate segmentation`: numbers against plain counts, formats of sets, masks that cannot be used."""

import json
import types

import numpy as np
import PIL.Image
import pytest

from grain_jax import inference
from grain_jax.core import errors
from grain_jax.evaluate import segmentation, tables
from tests import tiny
from tests.evaluate.report import workdirs
from tests.hostile import image_files as hostile

SIZE = 16
HEAD = dict(model__boxes__kind="roi_align", loss__box_description=1.0)


class Coloured:
    """A model whose class of a pixel is its grey value divided by STEP."""

    STEP = 2
    logit_scale, segment = 100.0, inference.Predictor.segment
    model = types.SimpleNamespace(image=types.SimpleNamespace(image_size=SIZE))

    def __init__(self):
        self.asked = []

    def encode_text(self, texts):
        self.asked += texts
        return np.ones((len(texts), 2), np.float32)

    def class_maps(self, images, classes, **options):
        self.options = options
        red = np.asarray(images, np.float32)[..., 0].reshape(-1, 4, 4, 4, 4).mean((2, 4))
        of_class = np.arange(len(classes.names), dtype=np.float32) * self.STEP
        return -np.abs(red[:, None] - of_class[:, None, None]) / 10


def paint(path, classes, size=(20, 17)):
    """An image whose columns have these classes, in equal parts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = np.repeat(np.array(classes) * Coloured.STEP, -(-size[0] // len(classes)))[: size[0]]
    pixels = np.broadcast_to(grey[:, None], (*size[::-1], 3)).astype(np.uint8)
    PIL.Image.fromarray(pixels).save(path)


def mask(path, ids, mode="L", **more):
    """A PNG of ids, an array [H, W]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    types = {"1": bool, "I;16": np.uint16}
    pixels = np.asarray(ids).astype(types.get(mode, np.uint8))
    image = PIL.Image.fromarray(pixels, "P" if mode == "P" else None)
    if mode == "P":
        image.putpalette([*range(255, -1, -1)] * 3)
    image.save(path, **more)


def measure(predictor=None, **options):
    options = {k: str(v) if hasattr(v, "parts") else v for k, v in options.items()}
    entry = segmentation.Segmentation(**{"batch_size": 3, **options})
    assert entry.check() > 0
    return entry.evaluate(predictor or Coloured())


def folder(root, count=4, size=(20, 17), names="wall\nfloor\nsky\n"):
    """Images of one class each, whose masks are right but for one column and an ignored one."""
    (root / "classes.txt").parent.mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text(names)
    for i in range(count):
        paint(root / "images" / f"{i}.png", [i % 3], size)
        ids = np.full(size[::-1], i % 3)
        ids[:, 0], ids[:, 1] = (i + 1) % 3, 255
        mask(root / "masks" / f"{i}.png", ids)
    return root


def by_counting(truth, predicted, classes):
    """(mIoU, pixel accuracy, mean class accuracy), class by class over the pixels of all images."""
    truth, predicted = (np.concatenate([x.ravel() for x in each]) for each in (truth, predicted))
    predicted = np.where(truth < 0, -1, predicted)
    of_classes = [(truth == c, predicted == c) for c in range(classes)]
    ious = [(t & p).sum() / (t | p).sum() for t, p in of_classes if (t | p).any()]
    shares = [(t & p).sum() / t.sum() for t, p in of_classes if t.any()]
    return np.mean(ious), (truth == predicted)[truth >= 0].mean(), np.mean(shares)


NAMES = ("miou", "pixel_accuracy", "mean_class_accuracy")


@pytest.mark.parametrize("seed", range(3))
def test_numbers_are_those_of_a_plain_count(seed):
    random = np.random.default_rng(seed)
    classes = int(random.integers(2, 9))
    truth, predicted, pixels = [], [], 0
    for _ in range(int(random.integers(1, 9))):
        shape = random.integers(1, 14, 2)
        truth.append(random.integers(-1, random.integers(1, classes + 1), shape))
        truth[-1].flat[0] = 0
        predicted.append(random.integers(0, random.integers(1, classes + 1), shape))
        pixels += segmentation.count_pixels(truth[-1], predicted[-1], classes)
    got = segmentation.measures(pixels, list(map(str, range(classes))))
    assert [got[name] for name in NAMES] == pytest.approx(by_counting(truth, predicted, classes), rel=1e-12)


def test_chance_and_classes_without_pixels():
    truth, predicted = np.array([[0, 0, 0, 1]]), np.array([[0, 0, 1, 1]])
    got = segmentation.measures(segmentation.count_pixels(truth, predicted, 3), ["a", "b", "c"])
    assert got["miou"] == pytest.approx((2 / 3 + 1 / 2) / 2)  # the third occurs nowhere
    # Drawn for each pixel: of 3 pixels one is right, 4/3 are said to be it.
    assert got["chance_miou"] == pytest.approx((1 / (3 + 4 / 3 - 1) + (1 / 3) / 2) / 3)
    assert got["per_class"]["c"] == {"iou": None, "accuracy": None, "pixels": 0}
    assert got["per_class"]["b"] == {"iou": 0.5, "accuracy": 1.0, "pixels": 1}


def test_a_folder(tmp_path):
    got = measure(images=folder(tmp_path))
    assert (got["images"], got["classes"], got["classes_seen"]) == (4, 3, 3)
    assert got["pixels"] == 4 * 17 * 19 and got["pixel_accuracy"] == pytest.approx(18 / 19)
    assert got["per_class"]["wall"]["pixels"] == 2 * 17 * 18 + 17
    rows = tables.rows_of("segmentation", tables.scalars(got))
    assert [row.key for row in rows] == ["miou", "pixel_accuracy"]
    json.dumps(got)
    # Images in sub-folders, with names that several words share.
    for name in ("images", "masks"):
        (tmp_path / name / "x").mkdir()
        (tmp_path / name / "3.png").rename(tmp_path / name / "x" / "3.png")
    (tmp_path / "classes.txt").write_text("wall, stone wall\nfloor\nsky\n")
    predictor = Coloured()
    sub = measure(predictor, images=tmp_path, by="patches", patch_features="tokens")
    assert sub["miou"] == got["miou"] and any("stone wall" in text for text in predictor.asked)
    assert predictor.options == dict(by="patches", patch_features="tokens")


def test_a_model_in_the_evaluation(tmp_path):
    """Windows, maps of patches and regions, texts and counts together, on images of odd sizes."""
    predictor, random = workdirs.predictor(**HEAD), np.random.default_rng(0)
    (tmp_path / "classes.txt").write_text("wall, stone wall\nfloor\nsky\n")
    pictures, truth = [], []
    for i, size in enumerate([(31, 17), (16, 40), (39, 15)]):  # of 3 or 4 windows
        pictures.append(PIL.Image.fromarray(random.integers(0, 256, (*size[::-1], 3), np.uint8)))
        paint(tmp_path / "images" / f"{i}.png", [0])
        pictures[-1].save(tmp_path / "images" / f"{i}.png")
        truth.append(random.integers(-1, 3, size[::-1]))
        mask(tmp_path / "masks" / f"{i}.png", truth[-1] % 256)
    got = measure(predictor, batch_size=1, images=tmp_path, stride=8)
    names = ["wall, stone wall", "floor", "sky"]
    predicted = predictor.segment(pictures, names, stride=8)
    expected = pytest.approx(by_counting(truth, predicted, 3), abs=3e-3)  # a pixel may be between classes
    assert [got[name] for name in NAMES] == expected
    assert got["pixels"] == sum((each >= 0).sum() for each in truth)


def test_the_background_is_what_fits_no_class(tmp_path):
    folder(tmp_path, 2, names="background\nwall\nfloor\n")
    paint(tmp_path / "images" / "2.png", [60])
    mask(tmp_path / "masks" / "2.png", np.zeros((17, 20)))

    class Doubtful(Coloured):
        def class_maps(self, images, classes, **options):
            maps = super().class_maps(images, classes)
            return np.where(np.asarray(images)[:, None, :4, :4, 0] > 100, 0, maps)

    options = dict(images=tmp_path, background_threshold=0.9)
    got = measure(Doubtful(), **options)
    # The first image is black, which is near to a wall; the third is near to nothing.
    assert got["per_class"]["background"]["accuracy"] == pytest.approx(340 / (340 + 17 * 18))
    assert got["chance_pixel_accuracy"] == pytest.approx(1 / 3)
    assert measure(Doubtful(), images=tmp_path)["per_class"]["background"]["accuracy"] == 1
    for i in range(3):
        mask(tmp_path / "masks" / f"{i}.png", np.full((17, 20), i))
    never = measure(Doubtful(), images=tmp_path, background_threshold=0.0, ignore=0)
    assert never["chance_pixel_accuracy"] == 1 / 2  # no pixel gets the background
    (tmp_path / "classes.txt").write_text("sky\nwall\nfloor\n")
    with pytest.raises(errors.UserError, match="expected a set with the class 'background'; its"):
        measure(**options)


def _ade20k(root):
    for i in (0, 41, 108):  # in the masks one more
        paint(root / "images/validation" / f"{i}.jpg", [i])
        ids = np.full((17, 20), i + 1)
        ids[0] = 0
        mask(root / "annotations/validation" / f"{i}.png", ids)
    return ["wall", "box", "plaything"], 16 * 20


def _voc(root):
    for i in (0, 20):
        paint(root / "JPEGImages" / f"2007_{i}.jpg", [i])
        ids = np.full((17, 20), i)
        ids[:, 3] = 255
        mask(root / "SegmentationClass" / f"2007_{i}.png", ids, "P")
    paint(root / "JPEGImages/of_the_training.jpg", [1])
    listed = root / "ImageSets/Segmentation/val.txt"
    listed.parent.mkdir(parents=True)
    listed.write_text("2007_0\n2007_20\n")
    return ["background", "tv monitor"], 17 * 19


@pytest.mark.parametrize("layout, write", [("ade20k", _ade20k), ("voc", _voc)])
def test_formats_of_public_sets(tmp_path, monkeypatch, layout, write):
    monkeypatch.setattr(Coloured, "STEP", 1)  # up to 150 classes
    names, pixels = write(tmp_path)
    got = measure(images=tmp_path, format=layout)
    assert got["pixel_accuracy"] == got["miou"] == 1 and got["unreadable"] == 0
    measured = {name: x["pixels"] for name, x in got["per_class"].items() if x["pixels"]}
    assert measured == dict.fromkeys(names, pixels)


def test_masks_of_public_sets_are_of_the_pixels_as_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(Coloured, "STEP", 1)
    _ade20k(tmp_path)
    exif = PIL.Image.Exif()
    exif[0x0112] = 3  # upside down
    for i in (0, 41):  # columns of two classes, below each other when they are turned
        path = tmp_path / "images/validation" / f"{i}.jpg"
        paint(path, [i, 108])
        PIL.Image.open(path).save(path, exif=exif, quality=100)
        mask(tmp_path / "annotations/validation" / f"{i}.png", [[i + 1] * 10 + [109] * 10] * 17)
    got = measure(images=tmp_path, format="ade20k")
    assert got["images"] == 3 and got["pixel_accuracy"] > 0.85


def test_masks_of_few_and_of_many_bits(tmp_path):
    """Grey of 1, 2, 4, 8 and 16 bits and palettes: the ids that the file holds."""
    size, name = (8, 5), "mask.png"
    for bits, mode in ((1, "1"), (8, "L"), (16, "I;16"), (8, "P"), (4, "P"), (2, "P"), (1, "P")):
        ids = np.random.default_rng(bits).integers(0, min(2**bits, 900), size[::-1])
        mask(tmp_path / name, ids, mode, **(dict(bits=bits) if mode == "P" else {}))
        content = (tmp_path / name).read_bytes()
        got = segmentation.decode_mask(content, name, size)
        np.testing.assert_array_equal(got, ids)
    for bits in (2, 4):  # grey, which Pillow writes with 8 bits alone
        ids = np.arange(8) % 2**bits
        packed = int("".join(f"{x:0{bits}b}" for x in ids), 2).to_bytes(bits)
        header = np.array([8, 1], ">u4").tobytes() + bytes([bits, 0, 0, 0, 0])
        chunks = [(b"IHDR", header), (b"IDAT", hostile.zlib.compress(b"\0" + packed)), (b"IEND", b"")]
        content = b"\x89PNG\r\n\x1a\n" + b"".join(hostile.png_chunk(*each) for each in chunks)
        got = segmentation.decode_mask(content, name, (8, 1))
        np.testing.assert_array_equal(got, ids[None])


def test_masks_that_cannot_be_used_are_left_out_and_named(tmp_path):
    folder(tmp_path, 6)
    masks = [tmp_path / "masks" / f"{i}.png" for i in range(6)]
    masks[1].unlink()
    mask(masks[2], np.zeros((17, 21)))
    PIL.Image.new("RGB", (20, 17)).save(masks[3])
    ids = [[3, 7, 9, 200, 11, 12, 255, 0, 1, 2]]
    mask(masks[4], np.repeat(ids, 17, 0).repeat(2, 1))
    masks[5].write_bytes(masks[5].read_bytes()[:-30])
    got = measure(images=tmp_path)
    assert (got["images"], got["unreadable"]) == (1, 5)
    said = ["No such file or directory", "got (21, 17) pixels, expected (20, 17)"]
    said += ["got PNG, mode RGB, expected a PNG", "got the ids 3, 7, 9, 11, 12 and 1 more"]
    said += ["expected a readable image"]
    for path, named, line in zip(masks[1:], got["unreadable_images"], said, strict=True):
        assert named.startswith(str(path)) and line in named and "\n" not in named


def test_data_that_cannot_be_used(tmp_path):
    def fault(expected, **options):
        with pytest.raises(errors.UserError, match=expected):
            segmentation.Segmentation(**{k: str(v) for k, v in options.items()}).check()

    voc = tmp_path / "voc"
    fault("^images: got nothing")
    fault("images: no such file or folder, .* of the format folder", images=tmp_path)
    folder(tmp_path)
    (tmp_path / "classes.txt").write_text("wall\nwall\n")
    fault("got 'wall' twice", images=tmp_path)
    (tmp_path / "classes.txt").unlink()
    fault("classes.txt: no such file", images=tmp_path)
    _voc(voc)
    (voc / "ImageSets/Segmentation/val.txt").write_text("of_the_training\n")
    fault("none of its 1 images has a mask", images=voc, format="voc")


def test_ids_of_many_classes(tmp_path):
    """255 is a class if there are more classes; the id of `ignore` never counts."""
    names = "".join(f"class {i}\n" for i in range(300))
    folder(tmp_path, names=names)
    mask(tmp_path / "masks" / "3.png", np.full((17, 20), 299), "I;16")
    class_of = lambda **more: segmentation.Segmentation(images=str(tmp_path), **more).open().class_of
    ignored = lambda **more: np.flatnonzero(class_of(**more) == segmentation.IGNORED).tolist()
    assert measure(images=tmp_path)["per_class"]["class 255"]["pixels"] == 3 * 17
    assert ignored() == [] and ignored(ignore=255) == [255]
    (tmp_path / "classes.txt").write_text(names[: names.index("class 255")])
    assert ignored() == [255] and ignored(ignore=7) == [7, 255]


def test_what_the_model_of_a_run_lacks():
    """It is said before the first step."""

    lines = lambda **more: segmentation.Segmentation(images="x", **more).faults_of_model(model)
    model = tiny.config().model
    assert lines(by="regions") == lines() == []
    for options in (dict(by="both"), dict(short_side=3), dict(stride=999)):
        (line,) = lines(**options)
        assert line.startswith(f"{next(iter(options))}: got ")
    model = tiny.config(**HEAD).model
    assert lines(by="both") == []
