"""Reads annotations (`A.jsonl`: a picture, its captions and its described boxes a line) and names every fault.

The format is interface.md's. Needs the standard library and `etils.epath` only, so that evaluators and
the offline tools in `data/` can share it.
"""

import json
import math
import posixpath
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath

KEYS = ("image", "caption", "captions", "synthetic_caption", "regions", "id")
REGION_KEYS = ("box", "description", "score")
MAX_FAULT_SHARE = 0.01  # of the lines; more is an error, fewer are left out and counted
_LISTED_FAULTS = 20  # that an error message spells out


class AnnotationError(ValueError):
    """The annotations cannot be used; the message has one line a fault and then a summary."""


class Region(NamedTuple):
    """A described box, as it stands in the file."""

    box_xyxy: tuple[float, float, float, float]  # pixels of the picture file
    description: str
    score: float  # the detector's; 1 where the file has none


class Annotation(NamedTuple):
    """One picture's line."""

    line: int  # in the file, from 1
    image: str  # path below the pictures' folder
    captions: tuple[str, ...]  # of the web or of annotators; may be empty
    synthetic_caption: str | None
    regions: tuple[Region, ...]


class Annotations(NamedTuple):
    """What `read` found."""

    records: list[Annotation]
    faults: list[str]  # one line each; the faulty lines are left out of `records`
    faulty_lines: int
    unknown_keys: dict[str, int]  # key -> how many lines have it


def read(path: epath.PathLike, *, max_faults: float = MAX_FAULT_SHARE) -> Annotations:
    """The annotations in a file of JSON lines; empty lines are skipped.

    Args:
      path: the file, local or remote.
      max_faults: the largest share of faulty lines, in [0, 1], that is put up with.

    Raises:
      AnnotationError: no such file, nothing in it, or too many faulty lines (all faults are in the message
        up to a limit, each as `FILE:LINE: what, got, expected`).
    """
    path = epath.Path(path)
    if not path.exists() or path.is_dir():
        raise AnnotationError(f"{path}: no such file; expected annotations, one JSON object a line")
    records, faults, unknown, lines = [], [], {}, 0
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AnnotationError(
            f"{path}: not UTF-8 text (byte {error.start}); expected JSON lines"
        ) from None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        lines += 1
        found: list[str] = []
        record = _record(number, line, found, unknown)
        faults.extend(f"{path.name}:{number}: {fault}" for fault in found)
        if not found:
            records.append(record)
    if not lines:
        raise AnnotationError(
            f"{path}: the file is empty; expected annotations, one JSON object a line"
        )
    if lines - len(records) > max_faults * lines:
        listed = faults[:_LISTED_FAULTS]
        more = (
            f" ({len(faults) - len(listed)} more faults not shown)"
            if len(faults) > len(listed)
            else ""
        )
        raise AnnotationError(
            "\n".join(listed)
            + f"\n{path}: {lines - len(records)} of {lines} lines are faulty,"
            + f" more than {max_faults:.0%}{more}"
        )
    return Annotations(records, faults, lines - len(records), unknown)


def normalised_box_xyxy(
    box_xyxy: Sequence[float], width: int, height: int
) -> tuple[float, float, float, float] | None:
    """A box in pixels as shares of the picture, clipped to it; None if less than half its area is left."""
    x1, y1, x2, y2 = box_xyxy
    left, top = max(0.0, x1), max(0.0, y1)
    right, bottom = min(float(width), x2), min(float(height), y2)
    inside = max(0.0, right - left) * max(0.0, bottom - top)
    if inside < 0.5 * (x2 - x1) * (y2 - y1):
        return None
    return left / width, top / height, right / width, bottom / height


def _record(
    number: int, line: str, faults: list[str], unknown: dict[str, int]
) -> Annotation | None:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        faults.append(
            f"not JSON ({error.msg} at column {error.colno}), expected one JSON object a line"
        )
        return None
    if not isinstance(value, dict):
        faults.append(f"got {_short(value)}, expected a JSON object with the key 'image'")
        return None
    for key in value.keys() - set(KEYS):
        unknown[key] = unknown.get(key, 0) + 1
    image = value.get("image")
    if not isinstance(image, str) or not image.strip():
        faults.append(f"image: got {_short(image)}, expected a path below the pictures' folder")
        image = ""
    elif image.startswith("/") or "://" in image or ".." in image.split("/"):
        faults.append(
            f"image: got {_short(image)}, expected a path that stays below the pictures' folder"
        )
    synthetic = value.get("synthetic_caption")
    if synthetic is not None and not isinstance(synthetic, str):
        faults.append(f"synthetic_caption: got {_short(synthetic)}, expected text")
    return Annotation(
        line=number,
        image=posixpath.normpath(image),
        captions=_captions(value, faults),
        synthetic_caption=synthetic if _is_text(synthetic) and synthetic.strip() else None,
        regions=_regions(value.get("regions"), faults),
    )


def _captions(value: dict[str, Any], faults: list[str]) -> tuple[str, ...]:
    """`caption`, then those of `captions`; blank ones are left out."""
    caption, several = value.get("caption"), value.get("captions")
    if caption is not None and not _is_text(caption):
        faults.append(f"caption: got {_short(caption)}, expected text")
        caption = None
    if several is not None and not (isinstance(several, list) and all(map(_is_text, several))):
        faults.append(f"captions: got {_short(several)}, expected a list of texts")
        several = None
    texts = ([] if caption is None else [caption]) + (several or [])
    return tuple(text.strip() for text in texts if text.strip())


def _regions(value: Any, faults: list[str]) -> tuple[Region, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        faults.append(f"regions: got {_short(value)}, expected a list")
        return ()
    regions = []
    for index, region in enumerate(value):
        at = f"regions[{index}]"
        if not isinstance(region, dict):
            faults.append(
                f"{at}: got {_short(region)}, expected an object with {', '.join(REGION_KEYS)}"
            )
            continue
        box, description, score = (region.get(key) for key in REGION_KEYS)
        if score is None:
            score = 1.0
        count = len(faults)
        if not _is_text(description) or not description.strip():
            faults.append(f"{at}.description: got {_short(description)}, expected text")
        if not _is_number(score):
            faults.append(f"{at}.score: got {_short(score)}, expected a finite number")
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            faults.append(
                f"{at}.box: got {_short(box)}, expected four finite numbers [x1, y1, x2, y2]"
            )
        elif box[2] <= box[0] or box[3] <= box[1]:
            faults.append(f"{at}.box: got {_short(box)}, expected x1 < x2 and y1 < y2 (pixels)")
        if len(faults) == count:
            regions.append(Region(tuple(map(float, box)), description.strip(), float(score)))
    return tuple(regions)


def _is_text(value: Any) -> bool:
    # JSON can spell half a surrogate pair, which no tokenizer takes.
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
