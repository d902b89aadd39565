"""Fashion-MNIST with boxes and words of parts, two classes and five combinations of parts held out.

The pictures are those of the package, black and white exchanged (it stores negatives): black on a white ground, 28 x 28.
Every box and word of a picture comes from `looks`; nobody looked at the pictures one by one.
"""

import collections
import dataclasses
import gzip
import hashlib
import io
import itertools
import random
import zlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import PIL.Image
from etils import epath

from benchmarks.fetch import package
from benchmarks.fetch.looks import SIDE, Part, parts
from grain_jax.cli.flags import flag
from grain_jax.core import progress
from grain_jax.data import parallel
from grain_jax.data.aviary.annotations import listed, templates
from grain_jax.data.aviary.generate import STAMP, is_complete, write_json, write_lines

PACKAGE = "dataset-fashion-mnist"
CLASSES = (  # in the order of the labels
    *("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag"),
    "ankle boot",
)
HELD_OUT = ("dress", "ankle boot")
_LARGEST = 2**26  # bytes that are unpacked of a file; the largest has 47 MB
_FOLDER = "usr/share/datasets/fashion-mnist"
_LICENCE = f"usr/share/doc/{PACKAGE}/copyright"
# Of the unpacked files: the same pictures whatever the version of the package.
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the files depend on.

    what is written:
      --seed N             which images are taken, and the words of captions
      --images N           training images, the classes in turn; fewer where it has fewer
      --seen-per-class N   evaluation images of each training class
      --unseen-per-kind N  evaluation images of each held-out kind
      --test-images N      test images, half of training classes, no two of equal parts
      --caption-parts N    parts that a synthetic caption tells, at most
    """

    seed: int = flag(0, low=0, high=2**63)
    images: int = flag(16000, low=0, high=10**6)
    seen_per_class: int = flag(100, low=0, high=10**6)
    unseen_per_kind: int = flag(150, low=0, high=10**6)
    test_images: int = flag(400, low=0, high=10**6)
    caption_parts: int = flag(2, high=8)


class Kind(NamedTuple):
    """Pictures of a class on which certain parts were measured; training has none of them."""

    name: str
    of: str  # class
    descriptions: tuple[str, ...]


_HERE = epath.Path(__file__).parent
_TABLE = (line.split("\t") for line in (_HERE / "kinds.tsv").read_text().splitlines()[1:])
# Each description is measured on pictures of training classes, too.
KINDS = tuple(Kind(name, of, tuple(descriptions)) for name, of, *descriptions in _TABLE)
HALVES = (KINDS[:8], KINDS[8:])  # `benchmarks.claim` chooses by the first, reports the second
_CAPTIONS = templates(_HERE / "captions.tsv")


class Picture(NamedTuple):
    """A picture of the package with its parts."""

    id: str  # "train-17", "t10k-3"
    ink: np.ndarray  # uint8 [28, 28], 0 = white
    label: str
    parts: list[Part]

    @property
    def looks(self) -> frozenset[str]:
        """The descriptions of its parts."""
        return frozenset(part.description for part in self.parts)

    @property
    def fits(self) -> list[Kind]:
        """The held-out kinds that it is of; training has no such picture."""
        return [k for k in KINDS if k.of == self.label and self.looks.issuperset(k.descriptions)]

    @property
    def kind(self) -> Kind | None:
        """The kind that it is shown for: the first, unless it is of two of one half."""
        halves = [[one for one in self.fits if one in half] for half in HALVES]
        return self.fits[0] if self.fits and max(map(len, halves)) == 1 else None


def write(
    output: epath.PathLike,
    settings: Settings = Settings(),
    *,
    deb: str | None = None,
    processes: int = 1,
) -> str:
    """Writes the data set to the folder `output`; its README.md describes the files.

    Args:
      deb: file of the package; None: apt-get downloads it.
      processes: that measure; with more than one, the main module of the caller must be importable.

    Returns: what was done, in words.

    Raises:
      errors.UserError: no package, or another one; `output` holds something else.
    """
    output = epath.Path(output)
    if is_complete(output, dataclasses.asdict(settings)):
        return "already complete"
    wanted = {f"{_FOLDER}/{name}.gz": "pictures or labels" for name in SHA256}
    found = package.read(PACKAGE, deb, {**wanted, _LICENCE: "licence"})
    every = list(_measured(found, processes))
    random.Random(f"fashion {settings.seed}").shuffle(every)
    training, seen, unseen, tests = _divided(every, settings)

    places = [(f"seen/{one.label.lower()}", one) for one in seen]
    places += [(f"unseen/{one.kind.name}", one) for one in unseen]
    places += [("images", one) for one in training]
    places += [("test/images", one) for one in itertools.chain(*tests.values())]
    for folder, one in places:
        _save(one, output / folder / f"{one.id}.png")
    lines = {}
    for name, pictures in tests.items():
        said = [{"caption": f"something with {listed(sorted(one.looks))}"} for one in pictures]
        lines[name] = list(map(_line, pictures, said))
        write_lines(output / "test" / f"{name}.jsonl", lines[name])
    write_lines(output / "test" / "A.jsonl", [*lines["seen"], *lines["unseen"]])
    write_json(output / "unseen.json", {kind.name: kind.descriptions for kind in KINDS})
    (output / "LICENSE").write_bytes(found[_LICENCE])
    (output / "README.md").write_text(_readme(settings, training, seen, unseen, tests))
    write_lines(output / "A.jsonl", [_line(one, _words(one, settings)) for one in training])
    write_json(output / STAMP, dataclasses.asdict(settings))
    return f"{len(training)} training images, {len(seen)} seen, {len(unseen)} of held-out kinds"


def _divided(every, settings):
    """(training images, evaluation images of their classes, those of held-out kinds, test images by half)."""
    known = [one for one in every if one.label not in HELD_OUT and not one.fits]
    others = [one for one in known if not one.id.startswith("train-")]
    seen = _in_turns(others, lambda one: one.label, most=settings.seen_per_class)
    kinds = [one for one in every if one.kind]
    unseen = _in_turns(kinds, lambda one: one.kind, most=settings.unseen_per_kind)
    training = _training([one for one in known if one.id.startswith("train-")])[: settings.images]
    taken = {one.id for pictures in (seen, unseen, training) for one in pictures}
    known_ids, looks = {one.id for one in known}, set()
    rest = [one for one in every if one.id not in taken]
    tests = {}
    for name, is_known in (("unseen", False), ("seen", True)):
        half = [one for one in rest if (one.id in known_ids) == is_known]
        tests[name] = _distinct(half, settings.test_images // 2, looks)
    return training, seen, unseen, tests


def _measured(found, processes) -> Iterable[Picture]:
    """Every picture of the package."""
    items = []
    for split in ("train", "t10k"):
        ink, labels = (
            _array(found, f"{split}-{what}-ubyte") for what in ("images-idx3", "labels-idx1")
        )
        if len(ink) != len(labels):
            raise package.PackageError(f"{split}: got {len(ink)} pictures and {len(labels)} labels")
        items += [(f"{split}-{i}", *item) for i, item in enumerate(zip(ink, labels))]
    done = parallel.ordered_map(_measure, items, workers=processes if processes > 1 else 0)
    return progress.over(done, total=len(items), what="fashion")


def _measure(item):
    identity, ink, label = item
    return Picture(identity, ink, CLASSES[label], parts(ink, CLASSES[label]))


def _array(found, name):
    """The numbers of an IDX file: big-endian magic 0, 0, 8 (bytes), dimensions; the length of each; the bytes."""
    packed = io.BytesIO(found[f"{_FOLDER}/{name}.gz"])
    try:
        content = gzip.GzipFile(fileobj=packed).read(_LARGEST)
    except (OSError, EOFError, zlib.error) as error:
        raise package.PackageError(f"{name}: {error}; expected the package {PACKAGE}") from None
    if hashlib.sha256(content).hexdigest() != SHA256[name]:
        expected = f"expected the package {PACKAGE} as Debian ships it"
        raise package.PackageError(f"{name}: its SHA-256 is not that of Fashion-MNIST; {expected}")
    shape = np.frombuffer(content, ">u4", content[3], 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def _training(pictures):
    """The pictures that have parts, in the order in which they are taken: the classes in turn, and of a class
    pictures with each part in turn, so that rare parts come early."""
    often = collections.Counter(look for one in pictures for look in one.looks)
    pictures = [one for one in pictures if one.parts]
    by_part = _in_turns(pictures, lambda one: min(one.looks, key=lambda look: (often[look], look)))
    return _in_turns(by_part, lambda one: one.label)


def _in_turns(pictures, key, most=None):
    """The keys in turn, as long as a key has pictures left; up to `most` of each."""
    groups = {}
    for one in pictures:
        groups.setdefault(key(one), []).append(one)
    rounds = itertools.zip_longest(*(groups[name][:most] for name in sorted(groups)))
    return [one for turn in rounds for one in turn if one is not None]


def _distinct(pictures, count, looks):
    """Up to `count` pictures with 2 parts or more, each with other looks than those before it and than `looks`."""
    found = []
    for one in pictures:
        if len(found) < count and len(one.looks) >= 2 and one.looks not in looks:
            looks.add(one.looks)
            found.append(one)
    return found


def _save(picture, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = io.BytesIO()
    PIL.Image.fromarray(255 - picture.ink).save(encoded, "PNG")
    path.write_bytes(encoded.getvalue())


def _words(picture, settings):
    """The two captions of a training image."""
    rng = random.Random(f"fashion {settings.seed}/{picture.id}")
    web = rng.choice(_CAPTIONS["web"]).format(name=picture.label, number=rng.randrange(1000, 10000))
    looks = sorted(picture.looks)
    rng.shuffle(looks)
    told = listed(looks[: settings.caption_parts])
    synthetic = rng.choice(_CAPTIONS["synthetic"]).format(parts=told)
    return {"caption": web, "synthetic_caption": synthetic if told else "a picture of an article"}


def _line(picture, words):
    """A line of annotations; a description with two boxes (sleeves, legs) is one phrase."""
    positions = {}
    for i, part in enumerate(picture.parts):
        positions.setdefault(part.description, []).append(i)
    return {
        "image": f"images/{picture.id}.png",
        **words,
        "regions": [
            {"box": list(part.box_xyxy), "description": part.description, "score": 1.0}
            for part in picture.parts
        ],
        "phrases": list(positions.values()),
        "id": picture.id,
    }


def _readme(settings, training, seen, unseen, tests):
    return f"""# Fashion-MNIST with parts

Made by `python -m benchmarks.fetch fashion` (settings: `settings.json`; seed {settings.seed}) of Debian's package {PACKAGE}:
photographs of Zalando's articles, MIT licence (`LICENSE`). Boxes and words are ours, measured by a program.

| | |
|---|---|
| `A.jsonl`, `images/` | {len(training)} training images of {len(CLASSES) - len(HELD_OUT)} classes |
| `seen/` | {len(seen)} other images of these classes (of the test split), a folder each |
| `unseen/`, `unseen.json` | {len(unseen)} images of {len(KINDS)} kinds that training never shows; their descriptions |
| `test/` | {len(tests["seen"])} images of training classes (`seen.jsonl`), {len(tests["unseen"])} of held-out kinds \
(`unseen.jsonl`), no two with the same parts |

Images are {SIDE} x {SIDE} pixels. Class names stand only in web captions (`caption`). A picture of a held-out class
that is of no kind, or of two, is used in `test/` only.
"""
