"""CSV files, one row per image; the options that name the columns: `data/sources/columns.py`.

The image is a path below --images. A cell that holds a list is JSON: `[[12, 30, 80, 64]]`.
"""

import contextlib
import csv
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import msgspec

from grain_jax.core import regular_file
from grain_jax.data.sources import base, columns, staged


@dataclasses.dataclass(frozen=True)
class Csv(columns.RowOptions, staged.ListedSource):
    """Images of CSV files in UTF-8, with a row of names first."""

    delimiter: Annotated[str, msgspec.Meta(pattern=r'\A[^\r\n"]\Z')] = ","

    needs = "a CSV file"

    def entries(self, options: base.Options) -> Iterator[base.Annotation | base.Fault]:
        base.check_split("a CSV file", options.split, ())
        for path in options.annotations:
            rows = _rows(path, self.delimiter)
            _, header = next(rows, ("", []))
            named = self.named(path, header, options)
            for where, cells in rows:
                if len(cells) != len(header):
                    got = f"got {len(cells)} cells, expected {len(header)} as in the first row"
                    yield base.Fault(where, "bad annotation", got, where)
                    continue
                image, annotation = self.annotation(where, _row(dict(zip(header, cells)), named), named)
                if isinstance(annotation, base.Fault):
                    yield annotation
                elif image:
                    yield annotation._replace(image=image)
                else:
                    yield base.Fault(where, "bad annotation", "got no image, expected a path", where)


def _row(cells: Mapping[str, str], named: columns.Named) -> dict[str, Any]:
    """The cells; lists are JSON. What is no JSON stays as it is: the row's form says what is wrong."""
    row: dict[str, Any] = {column: text or None for column, text in cells.items()}
    for name in named.paths.keys() - {"image", "caption", "id"}:
        column = named.paths[name][0]
        with contextlib.suppress(msgspec.DecodeError):
            row[column] = msgspec.json.decode(cells[column] or "null")
    return row


def _rows(path: str, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """The rows that are not empty, each with the line of its end, FILE:LINE. Raises SourceError."""
    lines = regular_file.lines(path, "a CSV file", columns.MAX_LINE)
    texts = (line.decode("utf-8" if number else "utf-8-sig") for number, line in enumerate(lines))
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
