"""GRAIN against CLIP: the third design of docs/claim.md as a sweep of arms, learning rates and seeds.

    python -m examples.claim.data --output runs/claim/data
    grain-jax sweep --config examples/claim/config.py --sweep examples/claim/sweep.py --parallel 2 \\
      --workdir runs/claim/runs
    python -m examples.claim.table runs/claim/runs

The commands run in a checkout. A run takes about five minutes of one core, the whole grid some six hours of
one core. The second command may be stopped and started again, and the third tells what is finished so far.
With `--poses`, the first command draws harder poses.

With your own data, in a folder that `python -m examples.claim.data --help` describes, and a larger config:

    python -m examples.claim.data --source DIR --output runs/mine
    grain-jax sweep --config examples/claim/config.py:runs/mine,grain_vitb16_cc3m --workdir runs/mine/runs \\
      --sweep examples/claim/sweep.py --config.total_steps=20000
    python -m examples.claim.table runs/mine/runs
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

RATES = (5e-4, 1e-3)
SEEDS = (0, 1, 2)  # of weights and of the order of the data; the images are the same

_NO_ANNOTATIONS = {"input.max_regions": 0}
_NO_REGION_LOSSES = {"loss.box": 0.0, "loss.region_description": 0.0}  # L_id keeps descriptions
_CAPTIONS = {"input.captions_per_image": 2}  # the web and the synthetic caption
_IN_CAPTIONS = {"input.descriptions_in_captions": 8}
_DESCRIPTIONS = {"loss.image_description": 1.0}
_POOLED = {"model.decoder.image_pool": "all"}
_BOXES = {"model.boxes.kind": "roi_align", "model.boxes.bins": 3, "loss.box_description": 1.0}


class Arm(NamedTuple):
    """What differs between the runs of a comparison."""

    label: str
    changes: dict[str, Any]  # of config.py

    @property
    def regions(self) -> bool:
        """Whether it trains region losses."""
        return self.label.startswith("GRAIN")


_FREE = _NO_REGION_LOSSES | _DESCRIPTIONS
ARMS = {
    "clip": Arm("CLIP, web captions", _NO_ANNOTATIONS | {"input.synthetic_caption_rate": 0.0}),
    "clip_descriptions": Arm("CLIP, descriptions in its captions", _NO_ANNOTATIONS | _IN_CAPTIONS),
    "clip_captions": Arm("CLIP, two captions", _NO_ANNOTATIONS | _CAPTIONS),
    "clip_image_description": Arm("CLIP, L_id", _FREE),
    "clip_both": Arm("CLIP, L_id, two captions", _FREE | _CAPTIONS),
    "clip_pooled": Arm("CLIP, L_id, two captions, pooled", _FREE | _CAPTIONS | _POOLED),
    "grain": Arm("GRAIN", {}),
    "grain_image_description": Arm("GRAIN, L_id", _DESCRIPTIONS),
    "grain_captions": Arm("GRAIN, two captions", _CAPTIONS),
    "grain_both": Arm("GRAIN, L_id, two captions", _DESCRIPTIONS | _CAPTIONS),
    "grain_pooled": Arm("GRAIN, L_id, two captions, pooled", _DESCRIPTIONS | _CAPTIONS | _POOLED),
    "grain_boxes": Arm(
        "GRAIN, L_id, two captions, pooled, L_bd", _DESCRIPTIONS | _CAPTIONS | _POOLED | _BOXES
    ),
}


class Run(NamedTuple):
    """One point of the sweep."""

    arm: str
    rate: float
    seed: int

    @property
    def point(self) -> dict[str, Any]:
        """The keys that it changes."""
        return ARMS[self.arm].changes | {"optim.learning_rate": self.rate, "seed": self.seed}


def runs() -> Iterator[Run]:
    """Every run; both rates of a seed before the next seed."""
    for seed in SEEDS:
        for arm in ARMS:
            for rate in RATES:
                yield Run(arm, rate, seed)


def sweep() -> Iterator[dict[str, Any]]:
    """72 points."""
    for run in runs():
        yield run.point
