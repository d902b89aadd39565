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
    "fault: damaged shard": ("damaged shards, not read to their end", "", "rebuild the set"),
    "no caption": ("images without any caption", "images", "nothing, if they have regions: the caption loss leaves them out, their regions train"),
    "refusal in synthetic caption": ("refusals among synthetic captions", "synthetic", _AGAIN),
    "refusal in description": ("refusals among descriptions", "description", _AGAIN),
    "markup in synthetic caption": ("synthetic captions with list marks or a preamble", "synthetic", "strip them"),
    "markup in description": ("descriptions with list marks or a preamble", "description", "strip them"),
    "cut web caption": (f"web captions over {statistics.ROW_LENGTH} tokens", "web", "shorten them if many: training cuts them"),
    "cut synthetic caption": (f"synthetic captions over {statistics.ROW_LENGTH} tokens", "synthetic", "ask the model for shorter ones: training cuts them"),
    "long description": (f"descriptions over {statistics.LONG_DESCRIPTION} tokens", "description", "look for sentences where phrases should be: they fill the rows"),
    "repeated description": ("descriptions that their image has already", "description", "merge the boxes, or keep the best one"),
    "tiny box": (f"boxes under {statistics.TINY:.1%} of their image", "description", "drop them: at 224 pixels they are less than 7 x 7"),
    "whole-image box": (f"boxes of {statistics.WHOLE:.0%} of their image or more", "description", "drop them if the description is of a part"),
}  # fmt: skip


def find(stats: statistics.Statistics, result: dict[str, Any]) -> list[Problem]:
    """All problems; faults come first. `result` is what `stats.result` returned."""
    count_images, texts = stats.images, result["texts"]
    totals = {kind: x["tokens"]["count"] for kind, x in texts.items()} | {"images": count_images}
    faults = sorted(name for name in stats.issues if name.startswith("fault: "))
    out = []
    for name in [*faults, *(name for name in _ISSUES if name not in faults)]:
        if name in stats.issues:
            count, example = stats.issues[name]
            unnamed = f"faulty: {name.removeprefix('fault: ')}", "", _LOST
            what, part, advice = _ISSUES.get(name, unnamed)
            total = max(totals[part], count) if part else 0
            out.append(Problem(what, count, total, example, advice))
    bare, example = stats.issues.get("no region", (0, ""))
    if bare > _FEW_REGIONS * count_images:
        advice = "nothing, if you know it: these images train the caption loss alone"
        out.append(Problem("images without regions", bare, count_images, example, advice))
    for kind, of_kind in texts.items():
        text, count = (of_kind["most_frequent"] or [("", 0)])[0]
        if count > LARGE_SHARE * count_images and count_images >= MANY:
            what = f"images that share one {kind} text (over {LARGE_SHARE:.0%} of all)"
            advice = "drop it if it is a placeholder, or repeats the model's prompt"
            out.append(Problem(what, count, count_images, repr(text), advice))
    nothing = "nothing for a few: loss.mask_duplicates keeps them from being negatives"
    for what, of_kind, advice in (
        ("images that are copies, byte by byte, of earlier ones", result["images"], "drop them, or merge their texts into one line"),
        ("web captions that another image has too", texts["web"], nothing),
        ("synthetic captions that another image has too", texts["synthetic"], nothing),
    ):  # fmt: skip
        if (copies := of_kind["copies"])["copies"]:
            numbers = copies["copies"], copies["total"], copies["example"]
            out.append(Problem(what, *numbers, advice))
    return out
