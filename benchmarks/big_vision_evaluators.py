"""Accuracy and recalls of a GRAIN checkpoint by big_vision's evaluators and by ours.

    PYTHONPATH=.:BIG_VISION python -m benchmarks.big_vision_evaluators --checkpoint DIR \
        --images CLASS_FOLDERS --pictures DIR --annotations A.jsonl [--json OUT.json]

BIG_VISION is a checkout of github.com/google-research/big_vision (tested with commit 0127fb6); its evaluators need
einops in addition to our `data` extra. The images are written as local TFDS data sets. The discriminative_classifier
and the retrieval evaluator of big_vision run on these through its `evaluators.common`; our evaluators run on the files.
The classifier of big_vision normalises the mean embedding of the prompts of a class, which the GRAIN paper does not:
so does ours here. The exit status is 1 if a number differs.
"""

import importlib
import json
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from benchmarks import harness
from grain_jax import inference
from grain_jax.core import annotations, errors, images
from grain_jax.evaluate import big_vision, retrieval, test_sets
from grain_jax.inference import scores
from grain_jax.input_pipeline import tokenizer

PROMPTS = ("class_name_only", "clip_paper")  # big_vision's names for its sets of templates
_IMAGE_TEXT = "proj.image_text"


def class_set(folder: epath.PathLike, data_dir: epath.Path) -> list[str]:
    """Writes the class folders as the TFDS set `grain_classes`; returns the names of the classes."""
    import tensorflow_datasets as tfds

    found = test_sets.ClassFolders(folder)
    names, paths, labels = found.classes, found.paths, found.labels
    features = {"image": _lossless(tfds), "label": tfds.features.ClassLabel(names=names)}
    examples = [{"image": _pixels(path), "label": int(label)} for path, label in zip(paths, labels)]
    _write(tfds, "grain_classes", features, examples, data_dir)
    return names


def caption_set(
    folder: epath.PathLike, path: epath.PathLike, data_dir: epath.Path
) -> tuple[epath.Path, int]:
    """Writes captioned images as the TFDS set `grain_captions`; (annotations of those kept, number left out).

    big_vision counts an equal caption of another image as a wrong answer, ours counts it as a right one. So images
    that share a caption with an earlier one are left out.
    """
    import tensorflow_datasets as tfds

    seen: set[str] = set()
    examples, lines, left_out = [], [], 0
    for record in annotations.read(path).records:
        keys = [tokenizer.clean(caption).lower() for caption in record.captions]
        if not keys or seen.intersection(keys) or len(set(keys)) < len(keys):
            left_out += 1
            continue
        seen.update(keys)
        captions = list(record.captions)
        image = _pixels(epath.Path(folder) / record.image)
        examples.append({"image": image, "captions": captions})
        lines.append(json.dumps({"image": record.image, "captions": captions}))
    features = {
        "image": _lossless(tfds),
        "captions": tfds.features.Sequence(tfds.features.Text()),
    }
    _write(tfds, "grain_captions", features, examples, data_dir)
    ours = data_dir / "A.jsonl"
    ours.write_text("\n".join(lines) + "\n")
    return ours, left_out


def _lossless(tfds: Any) -> Any:
    return tfds.features.Image(shape=(None, None, 3), encoding_format="png")


def _pixels(path: epath.PathLike) -> np.ndarray:
    return np.asarray(images.load_image(path).convert("RGB"))


def _write(tfds: Any, name: str, features: Mapping, examples: list, data_dir: epath.Path) -> None:
    tfds.disable_progress_bar()
    tfds.dataset_builders.store_as_tfds_dataset(
        name=name,
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets={"test": list(enumerate(examples))},  # (key, example)
        data_dir=data_dir,
        disable_shuffling=True,  # keeps the order of the images
    )


