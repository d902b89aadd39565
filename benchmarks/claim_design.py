"""The design of `benchmarks.claim`: settings (fixed before the first run), arms, and the plan of runs."""

import hashlib
import itertools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

DESIGN = 2  # number of the settings below; only docs/claim.md uses the rows of design 1
CONFIG = "configs/demo.py"
STEPS = 500
RATES = (5e-4, 1e-3)
SEEDS = (0, 1, 2)  # of weights and of the order of the data; images and species are the same
ALPHAS = (1.0, 0.75, 0.5, 0.25, 0.0)
ALPHA = 0.5  # of the headline, for arms with region embeddings aligned to descriptions

# Changes to CONFIG that all arms share; another --config is used unchanged.
SETTING: dict[str, Any] = {
    "input.synthetic_caption_rate": 0.25,
    "input.lanes": 1,
    "text.pack_group": 32,
    "text.pack_rows": 18,
    "model.text.context_length": 128,  # the control's captions are long
    "input.max_regions": 8,  # the number of parts of a bird, and of queries (docs/claim.md)
    "model.decoder.queries": 8,
    "loss.box": 0.2,
    "model.decoder.qkv_init_gain": 2.5,
    "model.image.position_period": 16.0,
}
# Packed rows for the texts of 32 images: no text is dropped, little is padded.
_ROWS = {rows: {"text.pack_rows": rows} for rows in (3, 6, 18, 20, 31)}
_CLIP = {"input.max_regions": 0}
_WEB = {"input.synthetic_caption_rate": 0.0}
_WORDS = {"input.descriptions_in_captions": 8}  # the region descriptions that GRAIN trains on

ARMS: dict[str, dict[str, Any]] = {
    "clip": {**_CLIP, **_ROWS[3], **_WEB},
    "clip_synthetic": {**_CLIP, **_ROWS[6]},
    "clip_descriptions": {**_CLIP, **_ROWS[18], **_WORDS},
    "grain_no_rd": {"loss.region_description": 0.0},
    "grain_no_box": {  # queries are matched by the cosine of query and description
        "loss.box": 0.0,
        "loss.match_l1": 0.0,
        "loss.match_giou": 0.0,
        "loss.match_description": 1.0,
    },
    "grain_group_negatives": {"loss.group_size": 16},
    "grain_unmasked": {"loss.mask_duplicates": False},
    "grain": {},
}
CLIP_ARMS = ("clip", "clip_synthetic", "clip_descriptions")
CONTROL = "clip_descriptions"

# Arms that answer single questions, at the learning rate of GRAIN.
QUESTIONS: dict[str, dict[str, Any]] = {
    "grain_boxes_and_words": {"loss.match_description": 5.0},
    "grain_and_descriptions": {**_ROWS[31], **_WORDS},
    "grain_web_captions": _WEB,
    "grain_five_queries": {"model.decoder.queries": 5, "input.max_regions": 5},
    "grain_more_synthetic": {**_ROWS[20], "input.synthetic_caption_rate": 0.5},
}
AVIARY = dict(
    seed=8,
    scale_from=0.95,
    turn=3.0,
    shift=0.02,
    mirrored=0.0,
    least_parts=8,
    most_parts=8,
    misses=0.1,
    caption_parts=4,
    seen_per_species=10,
    held_out_genera=20,
)
AVIARIES: dict[str, dict[str, Any]] = {
    "main": {},
    "more_and_independent": {"genera": 48, "parts_changed": 8},
    "independent_parts": {"parts_changed": 8},
    "more_species": {"genera": 48},
}
# Noise added to the annotations: share of regions lost (misses); standard deviation of box edges as a share of the
# side (jitter); share of regions with the description of another region (wrong).
NOISE: dict[str, dict[str, float]] = {
    "misses_80": {"misses": 0.8},
    "wrong_60": {"wrong": 0.6},
    "jitter_30": {"jitter": 0.3},
    "misses_50": {"misses": 0.5},
    "wrong_30": {"wrong": 0.3},
    "jitter_100": {"jitter": 1.0},
    "misses_95": {"misses": 0.95},
    "wrong_90": {"wrong": 0.9},
}
NOISE_ARMS = ("grain", CONTROL)
KEY_ARMS = ("clip", CONTROL, "grain_no_box", "grain")  # these run first


class Run(NamedTuple):
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


