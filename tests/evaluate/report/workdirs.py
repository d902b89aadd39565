"""The workdir of a run that trained nothing: a tiny random model, images to evaluate, a run's files."""

import json

import numpy as np
import PIL.Image
from flax import traverse_util

from grain_jax import config as config_lib
from grain_jax import inference
from grain_jax.evaluate import kinds
from grain_jax.models import grain
from tests import tiny

BAD = "</script><script>document.title='bad'</script>"  # that would run, if a page let it
CLASSES = ("wren", "blue_tit", "<img src=x onerror=alert(1)>")
PER_CLASS = 4
DESCRIPTIONS = {
    "wren": ["a short tail", "a brown wing"],
    "blue tit": ["a blue crest", BAD],
    CLASSES[2]: ["a <b>long</b> beak"],
}
ANNOTATED = 12  # all, so that one program serves all sections


def parameters(model, seed=0):
    """Random ones; nothing is compiled."""
    random = np.random.default_rng(seed)
    return traverse_util.unflatten_dict(
        {
            name: (random.normal(0, 0.2, shape) + name.endswith("scale")).astype(np.float32)
            for name, shape in grain.parameter_shapes(model).items()
        },
        sep="/",
    )


def predictor(**changes):
    small = dict(model__decoder__heads=2, model__image__depth=1, model__text__depth=1)
    model = tiny.config(**small, **changes).model
    return inference.Predictor(model, parameters(model))


def data(folder):
    """Class folders, descriptions and annotations below `folder`."""
    random = np.random.default_rng(0)
    regions = [d for texts in DESCRIPTIONS.values() for d in texts]
    lines = []
    for i, name in enumerate(CLASSES):
        (folder / "classes" / name).mkdir(parents=True)
        for j in range(PER_CLASS):
            pixels = random.integers(0, 256, (24, 24, 3)).astype(np.uint8)
            PIL.Image.fromarray(pixels).save(folder / "classes" / name / f"{j}.png")
            if len(lines) < ANNOTATED:
                boxes = [([2, 2, 12, 12], regions[i]), ([6, 10, 22, 20], regions[(i + j) % 5])]
                found = [{"box": b, "description": d, "score": 0.9} for b, d in boxes]
                lines.append(json.dumps({"image": f"classes/{name}/{j}.png", "regions": found}))
    (folder / "A.jsonl").write_text("\n".join(lines))
    (folder / "D.json").write_text(json.dumps(DESCRIPTIONS))


def workdir(folder, data_folder):
    """The files of a run of 40 steps, logged every second one and evaluated twice."""
    folder.mkdir()
    described = dict(descriptions=f"{data_folder}/D.json", alphas=(1.0, 0.5, 0.0), names=False)
    c = tiny.dictionary(model__decoder__heads=2)
    birds = kinds.evaluator("zeroshot", f"{data_folder}/classes", **described)
    boxes = kinds.evaluator("grounding", str(data_folder), annotations=f"{data_folder}/A.jsonl")
    c.evals.update(dict(birds=birds, boxes=boxes))
    (folder / "config.json").write_text(config_lib.to_json(config_lib.from_dict(c)))
    results = {
        "eval/birds/alpha_1.0/top1": 0.775,
        "eval/birds/alpha_1.0/top1_low": 0.7,
        "eval/birds/alpha_1.0/top1_high": 0.83,
        "eval/birds/chance": 1 / 3,
        "eval/birds/images": 12.0,
        "eval/boxes/box_iou": 0.4641,
        "eval/boxes/chance_box_iou": 0.2,
    }
    (folder / "results.json").write_text(json.dumps(results))
    lines = []
    for step in range(2, 42, 2):
        line = {"step": step, "loss": 9 / step, "loss_box": 1 / step, "logit_scale": 14.0}
        line |= {"grad_norm": 2.0, "grad_norm/image": 1.5}
        lines.append(json.dumps(line | (results if step in (20, 40) else {})))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 42, "lo')
    cifar10 = {"kind": "zeroshot", "images": 40, "chance": 0.1, "images_per_class": {"cat": 20, "ship": 20}}
    cifar10["alpha_1.0"] = {"top1": 0.6, "per_class": {"cat": 0.25, "ship": 0.95}}
    cifar10["by_name"] = {"alpha_1.0": {"top1": 0.5, "per_class": {"cat": 0.05, "ship": 0.95}}}
    suite = {"ran": {"cifar10": cifar10}, "skipped": {"dtd": "no data: tfds build dtd"}, "failed": {}}
    (folder / "suite.json").write_text(json.dumps(suite))
    return folder
