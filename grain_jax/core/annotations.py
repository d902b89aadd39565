"""Reads annotations (`A.jsonl`: per line an image, its captions and described boxes) and names every fault.

The only parser of that format, for evaluation and for the offline tools in `data/`; it needs neither
TensorFlow nor JAX. Checks that need the image itself are in data/example.py.
"""

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

from etils import epath

from grain_jax.core import errors, regular_file

EXPECTED = "one JSON object a line"
KEYS = ("image", "caption", "captions", "synthetic_caption", "regions", "phrases", "id")
REGION_KEYS = ("box", "description", "score", "negatives")
NO_TEXT = "no caption: got neither caption, captions, synthetic_caption nor regions, expected one of them"
MAX_FAULT_SHARE = 0.01  # of the lines; more is an error, fewer are skipped and counted
MIN_INSIDE = 0.5  # of the area of a box; boxes of detectors overhang a little, wrong boxes a lot

Box = tuple[float, float, float, float]


class AnnotationError(errors.UserError):
    """The annotations cannot be used; the message has one line a fault and then a summary."""


class Region(NamedTuple):
    """A described box."""

    box_xyxy: Box  # pixels of the image file
    description: str
    score: float  # the detector's, in [0, 1]
    negatives: tuple[str, ...] = ()  # texts that are nearly the description, and wrong


class Fault(NamedTuple):
    """Why an image, or one region of it, is left out."""

    image: str  # as Annotation.image; where there is none, what stands in its place (FILE:LINE, a tar)
    cause: str  # one of data.sources.CAUSES: counters have these names
    detail: str  # what was got, what was expected
    where: str = ""  # FILE:LINE, in formats that have lines


class Annotation(NamedTuple):
    """An image with its texts and its described boxes.

    A reader of a public format yields it unchecked, `data.sources.join` and `parse_line` check it.
    """

    image: str  # path below the images' folder, with /; unique in its source and stable over runs
    captions: Sequence[str] = ()  # from the web or from annotators
    synthetic_caption: str = ""  # "" if there is none
    regions: Sequence[Region] = ()
    id: str | None = None
    # For evaluation: each phrase (referring expression), as the indices in `regions` of all boxes that are
    # right for it; its text is their description. One may stand twice. None: each region is a phrase.
    phrases: Sequence[Sequence[int]] | None = None
    encoded: bytes = b""  # the image file; empty until it is read
    left_out: Sequence[Fault] = ()  # regions of the source that cannot be used
    where: str = ""  # as Fault.where
    # Width and height of the image that the boxes were drawn on, if known. (1, 1): boxes are shares of both.
    drawn_on: Sequence[float | None] | None = None


class Parsed(NamedTuple):
    """The content of a line. With `image` and `boxes_xyxy` the image of a faulty line can be checked, too."""

    annotation: Annotation | None  # None where there is a fault
    faults: list[str]  # each `what: got, expected`
    unknown_keys: list[str]  # those of regions as "regions.KEY"
    image: str  # "" where it is faulty
    boxes_xyxy: list[Box | None]  # of each region of the line; None where it is faulty


class Annotations(NamedTuple):
    """The content of a file."""

    records: list[Annotation]  # of the lines without a fault
    faults: list[str]  # one line each
    faulty_lines: int
    unknown_keys: dict[str, int]  # key -> number of its occurrences


def read(path: epath.PathLike) -> Annotations:
    """The annotations in a file of JSON lines; blank lines are skipped, captions may be missing.

    Raises:
      AnnotationError: nothing in it, or too many faulty lines (all faults are in the message, each as
        `FILE:LINE: what: got, expected`).
      regular_file.FileError: no such file, no regular one, or a line too long.
    """
    records, faults, unknown, lines = [], [], {}, 0
    for number, line in enumerate(regular_file.lines(path, EXPECTED), start=1):
        if not line.strip():
            continue
        lines += 1
        parsed = parse_line(line, text_required=False)
        faults += [f"{path}:{number}: {fault}" for fault in parsed.faults]
        for key in parsed.unknown_keys:
            unknown[key] = unknown.get(key, 0) + 1
        if parsed.annotation is not None:
            records.append(parsed.annotation)
    if not lines:
        raise AnnotationError(f"{path}: the file is empty, expected {EXPECTED}")
    faulty_lines = lines - len(records)
    if faulty_lines > MAX_FAULT_SHARE * lines:
        limit = f"{MAX_FAULT_SHARE:.0%}"
        summary = f"{path}: {faulty_lines} of {lines} lines are faulty, more than {limit}"
        raise AnnotationError("\n".join([*faults, summary]))
    return Annotations(records, faults, faulty_lines, unknown)


