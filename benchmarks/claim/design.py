"""The third design of `benchmarks.claim`: settings (fixed before the first run), and arms.

docs/claim.md tells what the first two designs asked and found; their rows stay in the table of results.
"""

import hashlib
import json
import pathlib
import runpy
from typing import Any, NamedTuple

from grain_jax.config import recipe

DESIGN = 3  # number of the settings below; only docs/claim.md uses the rows of the others
CONFIG = "configs/demo.py"
STEPS = 500
RATES = (5e-4, 1e-3)
SEEDS = (0, 1, 2)  # of weights and of the order of the data; images and species are the same
ALPHAS = (1.0, 0.75, 0.5, 0.25, 0.0)

# How the global embedding is asked for a class: by the mean of its descriptions, by that mean with unit length, as in
# CLIP, and by one sentence of all.
WAYS = ("unseen", "unit", "sentence")

# Changes to CONFIG that all arms share; another --config is used unchanged. The first five undo what these designs led to.
SETTING: dict[str, Any] = {
    "input.captions_per_image": 1,
    "loss.image_description": 0.0,
    "model.decoder.image_pool": "query",
    "model.boxes.kind": "none",
    "loss.box_description": 0.0,
    "input.synthetic_caption_rate": 0.25,
    "input.lanes": 1,
    "text.pack_group": 32,
    "model.text.context_length": 128,  # the captions of some arms are long
    "input.max_regions": 8,  # the number of parts of a bird, and of queries (docs/claim.md)
    "model.decoder.queries": 8,
    "loss.box": 0.2,
    "model.decoder.qkv_init_gain": 2.5,
    "model.image.position_period": 16.0,
}
_CLIP = {"input.max_regions": 0}
_NO_REGIONS = {"loss.box": 0.0, "loss.region_description": 0.0}  # the descriptions stay, for L_id
_WORDS = {"input.descriptions_in_captions": 8}  # the region descriptions that GRAIN trains on
_CAPTIONS = {"input.captions_per_image": 2}  # the web and the synthetic caption
_DESCRIPTIONS = {"loss.image_description": 1.0}
_POOLED = {"model.decoder.image_pool": "all"}
_BOXES = {"model.boxes.kind": "roi_align", "model.boxes.bins": 3, "loss.box_description": 1.0}

ARMS: dict[str, dict[str, Any]] = {
    "clip": {**_CLIP, "input.synthetic_caption_rate": 0.0},
    "clip_descriptions": {**_CLIP, **_WORDS},
    "clip_captions": {**_CLIP, **_CAPTIONS},
    "clip_image_description": {**_NO_REGIONS, **_DESCRIPTIONS},
    "clip_both": {**_NO_REGIONS, **_DESCRIPTIONS, **_CAPTIONS},
    "clip_pooled": {**_NO_REGIONS, **_DESCRIPTIONS, **_CAPTIONS, **_POOLED},
    "grain": {},
    "grain_image_description": _DESCRIPTIONS,
    "grain_captions": _CAPTIONS,
    "grain_both": {**_DESCRIPTIONS, **_CAPTIONS},
    "grain_pooled": {**_DESCRIPTIONS, **_CAPTIONS, **_POOLED},
    # After the results of the others, and of regions.py.
    "grain_boxes": {**_DESCRIPTIONS, **_CAPTIONS, **_POOLED, **_BOXES},
}
OURS = "grain_pooled"  # its lead over every other arm is reported
CLIP_ARMS = tuple(arm for arm in ARMS if arm.startswith("clip"))  # no region losses
KEY_ARMS = ("clip", "clip_descriptions", "clip_both", "clip_pooled", "grain", OURS)  # run first

AVIARY = dict(seed=23, scale_from=0.95, turn=3.0, shift=0.02, mirrored=0.0, misses=0.1)
AVIARY |= dict(least_parts=8, most_parts=8, caption_parts=4, seen_per_species=10)
AVIARY |= dict(held_out_genera=20)
# The main data set has eased poses, the other those of the demo.
AVIARIES: dict[str, dict[str, Any]] = {
    "main": {},
    "poses": {"scale_from": 0.8, "turn": 6.0, "shift": 0.04, "mirrored": 0.5},
}


class ClaimRun(NamedTuple):
    """One training."""

    arm: str
    rate: float  # learning rate
    seed: int
    steps: int
    data: str = "main"

    @property
    def name(self) -> str:
        """Name of the folder of the run, and key of its result."""
        return f"{self.data}-{self.arm}-lr{self.rate:g}-steps{self.steps}-seed{self.seed}"


def changes(run: ClaimRun, config: str) -> dict[str, Any]:
    """The changes of the run to the config file `config`, without paths."""
    run_keys = {"seed": run.seed, "total_steps": run.steps, "optim.learning_rate": run.rate}
    if config != CONFIG:
        return {**run_keys, **ARMS[run.arm]}
    short = {"optim.warmup_steps": 60, "log_every": 10, "checkpoint_every": 0, "pictures": 0}
    return {**run_keys, **short, **SETTING, **ARMS[run.arm]}


def settings_of(run: ClaimRun, config: str) -> str:
    """Fingerprint of all settings that a run depends on."""
    data = AVIARY, AVIARIES.get(run.data), None
    text = json.dumps([changes(run, config), data, config], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_config(run: ClaimRun, file: str, main: pathlib.Path, work: pathlib.Path) -> Any:
    """The config of a run: the file, the changes of the run, its evaluations, and the data set in `main`."""
    c = runpy.run_path(file)["get_config"]()
    changed = changes(run, file)
    c.update_from_flattened_dict(changed)
    c.total_epochs = c.input.prepare = None
    if "optim.warmup_steps" in changed:
        c.optim.warmup_epochs = None
    c.input.data_dir, c.input.name = str(work / "records"), run.data
    views = work / "views" / run.data
    test = str(main / "test")
    regions = run.arm not in CLIP_ARMS
    described = dict(names=False, descriptions=str(main / "unseen.json"))
    ways = {
        "unseen": described | dict(alphas=ALPHAS if regions else (1.0,)),
        "unit": described | dict(unit_features=True, alphas=(1.0,)),
        "sentence": described | dict(descriptions=str(views / "sentences.json"), alphas=(1.0,)),
    }
    evals = {}
    for split in ("validation", "test"):
        seen, unseen = (str(views / f"{group}_{split}") for group in ("seen", "unseen"))
        evals[f"seen_{split}"] = recipe.evaluator("zeroshot", seen, alphas=(1.0,))
        for way in WAYS:
            evals[f"{way}_{split}"] = recipe.evaluator("zeroshot", unseen, **ways[way])
    evals["retrieval"] = recipe.evaluator("retrieval", test, annotations=f"{test}/A.jsonl")
    for group in ("seen", "unseen") if regions else ():
        annotations = f"{test}/{group}.jsonl"
        evals[f"grounding_{group}"] = recipe.evaluator("grounding", test, annotations=annotations)
    c.evals = recipe.ConfigDict(evals)
    return c
