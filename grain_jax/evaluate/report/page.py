"""report.html: one static file with the results of a run: table, curves, classes, cards of regions."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from grain_jax.core import atomic, errors, html
from grain_jax.evaluate import tables
from grain_jax.evaluate.report import charts, look, run_files
from grain_jax.evaluate.report.arguments import NUM_IMAGES, Report

FILE = "report.html"
_STYLES = epath.Path(__file__).parent / "page.css"
_ABOUT_CURVES = "What was logged over the steps; each name has its last value."
_ABOUT_CLASSES = "The share of the images of each class whose top-1 is right, the lowest first."
_ABOUT_REGIONS = (
    "Test images with the boxes of the region queries (solid) and the description that each matches best, and"
    " the annotated boxes (dashed), in the colour of the query that each is matched to."
)


def write(
    workdir: epath.PathLike,
    predictor: Any = None,
    *,
    output: epath.PathLike | None = None,
    num_images: int = NUM_IMAGES,
    model: bool = True,
    results: Sequence[epath.PathLike] = (),
) -> epath.Path:
    """Writes the page of a run and returns its path. Raises errors.UserError if the folder holds no run.

    Args:
      workdir: workdir of a run.
      predictor: the model of the run, if it is in memory already; else the newest checkpoint is loaded.
      output: the file to write; default: `report.html` in `workdir`.
      num_images: images of each evaluation that the model runs on.
      model: False: no model is loaded, and the page shows only what the files hold.
      results: files of `grain-jax evaluate` in other folders.
    """
    run = run_files.read(workdir, results)
    looked = look.Looked({}, [], ["no model was loaded"])
    if model and run.config is not None:
        looked = look.look(workdir, predictor, run.config.get("evals", {}), num_images)
    path = epath.Path(output) if output else run.workdir / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, _render(run, looked))
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """`grain-jax report DIR`: writes the page of a run and prints its path; returns 0."""
    args = Report.parse(arguments)
    advice = f"give a smaller --num-images, or --no-model; or {errors.MORE_MEMORY}"
    with errors.out_of_memory_in_a_line("report", lambda: advice):
        shown: dict[str, Any] = dict(num_images=args.num_images, model=args.model, results=args.results)
        path = write(args.workdir, output=args.output, **shown)
    print(path)
    return 0


def _render(run: run_files.RunFiles, looked: look.Looked) -> str:
    step = f", step {run.step:,}" if run.step is not None else ""
    folder = html.text(str(run.workdir))
    per_class: dict[str, Mapping[str, float]] = {}
    for x in run.results:
        per_class |= {f"{x.name}, {way} ({x.source})": shares for way, shares in x.per_class.items()}
    unmeasured = "".join(f"<li>{html.text(x)}</li>" for x in [*run.unmeasured, *looked.unmeasured])
    config = html.text(json.dumps(run.config, indent=1, ensure_ascii=False), keep="\n")
    parts = [
        ("results", "Results", "The last evaluations.", _results(run.results)),
        ("curves", "Curves", _ABOUT_CURVES, charts.figures(run.series)),
        ("classes", "Classes", _ABOUT_CLASSES, _classes(per_class | looked.classes)),
        ("regions", "Regions", _ABOUT_REGIONS, "".join(map(_card, looked.cards))),
        ("unmeasured", "Not measured", "", f"<ul>{unmeasured}</ul>" if unmeasured else ""),
        ("config", "Config", "", f"<details><summary>config.json</summary><pre>{config}</pre></details>"),
    ]
    grids = {"curves": "charts", "regions": "cards"}
    return html.document(
        title=f"{run.workdir.name}: grain_jax.evaluate.report",
        header=f'<div><h1>Training run</h1><p class="soft"><code>{folder}</code>{step}</p></div>',
        sections=[
            html.Section(name, title, f'<div class="{grids.get(name, "")}">{content}</div>', about)
            for name, title, about, content in parts
            if content
        ],
        files=[_STYLES],
    )


def _results(results: Sequence[run_files.Result]) -> str:
    rows = ""
    for result in results:
        for row in tables.rows_of(result.kind, result.numbers):
            parts = (
                row.interval,
                row.chance and f"chance {row.chance}",
                row.images and f"of {row.images} images",
            )
            rows += f'<tr><th scope="row">{html.text(f"{result.name}: {row.key}")}</th><td class="value">'
            rows += f"<b>{row.value}</b> <small>{'; '.join(filter(None, parts))}</small></td>"
            rows += f"<td>{html.text(result.source)}</td></tr>"
    if not rows:
        return '<p class="none">Nothing has been evaluated.</p>'
    head = "".join(f'<th scope="col">{title}</th>' for title in ("measured", "value", "file"))
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _classes(per_class: Mapping[str, Mapping[str, float]]) -> str:
    out = ""
    for name, shares in per_class.items():
        out += f"<details{'' if out else ' open'}><summary>{html.text(name)}</summary>"
        out += '<ol class="classes">'
        for label, share in sorted(shares.items(), key=lambda pair: pair[1]):
            bar = f'<span class="track"><i style="width:{100 * share:.1f}%"></i></span>'
            out += f"<li><span>{html.text(label)}</span>{bar}{share:.1%}</li>"
        out += "</ol></details>"
    return out


def _card(card: look.Card) -> str:
    width, height = card.size
    shapes, lines = "", ""
    for box in card.boxes:
        is_true, is_matched, colours = box.cosine is None, box.colour >= 0, html.REGION_COLOURS
        colour = colours[box.colour % len(colours)] if is_matched else "#777"
        number = box.colour + 1 if is_matched else ""
        kind, more = ("true", "annotated") if is_true else ("predicted", f"cosine {box.cosine:.3f}")
        if box.right is not None:
            word = "right" if box.right else "wrong"
            more += f' <span class="{word}">{word}</span>'
        x1, y1, x2, y2 = np.multiply(box.xyxy, (width, height, width, height))
        corner = f'x="{x1:.1f}" y="{y1:.1f}" width="{x2 - x1:.1f}" height="{y2 - y1:.1f}"'
        text = html.text(box.text)
        shapes += f'<g class="{kind}"><title>{text}</title><rect class="halo" {corner}/>'
        shapes += f'<rect class="line" {corner} style="stroke:{colour}"/></g>'
        lines += f'<li><b class="badge" style="background:{colour}">{number}</b><span>{text}</span>'
        lines += f'<span class="more">{more}</span></li>'
    return (
        '<figure class="card"><div class="image">'
        f'<img src="{card.uri}" width="{width}" height="{height}" alt="">'
        f'<svg class="boxes" viewBox="0 0 {width} {height}" preserveAspectRatio="none">{shapes}</svg></div>'
        f'<figcaption>{html.text(card.name)}</figcaption><ul class="said">{lines}</ul></figure>'
    )
