"""FineHARD (qihoo360/FineHARD): jsonfiles/*.json, each a list of images with described boxes.

Keys: `f_path` (below the images' folder), `caption` (long, of a model), `short_caption`, and `bbox_info`: a
list of `bbox` (x1, y1, x2, y2 as shares of the image, then a score), `short_expr`, `long_expr`. The short
expression is the description; if `flag_short_neg` is 1, `short_expr_negs`, a dict of texts, has its negatives.
Source of these names: 360CVGroup/FG-CLIP, fgclip2/train/train_fgclip2.py and data/data.md at b1af1cd.
"""

from collections.abc import Iterator
from typing import Any

import msgspec
from etils import epath

from grain_jax.data.sources import base, join, staged


class _Region(msgspec.Struct):
    bbox: list[base.Scalar]
    short_expr: base.Scalar = None
    long_expr: base.Scalar = None
    flag_short_neg: base.Scalar = None
    short_expr_negs: dict[str, base.Scalar] | list[base.Scalar] | base.Scalar = None

    def region(self) -> base.Region:
        box: Any
        *box, score = [*self.bbox, base.WHOLE][:5]
        description, negatives = join.text(self.short_expr), self.short_expr_negs
        if not description or not isinstance(negatives, dict) or self.flag_short_neg != 1:
            negatives = {}
        texts: Any = description or self.long_expr, score, tuple(negatives.values())
        return base.Region(box, *texts)


class _Item(msgspec.Struct):
    f_path: str
    caption: str | None
    bbox_info: list[_Region]
    short_caption: str | None = None


class FineHard(staged.ListedSource):
    """Images of JSON files, or of folders of them."""

    needs = "jsonfiles, a folder of FineHARD's .json: f_path, caption, bbox_info"

    def entries(self, options: base.Options) -> Iterator[base.Annotation | base.Fault]:
        for path in map(epath.Path, options.annotations):
            for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
                listed = base.read_json(file, list[msgspec.Raw], self.needs)
                for _, item in base.items(listed, _Item, str(file)):
                    if isinstance(item, base.Fault):
                        yield item
                        continue
                    yield base.Annotation(
                        item.f_path.lstrip("/"),
                        [item.short_caption or ""],
                        item.caption or "",
                        [region.region() for region in item.bbox_info],
                        drawn_on=base.SHARES,
                    )
