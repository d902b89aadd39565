"""The fourth design of `benchmarks.claim`: what the local loss terms bring. Settings (fixed before the first run), arms.

An arm is named by what it adds to a recipe: `grain` (that of design 3 with a box head, the control), `clip` (the best
CLIP of design 3), `grain+text_pooled`, `clip+masked_patches+text_pooled`. The results of single terms choose the pair
(`dense_plan.best_two`).
"""

import hashlib
import json
import pathlib
import runpy
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.claim import design
from grain_jax.config import recipe

DESIGN = 4
SEEDS = (0, 1, 2)
STEPS = 500
RATE = 1e-3  # what design 3 chose for both recipes
AVIARY = {**design.AVIARY, **design.AVIARIES["poses"], "seed": 41, "test_images": 800}
MAIN, CLOTHES = "main", "clothes"  # data sets
RECIPES = {"grain": "grain_boxes", "clip": "clip_pooled"}  # -> arms of design 3
CONTROL, CLIP = "grain", "clip"

# The images have 64 x 64 pixels, 8 x 8 patches: a local view of 32 pixels has 4 x 4. Descriptions name colours, so views
# keep them; none names left or right.
VIEWS = {
    "input.views.local": 2,
    "input.views.size": 32,
    "input.views.min_area": 0.15,
    "input.views.max_area": 0.4,
    "input.views.brightness": 0.1,
    "input.views.contrast": 0.1,
    "input.views.saturation": 0.0,
    "input.views.grey_rate": 0.0,
}
# One teacher for every term, so that any two go together, and no arm uses the training of another model.
TEACHER = {"teacher.kind": "ema", "teacher.decay": 0.98, "teacher.end_decay": 0.998}
# An average of weights that know nothing teaches nothing: these terms grow over the second fifth of the run.
_LATER = {"start": 0.0, "from": 0.2, "to": 0.4}
_HEAD = {"prototypes": 256, "hidden": 256, "bottleneck": 64}


class Term(NamedTuple):
    """A local term as the design uses it."""

    options: dict[str, Any]  # of its entry of loss.terms
    config: dict[str, Any]  # further keys
    of_clip: bool = True  # whether CLIP has it, too: it needs no box


TERMS = {
    "self_distillation": Term({"weight": {**_LATER, "end": 0.5}, **_HEAD}, {**TEACHER, **VIEWS}),
    "masked_patches": Term({"weight": {**_LATER, "end": 0.5}, **_HEAD}, TEACHER),
    "crop_distillation": Term({"weight": {**_LATER, "end": 1.0}}, TEACHER, of_clip=False),
    "teacher_similarity": Term({"weight": {**_LATER, "end": 1.0}}, TEACHER),
    "text_pooled": Term({"weight": 1.0}, {}),
}


def arm_of(base: str, terms: Sequence[str]) -> str:
    """The name of a recipe with terms, in the order of TERMS; of CLIP those that it can have."""
    has = [t for t in TERMS if t in terms and (base != CLIP or TERMS[t].of_clip)]
    return "+".join([base, *has])


SINGLES = tuple(
    dict.fromkeys(arm_of(base, terms) for base in RECIPES for terms in ((), *zip(TERMS)))
)


def changes(run: design.ClaimRun) -> dict[str, Any]:
    """The changes of the run to `design.CONFIG`, without paths and without `loss.terms`."""
    base, *terms = run.arm.split("+")
    changed = design.changes(run._replace(arm=RECIPES[base]), design.CONFIG)
    for term in terms:
        changed |= TERMS[term].config
    return changed


def terms_of(run: design.ClaimRun) -> dict[str, dict[str, Any]]:
    """`loss.terms` of the run."""
    return {term: {"term": term, **TERMS[term].options} for term in run.arm.split("+")[1:]}


def settings_of(run: design.ClaimRun) -> str:
    """Fingerprint of all settings that a run depends on."""
    data = AVIARY if run.data == MAIN else None
    text = json.dumps([changes(run), terms_of(run), data, design.CONFIG], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_config(run: design.ClaimRun, main: pathlib.Path, work: pathlib.Path) -> Any:
    """The config of a run with its evaluations.

    Args:
      run: of `DESIGN`.
      main: folder of its data set.
      work: folder with records and views (`dense_data`).
    """
    c = runpy.run_path(design.CONFIG)["get_config"]()
    c.update_from_flattened_dict(changes(run))
    c.loss.terms = recipe.ConfigDict(terms_of(run))
    c.total_epochs = c.input.prepare = c.optim.warmup_epochs = None
    c.input.data_dir, c.input.name = str(work / "records"), run.data
    entries = _entries(run, main, work / "views" / run.data)
    made = {name: recipe.evaluator(kind, **options) for name, (kind, options) in entries.items()}
    c.evals = recipe.ConfigDict(made)
    return c


def _entries(run, main, views) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> kind and options of each evaluation."""
    regions = not run.arm.startswith(CLIP)
    described = dict(names=False, descriptions=str(main / "unseen.json"))
    sentence = dict(names=False, descriptions=str(views / "sentences.json"))
    evals = {"seen_test": ("zeroshot", dict(images=str(views / "seen_test"), alphas=(1.0,)))}
    for split in ("validation", "test"):
        unseen = dict(images=str(views / f"unseen_{split}"))
        alphas = (1.0, 0.5) if regions and split == "test" else (1.0,)
        ways = dict(
            unseen=described | dict(alphas=alphas),
            unit=described | dict(unit_features=True, alphas=(1.0,)),
            sentence=sentence | dict(alphas=(1.0,)),
        )
        evals |= {f"{way}_{split}": ("zeroshot", unseen | options) for way, options in ways.items()}
    annotated = lambda name: dict(images=str(main / "test"), annotations=str(views / name))
    for split in ("validation", "test") if run.data == MAIN else ("test",):
        evals[f"retrieval_{split}"] = ("retrieval", annotated(f"both_{split}.jsonl"))
    if regions:
        evals["grounding"] = ("grounding", annotated("unseen_test.jsonl"))
    return evals | (_segmentations(views, regions) if run.data == MAIN else {})


def _segmentations(views, regions) -> dict[str, tuple[str, dict[str, Any]]]:
    """Of patches: parts of validation, test and seen species, and looks; of regions and of both: parts."""
    parts = lambda group, way="patches": dict(images=str(views / f"{group}_masks"), maps=way)
    of_looks = views / "unseen_test_masks"
    looks = dict(images="images", masks="looks", classes="looks.txt")
    evals = {
        "parts_validation": parts("unseen_validation"),
        "parts": parts("unseen_test"),
        "parts_seen": parts("seen_test"),
        "looks": {key: str(of_looks / name) for key, name in looks.items()} | dict(maps="patches"),
    }
    if regions:
        evals |= {f"parts_{way}": parts("unseen_test", way) for way in ("regions", "both")}
    return {name: ("segmentation", options) for name, options in evals.items()}
