"""The problems of a set: each with its count, an example and advice."""

from typing import Any, NamedTuple

from grain_jax.data.inspect import counting, statistics

LARGE_SHARE = 0.1  # of the images; a text that more share is a problem
MANY = 20  # least images for which shares are checked
_UNEVEN = 1.1  # largest by smallest stream; training warns above it too
_FEW_REGIONS = 0.2  # share of images without regions above which it is a problem


class Problem(NamedTuple):
    """One line of the list of problems."""

    what: str
    count: int
    of: int  # total that the count is a part of; 0: none
    example: str
    advice: str


_LOST = "fix them: grain-jax build leaves such lines out"
_AGAIN = "run the model's pass again for these, or take the text out"
# Issue -> (its name in the list, the total that it is a part of (see `find`), advice).
_ISSUES = {
    "fault: image": ("images that cannot be read", "images", "take them out or fetch them again"),
    "fault: no caption": ("lines without any caption or region", "", _LOST),
    "fault: damaged shard": ("damaged shards, not read to their end", "", "rebuild the set"),
    "fault: missing shard": ("missing shards", "", "copy the set again, or rebuild it"),
    "fault: shard length": ("shards of another length than dataset_info.json says", "", "rebuild the set"),
    "no caption": ("images without any caption", "images", "nothing, if they have regions: the caption loss leaves them out, their regions train"),
    "empty web caption": ("empty web captions", "web", "leave them out"),
    "empty synthetic caption": ("empty synthetic captions", "synthetic", "leave them out"),
    "empty description": ("empty descriptions", "regions", "leave their regions out"),
    "refusal in synthetic caption": ("refusals among synthetic captions", "synthetic", _AGAIN),
    "refusal in description": ("refusals among descriptions", "regions", _AGAIN),
    "markup in synthetic caption": ("synthetic captions with list marks or a preamble", "synthetic", "strip them"),
    "markup in description": ("descriptions with list marks or a preamble", "regions", "strip them"),
    "cut web caption": (f"web captions over {statistics.ROW_LENGTH} tokens", "web", "shorten them if many: training cuts them"),
    "cut synthetic caption": (f"synthetic captions over {statistics.ROW_LENGTH} tokens", "synthetic", "ask the model for shorter ones: training cuts them"),
    "cut description": (f"descriptions over {statistics.ROW_LENGTH} tokens", "regions", "look for run-on answers: training cuts them"),
    "long description": (f"descriptions over {statistics.LONG_DESCRIPTION} tokens", "regions", "look for sentences where phrases should be: they fill the rows"),
    "repeated description": ("descriptions that their image has already", "regions", "merge the boxes, or keep the best one"),
    "box without area": ("boxes without an area", "regions", "leave the regions out: they teach nothing"),
    "box outside": ("boxes that leave their image", "regions", "clip them; if many, check their unit (shares, not pixels)"),
    "tiny box": (f"boxes under {statistics.TINY:.1%} of their image", "regions", "drop them: at 224 pixels they are less than 7 x 7"),
    "whole-image box": (f"boxes of {statistics.WHOLE:.0%} of their image or more", "regions", "drop them if the description is of a part"),
    "odd score": ("scores that are not in [0, 1]", "regions", "set them: training keeps the regions of the highest score"),
    "long image": (f"images over {statistics.LONG_SHAPE:g} times as long as wide, or the other way round", "images", "crop or drop them, or set input.sequence_lengths: a square squashes them"),
}  # fmt: skip


def find(stats: statistics.Statistics, result: dict[str, Any]) -> list[Problem]:
    """All problems; those of the whole set and of files come first. `result` is what `stats.result` returned."""
    parts = {
        "": 0,
        "images": stats.images,
        "regions": stats.regions,
        "web": result["captions"]["web"]["words"]["count"],
        "synthetic": result["captions"]["synthetic"]["words"]["count"],
    }
    found = _of_shards(result["set"]["shards"])
    faults = sorted(name for name in stats.issues if name.startswith("fault: "))
    for name in [*faults, *(name for name in _ISSUES if name not in faults)]:
        issue = stats.issues.get(name)
        if issue is None:
            continue
        line = f"lines with faulty {name.removeprefix('fault: ')}"
        what, part, advice = _ISSUES.get(name, (line, "", _LOST))
        of = max(parts[part], issue.count) if part else 0
        found.append(Problem(what, issue.count, of, issue.example, advice))
    return [*found, *_of_shares(stats, result), *_of_duplicates(result)]


def _of_shards(shards: dict[str, Any]) -> list[Problem]:
    if not shards["count"]:
        return []
    found, lanes, count = [], shards["lanes"], shards["count"]
    advice = f"rebuild with grain-jax build --num-shards, a multiple of {lanes}, or set input.lanes"
    if shards["empty"]:
        found.append(Problem("empty shards", shards["empty"], count, "", advice))
    if shards["records_per_lane"] is None:
        what, filled = (
            f"fewer filled shards than the {lanes} lanes: training stops",
            count - shards["empty"],
        )
        return [*found, Problem(what, filled, lanes, f"{filled} shards", advice)]
    low, high = shards["records_per_lane"]
    if high > _UNEVEN * low:
        what = f"uneven lanes (input.lanes={lanes}): some records are seen more often"
        found.append(Problem(what, lanes, 0, f"lanes have {low} to {high} records", advice))
    return found


def _of_shares(stats: statistics.Statistics, result: dict[str, Any]) -> list[Problem]:
    found, images = [], stats.images
    bare = stats.issues["no region"]
    if bare.count > _FEW_REGIONS * images:
        advice = "nothing, if you know it: these images train the caption loss alone"
        found.append(Problem("images without regions", bare.count, images, bare.example, advice))
    for kind, texts, advice in (
        ("description", result["descriptions"], "see whether the model copies its prompt"),
        ("synthetic caption", result["captions"]["synthetic"], "see whether the model fails"),
        ("web caption", result["captions"]["web"], "drop it if it is a placeholder"),
    ):
        common = [(text, n) for text, n in texts["most_frequent"] if n > LARGE_SHARE * images]
        if common and images >= MANY:
            (text, count), others = common[0], len(common) - 1
            example = f"{text!r}" + (f", and {others} more such" if others else "")
            what = f"images that share one {kind} (over {LARGE_SHARE:.0%} of all)"
            found.append(Problem(what, count, images, example, advice))
    scores = result["scores"]
    count, low = scores["count"], scores["min"]
    if count > 1 and low == scores["max"]:
        advice = f"nothing, if exact: training then keeps the first {counting.MAX_REGIONS} regions"
        found.append(Problem("scores that are all equal", count, count, f"{low:g}", advice))
    return found


def _of_duplicates(result: dict[str, Any]) -> list[Problem]:
    found, copies = [], result["duplicate_pictures"]
    if copies["copies"]:
        example = "{1} is {0}".format(*copies["examples"][0])
        what = "images that are copies, byte by byte, of earlier ones"
        advice = "drop them, or merge their texts into one line"
        found.append(Problem(what, copies["copies"], copies["total"], example, advice))
    for kind in ("web", "synthetic"):
        texts = result["captions"][kind]["distinct"]
        if texts["copies"]:
            what, example = f"{kind} captions that another image has too", texts["examples"][0][0]
            advice = "nothing for a few: loss.mask_duplicates keeps them from being negatives"
            found.append(Problem(what, texts["copies"], texts["total"], repr(example), advice))
    return found
