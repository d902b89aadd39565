"""FineHARD (qihoo360/FineHARD): jsonfiles/*.json, each a list of images with described boxes.

Keys: `f_path` (below the images' folder), `caption` (long, of a model), `short_caption`, and `bbox_info`: a
list of `bbox` (x1, y1, x2, y2 as shares of the image, then a score), `short_expr`, `long_expr`. The short
expression is the description; where `flag_short_neg` is 1, `short_expr_negs`, a dict of texts, has its negatives.
Source of these names: 360CVGroup/FG-CLIP, fgclip2/train/train_fgclip2.py and data/data.md at b1af1cd.
"""

from collections.abc import Iterator
from typing import Any

from etils import epath
from grain_jax.data.sources import base, json_files, staged

from grain_jax.files import annotations


class FineHard(staged.ListedSource):
    """Images of JSON files, or of folders of them."""

    def entries(self, options: base.Options) -> Iterator[base.Entry | base.Fault]:
        paths = []
        for path in map(epath.Path, options.annotations):
            paths += sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not paths:
            raise base.SourceError(
                "source finehard: expected --annotations jsonfiles, a folder of .json"
            )
        return _entries(paths)


def _entries(paths: list[epath.Path]) -> Iterator[base.Entry | base.Fault]:
    for path in paths:
        items = json_files.read_json_list(path, expected="a list: FineHARD's images")
        for number, item in enumerate(items):
            try:
                entry = _entry(item)
            except (KeyError, TypeError, AttributeError):
                got = f"got {annotations.show(item)}, expected f_path, caption, bbox_info"
                yield base.Fault(f"{path}[{number}]", "bad annotation", got)
                continue
            yield entry


def _entry(item: dict[str, Any]) -> base.Entry:
    regions = []
    for region in item["bbox_info"]:
        *box, score = [*region["bbox"], base.WHOLE][:5]
        description = base.text(region.get("short_expr"))
        negatives = region.get("short_expr_negs") if description else None
        if not isinstance(negatives, dict) or region.get("flag_short_neg") != 1:
            negatives = {}
        description = description or region.get("long_expr")
        regions.append((box, description, score, list(negatives.values())))
    return base.Entry(
        image=item["f_path"].lstrip("/"),
        captions=[item.get("short_caption")],
        synthetic_caption=item["caption"],
        regions=regions,
        shares=True,
    )
