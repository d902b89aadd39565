"""The zero-shot accuracy of a GRAIN checkpoint by clip-benchmark and by grain_jax, on a folder with a sub-folder a class.

    python -m benchmarks.clip_benchmark --checkpoint DIR --images CLASS_FOLDERS [--json OUT.json]

in an environment that has clip-benchmark (docs/library.md). The command line of clip-benchmark runs with our class names
and prompts. It normalises the mean embedding of the prompts of a class, which the GRAIN paper does not: with one prompt
a class that changes nothing; with several, the command gets class features by the rule of the paper (--load_clfs). The
exit status is 1 if a number differs.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from typing import Any
from unittest import mock

import jax
import numpy as np
import torch
from etils import epath

import grain_jax
from benchmarks import harness
from grain_jax.core import errors
from grain_jax.evaluate import clip_benchmark, encode, test_sets, zeroshot
from grain_jax.inference import prompts, scores

# The data set name under which clip-benchmark reads any folder of class folders, with names and prompts from files.
_DATASET = "imagenet_sketch"
_METRICS = {"acc1": "top1", "acc5": "top5", "mean_per_class_recall": "mean_per_class"}


def theirs(
    checkpoint: str,
    folder: str,
    names: Sequence[str],
    templates: Sequence[str],
    scratch: epath.Path,
    features: np.ndarray | None,
) -> dict[str, float]:
    """Metrics of the command of clip-benchmark on the folder; `features` [C, D] replace the prompts' means."""
    from clip_benchmark import cli

    prompted = [template.replace("{}", "{c}") for template in templates]
    (scratch / "names.json").write_text(json.dumps({_DATASET: list(names)}))
    (scratch / "templates.json").write_text(json.dumps({_DATASET: prompted}))
    output = scratch / "metrics.json"
    flags = dict(model_type=clip_benchmark.NAME, model="GRAIN", pretrained=checkpoint)
    flags |= dict(dataset=_DATASET, dataset_root=folder, output=output)
    flags |= dict(custom_classname_file=scratch / "names.json")
    flags |= dict(custom_template_file=scratch / "templates.json")
    flags |= dict(num_workers=0)  # workers would be forks of a process that runs JAX
    if features is not None:
        flags |= dict(load_clfs=scratch / "features.pt")
        torch.save(torch.from_numpy(features.T.copy()), flags["load_clfs"])
    arguments = ["clip_benchmark", "eval", *(f"--{k}={v}" for k, v in flags.items())]
    arguments += ["--no_amp", "--quiet"]  # bfloat16 scores have ties, which change classes
    with mock.patch.object(sys, "argv", arguments):
        cli.main()
    return json.loads(output.read_text())["metrics"]


def compare(checkpoint: str, folder: str) -> list[dict[str, Any]]:
    """A row for each metric with one prompt, and with several: ours, theirs, and whether they are equal."""
    names = test_sets.ClassFolders(folder).classes
    predictor, several = grain_jax.load(checkpoint), prompts.load_templates()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        scratch = epath.Path(scratch)
        for templates in (several[:1], several):
            file = scratch / "templates.txt"
            file.write_text("\n".join(templates) + "\n")
            entry = zeroshot.ZeroShot(images=folder, templates=str(file))
            our = entry.evaluate(predictor)
            handed = None
            if len(templates) > 1:
                texts = [prompts.class_texts(name, templates) for name in names]
                handed = scores.class_features(encode.encode_texts(predictor, texts))
            their = theirs(checkpoint, folder, names, templates, scratch, handed)
            for key, name in _METRICS.items():
                row = dict(prompts=len(templates), metric=key, clip_benchmark=their[key])
                row |= dict(ours=our["alpha_1.0"][name])
                rows.append(row | dict(ok=abs(row["clip_benchmark"] - row["ours"]) < 1e-9))
    return rows


def main() -> int:
    """Prints a line for each comparison; the exit status is 1 if a number differs."""
    images = dict(required=True, help="one folder a class, 5 classes or more")
    args = harness.arguments(__doc__, checkpoint=(str, dict(required=True)), images=(str, images))
    try:
        clip_benchmark.register()
        rows = compare(args.checkpoint, args.images)
    except errors.UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, torch {torch.__version__}")
    columns = dict(prompts=">7", metric="22", clip_benchmark=">14.4%", ours=">9.4%", ok=">5")
    table = harness.Table(columns)
    for row in rows:
        table.add(**row)
    harness.write(args.json, rows)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
