"""Evaluation results as text tables: value, 95% interval, chance level, and the number of images."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from grain_jax.core import printable
from grain_jax.evaluate import kinds

_OF_CLASSES = ("per_class", "images_per_class", "thresholds")  # too many for a table
_INTERVAL = "95% interval"
_LONGEST = 120  # characters of a cell; the rest is cut off
_CHANCE_OF = {"top1": "chance", "mean_per_class": "chance"}


def scalars(result: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a result, nested names joined by `/`; texts and lists are left out."""
    out = {}
    for key, value in result.items():
        if isinstance(value, Mapping) and key not in _OF_CLASSES:
            out |= scalars(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            out[prefix + key] = float(value)
    return out


def by_evaluation(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The numbers of `eval/NAME/KEY`, as in metrics.jsonl, as {NAME: {KEY: number}}, without others."""
    groups: dict[str, dict[str, float]] = {}
    for key, value in results.items():
        name, _, rest = key.removeprefix("eval/").partition("/")
        if isinstance(value, (int, float)):
            groups.setdefault(name, {})[rest] = value
    return groups


def describe(results: Mapping[str, tuple[str, Mapping[str, float]]]) -> str:
    """The table of results: name -> the kind of its evaluator, and its numbers by `scalars`."""
    rows = [(f"{name}: {row.key}", *row[1:]) for name, each in results.items() for row in rows_of(*each)]
    return table(("measured", "value", _INTERVAL, "chance", "images"), rows)


class TableRow(NamedTuple):
    """The cells of a number."""

    key: str  # in the numbers of the result
    value: str
    interval: str  # of 95%
    chance: str
    images: str


def rows_of(kind: str, numbers: Mapping[str, float]) -> list[TableRow]:
    """The numbers with an interval or a chance level; of an evaluator from outside the package all."""
    rows = []
    shown = kinds.find(kind).shown if kind in kinds.KINDS else ()
    for key, value in numbers.items():
        group, _, last = key.rpartition("/")
        names = f"{group}/chance_{last}", f"chance_{last}", _CHANCE_OF.get(last, "")
        chance = next((numbers[name] for name in names if name in numbers), None)
        interval = _interval(numbers, key)
        if kind not in kinds.KINDS:
            rows.append(TableRow(key, f"{value:.3f}", interval, "", ""))
        elif (interval or chance is not None or last in shown) and not key.startswith("groups/"):
            show = "{:.3f}" if re.search("_iou|_rank|_loss", key) else "{:.1%}"
            cell = "" if chance is None else show.format(chance)
            images = f"{numbers['images']:.0f}" if "images" in numbers else ""
            rows.append(TableRow(key, show.format(value), interval, cell, images))
    return rows


def _ways(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The paper's protocols in a zero-shot result: `names`, and `described alpha_A` for each alpha."""
    out = {}
    if result["names"]:
        out["names"] = result.get("by_name", result)["alpha_1.0"]
    if result["descriptions"]:
        out |= {f"described {k}": r for k, r in result.items() if k.startswith("alpha_")}
    return out


def averages(ran: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean `top1`, `top5` and `mean_per_class` of each of `_ways`, over the `sets` that ran and have it."""
    of_way: dict[str, list[Mapping[str, float]]] = {}
    for result in ran.values():
        for way, rates in _ways(result).items() if result["kind"] == "zeroshot" else ():
            of_way.setdefault(way, []).append(rates)
    mean = lambda sets, rate: float(sum(each[rate] for each in sets) / len(sets))
    means = lambda sets: {rate: mean(sets, rate) for rate in ("top1", "top5", "mean_per_class")}
    return {way: {"sets": len(sets)} | means(sets) for way, sets in of_way.items()}


def suite(ran: Mapping[str, Mapping[str, Any]], averages: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of the zero-shot sets of a suite that `ran`: one row per set, then the averages."""
    described = [way for way in averages if way != "names"]
    about = "Shares of images whose class is the best one; by class names"
    about += ", and by names with descriptions at each alpha" * bool(described)
    alphas = [f"alpha {float(way.rpartition('_')[2]):g}" for way in described]
    header = ["set", "by name", _INTERVAL, "top-5", "mean per class", _INTERVAL, *alphas]

    def row(name: str, ways: Mapping[str, Mapping[str, float]]) -> list[str]:
        share = lambda way, rate: f"{ways[way][rate]:.1%}" if way in ways else ""
        interval = lambda rate: _interval(ways.get("names", {}), rate)
        out = [name, share("names", "top1"), interval("top1"), share("names", "top5")]
        out += [share("names", "mean_per_class"), interval("mean_per_class")]
        return out + [share(way, "top1") for way in described]

    sets = {name: result for name, result in ran.items() if result["kind"] == "zeroshot"}
    rows = [[*row(n, _ways(x)), f"{x['chance']:.1%}", str(x["images"])] for n, x in sets.items()]
    if len(rows) > 1:
        counts = sorted({average["sets"] for average in averages.values()})
        rows.append([*row("average", averages), "", f"{' or '.join(map(str, counts))} sets"])
    return f"{about}\n{table([*header, 'chance', 'images'], rows)}"


def _interval(numbers: Mapping[str, float], key: str) -> str:
    low, high = numbers.get(f"{key}_low"), numbers.get(f"{key}_high")
    return "" if low is None or high is None else f"{100 * low:.1f} - {100 * high:.1f}%"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left and the others to the right, under a ruled header."""
    rows = [[printable.plain(cell, _LONGEST) for cell in row] for row in rows]
    first, *others = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    aligned = lambda row: "  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)])
    lines = [aligned(row) for row in [header, *rows]]
    rule = "-" * max(map(len, lines))
    return "\n".join(line.rstrip() for line in [lines[0], rule, *lines[1:]])
