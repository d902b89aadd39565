"""The phases of a run: steps with the same loss terms, share of patches and sequence length, each with its program.

A step in which the weight of a term is 0 computes nothing of it, and one that keeps a share of the patches nothing of
the others. The state is the same in all phases.
"""

import collections
import dataclasses
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax

from grain_jax import losses
from grain_jax.config import Config
from grain_jax.config import keep as keep_lib
from grain_jax.core import errors
from grain_jax.input_pipeline import order

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


Key: TypeAlias = tuple[int, int | None]  # the first step and the length of a phase


class Phase(NamedTuple):
    """The steps from `first` on, up to those of the next phase; with a `length`, those of them that have it."""

    first: int
    off: frozenset[str]  # the terms that are not computed, by name
    keep: float = 1.0  # the share of its patches that the image tower sees of an image
    length: int | None = (
        None  # N, the patches of an image and their padding; None: squares of `image_size`
    )

    @property
    def key(self) -> Key:
        """What tells it from the other phases of its run."""
        return self.first, self.length


def of(config: Config, total_steps: int) -> list[Phase]:
    """The phases of a run in their order, those of one stretch by length.

    Of a run without schedules (config.Schedule), and with one share of patches and one length, a single one.

    Raises:
      UserError: a phase has no loss term.
    """
    on = {name: one.on(total_steps) for name, one in config.loss.schedules.items()}
    shares = keep_lib.of_steps(config.model.image.keep, total_steps)
    by_share = keep_lib.stretches(config.input.sequence_lengths) or ((0.0, (None,)),)
    lengths = keep_lib.of_steps(by_share, total_steps)
    starts = {0, *(x for steps in on.values() if steps for x in (steps.start, steps.stop))}
    starts |= {first for first, _ in (*shares, *lengths)}
    found: list[Phase] = []
    for first in sorted(start for start in starts if start < total_steps):
        off = frozenset(name for name, steps in on.items() if first not in steps)
        at = lambda pairs, first=first: [what for begin, what in pairs if begin <= first][-1]
        own = [Phase(first, off, at(shares), length) for length in at(lengths)]
        last = [one for one in found if one.first == found[-1].first]
        if [one[1:] for one in last] != [one[1:] for one in own]:
            found += own
    names = {term.name for term, _ in losses.terms_of(config.loss)} if on else set()
    for phase in found:
        if on and names <= phase.off:
            raise errors.UserError(
                f"loss: got weights that are all 0 in step {phase.first} of {total_steps}, expected a loss term that is"
                f" on; off are {', '.join(sorted(phase.off))}"
            )
    return found


def steps(found: Sequence[Phase], total_steps: int) -> list[range]:
    """The steps of each phase of a run; those of one stretch share theirs, and each step has one of their lengths."""
    firsts = sorted({phase.first for phase in found})
    ends = dict(zip(firsts, [*firsts[1:], total_steps]))
    return [range(phase.first, ends[phase.first]) for phase in found]


def shares(found: Sequence[Phase], total_steps: int) -> list[float]:
    """The share of the steps of a run that each of its phases has; each length of a stretch is drawn equally often."""
    lengths = collections.Counter(phase.first for phase in found)
    stretches = zip(found, steps(found, total_steps))
    return [len(own) / total_steps / lengths[phase.first] for phase, own in stretches]


def of_step(keys: Iterable[Key], config: Config, step: int) -> Key:
    """That of the keys of the phases of a run which has the `step`, from 0 on."""
    keys = list(keys)
    first = max(first for first, _ in keys if first <= step)
    lengths = {length for begin, length in keys if begin == first}
    return first, lengths.pop() if len(lengths) == 1 else order.sequence_length(config, step)


def largest(found: Sequence[Phase]) -> int:
    """The place of the phase that computes most: that of most kept patches, then of most terms."""
    size = lambda phase: (phase.keep * (phase.length or 1), -len(phase.off))
    return max(range(len(found)), key=lambda i: size(found[i]))


def at(config: Config, phase: Phase) -> Config:
    """The config of a step of a phase, for all but the weights of its terms."""
    part = without(config, phase.off)
    if part.model.image.keep != phase.keep:
        image = dataclasses.replace(part.model.image, keep=phase.keep)
        part = dataclasses.replace(part, model=dataclasses.replace(part.model, image=image))
    if phase.length is not None:
        own = dataclasses.replace(part.input, sequence_lengths=(phase.length,))
        part = dataclasses.replace(part, input=own)
    return part


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
