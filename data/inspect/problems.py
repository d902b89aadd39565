"""The problems of a set: each with its count, an example and advice."""

from typing import Any, NamedTuple

from grain_jax.data.inspect import statistics

LARGE_SHARE = 0.1  # a text is a problem if more of the images share it
MANY = 20  # shares are checked from this number of images on
_FEW_REGIONS = 0.2  # a larger share of images without regions is a problem


class Problem(NamedTuple):
    """One line of the list of problems."""

    what: str
    count: int
    total: int  # of which `count` is a part; 0: unknown
    example: str
    advice: str


_LOST = "fix them: grain-jax build leaves such lines out"
_AGAIN = "run the model's pass again for these, or take the text out"
# Issue -> (its name in the list, the key of its total in `find`, advice).
_ISSUES = {
    "fault: image": ("images that cannot be read", "images", "take them out or fetch them again"),
    "fault: no caption": ("lines without any caption or region", "", _LOST),
    "fault: bad box": ("boxes that cannot be used", "regions", "leave the regions out, or put them right"),
    "fault: no description": ("regions without a description", "regions", "leave the regions out"),
    "fault: damaged shard": ("damaged shards, not read to their end", "", "rebuild the set"),
    "no caption": ("images without any caption", "images", "nothing, if they have regions: the caption loss leaves them out, their regions train"),
    "refusal in synthetic caption": ("refusals among synthetic captions", "synthetic", _AGAIN),
    "refusal in description": ("refusals among descriptions", "regions", _AGAIN),
    "markup in synthetic caption": ("synthetic captions with list marks or a preamble", "synthetic", "strip them"),
    "markup in description": ("descriptions with list marks or a preamble", "regions", "strip them"),
    "cut web caption": (f"web captions over {statistics.ROW_LENGTH} tokens", "web", "shorten them if many: training cuts them"),
    "cut synthetic caption": (f"synthetic captions over {statistics.ROW_LENGTH} tokens", "synthetic", "ask the model for shorter ones: training cuts them"),
    "cut description": (f"descriptions over {statistics.ROW_LENGTH} tokens", "regions", "look for run-on answers: training cuts them"),
    "long description": (f"descriptions over {statistics.LONG_DESCRIPTION} tokens", "regions", "look for sentences where phrases should be: they fill the rows"),
    "repeated description": ("descriptions that their image has already", "regions", "merge the boxes, or keep the best one"),
    "tiny box": (f"boxes under {statistics.TINY:.1%} of their image", "regions", "drop them: at 224 pixels they are less than 7 x 7"),
    "whole-image box": (f"boxes of {statistics.WHOLE:.0%} of their image or more", "regions", "drop them if the description is of a part"),
    "long image": (f"images over {statistics.LONG_SHAPE:g} times as long as wide, or the other way round", "images", "crop or drop them: a square squashes them"),
}  # fmt: skip


def find(stats: statistics.Statistics, result: dict[str, Any]) -> list[Problem]:
    """All problems; faults come first. `result` is what `stats.result` returned."""
    parts = {
        "": 0,
        "images": stats.images,
        "regions": result["regions"]["count"],
        "web": result["texts"]["web"]["words"]["count"],
        "synthetic": result["texts"]["synthetic"]["words"]["count"],
    }
    out = []
    faults = sorted(name for name in stats.issues if name.startswith("fault: "))
    for name in [*faults, *(name for name in _ISSUES if name not in faults)]:
        if name in stats.issues:
            count, example = stats.issues[name]
            unnamed = f"faulty: {name.removeprefix('fault: ')}", "", _LOST
            what, part, advice = _ISSUES.get(name, unnamed)
            total = max(parts[part], count) if part else 0
            out.append(Problem(what, count, total, example, advice))
    return [*out, *_of_whole(stats, result)]


def _of_whole(stats: statistics.Statistics, result: dict[str, Any]) -> list[Problem]:
    out, images = [], stats.images
    bare, example = stats.issues.get("no region", (0, ""))
    if bare > _FEW_REGIONS * images:
        advice = "nothing, if you know it: these images train the caption loss alone"
        out.append(Problem("images without regions", bare, images, example, advice))
    for kind, name, advice in (
        ("description", "description", "see whether the model copies its prompt"),
        ("synthetic", "synthetic caption", "see whether the model fails"),
        ("web", "web caption", "drop it if it is a placeholder"),
    ):
        frequent = result["texts"][kind]["most_frequent"]
        common = [(text, n) for text, n in frequent if n > LARGE_SHARE * images]
        if common and images >= MANY:
            (text, count), others = common[0], len(common) - 1
            example = f"{text!r}" + (f", and {others} more such" if others else "")
            what = f"images that share one {name} (over {LARGE_SHARE:.0%} of all)"
            out.append(Problem(what, count, images, example, advice))
    scores = result["regions"]["score_per_mille"]
    if scores["count"] > 1 and scores["min"] == scores["max"]:
        advice = "nothing, if exact: training then keeps the first input.max_regions regions"
        example = f"{scores['min'] / 1000:g}"
        out.append(Problem("scores that are all equal", scores["count"], 0, example, advice))
    nothing = "nothing for a few: loss.mask_duplicates keeps them from being negatives"
    for what, copies, advice in (
        ("images that are copies, byte by byte, of earlier ones", result["images"], "drop them, or merge their texts into one line"),
        ("web captions that another image has too", result["texts"]["web"], nothing),
        ("synthetic captions that another image has too", result["texts"]["synthetic"], nothing),
    ):  # fmt: skip
        if (copies := copies["copies"])["copies"]:
            numbers = copies["copies"], copies["total"], copies["example"]
            out.append(Problem(what, *numbers, advice))
    return out