def parse_line(line: bytes, *, text_required: bool) -> Parsed:
    """Checks a line without its image; boxes stay as they are in the file.

    Args:
      line: UTF-8 JSON; a byte order mark and white space at the ends do not matter.
      text_required: whether a line without caption, captions, synthetic_caption and regions is faulty (for
        training).
    """
    try:
        item = json.loads(line.rstrip().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested or too long a number"
        if isinstance(error, json.JSONDecodeError):
            reason = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        elif isinstance(error, UnicodeDecodeError):
            reason = f"not UTF-8 text (byte {error.start})"
        return Parsed(None, [f"not JSON: {reason}, expected one JSON object"], [], "", [])
    if not isinstance(item, dict):
        return Parsed(None, [f"got {show(item)}, expected one JSON object"], [], "", [])
    faults: list[str] = []
    unknown = [key for key in item if key not in KEYS]
    image = _image(item, faults)
    faults_before = len(faults)
    captions = _captions(item, faults)
    synthetic = _text(item, "synthetic_caption", faults)
    some = captions or synthetic or item.get("regions") or len(faults) > faults_before
    if text_required and not some:
        faults.append(NO_TEXT)
    identity = item.get("id")
    if identity is not None and not (_is_text(identity) and identity):
        faults.append(_wrong("id", identity, "a text"))
    regions, boxes_xyxy = _regions(item, faults, unknown)
    annotation = None
    if not faults:  # indices in `regions` are those of the line
        phrases = _phrases(item, regions, faults)
    if not faults:
        annotation = Annotation(image, captions, synthetic, regions, identity, phrases)
    return Parsed(annotation, faults, unknown, image, boxes_xyxy)


def clip_box(box_xyxy: Box, width: int, height: int) -> tuple[Box | None, float]:
    """(a box with an area clipped to an image, the share inside); None if less than MIN_INSIDE is."""
    x1, y1, x2, y2 = box_xyxy
    left, top, right, bottom = max(x1, 0.0), max(y1, 0.0), min(x2, width), min(y2, height)
    inside = max(0.0, right - left) * max(0.0, bottom - top)
    kept = inside / ((x2 - x1) * (y2 - y1))
    box = (left, top, float(right), float(bottom)) if kept >= MIN_INSIDE else None
    return box, kept


def iou(a_xyxy: Sequence[float], b_xyxy: Sequence[float]) -> float:
    """Intersection over union of two boxes."""
    width = max(0.0, min(a_xyxy[2], b_xyxy[2]) - max(a_xyxy[0], b_xyxy[0]))
    height = max(0.0, min(a_xyxy[3], b_xyxy[3]) - max(a_xyxy[1], b_xyxy[1]))
    areas = sum((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (a_xyxy, b_xyxy))
    return width * height / (areas - width * height)


_NOTHING: Any = object()  # in the place of a key that is not there


def _wrong(where: str, value: Any, expected: str) -> str:
    got = "none" if value is _NOTHING else show(value)
    return f"{where}: got {got}, expected {expected}"


def _image(item: dict[str, Any], faults: list[str]) -> str:
    """The image's path, normalised; "" where it is faulty."""
    name, expected = item.get("image", _NOTHING), "a path that stays below the images' folder"
    if not _is_text(name) or not name.strip() or "\0" in name:
        expected = "the path of an image"
    elif path := regular_file.inside(name):
        return path
    faults.append(_wrong("image", name, expected))
    return ""


def _text(item: dict[str, Any], key: str, faults: list[str]) -> str:
    """An optional text, stripped; "" where it is missing, null or blank."""
    value = item.get(key)
    if value is None or _is_text(value):
        return (value or "").strip()
    faults.append(_wrong(key, value, "a text"))
    return ""


def _captions(item: dict[str, Any], faults: list[str]) -> tuple[str, ...]:
    """The web captions: `caption`, then `captions`, without blank ones."""
    caption, several = _text(item, "caption", faults), item.get("captions")
    several = [] if several is None else several
    if not (isinstance(several, list) and all(map(_is_text, several))):
        faults.append(_wrong("captions", several, "a list of texts"))
        several = []
    return tuple(text.strip() for text in (caption, *several) if text.strip())


def _regions(
    item: dict[str, Any], faults: list[str], unknown: list[str]
) -> tuple[tuple[Region, ...], list[Box | None]]:
    """The regions without a fault, and the boxes of all."""
    entries = item.get("regions")
    if entries is None:
        return (), []
    if not isinstance(entries, list):
        faults.append(_wrong("regions", entries, "a list"))
        return (), []
    regions, boxes_xyxy = [], []
    for index, entry in enumerate(entries):
        at, before, box = f"regions[{index}]", len(faults), None
        if isinstance(entry, dict):
            unknown += [f"regions.{key}" for key in entry if key not in REGION_KEYS]
            box = _box(entry, at, faults)
            description: Any = entry.get("description", _NOTHING)
            score: Any = entry.get("score", _NOTHING)
            if not _is_text(description) or not description.strip():
                faults.append(_wrong(f"{at}.description", description, "a text"))
            number = isinstance(score, int | float) and not isinstance(score, bool)
            if not number or not 0 <= score <= 1:
                faults.append(_wrong(f"{at}.score", score, "a number from 0 to 1"))
            negatives = _negatives(entry, at, faults)
            if box is not None and len(faults) == before:
                regions.append(Region(box, description.strip(), float(score), negatives))
        else:
            faults.append(_wrong(at, entry, f"an object with {', '.join(REGION_KEYS)}"))
        boxes_xyxy.append(box)
    return tuple(regions), boxes_xyxy


def _negatives(entry: dict[str, Any], at: str, faults: list[str]) -> tuple[str, ...]:
    """The optional texts that are untrue of a region, stripped; none equals the description or another."""
    texts, description = entry.get("negatives"), entry.get("description")
    if texts is None:
        return ()
    if not isinstance(texts, list):
        faults.append(_wrong(f"{at}.negatives", texts, "a list of texts"))
        return ()
    said = plain(description) if _is_text(description) else ""
    seen = {said}
    for index, text in enumerate(texts):
        expected = "a text"
        if _is_text(text) and text.strip():
            other = "the description" if plain(text) == said else "an earlier one"
            expected = f"another text than {other}" if plain(text) in seen else ""
            seen.add(plain(text))
        if expected:
            faults.append(_wrong(f"{at}.negatives[{index}]", text, expected))
            return ()
    return tuple(text.strip() for text in texts)


def plain(text: str) -> str:
    """The text in lower case, with single spaces: what tells a negative from the description."""
    return " ".join(text.lower().split())


def _phrases(
    item: dict[str, Any], regions: tuple[Region, ...], faults: list[str]
) -> tuple[tuple[int, ...], ...] | None:
    """The optional phrases of a line whose `regions` have no fault."""
    entries = item.get("phrases")
    if entries is None:
        return None
    if not isinstance(entries, list):
        faults.append(_wrong("phrases", entries, "a list"))
        return None
    for index, entry in enumerate(entries):
        expected = ""
        if not (isinstance(entry, list) and entry and all(type(x) is int for x in entry)) or not (
            0 <= min(entry) <= max(entry) < len(regions)
        ):
            expected = f"positions in regions, 0 to {len(regions) - 1}"
        elif len(set(entry)) < len(entry):
            expected = "each position once"
        elif len({regions[x].description for x in entry}) > 1:
            expected = "positions of regions with one description"
        if expected:
            faults.append(_wrong(f"phrases[{index}]", entry, expected))
    return None if faults else tuple(map(tuple, entries))


def _box(entry: dict[str, Any], at: str, faults: list[str]) -> Box | None:
    box: Any = entry.get("box", _NOTHING)
    numbers = isinstance(box, list) and not any(isinstance(x, bool | str) for x in box)
    if fault := box_fault(box if numbers else None):
        shown = "none" if box is _NOTHING else show(box)
        faults.append(f"{at}.box: got {shown}, {fault}")
        return None
    x1, y1, x2, y2 = map(float, box)
    return x1, y1, x2, y2


def box_fault(box: Any) -> str:
    """What is wrong with (x1, y1, x2, y2); "" if its edges are finite and it has an area."""
    try:
        x1, y1, x2, y2 = map(float, box)
    except (TypeError, ValueError, OverflowError):
        x1 = y1 = x2 = y2 = math.nan
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
        return "expected four finite numbers [x1, y1, x2, y2]"
    if x1 < x2 and y1 < y2 and (x2 - x1) * (y2 - y1) > 0:
        return ""
    reason = "inverted" if x2 < x1 or y2 < y1 else "no area"
    return f"{reason}, expected x1 < x2 and y1 < y2"


def _is_text(value: Any) -> TypeGuard[str]:
    # JSON can spell half of a surrogate pair, which no file can hold and no tokenizer accepts.
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def show(value: Any) -> str:
    """A value as the user typed it, at most 60 characters."""
    try:
        text = json.dumps(value)
    except RecursionError:
        return "a deeply nested value"
    return text if len(text) <= 60 else text[:57] + "..."
