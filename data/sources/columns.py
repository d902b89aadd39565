"""What the columns of a table say about an image: the options that name them, and the form of a row.

The default name of a column is its option's: `image`, `caption`, `captions`, `boxes`, `labels`, `descriptions`,
`scores`, `id`. A name with dots, `objects.bbox`, is a field of a struct, or of each struct of a list.
`boxes=x1,y1,x2,y2` names four columns: then a row is one box, and rows of one image follow each other.
"""

import dataclasses
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import msgspec

from grain_jax.core import printable, regular_file
from grain_jax.data.sources import base
from grain_jax.data.sources.base import Annotation, Fault, Region

FORMATS = ("xyxy", "xywh", "cxcywh")
UNITS = ("pixel", "share")
OF_REGIONS = ("labels", "descriptions", "scores")
NAMES = ("image", "caption", "captions", "boxes", *OF_REGIONS, "id")
MAX_LINE = 4 << 20  # bytes of a line of text
_BOXES = re.compile(r"b?box(es)?|objects|regions", re.IGNORECASE)  # names of a column with boxes
_SIDES = re.compile(  # names of a column with one side of a box
    r"(b?box[_.]?)?([xy][12]?|[xy]_?(min|max|center)|c[xy]|left|top|right|bottom|w|h|width|height)",
    re.IGNORECASE,
)
_Text = Annotated[str, msgspec.Meta(max_length=base.MAX_TEXT)]


class Row(msgspec.Struct):
    """A row, by the options' names, without its image."""

    caption: _Text | None = None
    captions: list[_Text | None] | None = None
    boxes: list[list[float | None] | None] | None = None
    labels: list[_Text | int | None] | None = None
    descriptions: list[_Text | None] | None = None
    scores: list[float | None] | None = None
    id: _Text | int | None = None


