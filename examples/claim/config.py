"""The config of the comparison: `config.py[:FOLDER[,CONFIG]]`, as examples/claim/sweep.py says.

FOLDER is what `python -m examples.claim.data` wrote. The settings belong to the demo; another CONFIG has
its own.
"""

import importlib

from grain_jax.config.recipe import ConfigDict
from grain_jax.evaluate.kinds import evaluator

STEPS = 500
ALPHAS = (1.0, 0.5)
SPLITS = ("validation", "test")
# Embedding of a class: the mean of its descriptions, this with unit length (as in CLIP), or one sentence.
WAYS = ("unseen", "unit", "sentence")
SETTINGS = {
    "optim.learning_rate": 1e-3,
    "optim.warmup_steps": 60,
    "log_every": 10,
    "checkpoint_every": 0,
    "report_images": 0,
    "input.lanes": 1,
    "input.max_regions": 8,  # the number of parts of a bird, and of queries
    "input.captions_per_image": 1,
    "input.synthetic_caption_rate": 0.25,
    "text.pack_group": 32,
    "model.text.context_length": 128,  # the captions of some arms are long
    "model.image.position_period": 16.0,
    "model.decoder.boxes": "query",
    "model.decoder.reads_box": False,
    "model.decoder.class_score": "mean",
    "model.decoder.queries": 8,
    "model.decoder.qkv_init_gain": 2.5,
    "model.decoder.image_pool": "query",
    "model.boxes.kind": "none",
    "loss.box": 0.2,
    "loss.image_description": 0.0,
    "loss.box_description": 0.0,
}


def get_config(argument: str = "runs/claim/data"):
    """The baseline of all arms: GRAIN, one caption, the image query as the image embedding."""
    folder, _, name = argument.partition(",")
    c = importlib.import_module(f"grain_jax.configs.{name or 'demo'}").get_config()
    if not name:
        c.update_from_flattened_dict(SETTINGS)
    c.total_steps, c.total_epochs = STEPS, None
    c.input.prepare = None
    c.input.data_dir, c.input.name = f"{folder}/records", "claim"
    described = dict(names=False, descriptions=f"{folder}/unseen.json")
    ways = {
        "unseen": dict(described, alphas=ALPHAS),
        "unit": dict(described, alphas=(1.0,), unit_features=True),
        "sentence": dict(described, alphas=(1.0,), descriptions=f"{folder}/sentences.json"),
    }
    evals = {}
    for split in SPLITS:
        seen, unseen = (f"{folder}/{group}_{split}" for group in ("seen", "unseen"))
        evals[f"seen_{split}"] = evaluator("zeroshot", seen, alphas=(1.0,))
        for way in WAYS:
            evals[f"{way}_{split}"] = evaluator("zeroshot", unseen, **ways[way])
    test = f"{folder}/test"
    evals["retrieval"] = evaluator("retrieval", test, annotations=f"{test}/A.jsonl")
    evals["grounding"] = evaluator("grounding", test, annotations=f"{test}/unseen.jsonl")
    c.evals = ConfigDict(evals)
    return c
