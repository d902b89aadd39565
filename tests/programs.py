"""Whole runs of the trainer in a process: a smaller model, programs that are built once, no curves."""

import contextlib
import types
from collections.abc import Iterator

import pytest

from grain_jax import config as config_lib
from grain_jax.report import figures
from grain_jax.training import flops, train_step
from tests import tiny

SHALLOW = {f"model__{tower}__depth": 1 for tower in ("image", "text", "decoder")}
_programs: dict[str, train_step.Program] = {}
_per_image: dict[str, flops.PerImage] = {}
_build, _count = train_step.build, flops.per_image


def config(**overrides) -> config_lib.Config:
    """As tiny.config, with as little to trace, to compile and to save as there can be."""
    return tiny.config(**(SHALLOW | {"model__text__vocab_size": 600} | overrides))


class _Step:
    """A jitted step that is lowered and compiled once."""

    def __init__(self, step):
        self._step, self._lowered = step, None

    def __getattr__(self, name):
        return getattr(self._step, name)

    def __call__(self, *arguments):
        return self._step(*arguments)

    def lower(self, *shapes):
        if self._lowered is None:
            lowered = self._step.lower(*shapes)
            compiled = lowered.compile()
            self._lowered = types.SimpleNamespace(
                out_info=lowered.out_info, compile=lambda: compiled
            )
        return self._lowered


def _key(config: config_lib.Config, *others) -> str:
    """What a step is made of."""
    of_input = config.input
    read = (
        (config.model, config.loss, config.optim, config.text_layout, config.text.packing),
        (config.batch_size, config.microbatches, config.dtype, config.remat, config.sharding),
        (config.seed, config.ema_decay, of_input.captions_per_image, of_input.max_regions),
        of_input.negatives_per_region,
    )
    return repr((read, others))


def _program(config, mesh, *, total_steps, steps_per_epoch):
    per_epoch = config.optim.warmup_steps is None and steps_per_epoch
    key = _key(config, mesh.shape, mesh.devices.tolist(), total_steps, per_epoch)
    if key not in _programs:
        lengths = dict(total_steps=total_steps, steps_per_epoch=steps_per_epoch)
        program = _build(config, mesh, **lengths)
        _programs[key] = program._replace(step=_Step(program.step))
    return _programs[key]


def _flops(config, *arguments):
    key = _key(config, arguments)
    if key not in _per_image:
        _per_image[key] = _count(config, *arguments)
    return _per_image[key]


@contextlib.contextmanager
def quick_runs() -> Iterator[None]:
    """Inside, the trainer and `grain-jax verify` share the programs of equal configs on equal meshes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_step, "build", _program)
        patch.setattr(flops, "per_image", _flops)
        patch.setattr(figures, "curves", lambda *_: None)
        yield
