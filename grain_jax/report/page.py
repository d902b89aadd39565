"""report.html: one self-contained file that shows the results of a run, or of several side by side."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from etils import epath

from grain_jax import config as config_lib
from grain_jax.core import atomic, html
from grain_jax.evaluate import tables
from grain_jax.report import charts, collect, masks, run_files, written
from grain_jax.report.arguments import NUM_IMAGES

FILE = "report.html"
_FILES = ("page.css", "page.js", "curves.js", "sections.js")
_SECTIONS = (  # id, heading, what one sees
    ("results", "Results", "The last evaluations. The bar is the value, the thin line its 95% interval, the upright line chance."),
    ("curves", "Curves", "What was logged over the steps. Point at a chart, or focus it and press the arrow keys, to read the values at a step; press a name to hide its curve."),
    ("classes", "Classes", "How often each class is recognised: the share of its images whose top-1 is right."),
    ("confusions", "Hardest confusions", "Pairs of classes, the most frequent first: images of the one that were taken for the other, and (dashed) an image of that other."),
    ("regions", "Regions", "Test images with the boxes of the region queries, and the descriptions that these match best, against the annotated ones. Point at a box or a line to see it alone."),
    ("queries", "Queries", "What each query has specialised in: how much of its boxes covers a place (darker is more), the centres (dots), the mean box (outlined), and what it says."),
    ("attention", "Attention", "Where a query looks: its cross-attention over the patches of the image, brightest at its largest. The dashed box is the one that the query predicts."),
    ("written", "Captions and pointing", "Test images with the caption that the text decoder writes, what it reads in the annotated boxes (solid), and where it points for their descriptions (dashed)."),
    ("segmentation", "Segmentation", "Images with their true and their predicted classes, side by side. Grey pixels do not count."),
    ("config", "Config and environment", "The whole config, what differs between runs being marked; where and how the run ran; and what was not measured."),
)  # fmt: skip
_KEYS = (
    ("1 to 9", "go to a section"),
    ("/", "go to the nearest filter"),
    ("Tab", "next chart, image or control"),
    ("\u2190 \u2192", "in a chart: step by step; Page Up and Down: ten steps; Home, End"),
    ("\u2191 \u2193", "in an image with regions: one region after the other"),
    ("arrow keys", "in a row of choices: the next one"),
    ("Esc", "leave a filter, a chart or an image"),
    ("t", "light or dark"),
    ("?", "this list"),
)


def write(
    workdir: epath.PathLike,
    predictor: Any = None,
    *,
    others: Sequence[epath.PathLike] = (),
    output: epath.PathLike | None = None,
    results: Sequence[epath.PathLike] = (),
    num_images: int = NUM_IMAGES,
    model: bool = True,
) -> epath.Path:
    """Writes the page.

    Args:
      workdir: workdir of a run.
      predictor: the model of the run, if it is in memory already; else the newest checkpoint is loaded.
      others: workdirs of the runs that are shown beside it.
      output: the file to write; default: `report.html` in `workdir`.
      results: files that `grain_jax.evaluate` wrote for the first run.
      num_images: images of each evaluation that the model runs on.
      model: False: no model is loaded, and the page shows only what the files hold.

    Returns: the path of the page.

    Raises:
      run_files.InputError: a folder holds no run.
    """
    workdirs = [epath.Path(workdir), *map(epath.Path, others)]
    runs, found = [], []
    for i, folder in enumerate(workdirs):
        run = run_files.read(folder, results if i == 0 else ())
        runs.append(run)
        if model and run.config is not None:
            own = predictor if i == 0 else None
            looked = collect.collect(folder, run.config, own, step=run.step, num_images=num_images)
            found.append(looked)
            continue
        line = "no model was loaded (--no-model)"
        if model:
            line = f"{folder}: config.json is missing, so no model was loaded"
        found.append({"lines": {"model": line}})
    path = epath.Path(output) if output else workdirs[0] / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, render(runs, found))
    return path


def render(runs: Sequence[run_files.RunFiles], found: Sequence[Mapping[str, Any]]) -> str:
    """The HTML of the page.

    Args:
      runs: the files of each run, from `run_files.read`.
      found: the results of its model, from `collect.collect`, in the same order.
    """
    names = run_files.labels([run.workdir for run in runs])
    contents = {name: f'<div id="{name}-content"></div>' for name, _, _ in _SECTIONS}
    contents["results"] = _results(runs, names)
    contents["written"] = _written(found, names)
    contents["segmentation"] = _segmentation(found, names)
    contents["config"] = (
        _config(runs, names) + _environment(runs, names) + _unmeasured(runs, found, names)
    )
    keys = "".join(f"<dt><kbd>{key}</kbd></dt><dd>{does}</dd>" for key, does in _KEYS)
    where = "<br>".join(
        f"<code>{escape(str(run.workdir))}</code>"
        + (f", step {run.step:,}" if run.step is not None else "")
        for run in runs
    )
    heading = "Runs side by side" if len(runs) > 1 else "Training run"
    here = epath.Path(__file__).parent
    return html.document(
        title=f"{' | '.join(names)}: grain_jax.report",
        header=f'<div><h1>{heading}</h1><p class="soft">{where}</p></div>'
        '<div class="tools"><button id="theme" type="button" aria-label="light or dark">Dark</button>'
        '<button id="help" type="button">Keys (?)</button></div>',
        sections=[
            html.Section(name, title, contents[name], sees)
            for name, title, sees in _SECTIONS
            if contents[name]
        ],
        files=[here / name for name in _FILES],
        data=_payload(runs, found, names),
        after=f'<dialog id="keys" aria-label="Keys"><h2>Keys</h2><dl class="facts">{keys}</dl>'
        '<form method="dialog"><button>Close</button></form></dialog>',
    )


def _payload(runs, found, names) -> dict[str, Any]:
    """The JSON data that the scripts of the page draw."""
    counts = [len(s) for run in runs for k, (s, _) in run.series.items() if k.startswith("eval/")]
    most = max(counts, default=0)
    keys = dict.fromkeys(key for run in runs for key in run.series)
    shown = [
        chart._asdict() | {"series": list(chart.series.items())}
        for chart in charts.charts(keys, most)
    ]
    none = {"zeroshot": "no zeroshot evaluation is in the run's config"}
    out = [
        {
            "label": name,
            "series": {key: run_files.thinned(*curve) for key, curve in run.series.items()},
            "perClass": _per_class(run, looked),
            "zeroshot": looked.get("zeroshot", {}),
            "thumbs": looked.get("thumbs", []),
            "lines": ({} if "model" in looked["lines"] else none) | looked["lines"],
            **{part: looked.get(part) for part in ("regions", "queries", "attention")},
        }
        for run, looked, name in zip(runs, found, names)
    ]
    return {"runs": out, "charts": shown, "evaluations": most}


def _per_class(run: run_files.RunFiles, looked: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluation -> {note, alphas: alpha -> class -> [accuracy, images or None]}.

    Results on all images of an evaluation come first, then those of `collect` on some of them.
    """
    out = {}
    for result in run.results:
        if result.per_class:
            alphas = {
                alpha: {c: [share, result.counts.get(c)] for c, share in shares.items()}
                for alpha, shares in result.per_class.items()
            }
            shown = {"note": "all of its images", "alphas": alphas}
            out[f"{result.name} ({result.source})"] = shown
    for name, entry in looked.get("zeroshot", {}).items():
        alphas = {
            alpha: {c: [hits / n, n] for c, (hits, n) in part["per_class"].items()}
            for alpha, part in entry["alphas"].items()
        }
        note = f"{entry['pictures']} of {entry['of']} images"
        out[name] = {"note": note, "alphas": alphas}
    return out


