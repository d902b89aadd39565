"""GRIT (zzliang/GRIT): tar shards of img2dataset with the columns `noun_chunks` and `ref_exps` in the JSON.

Download with `--save_additional_columns '["id","noun_chunks","ref_exps"]'`. Each entry of these columns is
[start, end, x1, y1, x2, y2, score]: the caption's characters, and the box as shares of the image, so
img2dataset must neither crop nor pad it (`--resize_mode no` or `keep_ratio`).
"""

import math

import msgspec

from grain_jax.core import regular_file
from grain_jax.data.sources import base, webdataset

_Span = tuple[float, float, float, float, float, float, float]


class _Item(msgspec.Struct):
    caption: str
    ref_exps: list[_Span] | None = None
    noun_chunks: list[_Span] | None = None


class Grit(webdataset.WebDataset):
    """Images of tars; a region's description is its part of the caption."""

    def entry(self, image: str, files: dict[str, bytes]) -> base.Entry:
        expected = "a caption and spans of seven numbers"
        item = regular_file.checked(webdataset.metadata(files), _Item, "json", expected)
        # Referring expressions hold every noun chunk, with the words that belong to it.
        spans = item.noun_chunks if item.ref_exps is None else item.ref_exps
        if spans is None:
            raise ValueError(
                "got neither ref_exps nor noun_chunks, expected a list; img2dataset keeps them with"
                " --save_additional_columns"
            )
        regions = []
        for start, end, *box, score in spans:
            if not (math.isfinite(start) and math.isfinite(end)):
                raise ValueError(f"got characters {start} to {end}, expected finite numbers")
            regions.append((box, item.caption[int(start) : int(end)], score))
        return base.Entry(image, (item.caption,), regions=regions, shares=True)
