"""The fifth design of `benchmarks.claim`: what the text decoder brings. Settings (fixed before the first run), arms.

An arm is named by a recipe, `grain` (that of design 3 with a box head) or `clip` (the best CLIP of design 3), and the
weight of its text decoder's loss: `grain`, `grain+1`, `grain+10`; `grain+stop` has the weight 1, and its image tower
learns nothing from it. `words` is the CLIP with the best retrieval on clothes in design 3.
"""

import hashlib
import json
import pathlib
import runpy
from typing import Any

from benchmarks.claim import dense, design
from grain_jax.config import recipe
from grain_jax.data.aviary import masks

DESIGN = 5
SEEDS, STEPS, RATE = dense.SEEDS, dense.STEPS, dense.RATE
GRAIN, CLIP, STOP = dense.CONTROL, dense.CLIP, "stop"
WEIGHTS = ("1", "3", "10", STOP)
ARMS = (GRAIN, *(f"{GRAIN}+{weight}" for weight in WEIGHTS), CLIP, f"{CLIP}+1", f"{CLIP}+{STOP}")
CLOTHES_ARM = dense.WORDS  # on clothes, besides those
OURS = f"{GRAIN}+1"  # of equal FLOPs and of the second round

# Data sets. Those of the second round have images of POSES: a tenth of the true annotations, and these with the rest as
# a model that learnt from the tenth annotates it.
MAIN, POSES, CLOTHES, TENTH, ANNOTATED = "main", "poses", "clothes", "tenth", "annotated"
AVIARIES = {
    name: {**design.AVIARY, **design.AVIARIES[name], "seed": 53, "test_images": 800}
    for name in (MAIN, POSES)
}
SHARE = 10  # one image in so many keeps its true annotations
ANNOTATE = {"passes": "caption,describe", "boxes": "queries", "regions": 8, "threshold": 0.3}

TOKENIZER = "tokenizer.json"  # in the views of a data set
PAD, UNKNOWN, START, END = SPECIALS = ("[PAD]", "[UNK]", "[START]", "[END]")  # ids 0 to 3

TERM = "words"  # its name in loss.terms
# Sizes of the other modules. A caption of four parts has some 30 words: of these rows 3% of the sequences are left out.
_DECODER = {"depth": 2, "width": 96, "bins": 64, "regions": 2}
_DECODER |= {"row_length": 72, "predictions": 56}
RERANKED = 10  # candidates of a query


def parts_of(arm: str) -> tuple[str, str | None]:
    """The recipe of an arm, and its weight, STOP, or None without a text decoder."""
    base, _, weight = arm.partition("+")
    return base, weight or None


def run_of(arm: str, seed: int, steps: int = STEPS, data: str = MAIN) -> design.ClaimRun:
    """A run of this design."""
    return design.ClaimRun(arm, RATE, seed, steps, data)


def images_of(data: str) -> str:
    """The data set whose images, views and tokenizer this one has."""
    return POSES if data in (TENTH, ANNOTATED) else data


def records_of(run: design.ClaimRun) -> str:
    """The name of its records: each seed has a model that annotates."""
    return f"{run.data}_{run.seed}" if run.data == ANNOTATED else run.data


def changes(run: design.ClaimRun) -> dict[str, Any]:
    """The changes of the run to `design.CONFIG`, without paths, vocabulary and `loss.terms`."""
    base, _ = parts_of(run.arm)
    return design.changes(run._replace(arm=dense.RECIPES[base]), design.CONFIG)


def terms_of(run: design.ClaimRun) -> dict[str, dict[str, Any]]:
    """`loss.terms` of the run."""
    weight = parts_of(run.arm)[1]
    if weight is None:
        return {}
    stops = weight == STOP
    learnt = {"weight": 1.0 if stops else float(weight), "stop_gradient": stops}
    return {TERM: {"term": "text_decoder", **learnt, **_DECODER}}


def settings_of(run: design.ClaimRun) -> str:
    """Fingerprint of all settings that a run depends on."""
    entries = _entries(run, pathlib.Path("main"), pathlib.Path("views"))
    found = [changes(run), terms_of(run), AVIARIES.get(images_of(run.data)), design.CONFIG]
    found += [entries, SPECIALS, RERANKED]
    if run.data in (TENTH, ANNOTATED):
        found += [run.data, SHARE, ANNOTATE]
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def make_config(run: design.ClaimRun, main: pathlib.Path, work: pathlib.Path) -> Any:
    """The config of a run with its evaluations, but for those with reranking.

    Args:
      run: of this design.
      main: folder of its data set.
      work: folder with records and views, the tokenizer among these (`words_data`).
    """
    views = work / "views" / images_of(run.data)
    path = views / TOKENIZER
    c = runpy.run_path(design.CONFIG)["get_config"]()
    c.update_from_flattened_dict(changes(run))
    c.model.text.tokenizer = str(path)
    c.model.text.vocab_size = len(json.loads(path.read_text())["model"]["vocab"])
    c.model.text.pad_id, c.model.text.end_id = map(SPECIALS.index, (PAD, END))
    c.loss.terms = recipe.ConfigDict(terms_of(run))
    for term in c.loss.terms.values():
        term.group = 1  # every image is read
    c.total_epochs = c.input.prepare = c.optim.warmup_epochs = None
    c.input.data_dir, c.input.name = str(work / "records"), records_of(run)
    entries = _entries(run, main, views)
    made = {name: recipe.evaluator(kind, **options) for name, (kind, options) in entries.items()}
    c.evals = recipe.ConfigDict(made)
    return c


def annotated(main: pathlib.Path, views: pathlib.Path, name: str) -> dict[str, str]:
    """The options of an evaluation on test images: those of a file of `words_data`."""
    return dict(images=str(main / "test"), annotations=str(views / f"{name}.jsonl"))


def _entries(run, main, views) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> kind and options of each evaluation that a run makes."""
    base, weight = parts_of(run.arm)
    regions, clothes = base == GRAIN, run.data == CLOTHES
    evals = dense.zero_shot(main, views, (1.0, 0.5, 0.0) if regions else (1.0,))
    of = lambda name: annotated(main, views, name)
    for split in dense.SPLITS:
        evals[f"retrieval_{split}"] = ("retrieval", of(f"both_{split}"))
    if not clothes:
        asked = dict(negatives=10, captions=True)
        evals["hard_negatives"] = ("hard_negatives", of("unseen_test") | asked)
    if regions or weight:
        evals["grounding"] = ("grounding", of("unseen_test"))
        evals["grounding_all"] = ("grounding", of("both_test"))
    for kind in ("descriptions", "captions") if weight else ():
        evals[kind] = (kind, of("unseen_test"))
        evals[f"{kind}_all"] = (kind, of("both_test"))
    if regions and not clothes:
        templates = str(main / masks.FOLDER / masks.TEMPLATES)
        of_patches = dense.segmentations(views, regions)["parts"]
        evals["parts"] = ("segmentation", of_patches | dict(templates=templates))
    return evals