def _results(runs, names) -> str:
    """The table of results: a group of rows for each file with results, a column for each run."""
    groups: dict[str, dict[tuple[str, str], tuple[str, list[str]]]] = {}
    for i, run in enumerate(runs):
        for result in run.results:
            rows = groups.setdefault(result.source, {})
            for row in tables.rows_of(result.kind, result.numbers):
                what, *cells = tables.cells(result.name.replace("_", " "), result.numbers, row)
                _, columns = rows.setdefault((result.name, row.key), (what, [""] * len(runs)))
                columns[i] = _cell(result.numbers, row, *cells)
    if not groups:
        return '<p class="none">Nothing has been evaluated.</p>'
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = ""
    for source, rows in groups.items():
        group = f'<th scope="colgroup" colspan="{len(runs) + 1}">{escape(source)}</th>'
        body += f'<tbody class="group"><tr>{group}</tr></tbody><tbody>'
        for what, columns in rows.values():
            cells = (f'<td class="value">{x or "<small>none</small>"}</td>' for x in columns)
            body += f'<tr><th scope="row">{escape(what)}</th>{"".join(cells)}</tr>'
        body += "</tbody>"
    return f'<div class="scroll"><table><thead><tr><th scope="col">measured</th>{head}</tr></thead>{body}</table></div>'


