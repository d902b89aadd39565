"""GRIT (zzliang/GRIT): tar shards of img2dataset with the columns `noun_chunks` and `ref_exps` in the JSON.

Download with `--save_additional_columns '["id","noun_chunks","ref_exps"]'`. Each entry of these columns is
[start, end, x1, y1, x2, y2, score]: the caption's characters, and the box as shares of the image, so
img2dataset must neither crop nor pad it (`--resize_mode no` or `keep_ratio`).
"""

import math

from grain_jax.data.sources import base, webdataset

from grain_jax.files import annotations


class Grit(webdataset.WebDataset):
    """Images of tars; a region's description is its part of the caption."""

    def entry(self, image: str, files: dict[str, bytes]) -> base.Entry:
        return _entry(image, files)


def _entry(image: str, files: dict[str, bytes]) -> base.Entry:
    item = webdataset.metadata(files)
    caption = item.get("caption")
    if not isinstance(caption, str):
        raise ValueError(f"caption: got {annotations.show(caption)}, expected a text")
    # Referring expressions hold every noun chunk, with the words that belong to it.
    spans = item.get("ref_exps", item.get("noun_chunks"))
    if not isinstance(spans, list):
        raise ValueError(
            "got neither ref_exps nor noun_chunks, expected a list; img2dataset keeps them with"
            " --save_additional_columns"
        )
    regions = []
    for span in spans:
        if not isinstance(span, list) or len(span) != 7 or not all(map(_is_finite, span)):
            raise ValueError(f"got {annotations.show(span)}, expected seven finite numbers")
        start, end, *box, score = span
        regions.append((box, caption[int(start) : int(end)], score))
    return base.Entry(image, (caption,), regions=regions, shares=True)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
