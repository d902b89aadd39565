"""A data source of your own: boxes and phrases in a CSV file, one row a box.

  image,caption,x1,y1,x2,y2,phrase
  street/001.jpg,a bus at a stop,12,30,200,180,a red bus

Rows of an image stand together; a row without a phrase has a caption alone. In the folder above `examples`:

  grain-jax annotate --source examples.source.csv_boxes:CsvBoxes --annotations boxes.csv --images DIR \
    --option unit=share --passes none --output OUT

reads the file and writes OUT/A.jsonl. `grain-jax build` takes the same options and makes records.
"""

import csv
import dataclasses
import itertools
from collections.abc import Iterator

from grain_jax.data.sources import base, staged

UNITS = ("pixel", "share")
COLUMNS = ("image", "caption", "x1", "y1", "x2", "y2", "phrase")


@dataclasses.dataclass(frozen=True)
class CsvBoxes(staged.ListedSource):
    """Images of CSV files. The fields are its options: `--option delimiter=;`."""

    delimiter: str = ","
    unit: str = "pixel"  # of x1 to y2; share: of the image's width and height

    def __post_init__(self):
        if self.unit not in UNITS:
            raise ValueError(f"unit: got {self.unit!r}, expected one of {', '.join(UNITS)}")

    def entries(self, options: base.Options) -> Iterator[base.Annotation | base.Fault]:
        """An annotation per image; whether a box lies in its image is checked when the image is read."""
        for path in options.annotations:
            with open(path, newline="", encoding="utf-8") as file:
                rows = csv.DictReader(file, delimiter=self.delimiter)
                if missing := set(COLUMNS) - set(rows.fieldnames or ()):
                    raise base.SourceError(
                        f"{path}: has no column {', '.join(sorted(missing))} between {self.delimiter!r}"
                    )
                for image, of_image in itertools.groupby(rows, key=lambda row: row["image"]):
                    yield self._entry(image, list(of_image))

    def _entry(self, image: str, rows: list[dict[str, str]]) -> base.Annotation | base.Fault:
        try:
            regions = [
                base.Region([float(row[x]) for x in COLUMNS[2:6]], row["phrase"], base.WHOLE)
                for row in rows
                if row["phrase"]
            ]
        except (TypeError, ValueError) as error:  # a short row; no number
            return base.Fault(image, "bad annotation", f"a box: {error}")
        captions = list(dict.fromkeys(row["caption"] for row in rows))
        drawn_on = base.SHARES if self.unit == "share" else None
        return base.Annotation(image, captions, regions=regions, drawn_on=drawn_on)
