"""The zero-shot accuracy of a GRAIN checkpoint by clip-benchmark and by grain_jax, on a folder with a sub-folder a class.

    python -m benchmarks.clip_benchmark --checkpoint DIR --images CLASS_FOLDERS [--json OUT.json]

in an environment that has clip-benchmark (docs/library.md). The command line of clip-benchmark
runs with our class names and prompts. It normalises the mean embedding of the prompts of a class, which the GRAIN paper does not. With one prompt a
class that changes nothing; with several, ours is measured both ways, and the command runs once more with class
features by the rule of the paper (--load_clfs). The exit status is 1 if a number differs.
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
from grain_jax import errors
from grain_jax.evaluate import encode, rates, test_sets, zeroshot
from grain_jax.inference import prompts, scores
from grain_jax.integrations import clip_benchmark

# The data set name under which clip-benchmark reads any folder of class folders, with names and prompts from files.
_DATASET = "imagenet_sketch"
_METRICS = {"acc1": "top1", "acc5": "top5", "mean_per_class_recall": "mean_per_class"}


def theirs(
    checkpoint: str,
    folder: str,
    names: Sequence[str],
    templates: Sequence[str],
    scratch: epath.Path,
    features: np.ndarray | None = None,
) -> tuple[dict[str, float], np.ndarray]:
    """Runs the command of clip-benchmark on the folder; returns its metrics and scores [N, C].

    Args:
      checkpoint: the model.
      folder: the folder of the class folders.
      names: names of the classes, in the order of the folders.
      templates: prompts with {}.
      scratch: folder for the input and output files of the command.
      features: class features [C, D] to use instead of the prompts.
    """
    from clip_benchmark import cli
    from clip_benchmark.metrics import zeroshot_classification

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
    classify, seen = zeroshot_classification.run_classification, []

    def run_classification(*positional: Any, **named: Any) -> Any:
        seen.append(classify(*positional, **named))
        return seen[-1]

    with (
        mock.patch.object(sys, "argv", arguments),
        mock.patch.object(zeroshot_classification, "run_classification", run_classification),
    ):
        cli.main()
    return json.loads(output.read_text())["metrics"], seen[0][0].numpy() / 100


def ours(
    features: np.ndarray, image_embed: np.ndarray, labels: np.ndarray
) -> tuple[dict[str, float], np.ndarray]:
    """Our metrics under the names of clip-benchmark, and our scores [N, C], of class features [C, D]."""
    found = scores.global_scores(image_embed, features)
    right = labels[:, None] == np.arange(len(features))
    top1, top5 = (rates.topk_hits(found, right, k) for k in (1, 5))
    per_class = [top1[labels == label].mean() for label in range(len(features))]
    values = (top1.mean(), top5.mean(), np.mean(per_class))
    return dict(zip(_METRICS, map(float, values))), found


def compare(checkpoint: str, folder: str) -> list[dict[str, Any]]:
    """A row for each comparison: both metrics, the largest difference of scores, the share of images with the same class."""
    names, paths, labels = test_sets.class_folders(folder)
    predictor = grain_jax.load(checkpoint)
    several = prompts.load_templates()
    image_embed = encode.gather_images(
        predictor, paths, label="images", unreadable={}, regions=False
    ).image_embed
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        scratch = epath.Path(scratch)
        for title, templates, rule in (
            ("one prompt", several[:1], "ours"),
            (f"{len(several)} prompts, unit means", several, "unit"),
            (f"{len(several)} prompts, the paper's means", several, "handed over"),
        ):
            file = scratch / "templates.txt"
            file.write_text("\n".join(templates) + "\n")
            texts = [prompts.class_texts(name, templates) for name in names]
            features = scores.class_features(encode.encode_texts(predictor, texts))
            if rule == "unit":
                features = scores.unit(features)
            else:
                entry = zeroshot.ZeroShot(images=str(folder), templates=str(file))
                by_command = entry.evaluate(predictor)
            handed = features if rule == "handed over" else None
            their, their_scores = theirs(checkpoint, folder, names, templates, scratch, handed)
            our, our_scores = ours(features, image_embed, labels)
            if rule != "unit":  # compare the metrics of our command
                our = {key: by_command["alpha_1.0"][name] for key, name in _METRICS.items()}
            if rule == "ours":  # with one prompt the class features have unit length
                length = np.linalg.norm(features, axis=1)
                np.testing.assert_allclose(length, 1, atol=1e-5)
            same = their_scores.argmax(axis=1) == our_scores.argmax(axis=1)
            equal = all(abs(their[key] - our[key]) < 1e-9 for key in _METRICS)
            row = dict(name=title, pictures=len(labels), classes=len(names))
            row |= dict(clip_benchmark=their, ours=our, same_class=float(same.mean()))
            row |= dict(worst_score=float(np.abs(their_scores - our_scores).max()))
            rows.append(row | dict(ok=equal and bool(same.all())))
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
    where = f"{jax.devices()[0].device_kind}, jax {jax.__version__}, torch {torch.__version__}"
    print(f"{rows[0]['pictures']} images of {rows[0]['classes']} classes; {where}")
    columns = dict(prompts="30", metric="22", clip_benchmark=">14.4%", ours=">9.4%")
    table = harness.Table(columns)
    for row in rows:
        for key in _METRICS:
            both = {side: row[side][key] for side in ("clip_benchmark", "ours")}
            table.add(prompts=row["name"], metric=key, **both)
        print(
            f"{'':30} {row['same_class']:.2%} of the images get the same class; scores differ by at"
            f" most {row['worst_score']:.1e}{'' if row['ok'] else '  DIFFERS'}"
        )
    harness.write(args.json, rows)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
