"""The phases of a run: stretches of steps in which the same loss terms are on, each with a program of its own.

A step in which the weight of a term is 0 computes nothing of it. The state is the same in all phases.
"""

import dataclasses
import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax

from grain_jax import losses
from grain_jax.config import Config
from grain_jax.core import errors

_OF_TEXTS = {name for name in losses.TERMS if name != "box"}
_OF_IMAGES = {"image_caption", "image_description"}


def _trained_by(config: Config) -> dict[str, set[str]]:
    """Patterns of parameters that nothing trains where none of these terms is on, nor one of `loss.terms`."""
    decoder = config.model.decoder
    sums_regions = decoder is not None and decoder.image_pool == "all"
    return {
        r"text.*|logit_(scale|bias)": _OF_TEXTS,
        r"decoder/.*": {*losses.TERMS} - {"box_description"},
        r"image_projection/.*": _OF_IMAGES,
        r"region_projection/.*": {
            "region_description",
            "hard_negative",
            *(_OF_IMAGES if sums_regions else ()),
        },
        r"(box_head|box_projection)/.*": {"box_description", "hard_negative"},
        r"box_mlp/.*": {"box"},
    }


class Phase(NamedTuple):
    """The steps from `first` on, up to those of the next phase."""

    first: int
    off: frozenset[str]  # the terms that are not computed, by name


def of(config: Config, total_steps: int) -> list[Phase]:
    """The phases of a run in their order; of one without schedules (config.Schedule) a single one.

    Raises:
      UserError: a phase has no loss term.
    """
    on = {name: one.on(total_steps) for name, one in config.loss.schedules.items()}
    starts = {0, *(x for steps in on.values() if steps for x in (steps.start, steps.stop))}
    found: list[Phase] = []
    for first in sorted(start for start in starts if start < total_steps):
        off = frozenset(name for name, steps in on.items() if first not in steps)
        if not found or found[-1].off != off:
            found.append(Phase(first, off))
    names = {term.name for term, _ in losses.terms_of(config.loss)} if on else set()
    for phase in found:
        if on and names <= phase.off:
            raise errors.UserError(
                f"loss: got weights that are all 0 in step {phase.first} of {total_steps}, expected a loss term that is"
                f" on; off are {', '.join(sorted(phase.off))}"
            )
    return found


def shares(found: Sequence[Phase], total_steps: int) -> list[float]:
    """The share of the steps of a run that each of its phases has."""
    ends = [*(phase.first for phase in found[1:]), total_steps]
    return [(end - phase.first) / total_steps for phase, end in zip(found, ends)]


def without(config: Config, off: Collection[str]) -> Config:
    """The config of a step in which these terms are off, for all but the weights of the others."""
    if not off:
        return config
    optional = [name for name in off if name in losses.TERMS and losses.TERMS[name].optional]
    terms = {name: entry for name, entry in config.loss.terms.items() if name not in off}
    loss = dataclasses.replace(config.loss, terms=terms, **dict.fromkeys(optional, 0.0))
    return dataclasses.replace(config, loss=loss)


def held(params: Any, before: Any, config: Config, off: Collection[str]) -> Any:
    """`params`, but the bits of `before` where only terms that are off train a parameter.

    These are what lies below `terms/NAME` and, where no entry of `loss.terms` is on, what `_trained_by` names. Neither
    moments nor weight decay move them.

    Args:
      params: after the update.
      before: the same tree, before it.
      config: of the run.
      off: the terms that are off.
    """
    patterns = [rf"terms/{name}/.*" for name in off if name in config.loss.terms]
    loss = without(config, off).loss
    on = {term.name for term, weight in losses.terms_of(loss) if weight} - {*off}
    if not loss.terms:
        of = _trained_by(config).items()
        patterns += [pattern for pattern, names in of if names & {*off} and not names & on]
    if not patterns:
        return params
    own = re.compile("|".join(patterns))

    def choose(path, new, old):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return old if own.fullmatch(name) else new

    return jax.tree_util.tree_map_with_path(choose, params, before)
