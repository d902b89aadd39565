"""The curves of a run: which of them share a chart, and what they are called, in report.html and curves.png."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from grain_jax import losses

HEADLINES = {  # last part of the key of a main number -> label
    "/top1": "top-1",
    "/r1": "R@1",
    "/box_iou": "box IoU",
    "/region_to_description_r1": "region to description R@1",
    "/phrase_acc50": "phrase to box Acc@0.5",
    "/miou": "mIoU",
}
_MATCHING = {
    "matched_iou": "IoU of matched boxes",
    "matched_iou50": "share with IoU of 0.5 or more",
    "region_description_accuracy": "own description is the nearest",
    "query_usage_entropy": "entropy of which query is used",
}
_SINGLE = {  # a chart each
    "logit_scale": "Logit scale (1 / temperature)",
    "learning_rate": "Learning rate",
    "images_per_second": "Images per second",
    "model_flops_per_second": "Model FLOPs per second",
    "texts_dropped": "Texts dropped in packing",
    "texts_dropped_share": "Share of the texts that packing dropped or cut",
}
# Numbers of an evaluation that only qualify another one, beside bounds and chance levels.
_COUNTS = (
    "pictures captions classes classes_seen pixels descriptions regions regions_matched unreadable"
    " faulty_lines"
)


class Chart(NamedTuple):
    """Curves that share a chart."""

    title: str
    series: dict[str, str]  # key of metrics.jsonl -> label
    log: bool = False  # whether its scale is logarithmic at first
    noisy: bool = False  # whether it may be smoothed


def charts(keys: Iterable[str], evaluations: int) -> list[Chart]:
    """The charts in the order of the page; each key is in one of them.

    Args:
      keys: of the curves (`metrics_file.series`) of all runs.
      evaluations: the largest number of evaluations of a run; from two on they are drawn over the steps.
    """
    left, made = dict.fromkeys(keys), []
    for chart in _wanted(list(left), evaluations):
        series = {key: label for key, label in chart.series.items() if key in left}
        if series:
            made.append(chart._replace(series=series))
        for key in series:
            left.pop(key)
    alone = [key for key in left if not key.startswith("eval/")]
    return made + [Chart(key.replace("_", " "), {key: key}) for key in alone]


def _wanted(keys: list[str], evaluations: int) -> Iterator[Chart]:
    yield Chart("Losses", losses.labels_of(keys), noisy=True)
    weights = {k: k.removeprefix("weight/") for k in keys if k.startswith("weight/")}
    yield Chart("Weights of the loss terms", weights)
    if evaluations > 1:
        yield Chart("Evaluations", {key: headline(key) for key in headlines(keys)})
    shares = {k: f"query {int(k[12:]) + 1}" for k in keys if re.fullmatch(r"query_share/\d+", k)}
    yield Chart("Share of the matched regions, by query", shares, noisy=True)
    matching = {k: k.replace("_", " ") for k in keys if k.startswith(("query_", "matched_"))}
    yield Chart("Regions while training", matching | _MATCHING, noisy=True)
    norms = {key: key.removeprefix("grad_norm/") for key in keys if key.startswith("grad_norm/")}
    yield Chart("Gradient norms", {"grad_norm": "all"} | norms, log=True, noisy=True)
    for key in keys:
        name, _, last = key.rpartition("/")
        if last == "entropy_of_one":  # of a local term with prototypes
            both = {f"{name}/entropy": "of the mean", key: "of single ones"}
            yield Chart(f"Entropy of the prototypes: {name}", both, noisy=True)
    waits = {"input_wait_fraction": "of the time", "input_wait_steps": "of the steps"}
    yield Chart("Share spent waiting for input", waits, noisy=True)
    for key, title in _SINGLE.items():
        yield Chart(title, {key: title}, noisy=key not in ("logit_scale", "learning_rate"))
    if evaluations < 2:
        return
    for name in dict.fromkeys(key.split("/")[1] for key in keys if key.startswith("eval/")):
        own = [k for k in keys if k.startswith(f"eval/{name}/") and not _is_beside(k)]
        shown = {key: key.split("/", 2)[2].replace("_", " ") for key in own}
        yield Chart(f"Evaluation {name.replace('_', ' ')}: other numbers", shown)


def _is_beside(key: str) -> bool:
    """Whether a number of an evaluation only qualifies another one: a bound, a chance level, a count."""
    last = key.rpartition("/")[2]
    beside = last.endswith(("_low", "_high")) or "chance" in last or last in _COUNTS.split()
    # Of each query only the share is drawn; the section "Queries" shows its boxes.
    return beside or ("/query/" in key and last != "share")


def headlines(keys: Iterable[str]) -> list[str]:
    """The keys of the main numbers of the evaluations."""
    return [k for k in keys if k.startswith("eval/") and k.endswith(tuple(HEADLINES))]


def headline(key: str) -> str:
    """The label of a main number, e.g. `eval/unseen/alpha_0.5/top1` -> "unseen: top-1, alpha 0.5"."""
    name, _, rest = key.removeprefix("eval/").partition("/")
    label = next(label for ending, label in HEADLINES.items() if key.endswith(ending))
    group = rest.rpartition("/")[0]  # "alpha_0.5", "image_to_text" or ""
    way, _, alpha = group.rpartition("/")  # of "by_name/alpha_0.5": "by_name", "alpha_0.5"
    if alpha.startswith("alpha_"):
        name = f"{name}, {way}" if way else name
        return f"{name}: {label}, alpha {float(alpha.removeprefix('alpha_')):g}".replace("_", " ")
    return f"{name}: {group} {label}".replace("_", " ").replace("  ", " ")


def chance(last: Mapping[str, float], key: str) -> float | None:
    """The chance level of a number among the `last` ones: `.../chance_KEY`, else `eval/NAME/chance`; or None."""
    here, _, name = key.rpartition("/")
    return last.get(f"{here}/chance_{name}", last.get(f"eval/{key.split('/')[1]}/chance"))
