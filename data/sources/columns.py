"""What the columns of a table say of an image: the options that name them, and the form of a row.

A column that is not named is that of the option's own name, where the table has it: `image`, `caption`, `captions`,
`boxes`, `labels`, `descriptions`, `scores`, `id`. A name with dots, `objects.bbox`, is a field of a struct, or of each
struct of a list. `boxes=x1,y1,x2,y2` names four columns: a row is one box then, and rows of one image follow each other.
"""

import dataclasses
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import msgspec

from grain_jax.core import printable, regular_file
from grain_jax.data.sources import base, webdataset

FORMATS = ("xyxy", "xywh", "cxcywh")
UNITS = ("pixel", "share")
OF_REGIONS = ("labels", "descriptions", "scores")
NAMES = ("image", "caption", "captions", "boxes", *OF_REGIONS, "id")
MAX_REGIONS = 10_000  # of an image
MAX_LINE = 4 << 20  # bytes of a line of text
MAX_CAPTIONS = 1_000  # of an image
_MAX_NAMES = 1 << 20  # bytes of a file of names

# Names of columns that hold lists of boxes, and of columns that hold one side of a box.
_LISTS = re.compile(r"b?box(es)?|objects|regions", re.IGNORECASE)
_SIDES = re.compile(
    r"(b?box[_.]?)?([xy][12]?|[xy]_?(min|max|center)|c[xy]|left|top|right|bottom|w|h|width|height)",
    re.IGNORECASE,
)
Describe = Callable[[str], str]
_Text = Annotated[str, msgspec.Meta(max_length=webdataset.MAX_TEXT)]
_Box = Annotated[list[float | None], msgspec.Meta(max_length=16)]
_OfRegions = msgspec.Meta(max_length=MAX_REGIONS)


class Row(msgspec.Struct):
    """A row, by the options' names, without its image."""

    caption: _Text | None = None
    captions: Annotated[list[_Text | None], msgspec.Meta(max_length=MAX_CAPTIONS)] | None = None
    boxes: Annotated[list[_Box | None], _OfRegions] | None = None
    labels: Annotated[list[_Text | int | None], _OfRegions] | None = None
    descriptions: Annotated[list[_Text | None], _OfRegions] | None = None
    scores: Annotated[list[float | None], _OfRegions] | None = None
    id: _Text | int | None = None


