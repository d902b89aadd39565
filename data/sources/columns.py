"""What the columns of a table say about an image: the options that name them, and the form of a row.

A column's default name is its option's. A name with dots, `objects.bbox`, is a field of a struct, or of each
struct of a list.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from grain_jax.core import printable, regular_file
from grain_jax.data.sources import base
from grain_jax.data.sources.base import Annotation, Fault, Region

OF_REGIONS = ("labels", "descriptions", "scores")
NAMES = ("image", "caption", "captions", "boxes", *OF_REGIONS, "id")
MAX_LINE = 4 << 20  # bytes of a line of text
BoxFormat = Literal["xyxy", "xywh", "cxcywh"]
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

    paths: Mapping[str, Sequence[str]]  # option -> the column and the fields of it with the value
    names: Sequence[str]  # of labels that are numbers
    described: Callable[[str], str]  # a label -> the description


@dataclasses.dataclass(frozen=True)
class RowOptions(base.BoxUnit):
    """The options of rows: the names of columns, the form of boxes."""

    image: str = ""
    caption: str = ""
    captions: str = ""
    boxes: str = ""
    labels: str = ""  # names of classes, or their numbers
    descriptions: str = ""
    scores: str = ""
    id: str = ""
    box_format: BoxFormat = "xyxy"

    def named(self, where: object, known: Sequence[str], options: base.Options) -> Named:
        """Finds the columns in the table `where`. Raises SourceError: one is missing."""
        paths, missing = {}, []
        for name in NAMES:
            column = getattr(self, name) or (name if name in known else "")
            if column:
                paths[name] = [column] if column in known else column.split(".")
                missing += [] if paths[name][0] in known else [column]
        if "image" not in paths:
            missing.append("image")
        if "boxes" not in paths:
            paths = {name: path for name, path in paths.items() if name not in OF_REGIONS}
        elif "labels" in paths and (self.labels or "descriptions" not in paths):
            paths.pop("descriptions", None)
        elif "descriptions" in paths:
            paths.pop("labels", None)
        else:
            missing.append("labels or descriptions")
        if missing:
            got = f"has no column {', '.join(missing)}; --option NAME=COLUMN names it"
            columns = printable.plain(", ".join(known), 400)
            raise base.SourceError(f"{where}: {got}, expected one of: {columns}")
        return Named(paths, [], options.described)

    def annotation(self, where: str, row: Mapping[str, Any], named: Named) -> tuple[Any, Annotation | Fault]:
        """The value of the column `image` in a row, by column, and what the row says about the image."""
        values = {name: _pick(row, path) for name, path in named.paths.items()}
        image = values.pop("image")
        if isinstance(values.get("caption"), list):  # several texts in a column of that name
            values["captions"] = [*values.pop("caption"), *(values.get("captions") or ())]
        try:
            columns = regular_file.checked(values, Row, where, "what the columns of a row hold")
            boxes, texts = columns.boxes or [], columns.descriptions or []
            if "labels" in named.paths:
                texts = [_described(label, named) for label in columns.labels or ()]
            scores = columns.scores or [base.WHOLE] * len(boxes)
            if not len(boxes) == len(texts) == len(scores):
                got = f"{len(boxes)} boxes, {len(texts)} texts and {len(scores)} scores"
                raise ValueError(f"got {got}, expected as many of each")
        except ValueError as error:
            reason = str(error).removeprefix(f"{where}: ")
            return image, Fault(where, "bad annotation", reason, where)
        regions: Any = zip(map(self._xyxy, boxes), texts, scores)
        return image, Annotation(
            where,
            [text for text in (columns.caption, *(columns.captions or ())) if text],
            regions=[Region(*values) for values in regions],
            id=None if columns.id is None else str(columns.id),
            where=where,
            drawn_on=self.drawn_on,
        )

    def _xyxy(self, box: Any) -> Any:
        if self.box_format == "xyxy" or len(box or ()) != 4 or None in box:
            return box
        if self.box_format == "cxcywh":
            x, y, width, height = box
            box = x - width / 2, y - height / 2, width, height
        return base.xywh(box)


def unread_boxes(row: Mapping[str, Any], path: str = "") -> str:
    """The options that would read boxes and labels which stand in a row; "" if it has no such values."""
    for name, value in row.items():
        first = value[0] if isinstance(value, list) and value else value
        where = f"{path}{name}"
        if isinstance(value, list) and _is_box(first):
            labels = next((x for x, y in row.items() if _are_labels(y, len(value))), "")
            return f"boxes={where}" + (f" labels={path}{labels}" if labels else "")
        if isinstance(value, list) and isinstance(first, Mapping):
            value = {key: [item.get(key) for item in value] for key in first}
        if isinstance(value, Mapping) and (found := unread_boxes(value, f"{where}.")):
            return found
    return ""


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(type(x) in (int, float) for x in value)


def _are_labels(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and {*map(type, value)} in ({str}, {int})


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
