"""The class names of a dataset for prompts, read from a class file or made from the labels of the dataset.

A class file has one class per line: `name`, `label<TAB>name`, or `label<TAB>name<TAB>group`. Blank lines and
`#` lines are skipped. Each file in `classes/` is named after the TFDS set that it describes.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from grain_jax.core import errors, regular_file

SHIPPED = epath.Path(__file__).parent / "classes"
_IMAGENET = "imagenet2012"
# What open_clip calls ImageNet's eft, maillot, projectile and sunglass, by WordNet id.
OPEN_CLIP_NAMES = {"n01631663": "newt", "n03710637": "tights"}
OPEN_CLIP_NAMES |= {"n04008634": "missile", "n04355933": "sunglasses"}

# Prefixes of labels that no name has: 001.Laysan_Albatross, n02085620-chihuahua, /a/abbey (SUN397).
_SORTED = re.compile(r"\A(\d+\.|n\d{8}-|/([a-z]/)?)")
_WNID = re.compile(r"n\d{8}")


class Line(NamedTuple):
    """One line of a class file."""

    label: str | None  # the label in the dataset; None where the file has only names
    name: str  # the name in prompts
    group: str = ""  # e.g. rare, common, frequent (LVIS); "": none


def for_labels(labels: Sequence[str] | None, count: int, classes: str | None) -> list[str]:
    """The class names for prompts, in the order of the labels of the dataset.

    Args:
      labels: the label names of the dataset; None where it has none. Numbers (0, 1, ...) count as none.
      count: the number of classes of the dataset.
      classes: a class file: its path or the name of a file in `classes/`; None: names made from the labels.
        If both have labels, the file may have more; otherwise it has the dataset's classes in its order.

    Raises errors.UserError: no names, no such file, or the names of another dataset.
    """
    labels = _texts(labels)
    if classes is None:
        if labels is None or all(_WNID.fullmatch(label) for label in labels):
            got = f"{count} classes without names" if labels is None else f"labels such as {labels[0]}"
            expected = f"a file of class names: a path, or one of {shipped()}"
            raise errors.UserError(f"classes: got {got}, expected {expected}")
        names = [readable(label) for label in labels]
        if repeated := twice(names):
            expected = "a file of label<TAB>name"
            raise errors.UserError(f"classes: got two labels that read {repeated!r}, expected {expected}")
        return names
    lines, fault = read(classes), f"classes {classes}: got "
    if lines[0].label is not None and labels is not None:
        names = {line.label: line.name for line in lines}
        if missing := [label for label in labels if label not in names]:
            fault += f"no name for {len(missing)} of the dataset's {count} labels, the first: {missing[0]!r}"
            raise errors.UserError(f"{fault}; expected a file of this dataset")
        return [names[label] for label in labels]
    if len(lines) != count:
        raise errors.UserError(f"{fault}{len(lines)} classes, expected the dataset's {count}")
    position = {readable(label).lower(): i for i, label in enumerate(labels or ())}
    for i, line in enumerate(lines):
        if position.get(readable(line.name).lower(), i) != i:
            expected = "expected the dataset's order, or label<TAB>name"
            raise errors.UserError(f"{fault}{line.name!r} as class {i}; {expected}")
    return [line.name for line in lines]


def read(classes: str) -> list[Line]:
    """The lines of a class file, at least one; `classes` as in `for_labels`, but not None.

    Raises errors.UserError: no such file, an empty one, a repeated label, or different numbers of columns.
    """
    path = SHIPPED / f"{classes}.txt"
    if "/" in classes or not path.exists():
        path = epath.Path(classes).expanduser()
    text = regular_file.read_text(path, f"one class a line, or one of {shipped()}")
    used = [line for line in composed(text).splitlines() if line.strip() and not line.startswith("#")]
    rows = [tuple(map(str.strip, line.split("\t"))) for line in used]
    if not rows or not all(text for row in rows for text in row):
        raise errors.UserError(f"classes {path}: got no class or an empty name, expected names")
    if len(rows[0]) > 3 or {len(row) for row in rows} != {len(rows[0])}:
        forms = "name, of label<TAB>name or of label<TAB>name<TAB>group"
        raise errors.UserError(f"classes {path}: got lines of several forms, expected all of {forms}")
    lines = [Line(None, *row) if len(row) == 1 else Line(*row) for row in rows]
    if repeated := twice([line.label for line in lines if line.label]):
        raise errors.UserError(f"classes {path}: got the label {repeated!r} twice, expected it once")
    return lines


def composed(name: str) -> str:
    """A name in Unicode's form NFC, in which names are compared: files and folders of macOS may have NFD."""
    return unicodedata.normalize("NFC", name)


def shipped() -> str:
    """The values of `classes` that are not paths, for messages: the files in `classes/`."""
    return ", ".join(sorted(path.stem for path in SHIPPED.iterdir() if path.suffix == ".txt"))


def stems(labels: Sequence[str] | None, classes: str | None) -> list[str] | None:
    """Second names of the classes, by which files of descriptions may call them: the labels without prefix.

    For a WordNet id of ImageNet it is the name in classes/imagenet2012.txt, or open_clip's if the classes
    have it. Arguments as of `for_labels`, which has accepted them. None where neither has labels.
    """
    known = _texts(labels)
    if known is None and classes is not None:
        known = [line.label for line in read(classes) if line.label is not None]
    if not known:
        return None
    if not _WNID.fullmatch(known[0]):
        return [_stem(label) for label in known]
    second = {str(line.label): line.name for line in read(_IMAGENET)}
    if classes == _IMAGENET:
        second |= OPEN_CLIP_NAMES
    return [second.get(label, _stem(label)) for label in known]


def readable(label: str) -> str:
    """A name made from a label: `apple_pie` -> "apple pie", `/a/apse/indoor` -> "indoor apse".

    No name keeps a `/`, because inference/prompts.py reads it as PARENT/CLASS: with spaces it becomes `-`.
    """
    if " " in (stem := _stem(label)):
        return stem.replace("/", "-")
    return " ".join(" ".join(reversed(stem.split("/"))).replace("_", " ").split())


def _stem(label: str) -> str:
    """A label without its prefix."""
    return _SORTED.sub("", label.strip(), count=1)


def _texts(labels: Sequence[str] | None) -> Sequence[str] | None:
    """The labels, composed; None if they are 0, 1, 2, ..., which TFDS gives to a set without label names."""
    if labels is None or list(labels) == list(map(str, range(len(labels)))):
        return None
    return [composed(label) for label in labels]


def twice(names: Sequence[str]) -> str:
    """The first name that is there twice; "": none."""
    return next((name for name in names if names.count(name) > 1), "")