class Named(NamedTuple):
    """The columns of one table."""

    # option -> the column and the fields of it that lead to the value; of `boxes` one such path, or four
    paths: Mapping[str, tuple[tuple[str, ...], ...]]
    names: Sequence[str] = ()  # of labels that are numbers

    @property
    def row_is_box(self) -> bool:
        """Whether four columns have the sides of one box."""
        return len(self.paths.get("boxes", ())) == 4

    @property
    def columns(self) -> list[str]:
        """The columns of the table that are read."""
        return list(dict.fromkeys(path[0] for paths in self.paths.values() for path in paths))

    def values(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a row, by option; of four columns of a box, lists of one."""
        found = {name: [_pick(row, path) for path in paths] for name, paths in self.paths.items()}
        if not self.row_is_box:
            return {name: values[0] for name, values in found.items()}
        of_box = ("boxes", *OF_REGIONS)
        return {
            name: [values] if name == "boxes" else values if name in of_box else values[0]
            for name, values in found.items()
        }


@dataclasses.dataclass(frozen=True)
class Columns:
    """The options of a table: the names of its columns, the form of its boxes, the names of its labels.

    Raises:
      ValueError: an option has another value than those that are expected.
    """

    image: str = ""
    caption: str = ""
    captions: str = ""
    boxes: str = ""
    labels: str = ""  # names of classes, or their numbers
    descriptions: str = ""
    scores: str = ""
    id: str = ""
    box_format: str = "xyxy"
    unit: str = "pixel"  # share: of the image's width and height
    names: str = ""  # a file with the name of each label, a line each, from 0 on

    has_labels: ClassVar[bool] = True

    def __post_init__(self):
        for key, known in (("box_format", FORMATS), ("unit", UNITS)):
            if (got := getattr(self, key)) not in known:
                raise ValueError(f"{key}: got {got!r}, expected one of {', '.join(known)}")
        if self.labels and self.descriptions:
            raise ValueError("labels and descriptions: got both, expected one of them")
        if self.boxes.count(",") not in (0, 3):
            raise ValueError(
                f"boxes: got {self.boxes!r}, expected one column, or four: x1,y1,x2,y2"
            )

    def named(self, where: object, known: Sequence[str]) -> Named:
        """The columns among those of the table `where`. Raises SourceError: one is missing."""
        paths = {name: self._paths(name, where, known) for name in NAMES}
        paths = {name: found for name, found in paths.items() if found}
        listed = _listed(known)
        if "image" not in paths:
            raise base.SourceError(f"{where}: has no column image; --option image=COLUMN, {listed}")
        if "boxes" not in paths:
            if given := [name for name in OF_REGIONS if getattr(self, name)]:
                what = f"--option {given[0]} without boxes; --option boxes=COLUMN"
                raise base.SourceError(f"{where}: {what}, {listed}")
            paths = {name: found for name, found in paths.items() if name not in OF_REGIONS}
        elif "descriptions" in paths and not self.labels:
            paths.pop("labels", None)
        elif "labels" in paths:
            paths.pop("descriptions", None)
        else:
            texts = "--option labels=COLUMN or descriptions=COLUMN"
            raise base.SourceError(f"{where}: has boxes without a text; {texts}, {listed}")
        for found in paths.values():
            for column, *_ in found:
                if list(known).count(column) > 1:
                    raise base.SourceError(f"{where}: has several columns {column}, expected one")
        return Named(paths, self._names())

    def check_labels(self, where: object, named: Named, label_text: str) -> None:
        """Raises SourceError where --label-text is given and no labels are read."""
        if label_text and "labels" not in named.paths:
            raise base.SourceError(
                f"{where}: got --label-text, and no labels are read; --option labels=COLUMN"
            )

    def _paths(self, name: str, where: object, known: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        given = getattr(self, name)
        if not given:
            return ((name,),) if name in known else ()
        found = []
        for column in given.split(",") if name == "boxes" else [given]:
            path = (column,) if column in known else tuple(column.split("."))
            if path[0] not in known:
                raise base.SourceError(
                    f"{where}: has no column {column} (--option {name}), {_listed(known)}"
                )
            found.append(path)
        return tuple(found)

    def _names(self) -> list[str]:
        if not self.names:
            return []
        content = regular_file.read_text(self.names, "the name of a label a line", _MAX_NAMES)
        return [x.rstrip("\r") for x in content.removeprefix("\ufeff").rstrip("\n").split("\n")]

    def items(
        self, rows: Iterable[tuple[str, Mapping[str, Any]]], named: Named, described: Describe
    ) -> Iterator[tuple[str, Any, base.Entry | base.Fault]]:
        """Where each image stands, its value in the column `image`, and what the table says of it.

        Args:
          rows: where each stands, FILE:ROW, and its values by column.
          named: the columns.
          described: a label -> the description.
        """
        found = ((where, named.values(row)) for where, row in rows)
        for where, values in _joined(found) if named.row_is_box else found:
            yield where, values.pop("image", None), self._entry(where, values, named, described)

    def _entry(
        self, where: str, values: dict[str, Any], named: Named, described: Describe
    ) -> base.Entry | base.Fault:
        if isinstance(values.get("caption"), list):  # several texts in a column of that name
            given, more = values.pop("caption"), values.get("captions")
            values["captions"] = given if more is None else more
            if isinstance(more, list):
                values["captions"] = [*given, *more]
        try:
            row = regular_file.checked(values, Row, where, "what the columns of a row hold")
        except regular_file.FileError as error:
            return base.Fault(where, "bad annotation", str(error).removeprefix(f"{where}: "))
        boxes, texts = row.boxes or [], row.descriptions or []
        if "labels" in named.paths:
            texts = [_name(label, named.names) for label in row.labels or ()]
            texts = [described(text) if text else None for text in texts]
        scores = row.scores or [base.WHOLE] * len(boxes)
        if not len(boxes) == len(texts) == len(scores):
            got = f"{len(boxes)} boxes, {len(texts)} texts and {len(scores)} scores"
            return base.Fault(where, "bad annotation", f"got {got}, expected as many of each")
        return base.Entry(
            where,
            [text for text in (row.caption, *(row.captions or ())) if text],
            regions=[(self._xyxy(x), *rest) for x, *rest in zip(boxes, texts, scores)],
            shares=self.unit == "share",
            id=None if row.id is None else str(row.id),
        )

    def _xyxy(self, box: Any) -> Any:
        if self.box_format == "xyxy" or len(box or ()) != 4 or None in box:
            return box
        if self.box_format == "cxcywh":
            x, y, width, height = box
            box = x - width / 2, y - height / 2, width, height
        return base.xywh(box)


def warn_of_boxes(where: object, known: Sequence[str], named: Named) -> None:
    """Says on stderr which columns of the table look like boxes, where none is read as boxes."""
    if "boxes" in named.paths:
        return
    unread = [name for name in known if name not in named.columns]
    lists = list(filter(_LISTS.fullmatch, unread))
    sides = list(filter(_SIDES.fullmatch, unread))
    option = f"boxes={','.join(sides)}" if len(sides) == 4 else "boxes=COLUMN"
    if looking := lists + (sides if len(sides) >= 4 else []):
        got = f"the columns {', '.join(looking)} look like boxes and are not read"
        advice = f"--option {option} descriptions=COLUMN (or labels=COLUMN) reads them"
        print(printable.plain(f"{where}: {got}; {advice}"), file=sys.stderr)


def _listed(known: Sequence[str]) -> str:
    return f"expected one of: {printable.plain(', '.join(known), 400)}"


def _pick(value: Any, path: Sequence[str]) -> Any:
    """The value at the end of a path; of a list, that of each item."""
    for at, part in enumerate(path):
        if isinstance(value, list):
            return [_pick(item, path[at:]) for item in value]
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _place(image: Any) -> Any:
    """What tells the image of a row from others: its path, or its bytes."""
    if isinstance(image, Mapping):
        image = image.get("path") or image.get("bytes")
    return image if isinstance(image, str | bytes | None) else repr(image)


def _joined(rows: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of each image as one: the lists of its boxes one after another, each of its captions once."""
    met: set[int] = set()
    for image, of_image in itertools.groupby(rows, key=lambda row: _place(row[1].get("image"))):
        group = iter(of_image)
        where, joined = next(group)
        if hash(image) in met:
            got = "got rows of an image apart, expected them one after another; sort the table by image"
            raise base.SourceError(f"{where}: {got}")
        met.add(hash(image))
        lists = joined.keys() & {"boxes", *OF_REGIONS}
        captions = [joined.get("caption")]
        for _, row in group:
            if row.get("caption") not in captions and len(captions) <= MAX_CAPTIONS:
                captions.append(row.get("caption"))
            if len(joined["boxes"]) <= MAX_REGIONS:  # one more, which is then a fault
                for name in lists:
                    joined[name] += row[name]
        if len(captions) > 1:
            joined["caption"] = [text for text in captions if text]
        there = [any(side is not None for side in box) for box in joined["boxes"]]
        for name in lists:  # a row without a box has a caption alone
            joined[name] = list(itertools.compress(joined[name], there))
        yield where, joined


def _name(label: str | int | None, names: Sequence[str]) -> str | None:
    """The name of a label that is a number; None where there is none."""
    if isinstance(label, int):
        return names[label] if 0 <= label < len(names) else None
    return label
