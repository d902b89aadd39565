"""CSV files, one row an image, or one row a box; the options that name the columns: `data/sources/columns.py`.

The image is a path below --images. A cell that holds a list (captions; boxes, labels, descriptions, scores of an image)
is JSON: `[[12, 30, 80, 64]]`.
"""

import csv
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from grain_jax.core import regular_file
from grain_jax.data.sources import base, columns, staged


@dataclasses.dataclass(frozen=True)
class Csv(columns.Columns, staged.ListedSource):
    """Images of CSV files in UTF-8, with a row of names first."""

    delimiter: str = ","

    needs = "a CSV file"

    def __post_init__(self):
        super().__post_init__()
        if len(self.delimiter) != 1 or not self.delimiter.isprintable() and self.delimiter != "\t":
            raise ValueError(f"delimiter: got {self.delimiter!r}, expected one character")

    def entries(self, options: base.Options) -> Iterator[base.Entry | base.Fault]:
        if options.split:
            raise base.SourceError(
                f"got --split {options.split}, CSV files have no splits, expected none"
            )
        for path in options.annotations:
            yield from self._of_file(path, options)

    def _of_file(self, path: str, options: base.Options) -> Iterator[base.Entry | base.Fault]:
        rows = _rows(path, self.delimiter)
        _, header = next(rows, ("", []))
        named, faults = self.named(path, header), []
        self.check_labels(path, named, options.label_text)
        columns.warn_of_boxes(path, header, named)

        def whole() -> Iterator[tuple[str, Mapping[str, Any]]]:
            for where, cells in rows:
                if len(cells) == len(header):
                    yield where, self._row(dict(zip(header, cells)), named)
                else:
                    got = f"got {len(cells)} cells, expected {len(header)} as in the first row"
                    faults.append(base.Fault(where, "bad annotation", got, where))

        for where, image, found in self.items(whole(), named, options.described):
            if isinstance(found, base.Entry) and not image:
                found = base.Fault(where, "bad annotation", "got no image, expected a path")
            if isinstance(found, base.Entry):
                found = found._replace(image=image)
            yield found._replace(where=where)
            yield from faults
            faults.clear()
        yield from faults

    def _row(self, cells: dict[str, str], named: columns.Named) -> dict[str, Any]:
        """The cells; those of lists and numbers as what they say in JSON, others and what is no JSON as they are."""
        found: dict[str, Any] = {column: text or None for column, text in cells.items()}
        plain = ["image", "caption", "id"]
        if named.row_is_box:
            plain += ["labels", "descriptions"]
        for name, paths in named.paths.items():
            numbers = name == "labels" and bool(self.names)
            for column, *_ in paths if numbers or name not in plain else ():
                try:
                    found[column] = msgspec.json.decode(cells[column]) if cells[column] else None
                except msgspec.DecodeError:
                    pass  # the row's form says what is wrong with it
        return found


def _rows(path: str, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """The rows that are not empty, each with the place of its end, FILE:LINE. Raises SourceError."""
    lines = regular_file.lines(path, "a CSV file", columns.MAX_LINE)
    texts = (line.decode("utf-8" if at else "utf-8-sig") for at, line in enumerate(lines))
    csv.field_size_limit(columns.MAX_LINE)
    reader = csv.reader(texts, delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            if cells:
                yield f"{path}:{reader.line_num}", cells
    except (csv.Error, UnicodeDecodeError) as error:
        reason = error if isinstance(error, csv.Error) else "not UTF-8 text"
        where = f"{path}:{reader.line_num + 1}"
        raise base.SourceError(f"{where}: {reason}, expected rows of a CSV file") from None
