"""The model card (README.md) of a converted model, from the files of its run."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from etils import epath

from grain_jax import config as config_lib
from grain_jax.checkpoint import files
from grain_jax.convert import parity, towers
from grain_jax.core import regular_file
from grain_jax.runtime import metrics_file


class TrainedRun(NamedTuple):
    """The known origin of a model; empty if nothing is known."""

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
    for line in metrics_file.read(workdir)[0]:
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
    repo: str | None = None,
) -> str:
    """The text of the card: Markdown with the front matter of the Hugging Face Hub.

    Args:
      model: the sizes.
      run: where the model comes from.
      proof: the parity report of the conversion.
      use: code that loads FOLDER.
      missing: why the folder has no tokenizer, or "".
      library: that loads the folder, as the Hub names it.
      repo: ORG/NAME on the Hub, in place of FOLDER.
    """
    notes = ["```", *([f'In JAX: `grain_jax.load("hf://{repo}")`.'] if repo else [])]
    if missing:
        notes.append(f"The folder has {missing}. Another tokenizer would give other token ids.")
    training = "Not recorded: the model came without the config of its run."
    if "optim" in run.config:
        training = _table(_training(run))
    elif run.source:
        training = f"Converted from {run.source}, which does not record the training."
    evaluation = "The run evaluated nothing. Evaluate the model before you rely on it."
    if run.metrics:
        measured = _table((name, f"{value:.4g}") for name, value in sorted(run.metrics.items()))
        evaluation = f"During training, at step {run.measured_at}:\n\n{measured}"
    is_proven = proof.verdict != parity.NOT_PROVEN
    return _CARD.format(
        library=library,
        title="Image and text towers" if model.decoder is None else "GRAIN",
        use="\n".join([use.strip().replace("FOLDER", repo or "FOLDER"), *notes]),
        model="\n".join(towers.describe(model, {})),
        training=training,
        evaluation=evaluation,
        parity=proof.text if is_proven else proof.text.splitlines()[-1],
    )


_CARD = """---
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

## Model

```
{model}
```

## Data and training

{training}

## Evaluation

{evaluation}

Parity of the conversion:

```
{parity}
```

## Limits

Images are resized to a square, and scores are cosine similarities, not probabilities. The errors, gaps and biases of the
captions and descriptions are in this model: do not use it for decisions about people.

## Licence

Code in this folder: Apache-2.0. The weights: not stated by the run; the terms of the training data and of the model's
author apply. State a licence before you publish the weights.
"""


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])


_KEYS = (
    *("input.name", "input.source", "total_steps", "total_epochs", "batch_size"),
    *("optim.learning_rate", "optim.weight_decay", "ema_decay", "dtype"),
)


def _training(run: TrainedRun) -> list[tuple[str, Any]]:
    stored = config_lib.flatten(run.config)
    keys = [*_KEYS, *(key for key in stored if key.startswith("loss."))]
    rows = [(key, stored[key]) for key in keys if stored.get(key)]
    return [("step of these weights", run.step), *rows]
