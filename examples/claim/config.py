"""GRAIN against CLIP on drawn birds: the third design of docs/claim.md as a sweep of arms, rates and seeds.

    python -m examples.claim.data --output runs/claim/data
    grain-jax sweep --config examples/claim/config.py --sweep examples/claim/config.py --parallel 2 \\
      --workdir runs/claim/runs
    python -m examples.claim.table runs/claim/runs

A run takes about five minutes of one core, the whole grid some six hours. The second command may be stopped
and started again. With your own data (`python -m examples.claim.data --help`) and a larger config:

    python -m examples.claim.data --source DIR --output runs/mine
    grain-jax sweep --config examples/claim/config.py:runs/mine,grain_vitb16_cc3m --workdir runs/mine/runs \\
      --sweep examples/claim/config.py --config.total_steps=20000
    python -m examples.claim.table runs/mine/runs
"""

import importlib
import itertools
from collections.abc import Iterator
from typing import Any

from grain_jax.evaluate.kinds import evaluator

RATES = (5e-4, 1e-3)
SEEDS = (0, 1, 2)  # of weights and of the order of the data; the images are the same
SPLITS = ("validation", "test")
# Embedding of a class: the mean of its descriptions, this with unit length (as in CLIP), or one sentence.
WAYS = ("unseen", "unit", "sentence")
_NO_ANNOTATIONS = {"input.max_regions": 0}
_FREE = {"loss.box": 0.0, "loss.region_description": 0.0, "loss.image_description": 1.0}
_IN_CAPTIONS = {"input.descriptions_in_captions": 8}
_CAPTIONS = {"input.captions_per_image": 2}  # the web and the synthetic caption
_DESCRIPTIONS = {"loss.image_description": 1.0}
_POOLED = _CAPTIONS | {"model.decoder.image_pool": "all"}
_BOXES = {"model.boxes.kind": "roi_align", "model.boxes.bins": 3, "loss.box_description": 1.0}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> label in the table, keys that it changes
    "clip": ("CLIP, web captions", _NO_ANNOTATIONS | {"input.synthetic_caption_rate": 0.0}),
    "clip_descriptions": ("CLIP, descriptions in its captions", _NO_ANNOTATIONS | _IN_CAPTIONS),
    "clip_captions": ("CLIP, two captions", _NO_ANNOTATIONS | _CAPTIONS),
    "clip_image_description": ("CLIP, L_id", _FREE),
    "clip_both": ("CLIP, L_id, two captions", _FREE | _CAPTIONS),
    "clip_pooled": ("CLIP, L_id, two captions, pooled", _FREE | _POOLED),
    "grain": ("GRAIN", {}),
    "grain_image_description": ("GRAIN, L_id", _DESCRIPTIONS),
    "grain_captions": ("GRAIN, two captions", _CAPTIONS),
    "grain_both": ("GRAIN, L_id, two captions", _DESCRIPTIONS | _CAPTIONS),
    "grain_pooled": ("GRAIN, L_id, two captions, pooled", _DESCRIPTIONS | _POOLED),
    "grain_boxes": ("GRAIN, L_id, two captions, pooled, L_bd", _DESCRIPTIONS | _POOLED | _BOXES),
}
Run = tuple[str, float, int]  # arm, learning rate, seed


def runs() -> dict[Run, dict[str, Any]]:
    """Every run with the keys that it changes; both rates of a seed before the next seed."""
    return {
        (arm, rate, seed): ARMS[arm][1] | {"optim.learning_rate": rate, "seed": seed}
        for seed, arm, rate in itertools.product(SEEDS, ARMS, RATES)
    }


def sweep() -> Iterator[dict[str, Any]]:
    """72 points."""
    yield from runs().values()


def get_config(argument: str = "runs/claim/data"):
    """The baseline of all arms, of "FOLDER[,CONFIG]" (FOLDER: of the first command): GRAIN, one caption."""
    folder, _, name = argument.partition(",")
    c = importlib.import_module(f"grain_jax.configs.{name or 'demo'}").get_config()
    if not name:  # another config has its own settings
        c.log_every, c.checkpoint_every, c.report_images = 10, 0, 0
        c.optim.update(learning_rate=1e-3, warmup_steps=60)
        # As many regions, and queries, as a bird has parts.
        c.input.update(lanes=1, max_regions=8, captions_per_image=1, synthetic_caption_rate=0.25)
        c.text.pack_group = 32
        c.model.text.context_length = 128  # the captions of some arms are long
        c.model.image.position_period, c.model.boxes.kind = 16.0, "none"
        c.model.decoder.update(boxes="query", reads_box=False, class_score="mean", image_pool="query")
        c.model.decoder.update(queries=8, qkv_init_gain=2.5)
        c.loss.update(box=0.2, image_description=0.0, box_description=0.0)
    c.total_steps, c.total_epochs = 500, None
    c.input.update(prepare=None, data_dir=f"{folder}/records", name="claim")
    described = dict(names=False, descriptions=f"{folder}/unseen.json")
    ways = {
        "unseen": dict(described, alphas=(1.0, 0.5)),
        "unit": dict(described, alphas=(1.0,), unit_features=True),
        "sentence": dict(described, alphas=(1.0,), descriptions=f"{folder}/sentences.json"),
    }
    evals = {}
    for split in SPLITS:
        evals[f"seen_{split}"] = evaluator("zeroshot", f"{folder}/seen_{split}", alphas=(1.0,))
        for way in WAYS:
            evals[f"{way}_{split}"] = evaluator("zeroshot", f"{folder}/unseen_{split}", **ways[way])
    for kind, file in (("retrieval", "A.jsonl"), ("grounding", "unseen.jsonl")):
        evals[kind] = evaluator(kind, f"{folder}/test", annotations=f"{folder}/test/{file}")
    c.evals = evals
    return c
