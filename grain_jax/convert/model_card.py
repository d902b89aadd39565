"""The model card (README.md) of a converted model, from what its run left behind."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from grain_jax import config as config_lib
from grain_jax.convert import parity
from grain_jax.runtime import checkpoint, metrics_file


class Run(NamedTuple):
    """What is known of how a model came about; empty where it is not."""

    config: dict[str, Any]
    step: int | None  # of the checkpoint
    metrics: dict[str, float]  # "eval/..."
    measured_at: int | None  # the step that they are of
    source: str  # of a converted model: the file that it was converted from


def read_run(folder: epath.PathLike) -> Run:
    """The run behind a checkpoint in its workdir, WORKDIR/checkpoints/STEP, or behind a converted model.

    Of the metrics the newest are taken that were measured no later than the checkpoint's step.
    """
    folder = epath.Path(folder)
    if not (folder / "state").is_dir():
        notes = json.loads((folder / "config.json").read_text())
        return Run({}, None, {}, None, str(notes.get("source", "")))
    workdir, step = folder.parent.parent, int(folder.name) if folder.name.isdigit() else None
    metrics, measured_at = {}, None
    for line in metrics_file.read(metrics_file.files(workdir))[0]:
        here = {key: value for key, value in metrics_file.numbers(line) if key.startswith("eval/")}
        if here and step is not None and line.step <= step:
            metrics, measured_at = here, line.step
    return Run(checkpoint.read_json(folder, "config"), step, metrics, measured_at, "")


def write(
    model: config_lib.Model,
    losses: Mapping[str, Any],
    run: Run,
    proof: parity.Report,
    has_tokenizer: bool,
) -> str:
    """The card's text, Markdown with the front matter that the Hugging Face hub reads."""
    image, text, decoder = model.image, model.text, model.decoder
    config = run.config
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: zero-shot-image-classification",
        "tags: [grain, clip, grounding]",
        "license: other",
        "---",
        "",
        "# GRAIN",
        "",
        "Embeds images, texts and regions of images in one space: zero-shot classification with"
        " class names or descriptions, and boxes for what a text describes. The method is Halbe et"
        ' al., "Grounding Descriptions in Images informs Zero-Shot Visual Recognition" (WACV 2026,'
        " arXiv 2412.04429); this folder was written by `python -m grain_jax.convert to-hf`.",
        "",
        "```python",
        "import torch",
        "from PIL import Image",
        "from transformers import AutoModel, AutoProcessor",
        "",
        'model = AutoModel.from_pretrained("FOLDER", trust_remote_code=True).eval()',
        'processor = AutoProcessor.from_pretrained("FOLDER", trust_remote_code=True)',
        "with torch.no_grad():",
        '    pixels = processor(images=Image.open("bird.jpg"))["pixel_values"]',
        '    texts = [processor(text=[f"a photo of a {c}"])["input_ids"] for c in ("wren", "owl")]',
        "    scores = model.zero_shot_logits(pixels, model.class_features(texts))",
        "    regions = model.get_regions(pixels)  # .boxes_xyxy in [0, 1], .embeds",
        "```",
        "",
        "Needs torch, transformers 5 and Pillow; with ftfy, texts with broken encodings are repaired"
        " as in training.",
    ]
    if not has_tokenizer:
        lines.append(
            f"There is no tokenizer: the vocabulary has {text.vocab_size} ids, so give token ids;"
            " images go through `AutoImageProcessor`."
        )
    lines += [
        "",
        "## Model",
        "",
        "| part | |",
        "|---|---|",
        f"| image tower | {image.image_size} px, patch {image.patch_size}, width {image.width}, depth"
        f" {image.depth}, {image.heads} heads, {image.activation}"
        f"{', qk-norm' if image.qk_norm else ''} |",
        f"| text tower | width {text.width}, depth {text.depth}, {text.heads} heads, context"
        f" {text.context_length}, vocabulary {text.vocab_size} |",
        f"| region decoder | {decoder.queries} regions, width {decoder.width}, depth {decoder.depth},"
        f" {decoder.heads} heads |",
        f"| embedding | {model.embed_dim} |",
        "",
        "## Data and training",
        "",
    ]
    if "optim" in config:
        length = (
            f"{config['total_epochs']:g} epochs"
            if config.get("total_steps") is None
            else f"{config['total_steps']} steps"
        )
        decay = config["ema_decay"]
        average = f"these are an average, of decay {decay:g}" if decay else "none"
        lines += [
            "| | |",
            "|---|---|",
            f"| data set | {config['input']['name'] or config['input']['source']} |",
            f"| length | {length}; these weights are of step {run.step} |",
            f"| batch | {config['batch_size']} |",
            f"| learning rate, weight decay | {config['optim']['learning_rate']:g},"
            f" {config['optim']['weight_decay']:g} |",
            f"| average of weights | {average} |",
            f"| activations | {config['dtype']} |",
            *(f"| loss: {key} | {value} |" for key, value in losses.items()),
        ]
    elif run.source:
        lines.append(f"Converted from {run.source}; how that was trained is not recorded there.")
    else:
        lines.append("Not recorded: there was no run's config beside the model.")
    lines += ["", "## Measured", ""]
    if run.metrics:
        lines += [f"In the run, at step {run.measured_at}:", "", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {_number(value)} |" for name, value in sorted(run.metrics.items())]
    else:
        lines.append("Nothing was measured in the run. Measure before you rely on it.")
    lines += [
        "",
        "Conversion:",
        "",
        "```",
        proof.text.splitlines()[-1] if proof.verdict == parity.NOT_PROVEN else proof.text,
        "```",
        "",
        "## Limits",
        "",
        f"- At most {decoder.queries} regions an image, whatever it shows; a box is given for every"
        " query, also where there is nothing.",
        "- Images are resized to a square: long ones are distorted, small things may vanish.",
        f"- Texts are cut to {text.context_length} tokens. Scores are cosines, not probabilities.",
        "- Captions and descriptions of such training sets come from the web and from other models;"
        " what they get wrong or leave out, and their biases, are in this model. Not for decisions"
        " about people.",
        "",
        "## Licence",
        "",
        "The code in this folder: Apache-2.0. The weights: not stated by the run; the terms of the"
        " training data and of whoever trained it apply, so state one before you publish.",
        "",
    ]
    return "\n".join(lines)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
