"""The commands of these tests load each model once."""

import functools

import pytest

from grain_jax import inference
from grain_jax.inference import predictor

LOAD = functools.cache(predictor.load)


@pytest.fixture(scope="module", autouse=True)
def one_load():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictor, "load", LOAD)
        patch.setattr(inference, "load", LOAD)
        yield