def _cell(numbers, row, value: str, between: str, chance: str, of: str) -> str:
    """A number with its interval, chance level and count; numbers in [0, 1] get a bar too."""
    parts = [between, f"chance {chance}" if chance else "", f"of {of}" if of else ""]
    text = f"<b>{escape(value)}</b> <small>{escape('; '.join(filter(None, parts)))}</small>"
    number = numbers[row.key]
    if not (row.is_share or row.chance) or not 0 <= number <= 1:
        return text
    bar = f'<i class="value" style="width:{100 * number:.2f}%"></i>'
    low, high = numbers.get(f"{row.key}_low"), numbers.get(f"{row.key}_high")
    if low is not None and high is not None:
        place = f"left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"
        bar += f'<i class="between" style="{place}"></i>'
    if row.chance in numbers:
        bar += f'<i class="chance" style="left:{100 * numbers[row.chance]:.2f}%"></i>'
    return f'{text}<span class="scale" aria-hidden="true">{bar}</span>'


def _segmentation(found, names) -> str:
    """The images of the segmentations of each run; "" where there is none."""
    out = ""
    for looked, label in zip(found, names):
        for entry, part in looked.get("segmentation", {}).items():
            out += masks.rendered(f"{label}: {entry}" if len(names) > 1 else entry, part)
    return out


def _written(found, names) -> str:
    """What the text decoder of each run writes; "" where there is none."""
    out = ""
    for looked, label in zip(found, names):
        if part := looked.get("written"):
            entry = part["entry"]
            out += written.rendered(f"{label}: {entry}" if len(names) > 1 else entry, part)
    return out


def _config(runs, names) -> str:
    flats = [config_lib.flatten(run.config or {}) for run in runs]
    keys = dict.fromkeys(key for flat in flats for key in flat)
    if not keys:
        return '<p class="none">config.json is missing.</p>'
    shown = lambda value: json.dumps(value, ensure_ascii=False)
    rows = [(key, [shown(flat[key]) if key in flat else "" for flat in flats]) for key in keys]
    return f'<div id="config-tools"></div>{_table("config-table", "key", names, rows)}'


def _environment(runs, names) -> str:
    keys = dict.fromkeys(key for run in runs for key in run.environment)
    rows = [(key, [run.environment.get(key, "") for run in runs]) for key in keys]
    return f"<h3>Environment</h3>{_table('environment-table', 'what', names, rows, code=False)}"


def _table(name: str, what: str, names, rows, *, code: bool = True) -> str:
    """A table with a column for each run; rows in which the runs differ are marked."""
    tag, kind = ("code", "tall") if code else ("span", "scroll")
    head = "".join(f'<th scope="col">{escape(n)}</th>' for n in [what, *names])
    body = ""
    for key, texts in rows:
        cells = (f'<td class="long"><{tag}>{escape(text)}</{tag}></td>' for text in texts)
        differs = " class=differs" if len(set(texts)) > 1 else ""
        body += (
            f'<tr{differs}><th scope="row"><{tag}>{escape(key)}</{tag}></th>{"".join(cells)}</tr>'
        )
    return (
        f'<div class="{kind}"><table id="{name}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _unmeasured(runs, found, names) -> str:
    lines = []
    for run, looked, name in zip(runs, found, names):
        own = run.unmeasured + [f"{part}: {line}" for part, line in looked["lines"].items()]
        for entry, part in looked.get("zeroshot", {}).items():
            if part["pictures"] < part["of"]:
                of = f"{part['pictures']} of {part['of']} images"
                own.append(f"{entry}: confusions and classes are of {of}")
        lines += [f"{name}: {line}" if len(runs) > 1 else line for line in own]
    shown = "".join(f"<li>{escape(line)}</li>" for line in lines)
    shown = f"<ul>{shown}</ul>" if lines else "<p>Nothing is missing.</p>"
    return f"<h3>Not measured</h3>{shown}"
