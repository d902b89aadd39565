"""FineHARD (qihoo360/FineHARD): jsonfiles/*.json, each a list of images with described boxes.

Keys: `f_path` (below the images' folder), `caption` (long, of a model), `short_caption`, and `bbox_info`: a
list of `bbox` (x1, y1, x2, y2 as shares of the image, then a score), `short_expr`, `long_expr`. The short
expression is the description; where `flag_short_neg` is 1, `short_expr_negs`, a dict of texts, has its negatives.
Source of these names: 360CVGroup/FG-CLIP, fgclip2/train/train_fgclip2.py and data/data.md at b1af1cd.
"""

from collections.abc import Iterator

import msgspec
from etils import epath

from grain_jax.data.sources import base, json_files, staged


class _Region(msgspec.Struct):
    bbox: list[base.Scalar]
    short_expr: base.Scalar = None
    long_expr: base.Scalar = None
    flag_short_neg: base.Scalar = None
    short_expr_negs: dict[str, base.Scalar] | list[base.Scalar] | base.Scalar = None


class _Item(msgspec.Struct):
    f_path: str
    caption: str | None
    bbox_info: list[_Region]
    short_caption: str | None = None


class FineHard(staged.ListedSource):
    """Images of JSON files, or of folders of them."""

    needs = "jsonfiles, a folder of FineHARD's .json: f_path, caption, bbox_info"

    def entries(self, options: base.Options) -> Iterator[base.Entry | base.Fault]:
        for path in map(epath.Path, options.annotations):
            for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
                for found in json_files.read_list(file, _Item, self.needs):
                    yield found if isinstance(found, base.Fault) else _entry(found)


def _entry(item: _Item) -> base.Entry:
    regions = []
    for region in item.bbox_info:
        *box, score = [*region.bbox, base.WHOLE][:5]
        description = base.text(region.short_expr)
        negatives = region.short_expr_negs if description else None
        if not isinstance(negatives, dict) or region.flag_short_neg != 1:
            negatives = {}
        description = description or region.long_expr
        regions.append((box, description, score, list(negatives.values())))
    return base.Entry(
        image=item.f_path.lstrip("/"),
        captions=[item.short_caption],
        synthetic_caption=item.caption,
        regions=regions,
        shares=True,
    )
