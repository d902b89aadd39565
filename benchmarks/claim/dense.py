"""The fourth design of `benchmarks.claim`: what the local loss terms bring. Settings (fixed before the first run), arms.

An arm is named by a recipe and the terms that it adds: `grain` (that of design 3 with a box head, the control), `clip`
(the best CLIP of design 3), `towers` (that CLIP without a decoder, whose patches lie in the space of texts), `words` (the
CLIP with the best retrieval on clothes in design 3), and `grain+text_pooled`, `clip+masked_patches+text_pooled`, ... The
single terms choose the pair (`dense_plan.best_two`).
"""

import hashlib
import json
import pathlib
import runpy
from collections.abc import Iterable
from typing import Any, NamedTuple

from benchmarks.claim import design
from grain_jax.config import recipe
from grain_jax.data.aviary import masks

DESIGN = 4
SEEDS = (0, 1, 2)
STEPS = 500
RATE = 1e-3  # that of design 3, for both recipes
AVIARY = {**design.AVIARY, **design.AVIARIES["poses"], "seed": 41, "test_images": 800}
MAIN, CLOTHES = "main", "clothes"  # data sets
SPLITS = ("validation", "test")

CONTROL, CLIP, TOWERS, WORDS = "grain", "clip", "towers", "words"
RECIPES = {
    CONTROL: "grain_boxes",
    CLIP: "clip_pooled",
    TOWERS: "clip_pooled",
    WORDS: "clip_descriptions",
}  # -> arms of design 3

# Images of 64 x 64 pixels have 8 x 8 patches; a local view of 32 pixels has 4 x 4. Descriptions name colours, so views
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
# One teacher for all terms: any two go together, and no arm has the training of another model for nothing.
TEACHER = {"teacher.kind": "ema", "teacher.decay": 0.98, "teacher.end_decay": 0.998}
# The average of a model that knows nothing teaches nothing: these weights grow in the second fifth of a run.
_LATER = {"start": 0.0, "from": 0.2, "to": 0.4}
_HEAD = {"prototypes": 256, "hidden": 256, "bottleneck": 64}


class Term(NamedTuple):
    """A local term as the design uses it."""

    options: dict[str, Any]  # of its entry of loss.terms
    config: dict[str, Any]  # further keys
    needs_boxes: bool = False  # so that CLIP cannot have it


TERMS = {
    "self_distillation": Term({"weight": {**_LATER, "end": 0.5}, **_HEAD}, {**TEACHER, **VIEWS}),
    "masked_patches": Term({"weight": {**_LATER, "end": 0.5}, **_HEAD}, TEACHER),
    "crop_distillation": Term({"weight": {**_LATER, "end": 1.0}}, TEACHER, needs_boxes=True),
    "teacher_similarity": Term({"weight": {**_LATER, "end": 1.0}}, TEACHER),
    # Of 16 images in a group one is an image's own: log(1 / 15) = -2.7.
    "text_pooled": Term({"weight": 1.0, "group": 16, "bias_init": -3.0}, {}),
}


def arm_of(base: str, terms: Iterable[str] = ()) -> str:
    """The name of a recipe with terms, in the order of TERMS; without those that need boxes, of CLIP."""
    has = [t for t in TERMS if t in terms and (base == CONTROL or not TERMS[t].needs_boxes)]
    return "+".join([base, *has])


def parts_of(arm: str) -> tuple[str, tuple[str, ...]]:
    """The recipe of an arm, and its terms."""
    base, *terms = arm.split("+")
    return base, tuple(terms)


# The arms that are known before any result: each recipe, and each term alone.
SINGLES = tuple(
    dict.fromkeys(
        [CONTROL, CLIP, TOWERS, *(arm_of(b, (t,)) for b in (CONTROL, CLIP) for t in TERMS)]
    )
)


def run_of(arm: str, seed: int, steps: int = STEPS, data: str = MAIN) -> design.ClaimRun:
    """A run of this design."""
    return design.ClaimRun(arm, RATE, seed, steps, data)


def changes(run: design.ClaimRun) -> dict[str, Any]:
    """The changes of the run to `design.CONFIG`, without paths and `loss.terms`."""
    base, terms = parts_of(run.arm)
    changed = design.changes(run._replace(arm=RECIPES[base]), design.CONFIG)
    if base == TOWERS:
        of_decoder = [key for key in changed if key.startswith("model.decoder.")]
        changed = {key: value for key, value in changed.items() if key not in of_decoder}
        changed |= {"model.decoder": None, "model.image.pool": "mean"}
    for term in terms:
        changed |= TERMS[term].config
    return changed


