"""The third design of `benchmarks.claim`: settings (fixed before the first run), arms, and the plan of runs.

docs/claim.md tells what the first two designs asked and found; their rows stay in the table of results.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

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


def by_description(result: Mapping[str, Any], split: str) -> float:
    """Top-1 of unseen classes by their descriptions, alpha 1, asked in the way that is best for the validation classes."""
    way = max(WAYS, key=lambda way: result[f"{way}_validation/alpha_1.0/top1"])
    return result[f"{way}_{split}/alpha_1.0/top1"]


def validation_score(result: Mapping[str, Any]) -> float:
    """The score that chooses the learning rate of an arm: unseen classes by description; seen names for "clip"."""
    if result["arm"] == "clip":
        return result["seen_validation/alpha_1.0/top1"]
    return by_description(result, "validation")


def best_rate(results: Mapping[str, Mapping[str, Any]], arm: str, steps: int) -> float | None:
    """The learning rate of an arm with the best validation score on the first seed; None before all have run."""
    scores = {}
    for rate in RATES:
        result = results.get(ClaimRun(arm, rate, SEEDS[0], steps).name)
        if result is None:
            return None
        scores[rate] = validation_score(result)
    return max(scores, key=scores.get)


def plan(
    results: Mapping[str, Mapping[str, Any]], *, steps: int, aviaries: bool
) -> dict[str, list[ClaimRun]]:
    """Study -> its runs; runs that depend on a learning rate are absent until it is chosen.

    Args:
      results: name of a finished run -> its row.
      steps: training steps of the main comparison.
      aviaries: whether data sets other than the main one can be drawn.
    """
    first = SEEDS[0]
    studies = {"grid": [ClaimRun(a, r, first, steps) for a in ARMS for r in RATES]}
    best = {arm: best_rate(results, arm, steps) for arm in ARMS}
    known = [arm for arm in ARMS if best[arm] is not None]
    studies["equal steps"] = [ClaimRun(a, best[a], seed, steps) for seed in SEEDS for a in known]
    if best[OURS] is None:
        return studies
    if aviaries:
        studies["poses"] = [
            ClaimRun(a, best[a], seed, steps, "poses") for seed in SEEDS for a in known
        ]
    flops = {a: results[ClaimRun(a, best[a], first, steps).name]["flops_per_step"] for a in known}
    fair = {a: round(steps * flops[OURS] / flops[a]) for a in known if a in CLIP_ARMS}
    studies["equal FLOPs"] = [
        ClaimRun(a, best[a], seed, fair[a] if abs(fair[a] / steps - 1) > 0.05 else steps)
        for seed in SEEDS
        for a in fair
    ]
    return studies


def order(studies: Mapping[str, list[ClaimRun]]) -> list[ClaimRun]:
    """All runs, the most informative first, so that an interrupted plan has results of every study."""
    first = [run for s in ("grid", "equal steps") for run in studies[s] if run.arm in KEY_ARMS]
    poses = [run for run in studies.get("poses", []) if run.arm in KEY_ARMS]
    rest = [run for runs in studies.values() for run in runs]
    return list(dict.fromkeys([*first, *studies["grid"], *poses, *rest]))


def settings_of(run: ClaimRun, config: str) -> str:
    """Fingerprint of all settings that a run depends on."""
    data = AVIARY, AVIARIES.get(run.data), None
    text = json.dumps([changes(run, config), data, config], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