class Named(NamedTuple):
    """The columns of one table."""

    # option -> the column and the fields of it that lead to the value; for `boxes` one such path, or four
    paths: Mapping[str, tuple[tuple[str, ...], ...]]
    names: Sequence[str]  # of labels that are numbers
    described: Callable[[str], str]  # a label -> the description

    @property
    def row_is_box(self) -> bool:
        """Whether four columns have the sides of one box."""
        return len(self.paths.get("boxes", ())) == 4

    @property
    def columns(self) -> list[str]:
        """The columns of the table that are read."""
        return list(dict.fromkeys(path[0] for paths in self.paths.values() for path in paths))

    def values(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a row, by option; lists of one if a row is a box."""
        values = {name: [_pick(row, path) for path in paths] for name, paths in self.paths.items()}
        of_box = OF_REGIONS if self.row_is_box else ()
        out = {name: values if name in of_box else values[0] for name, values in values.items()}
        return out | ({"boxes": [values["boxes"]]} if self.row_is_box else {})


@dataclasses.dataclass(frozen=True)
class TableOptions:
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

    has_labels: ClassVar[bool] = True

    def __post_init__(self):
        for key, known in (("box_format", FORMATS), ("unit", UNITS)):
            if (got := getattr(self, key)) not in known:
                raise ValueError(f"{key}: got {got!r}, expected one of {', '.join(known)}")
        if self.boxes.count(",") not in (0, 3):
            expected = "expected one column, or four: x1,y1,x2,y2"
            raise ValueError(f"boxes: got {self.boxes!r}, {expected}")

    def named(self, where: object, known: Sequence[str], options: base.Options) -> Named:
        """Finds the columns in the table `where`. Raises SourceError: one is missing."""
        paths = {name: self._paths(name, where, known) for name in NAMES}
        paths = {name: path_list for name, path_list in paths.items() if path_list}
        fault = ""
        if "image" not in paths:
            fault = "has no column image; --option image=COLUMN"
        elif "boxes" not in paths:
            paths = {name: path_list for name, path_list in paths.items() if name not in OF_REGIONS}
        elif "descriptions" in paths and not self.labels:
            paths.pop("labels", None)
        elif "labels" in paths:
            paths.pop("descriptions", None)
        else:
            texts = "--option labels=COLUMN or descriptions=COLUMN"
            fault = f"has boxes without a text; {texts}"
        if fault:
            raise base.SourceError(f"{where}: {fault}, {_expected(known)}")
        return Named(paths, [], options.described)

    def _paths(self, name: str, where: object, known: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        columns = getattr(self, name)
        if not columns:
            return ((name,),) if name in known else ()
        paths = []
        for column in columns.split(",") if name == "boxes" else [columns]:
            path = (column,) if column in known else tuple(column.split("."))
            if path[0] not in known:
                got = f"has no column {column} (--option {name})"
                raise base.SourceError(f"{where}: {got}, {_expected(known)}")
            paths.append(path)
        return tuple(paths)

    def annotations(
        self, rows: Iterable[tuple[str, Mapping[str, Any]]], named: Named
    ) -> Iterator[tuple[Any, Annotation | Fault]]:
        """The value of each image in the column `image`, and what the table says about it.

        Args:
          rows: where each stands, FILE:ROW, and its values by column.
          named: the columns.
        """
        values = ((where, named.values(row)) for where, row in rows)
        for where, of_image in _joined(values) if named.row_is_box else values:
            yield of_image.pop("image", None), self._annotation(where, of_image, named)

    def _annotation(self, where: str, values: dict[str, Any], named: Named) -> Annotation | Fault:
        if isinstance(values.get("caption"), list):  # several texts in a column of that name
            values["captions"] = [*values.pop("caption"), *(values.get("captions") or ())]
        try:
            row = regular_file.checked(values, Row, where, "what the columns of a row hold")
            boxes, texts = row.boxes or [], row.descriptions or []
            if "labels" in named.paths:
                texts = [_described(label, named) for label in row.labels or ()]
        except ValueError as error:
            reason = str(error).removeprefix(f"{where}: ")
            return Fault(where, "bad annotation", reason, where)
        scores = row.scores or [base.WHOLE] * len(boxes)
        if not len(boxes) == len(texts) == len(scores):
            got = f"{len(boxes)} boxes, {len(texts)} texts and {len(scores)} scores"
            detail = f"got {got}, expected as many of each"
            return Fault(where, "bad annotation", detail, where)
        regions: Any = [(self._xyxy(box), *rest) for box, *rest in zip(boxes, texts, scores)]
        return Annotation(
            where,
            [text for text in (row.caption, *(row.captions or ())) if text],
            regions=[Region(*values) for values in regions],
            id=None if row.id is None else str(row.id),
            where=where,
            drawn_on=base.SHARES if self.unit == "share" else None,
        )

    def _xyxy(self, box: Any) -> Any:
        if self.box_format == "xyxy" or len(box or ()) != 4 or None in box:
            return box
        if self.box_format == "cxcywh":
            x, y, width, height = box
            box = x - width / 2, y - height / 2, width, height
        return base.xywh(box)


def warn_of_boxes(where: object, known: Sequence[str], named: Named) -> None:
    """Says on stderr which columns of the table look like boxes, if none is read as boxes."""
    unread = [] if "boxes" in named.paths else [x for x in known if x not in named.columns]
    lists, sides = (list(filter(form.fullmatch, unread)) for form in (_BOXES, _SIDES))
    if looking := lists + (sides if len(sides) >= 4 else []):
        option = f"boxes={','.join(sides)}" if len(sides) == 4 else "boxes=COLUMN"
        got = f"the columns {', '.join(looking)} look like boxes and are not read"
        advice = f"--option {option} descriptions=COLUMN (or labels=COLUMN) reads them"
        print(printable.plain(f"{where}: {got}; {advice}"), file=sys.stderr)


def _expected(known: Sequence[str]) -> str:
    return f"expected one of: {printable.plain(', '.join(known), 400)}"


def _pick(value: Any, path: Sequence[str]) -> Any:
    """The value at the end of a path; in a list, the value of each item."""
    for depth, part in enumerate(path):
        if isinstance(value, list):
            return [_pick(item, path[depth:]) for item in value]
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _described(label: str | int | None, named: Named) -> str | None:
    """The description that stands for a label. Raises ValueError: it is a number, and has no name."""
    if isinstance(label, int):
        if not named.names:
            raise ValueError(f"label {label} has no name in the file, expected texts")
        label = named.names[label] if 0 <= label < len(named.names) else None
    return named.described(label) if label else None


def _joined(rows: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of each image as one: the lists of its boxes one after another, each of its captions once."""
    met: set[int] = set()
    for image, of_image in itertools.groupby(rows, key=lambda row: _key(row[1].get("image"))):
        group = iter(of_image)
        where, joined = next(group)
        if hash(image) in met:
            got = "got rows of an image apart, expected them one after another; sort the table by image"
            raise base.SourceError(f"{where}: {got}")
        met.add(hash(image))
        lists = joined.keys() & {"boxes", *OF_REGIONS}
        captions = [joined.get("caption")]
        for _, row in group:
            if row.get("caption") not in captions:
                captions.append(row.get("caption"))
            for name in lists:
                joined[name] += row[name]
        if len(captions) > 1:
            joined["caption"] = [text for text in captions if text]
        has_box = [any(side is not None for side in box) for box in joined["boxes"]]
        for name in lists:  # a row without a box has a caption alone
            joined[name] = list(itertools.compress(joined[name], has_box))
        yield where, joined


def _key(image: Any) -> Any:
    """What tells the image of a row from others: its path, or its bytes."""
    if isinstance(image, Mapping):
        image = image.get("path") or image.get("bytes")
    return image if isinstance(image, str | bytes | None) else repr(image)