def terms_of(run: design.ClaimRun) -> dict[str, dict[str, Any]]:
    """`loss.terms` of the run."""
    return {term: {"term": term, **TERMS[term].options} for term in parts_of(run.arm)[1]}


def settings_of(run: design.ClaimRun) -> str:
    """Fingerprint of all settings that a run depends on."""
    data = AVIARY if run.data == MAIN else None
    entries = _entries(run, pathlib.Path("main"), pathlib.Path("views"))
    settings = [changes(run), terms_of(run), data, design.CONFIG, entries]
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_config(run: design.ClaimRun, main: pathlib.Path, work: pathlib.Path) -> Any:
    """The config of a run with its evaluations.

    Args:
      run: of this design.
      main: folder of its data set.
      work: folder with records and views (`dense_data`).
    """
    c = runpy.run_path(design.CONFIG)["get_config"]()
    changed = changes(run)
    if run.arm.startswith(TOWERS):
        c.model.decoder = changed.pop("model.decoder")
    c.update_from_flattened_dict(changed)
    c.loss.terms = recipe.ConfigDict(terms_of(run))
    c.total_epochs = c.input.prepare = c.optim.warmup_epochs = None
    c.input.data_dir, c.input.name = str(work / "records"), run.data
    entries = _entries(run, main, work / "views" / run.data)
    one = {"segmentation": {"patch_sides": (1,)}}  # a box a patch, as the design was fixed
    made = {
        name: recipe.evaluator(kind, **options, **one.get(kind, {}))
        for name, (kind, options) in entries.items()
    }
    c.evals = recipe.ConfigDict(made)
    return c


def _entries(run, main, views) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> kind and options of each evaluation."""
    base, _ = parts_of(run.arm)
    regions = base == CONTROL
    evals = zero_shot(main, views, (1.0, 0.5) if regions else (1.0,))
    annotated = lambda name: dict(images=str(main / "test"), annotations=str(views / name))
    for split in SPLITS if run.data == MAIN else ("test",):
        evals[f"retrieval_{split}"] = ("retrieval", annotated(f"both_{split}.jsonl"))
    if regions:
        evals["grounding"] = ("grounding", annotated("unseen_test.jsonl"))
    if run.data == MAIN and base in (CONTROL, TOWERS):
        templates = str(main / masks.FOLDER / masks.TEMPLATES)
        found = segmentations(views, regions)
        evals |= {
            name: ("segmentation", options | dict(templates=templates))
            for name, options in found.items()
        }
    return evals


def zero_shot(main, views, alphas) -> dict[str, tuple[str, dict[str, Any]]]:
    """Seen classes by name, and unseen ones in each way (`design.WAYS`), those of the test at these alphas."""
    described = dict(names=False, descriptions=str(main / "unseen.json"))
    sentence = dict(names=False, descriptions=str(views / "sentences.json"))
    seen = dict(images=str(views / "seen_test"), alphas=(1.0,))
    evals: dict[str, tuple[str, dict[str, Any]]] = {"seen_test": ("zeroshot", seen)}
    for split in SPLITS:
        unseen = dict(images=str(views / f"unseen_{split}"))
        ways = dict(
            unseen=described | dict(alphas=alphas if split == "test" else (1.0,)),
            unit=described | dict(unit_features=True, alphas=(1.0,)),
            sentence=sentence | dict(alphas=(1.0,)),
        )
        evals |= {f"{way}_{split}": ("zeroshot", unseen | options) for way, options in ways.items()}
    return evals


def segmentations(views, regions) -> dict[str, dict[str, Any]]:
    """The part of each pixel that shows one, by patches, by regions and by both; and its look.

    The patches of a decoder without a box head lie in no space of texts, so CLIP with one has none of them.
    """
    alone = dict(
        ignore=0, background_threshold=0.0
    )  # background does not count, and no pixel gets it
    parts = lambda group, by: dict(images=str(views / f"{group}_masks"), by=by)
    of_looks = views / "unseen_test_masks"
    looks = dict(images="images", masks="looks", classes="looks.txt")
    looks = {key: str(of_looks / name) for key, name in looks.items()}
    evals = {
        "parts_validation": parts("unseen_validation", "patches") | alone,
        "parts": parts("unseen_test", "patches") | alone,
        "parts_seen": parts("seen_test", "patches") | alone,
        "parts_background": parts("unseen_test", "patches") | dict(background_threshold=0.8),
        "looks": looks | dict(by="patches") | alone,
    }
    if regions:
        evals |= {f"parts_{by}": parts("unseen_test", by) | alone for by in ("regions", "both")}
    return evals
