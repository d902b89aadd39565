"""The model card (README.md) of a converted model, from the files of its run."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from grain_jax import config as config_lib
from grain_jax.checkpoint import files
from grain_jax.convert import parity, towers
from grain_jax.core import regular_file
from grain_jax.runtime import metrics_file


class TrainedRun(NamedTuple):
    """The known origin of a model; empty where there is none."""

    config: dict[str, Any]
    step: int | None  # of the checkpoint
    metrics: dict[str, float]  # "eval/..."
    measured_at: int | None  # step of the metrics
    source: str  # the file that a converted model comes from


def read_run(folder: epath.PathLike) -> TrainedRun:
    """The run of a checkpoint in its workdir (WORKDIR/checkpoints/STEP), or the source of a converted model.

    The metrics are the newest that were measured at or before the step of the checkpoint.
    """
    folder = epath.Path(folder)
    if not (folder / "state").is_dir():
        path = folder / "config.json"
        notes = regular_file.read_json(path, dict[str, Any], "a converted model's")
        return TrainedRun({}, None, {}, None, str(notes.get("source", "")))
    workdir, step = folder.parent.parent, int(folder.name) if folder.name.isdigit() else None
    metrics, measured_at = {}, None
    for line in metrics_file.read(metrics_file.files(workdir))[0]:
        here = {key: value for key, value in metrics_file.numbers(line) if key.startswith("eval/")}
        if here and step is not None and line.step <= step:
            metrics, measured_at = here, line.step
    return TrainedRun(files.read_items(folder).config, step, metrics, measured_at, "")


def write(
    model: config_lib.Model,
    run: TrainedRun,
    proof: parity.Report,
    use: str,
    missing: str = "",
    *,
    library: str = "transformers",
    losses: Mapping[str, Any] | None = None,
    repo: str | None = None,
) -> str:
    """The text of the card: Markdown with the front matter of the Hugging Face hub.

    Args:
      model: the sizes.
      run: where the model comes from.
      proof: the parity report of the conversion.
      use: code that loads FOLDER.
      missing: why the folder has no tokenizer, or "".
      library: that loads the folder, as the Hub names it.
      losses: those of the modeling file.
      repo: ORG/NAME on the Hub, in place of FOLDER.
    """
    title = "Image and text towers" if model.decoder is None else "GRAIN"
    use = use.strip().replace("FOLDER", repo or "FOLDER")
    lines = [_HEAD.format(title=title, library=library, use=use)]
    if repo:
        lines += ["", f'In JAX: `grain_jax.load("hf://{repo}")`.']
    if missing:
        lines.append(
            f"The folder has {missing}. A tokenizer that a library takes instead is another."
        )
    lines += ["", "## Model", "", "```", *towers.describe(model, {}), "```"]
    if losses is not None and model.boxes.kind != "none":
        lines.append(
            f"A box head, {model.boxes.kind}: `get_boxes(pixels, boxes)` embeds given boxes, `similarity_maps(pixels, texts)`"
            " shows where texts lie."
        )
    lines += ["", "## Data and training", ""]
    if "optim" in run.config:
        lines += _table(("", ""), _training(run, losses or {}))
    elif run.source:
        lines.append(f"Converted from {run.source}, which does not record the training.")
    else:
        lines.append("Not recorded: the model came without the config of its run.")
    lines += ["", "## Evaluation", ""]
    if run.metrics:
        lines += [f"During training, at step {run.measured_at}:", ""]
        measured = [(name, f"{value:.4g}") for name, value in sorted(run.metrics.items())]
        lines += _table(("metric", "value"), measured)
    else:
        lines.append("The run evaluated nothing. Evaluate the model before you rely on it.")
    report = proof.text
    if proof.verdict == parity.NOT_PROVEN:
        report = report.splitlines()[-1]
    lines += ["", "Parity of the conversion:", "", "```", report, "```", "", "## Limits", ""]
    if model.decoder is not None:
        lines.append(
            f"- The model predicts {model.decoder.queries} regions for every image, also where there is no object."
        )
    lines += [
        "- Images are resized to a square without keeping the aspect ratio; small objects may disappear.",
        f"- Texts are cut to {model.text.context_length} tokens. Scores are cosine similarities, not probabilities.",
        "- Captions and descriptions of such training sets come from the web and from other models. Their errors,"
        " gaps and biases are in this model. Do not use it for decisions about people.",
        "",
        _LICENCE,
    ]
    return "\n".join(lines)


_HEAD = """---
library_name: {library}
pipeline_tag: zero-shot-image-classification
tags: [grain, clip]
license: other
---

# {title}

Embeds images, texts and, with a region decoder, image regions in one space: zero-shot classification by class names or
descriptions, and boxes for what a text describes. Method: Halbe et al., "Grounding Descriptions in Images informs
Zero-Shot Visual Recognition" (WACV 2026, arXiv 2412.04429). `grain-jax convert` wrote this folder.

```python
{use}
```"""
_LICENCE = """## Licence

Code in this folder: Apache-2.0. The weights: not stated by the run; the terms of the training data and of the model's
author apply. State a licence before you publish the weights.
"""


def _table(header: tuple[str, str], rows: list[tuple[str, str]]) -> list[str]:
    rule = "|---|---|"
    return [f"| {' | '.join(header)} |", rule, *(f"| {key} | {value} |" for key, value in rows)]


def _training(run: TrainedRun, losses: Mapping[str, Any]) -> list[tuple[str, str]]:
    config = run.config
    decay, optim, steps = config["ema_decay"], config["optim"], config.get("total_steps")
    length = f"{steps} steps" if steps is not None else f"{config['total_epochs']:g} epochs"
    return [
        ("data set", config["input"]["name"] or config["input"]["source"]),
        ("length", f"{length}; these weights are of step {run.step}"),
        ("batch size", str(config["batch_size"])),
        ("learning rate, weight decay", f"{optim['learning_rate']:g}, {optim['weight_decay']:g}"),
        ("moving average", f"these weights, with decay {decay:g}" if decay else "none"),
        ("activation dtype", config["dtype"]),
        *((f"loss: {key}", str(value)) for key, value in losses.items()),
    ]