def evaluators(checkpoint: str, names: list[str], data_dir: epath.Path, batch_size: int) -> Any:
    """(parameters of the checkpoint in big_vision's model, name -> evaluator of big_vision)."""
    from big_vision.evaluators import common

    big_vision.register()
    prepare = dict(
        pp_img=f"grain_image({checkpoint!r})",
        pp_txt=f"grain_text({checkpoint!r})",
        data_dir=str(data_dir),
    )
    classes = dict(
        type=f"{_IMAGE_TEXT}.discriminative_classifier",
        dataset_names=["grain_classes"],
        class_names=names,
        canonicalize=False,
        dataset_overrides={},  # the default names another data set
    )
    evals = {prompts: classes | prepare | dict(prompt_templates=prompts) for prompts in PROMPTS}
    captions = dict(dataset="grain_captions", txt_name="captions")
    evals["retrieval"] = dict(type=f"{_IMAGE_TEXT}.retrieval") | captions | prepare
    config = dict(model_name=big_vision.NAME, model=dict(checkpoint=checkpoint), evals=evals)
    config |= dict(model_init=checkpoint, batch_size=batch_size)
    config = ml_collections.ConfigDict(config)
    # As in the trainers of big_vision.
    module = importlib.import_module(f"big_vision.models.{config.model_name}")
    model = module.Model(**config.model)
    params = module.load(None, config.model_init, config.model)
    predict = {"predict": module.predict_fn(model)}
    once = dict(get_steps=lambda key, cfg: 1, devices=jax.devices())
    made = common.from_config(config, predict, **once)
    return {"params": params}, {name: evaluator for name, evaluator, *_ in made}


def our_accuracy(checkpoint: str, folder: epath.PathLike, templates: list[str]) -> float:
    """Our top-1 with class means of unit length, as big_vision makes them."""
    predictor = inference.load(checkpoint, templates=templates)
    found = test_sets.ClassFolders(folder)
    names, paths, labels = found.classes, found.paths, found.labels
    classes = predictor.class_features(names)
    classes = classes._replace(features=scores.unit(classes.features))
    found = predictor.classify((images.load_image(path) for path in paths), classes)
    return float((found.argmax(axis=1) == labels).mean())


def main() -> int:
    """Prints a line for each number of both sides; the exit status is 1 if two differ."""
    needed = dict(required=True)
    args = harness.arguments(
        __doc__,
        checkpoint=(str, needed),
        images=(str, needed | dict(help="one folder a class")),
        pictures=(str, needed | dict(help="folder of the annotated images")),
        annotations=(str, needed | dict(help="A.jsonl")),
        batch_size=32,
    )
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        scratch = epath.Path(scratch)
        try:
            names = class_set(args.images, scratch)
            lines, left_out = caption_set(args.pictures, args.annotations, scratch)
            state, made = evaluators(args.checkpoint, names, scratch, args.batch_size)
            for prompts in PROMPTS:
                theirs = made[prompts].evaluate(state, "grain_classes")
                templates = made[prompts].prompt_templates
                ours = our_accuracy(args.checkpoint, args.images, templates)
                both = dict(big_vision=float(theirs["accuracy"]), ours=ours)
                rows.append(dict(name=f"accuracy, {prompts}") | both)
            theirs = dict(made["retrieval"].run(state))
            predictor = inference.load(args.checkpoint)
            entry = retrieval.Retrieval(images=args.pictures, annotations=str(lines))
            found = entry.evaluate(predictor)
        except errors.UserError as error:
            print(error, file=sys.stderr)
            return 2
    for their_way, our_way in (("img2txt", "image_to_text"), ("txt2img", "text_to_image")):
        for k in retrieval.KS:
            both = dict(big_vision=float(theirs[f"{their_way}_recall@{k}"]))
            rows.append(dict(name=f"{our_way} R@{k}") | both | dict(ours=found[our_way][f"r{k}"]))
    print(
        f"{len(names)} classes; {found['pictures']} images with {found['captions']} captions ({left_out} left out"
        f" that share a caption); {jax.devices()[0].device_kind}, jax {jax.__version__}"
    )
    table = harness.Table(dict(name="28", big_vision=">10.4%", ours=">9.4%", ok=">5"))
    for row in rows:
        row["ok"] = abs(row["big_vision"] - row["ours"]) < 1e-6
        table.add(**row)
    harness.write(args.json, rows)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
