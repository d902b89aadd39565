"""The zero-shot accuracy of a GRAIN checkpoint by clip-benchmark and by grain_jax, on a folder with a sub-folder a class.

    python -m benchmarks.clip_benchmark --checkpoint DIR --images CLASS_FOLDERS [--json OUT.json]

in an environment that has clip-benchmark (docs/library.md). The command line of clip-benchmark
runs with our class names and prompts. It normalises the mean embedding of the prompts of a class, which the GRAIN paper does not. With one prompt a
class that changes nothing; with several, ours is measured both ways, and the command runs once more with class
features by the rule of the paper (--load_clfs). The exit status is 1 if a number differs.
"""

import argparse
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
from benchmarks import side_by_side
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

    names_file, templates_file = scratch / "names.json", scratch / "templates.json"
    names_file.write_text(json.dumps({_DATASET: list(names)}))
    templates_file.write_text(json.dumps({_DATASET: [t.replace("{}", "{c}") for t in templates]}))
    output = scratch / "metrics.json"
    arguments = [
        "clip_benchmark",
        "eval",
        f"--model_type={clip_benchmark.NAME}",
        "--model=GRAIN",
        f"--pretrained={checkpoint}",
        f"--dataset={_DATASET}",
        f"--dataset_root={folder}",
        f"--custom_classname_file={names_file}",
        f"--custom_template_file={templates_file}",
        f"--output={output}",
        "--no_amp",  # bfloat16 scores have ties, which change classes
        "--num_workers=0",  # workers would be forks of a process that runs JAX
        "--quiet",
    ]
    if features is not None:
        torch.save(torch.from_numpy(features.T.copy()), scratch / "features.pt")
        arguments.append(f"--load_clfs={scratch / 'features.pt'}")
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
                by_command = zeroshot.evaluate(
                    predictor, test_sets.ClassFolders(folder), templates=file
                )
            handed = features if rule == "handed over" else None
            their, their_scores = theirs(checkpoint, folder, names, templates, scratch, handed)
            our, our_scores = ours(features, image_embed, labels)
            if rule != "unit":  # compare the metrics of our command
                our = {key: by_command["alpha_1.0"][name] for key, name in _METRICS.items()}
            if rule == "ours":  # with one prompt the class features have unit length
                length = np.linalg.norm(features, axis=1)
                np.testing.assert_allclose(length, 1, atol=1e-5)
            same = their_scores.argmax(axis=1) == our_scores.argmax(axis=1)
            rows.append(
                {
                    "name": title,
                    "pictures": len(labels),
                    "classes": len(names),
                    "clip_benchmark": their,
                    "ours": our,
                    "same_class": float(same.mean()),
                    "worst_score": float(np.abs(their_scores - our_scores).max()),
                    "ok": all(abs(their[key] - our[key]) < 1e-9 for key in _METRICS)
                    and bool(same.all()),
                }
            )
    return rows


def main() -> int:
    """Prints a line for each comparison; the exit status is 1 if a number differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--images", required=True, help="one folder a class, 5 classes or more")
    parser.add_argument("--json", help="file to write the figures to")
    args = parser.parse_args()
    try:
        clip_benchmark.register()
        rows = compare(args.checkpoint, args.images)
    except errors.UserError as error:
        print(error, file=sys.stderr)
        return 2
    where = f"{jax.devices()[0].device_kind}, jax {jax.__version__}, torch {torch.__version__}"
    print(f"{rows[0]['pictures']} images of {rows[0]['classes']} classes; {where}")
    print(f"{'':30} {'':22} {'clip-benchmark':>14} {'ours':>9}")
    for row in rows:
        for key in _METRICS:
            both = f"{row['clip_benchmark'][key]:14.4%} {row['ours'][key]:9.4%}"
            print(f"{row['name']:30} {key:22} {both}")
        print(
            f"{'':30} {row['same_class']:.2%} of the images get the same class; scores differ by at"
            f" most {row['worst_score']:.1e}{'' if row['ok'] else '  DIFFERS'}"
        )
    side_by_side.write(args.json, rows)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
