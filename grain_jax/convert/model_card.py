"""The model card (README.md) of a converted model, from the files of its run."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from grain_jax import config as config_lib
from grain_jax.checkpoint import files
from grain_jax.convert import parity, towers
from grain_jax.core import metrics_file, regular_file

_KEYS = (
    *("input.name", "input.source", "total_steps", "total_epochs", "batch_size"),
    *("optim.learning_rate", "optim.weight_decay", "ema_decay", "dtype"),
)
_CARD = """---
library_name: {library}
pipeline_tag: zero-shot-image-classification
tags: [grain, clip]
license: other
---

# {title}

Embeds images, texts and, with a region decoder, image regions in one space: zero-shot classification by class
names or descriptions, and boxes for what a text describes. Method: Halbe et al., "Grounding Descriptions in
Images informs Zero-Shot Visual Recognition" (WACV 2026, arXiv 2412.04429).

`grain-jax convert` wrote this folder.

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

Images are resized to a square, and scores are cosine similarities, not probabilities. The errors, gaps and
biases of the captions and descriptions are in this model: do not use it for decisions about people.

## Licence

Code in this folder: Apache-2.0. The weights: not stated by the run; the terms of the training data and of the
model's author apply. State a licence before you publish the weights.
"""


def write(
    model: config_lib.Model,
    folder: epath.PathLike,
    proof: parity.Report,
    use: str,
    missing: str = "",
    library: str = "transformers",
) -> str:
    """The text of the card: Markdown with the front matter of the Hugging Face Hub.

    `folder` is a checkpoint in its workdir (WORKDIR/checkpoints/STEP) or a converted model. `use` is code
    that loads FOLDER. `missing` says why the folder has no tokenizer.
    """
    note = f"\nThe folder has {missing}. Another tokenizer would give other token ids." if missing else ""
    training, evaluation = _run(epath.Path(folder))
    is_proven = proof.verdict != parity.NOT_PROVEN
    return _CARD.format(
        library=library,
        title="Image and text towers" if model.decoder is None else "GRAIN",
        use=f"{use.strip()}\n```{note}",
        model="\n".join(towers.describe(model)),
        training=training,
        evaluation=evaluation,
        parity=proof.text if is_proven else proof.text.splitlines()[-1],
    )


def _run(folder: epath.Path) -> tuple[str, str]:
    """What the card says of training and evaluation: the newest metrics up to the checkpoint's step."""
    evaluation = "The run evaluated nothing. Evaluate the model before you rely on it."
    if not (folder / "state").is_dir():
        notes = regular_file.read_json(folder / "config.json", dict[str, Any], "a converted model's")
        source = notes.get("source") or "a model without its run"
        return f"Converted from {source}, which does not record the training.", evaluation
    step = int(folder.name) if folder.name.isdigit() else -1
    for line in metrics_file.read(folder.parent.parent):
        metrics = {key: x for key, x in metrics_file.numbers(line) if key.startswith("eval/")}
        if metrics and line.step <= step:
            numbers = {key: f"{metrics[key]:.4g}" for key in sorted(metrics)}
            evaluation = f"During training, at step {line.step}:\n\n{_table(numbers)}"
    stored = config_lib.flatten(files.read_items(folder).config)
    keys = [*_KEYS, *(key for key in stored if key.startswith("loss."))]
    shown = {key: stored[key] for key in keys if stored.get(key)}
    return _table({"step of these weights": step} | shown), evaluation


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {x} |" for key, x in rows.items())])
