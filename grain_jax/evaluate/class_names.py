"""The names of a data set's classes, as they stand in prompts: from a file or from the set's own labels.

A file has one class a line: `name`, `label<TAB>name`, or `label<TAB>name<TAB>group` where accuracies of
groups of classes are wanted; blank lines and `#` lines are skipped. Those that come with the package
(`classes/`) are called after the TFDS set that they are for.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from grain_jax import errors

SHIPPED = epath.Path(__file__).parent / "classes"
# As a file: ImageNet's names as that package publishes them; two stand twice there (missile, sunglasses).
OPEN_CLIP = "open_clip"

# Before a label: 001.Laysan_Albatross, n02085620-chihuahua, SUN397's /a/abbey.
_SORTED = re.compile(r"\A(\d+\.|n\d{8}-|/([a-z]/)?)")
_WNID = re.compile(r"n\d{8}")


class ClassNameError(errors.UserError):
    """There are no names for a set's classes, or those of a file are not of this set; one line."""


class Line(NamedTuple):
    """A class in a file."""

    label: str | None  # the data set's; None where the file has names alone
    name: str  # in prompts
    group: str = ""  # LVIS: rare, common, frequent


def for_labels(labels: Sequence[str] | None, count: int, classes: str | None) -> list[str]:
    """The classes' names for prompts, in the order of the data set's labels.

    Args:
      labels: the set's own label names; None where it has none. Numbers (0, 1, ...) count as none.
      count: of the set's classes.
      classes: a class file: its path, the name of one that comes with the package, or OPEN_CLIP; None
        for the labels themselves, made readable. Where labels and a file's labels are there, names are
        found by label, and the file may have more; a file without labels must have the set's order.

    Raises:
      ClassNameError: no names, no such file, or names that are not those of this set.
    """
    labels = _texts(labels)
    if classes is None:
        return _readable_labels(labels, count)
    lines = read(classes)
    if lines[0].label is not None and labels is not None:
        names = {line.label: line.name for line in lines}
        missing = [label for label in labels if label not in names]
        if missing:
            raise ClassNameError(
                f"classes {classes}: got no name for {len(missing)} of the data set's {count} labels,"
                f" the first: {missing[0]!r}; expected a file of this data set"
            )
        return [names[label] for label in labels]
    if len(lines) != count:
        raise ClassNameError(
            f"classes {classes}: got {len(lines)} classes, expected the data set's {count}"
        )
    if labels is not None:
        _check_order(classes, [line.name for line in lines], labels)
    return [line.name for line in lines]


def read(classes: str) -> list[Line]:
    """The lines of a class file (as in `for_labels`), at least one.

    Raises:
      ClassNameError: no such file, an empty one, a label twice, or lines of several forms.
    """
    if classes == OPEN_CLIP:
        return _open_clip()
    path = SHIPPED / f"{classes}.txt"
    if "/" in classes or not path.exists():
        path = epath.Path(classes)
    if not path.is_file():
        raise ClassNameError(
            f"classes {classes}: no such file, expected one class a line, or one of {shipped()}"
        )
    rows = [
        [text.strip() for text in line.split("\t")]
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.strip() and not line.startswith("#")
    ]
    if not rows or not all(text for row in rows for text in row):
        raise ClassNameError(f"classes {path}: got no class or an empty name, expected names")
    if len(rows[0]) > 3 or {len(row) for row in rows} != {len(rows[0])}:
        raise ClassNameError(
            f"classes {path}: got lines of several forms, expected all of name, of label<TAB>name or of"
            " label<TAB>name<TAB>group"
        )
    lines = [Line(None, *row) if len(row) == 1 else Line(*row) for row in rows]
    labels = [line.label for line in lines]
    twice = [label for label in dict.fromkeys(labels) if label and labels.count(label) > 1]
    if twice:
        raise ClassNameError(f"classes {path}: got the label {twice[0]!r} twice, expected it once")
    return lines


def shipped() -> str:
    """The names that `classes` may have besides paths, for messages."""
    files = (path.stem for path in SHIPPED.iterdir() if path.suffix == ".txt")
    return ", ".join([*sorted(files), OPEN_CLIP])


def stems(labels: Sequence[str] | None, classes: str | None) -> list[str] | None:
    """The labels without their sorting prefix: the names of classes in published files of descriptions.

    So `apartment_building/outdoor` is found there by its label, whatever its name in prompts is.

    Args:
      labels, classes: as in `for_labels`, which has checked them.

    Returns: in the order of the classes; None where neither the set nor the file has labels.
    """
    found: Sequence[str | None] | None = _texts(labels)
    if found is None and classes is not None:
        found = [line.label for line in read(classes)]
    known = [label for label in found or () if label is not None]
    return None if found is None or len(known) < len(found) else [_stem(label) for label in known]


def readable(label: str) -> str:
    """A label as a name: `apple_pie` -> "apple pie", `/a/apse/indoor` -> "indoor apse".

    `/` ends a label's head only where the label has no spaces; a name never has one, since in prompts
    that is a class and its parent.
    """
    stem = _stem(label)
    if " " in stem:
        return stem.replace("/", "-")
    return " ".join(" ".join(reversed(stem.split("/"))).replace("_", " ").split())


def _stem(label: str) -> str:
    """A label without a number, WordNet's id or SUN397's folder (the first letter) before it."""
    return _SORTED.sub("", label.strip(), count=1)


def _texts(labels: Sequence[str] | None) -> Sequence[str] | None:
    """None for 0, 1, 2, ...: what TFDS gives for a set without label names."""
    return None if labels is None or list(labels) == list(map(str, range(len(labels)))) else labels


def _readable_labels(labels: Sequence[str] | None, count: int) -> list[str]:
    if labels is None or all(_WNID.fullmatch(label) for label in labels):
        got = f"{count} classes without names" if labels is None else f"labels such as {labels[0]}"
        raise ClassNameError(
            f"classes: got {got}, expected a file of class names: a path, or one of {shipped()}"
        )
    names = [readable(label) for label in labels]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise ClassNameError(
            f"classes: got two labels that read {twice[0]!r}, expected a file of label<TAB>name"
        )
    return names


def _check_order(classes: str, names: Sequence[str], labels: Sequence[str]) -> None:
    """Raises ClassNameError where a name stands in the place of another class."""
    place = {readable(label).lower(): i for i, label in enumerate(labels)}
    for i, name in enumerate(names):
        if place.get(readable(name).lower(), i) != i:
            raise ClassNameError(
                f"classes {classes}: got {name!r} as class {i}, where the data set has {labels[i]!r};"
                " expected the data set's order, or label<TAB>name"
            )


def _open_clip() -> list[Line]:
    try:
        from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
    except ImportError:
        raise ClassNameError(
            f"classes {OPEN_CLIP}: got no package open_clip, expected it;"
            " pip install open_clip_torch"
        ) from None
    wnids = [line.label for line in read("imagenet2012")]  # sorted, as its names are
    return [Line(*pair) for pair in zip(wnids, IMAGENET_CLASSNAMES, strict=True)]