def changes(run: Run, config: str) -> dict[str, Any]:
    """The changes of the run to the config file `config`, without paths."""
    arm = {**ARMS, **QUESTIONS}[run.arm]
    run_keys = {"seed": run.seed, "total_steps": run.steps, "optim.learning_rate": run.rate}
    if config != CONFIG:  # its text.pack_rows suits its own texts
        return {**run_keys, **{key: arm[key] for key in arm if key != "text.pack_rows"}}
    return {
        **run_keys,
        "optim.warmup_steps": 60,
        "log_every": 10,
        "checkpoint_every": 0,
        "pictures": 0,
        **SETTING,
        **arm,
    }


def headline_alpha(arm: str) -> float:
    """Weight of the global score in the headline of an arm: 1 where no region loss aligns regions and text."""
    return 1.0 if arm in (*CLIP_ARMS, "grain_no_rd") else ALPHA


def validation_score(result: Mapping[str, Any]) -> float:
    """The score that chooses the learning rate of an arm: unseen classes by description; seen classes by name for "clip"."""
    arm = result["arm"]
    if arm == "clip":
        return result["seen_validation/alpha_1.0/top1"]
    alone = result[f"unseen_validation/alpha_{headline_alpha(arm)}/top1"]
    # CLIP arms are prompted with single descriptions or one sentence of all; the better counts.
    return max(alone, result["sentence_validation/alpha_1.0/top1"]) if arm in CLIP_ARMS else alone


def best_rate(results: Mapping[str, Mapping[str, Any]], arm: str, steps: int) -> float | None:
    """The learning rate of an arm with the best validation score on the first seed; None before all have run."""
    scores = {}
    for rate in RATES:
        result = results.get(Run(arm, rate, SEEDS[0], steps).name)
        if result is None:
            return None
        scores[rate] = validation_score(result)
    return max(scores, key=scores.get)


def plan(
    results: Mapping[str, Mapping[str, Any]], *, steps: int, aviaries: bool
) -> dict[str, list[Run]]:
    """Study -> its runs; runs that depend on a learning rate are absent until it is chosen.

    Args:
      results: name of a finished run -> its row.
      steps: training steps of the main comparison.
      aviaries: whether data sets other than the main one can be drawn.
    """
    studies = {"grid": [Run(a, r, SEEDS[0], steps) for a in ARMS for r in RATES]}
    best = {arm: best_rate(results, arm, steps) for arm in ARMS}
    known = [arm for arm in ARMS if best[arm] is not None]
    studies["equal steps"] = [Run(a, best[a], seed, steps) for seed in SEEDS for a in known]
    grain = best["grain"]
    if grain is None or best[CONTROL] is None:
        return studies
    first = SEEDS[0]
    data_sets = [data for data in AVIARIES if data != "main"] if aviaries else []
    studies["questions"] = [
        run
        for arm, data in itertools.zip_longest(QUESTIONS, data_sets)
        for run in (
            Run(arm, grain, first, steps) if arm else None,
            Run("grain", grain, first, steps, data) if data else None,
        )
        if run
    ]
    studies["noise"] = [
        Run(arm, best[arm], first, steps, data)
        for data in NOISE
        for arm in NOISE_ARMS
        if arm != CONTROL or "jitter" not in NOISE[data]  # the control reads no boxes
    ]
    flops = {a: results[Run(a, best[a], first, steps).name]["flops_per_step"] for a in known}
    fair = {arm: round(steps * flops["grain"] / flops[arm]) for arm in CLIP_ARMS if arm in known}
    studies["equal FLOPs"] = [
        Run(arm, best[arm], seed, fair[arm] if abs(fair[arm] / steps - 1) > 0.05 else steps)
        for seed in SEEDS
        for arm in fair
    ]
    studies["longer"] = [Run(arm, best[arm], first, 2 * steps) for arm in (CONTROL, "grain")]
    return studies


def order(studies: Mapping[str, list[Run]]) -> list[Run]:
    """All runs, the most informative first, so that an interrupted plan has results of every study."""
    first = [run for s in ("grid", "equal steps") for run in studies[s] if run.arm in KEY_ARMS]
    others = [studies.get(study, []) for study in ("questions", "noise", "equal FLOPs")]
    in_turn = [run for runs in itertools.zip_longest(*others) for run in runs if run]
    rest = [run for runs in studies.values() for run in runs]
    return list(dict.fromkeys([*first, *studies["grid"], *in_turn, *rest]))


def settings_of(run: Run, config: str) -> str:
    """Fingerprint of all settings that a run depends on."""
    data = AVIARY, AVIARIES.get(run.data), NOISE.get(run.data)
    text = json.dumps([changes(run, config), data, config], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
