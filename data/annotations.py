"""Reads and checks annotation lines (`A.jsonl`): what is wrong, in every line, in the user's words.

A line becomes an `Annotation` or a list of faults, never an exception; `data/build.py` decides what
many faults mean.
"""

import json
import math
import posixpath
from typing import Any, NamedTuple

import PIL.Image
from etils import epath

from grain_jax import images

KEYS = {"image", "caption", "captions", "synthetic_caption", "regions", "id"}
REGION_KEYS = {"box", "description", "score"}
MIN_INSIDE = 0.5  # of a box's area; detectors hang over a little, a wrong box hangs over a lot


class Region(NamedTuple):
    """A box in pixels of the picture file, clipped to it, and what is in it."""

    box_xyxy: tuple[float, float, float, float]
    description: str
    score: float


class Annotation(NamedTuple):
    """A line that has no fault."""

    id: str | None
    image: str  # below the pictures' folder
    captions: list[str]
    synthetic_caption: str  # "" where there is none
    regions: list[Region]


class Checked(NamedTuple):
    """What a line came to: an annotation with its picture, or faults."""

    annotation: Annotation | None
    picture: PIL.Image.Image | None
    encoded: bytes  # the picture's file
    faults: list[str]
    boxes_clipped: int
    unknown_keys: list[str]


def check_line(line: bytes, folder: epath.PathLike) -> Checked:
    """Checks one line and its picture, which lies below `folder`."""
    faults: list[str] = []
    try:
        item = json.loads(line.rstrip().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested or too long a number"
        if isinstance(error, json.JSONDecodeError):
            reason = f"{error.msg} at column {error.colno}"
        elif isinstance(error, UnicodeDecodeError):
            reason = f"not UTF-8 text (byte {error.start})"
        return Checked(None, None, b"", [f"not JSON: {reason}, expected one JSON object"], 0, [])
    if not isinstance(item, dict):
        fault = f"got {_show(item)}, expected one JSON object"
        return Checked(None, None, b"", [fault], 0, [])
    unknown = [key for key in item if key not in KEYS]

    captions = _captions(item, faults)
    synthetic = _text(item, "synthetic_caption", faults)
    if not captions and not synthetic and not any("caption" in fault for fault in faults):
        faults.append(
            "no caption: got neither caption, captions nor synthetic_caption, expected a text"
        )
    identity = item.get("id")
    if identity is not None and (not _is_text(identity) or not identity):
        faults.append(f"id: got {_show(identity)}, expected a text")
    image, picture, encoded = _picture(item, epath.Path(folder), faults)

    regions, clipped = [], 0
    entries = item.get("regions") or []
    if not isinstance(entries, list):
        faults.append(f"regions: got {_show(entries)}, expected a list")
        entries = []
    for index, entry in enumerate(entries):
        at = f"regions[{index}]"
        if not isinstance(entry, dict):
            faults.append(
                f"{at}: got {_show(entry)}, expected an object with box, description, score"
            )
            continue
        unknown += [f"regions.{key}" for key in entry if key not in REGION_KEYS]
        box, was_clipped = _box(entry, at, picture, faults)
        description, score = entry.get("description"), entry.get("score")
        if not _is_text(description) or not description.strip():
            got = _show(description) if "description" in entry else "none"
            faults.append(f"{at}.description: got {got}, expected a text")
        if not _is_number(score) or not 0 <= score <= 1:
            got = _show(score) if "score" in entry else "none"
            faults.append(f"{at}.score: got {got}, expected a number from 0 to 1")
        if not faults:
            clipped += was_clipped
            regions.append(Region(box, description.strip(), float(score)))
    if faults:
        return Checked(None, None, b"", faults, 0, unknown)
    annotation = Annotation(identity, image, captions, synthetic, regions)
    return Checked(annotation, picture, encoded, [], clipped, unknown)


def _show(value: Any) -> str:
    """A value as the user typed it, cut to what fits on a line."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_text(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")  # JSON can spell half a surrogate pair, which no file can hold
    except UnicodeEncodeError:
        return False
    return True


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond any float
        return False


def _text(item: dict[str, Any], key: str, faults: list[str]) -> str:
    """An optional text, stripped; "" where it is missing, null or blank."""
    value = item.get(key)
    if value is None:
        return ""
    if not _is_text(value):
        faults.append(f"{key}: got {_show(value)}, expected a text")
        return ""
    return value.strip()


def _captions(item: dict[str, Any], faults: list[str]) -> list[str]:
    """The web captions: `caption`, then those of `captions`; blank ones are left out."""
    caption = _text(item, "caption", faults)
    captions = [caption] if caption else []
    several = item.get("captions")
    if several is None:
        return captions
    if not isinstance(several, list) or not all(map(_is_text, several)):
        faults.append(f"captions: got {_show(several)}, expected a list of texts")
        return captions
    return captions + [text.strip() for text in several if text.strip()]


def _picture(
    item: dict[str, Any], folder: epath.Path, faults: list[str]
) -> tuple[str, PIL.Image.Image | None, bytes]:
    name = item.get("image")
    if not _is_text(name) or not name or "\0" in name:
        got = _show(name) if "image" in item else "none"
        faults.append(f"image: got {got}, expected the path of a picture below {folder}")
        return "", None, b""
    relative = posixpath.normpath(name)
    if posixpath.isabs(relative) or relative.split("/")[0] == "..":
        faults.append(f"image: got {_show(name)}, expected a path that stays below {folder}")
        return "", None, b""
    try:
        encoded = (folder / relative).read_bytes()
    except FileNotFoundError:
        faults.append(f"image: got {_show(name)}, expected a file; there is no {folder / relative}")
        return "", None, b""
    except OSError as error:
        faults.append(f"image: got {_show(name)}, {error.strerror or error}, expected a picture")
        return "", None, b""
    try:
        return relative, images.decode_image(encoded, f"image: got {_show(name)}"), encoded
    except images.ImageError as error:
        faults.append(str(error))
        return "", None, b""


def _box(
    entry: dict[str, Any], at: str, picture: PIL.Image.Image | None, faults: list[str]
) -> tuple[tuple[float, float, float, float], bool]:
    """The box clipped to the picture, and whether that changed it."""
    box, nothing = entry.get("box"), (0.0, 0.0, 0.0, 0.0)
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        got = _show(box) if "box" in entry else "none"
        faults.append(f"{at}.box: got {got}, expected four finite numbers [x1, y1, x2, y2]")
        return nothing, False
    x1, y1, x2, y2 = map(float, box)
    if x2 < x1 or y2 < y1:
        faults.append(f"{at}.box: got {_show(box)}, inverted, expected x1 < x2 and y1 < y2")
        return nothing, False
    area = (x2 - x1) * (y2 - y1)
    if not 0 < area < math.inf:
        faults.append(f"{at}.box: got {_show(box)}, no area, expected x1 < x2 and y1 < y2")
        return nothing, False
    if picture is None:  # its own fault is reported already
        return nothing, False
    width, height = picture.size
    inside = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
    kept = max(0.0, inside[2] - inside[0]) * max(0.0, inside[3] - inside[1])
    if kept < MIN_INSIDE * area:
        faults.append(
            f"{at}.box: got {_show(box)}, {kept / area:.0%} of it in the picture of"
            f" {width} x {height}, expected at least {MIN_INSIDE:.0%}"
        )
        return nothing, False
    return inside, inside != (x1, y1, x2, y2)
