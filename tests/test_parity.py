"""Our numbers against the PyTorch reference's; benchmarks/parity prints the same as a table."""

import numpy as np
import pytest

from benchmarks.parity import comparison, goldens, groups
from grain_jax.convert.reference import names

pytestmark = [pytest.mark.long, pytest.mark.quick]


@pytest.mark.parametrize("group", groups.GROUPS)
def test_equals_the_reference(group):
    comparisons = groups.compare(group)
    failing = [f"{c.name}: {c.error:.3g} > {c.tolerance:.3g}" for c in comparisons if not c.ok]
    assert comparisons and not failing, "\n".join(failing)


def test_gradients_cover_every_parameter_of_the_reference():
    arrays = goldens.goldens().arrays
    parameters = {key.removeprefix("params/") for key in arrays if key.startswith("params/")}
    unused = {name.replace(".", "/", 1) for name in names.UNUSED}
    compared = {c.name for c in groups.compare("gradients")} - {"names"}
    assert compared == parameters - unused
    assert len(compared) == 136


def test_comparisons_fail_when_they_should():
    reference = np.array([1.0, -4.0, 0.5])
    assert comparison.relative("", reference + [0, 0, 3e-5], reference).ok
    assert not comparison.relative("", reference + [0, 0, 5e-5], reference).ok
    assert not comparison.relative("", reference * np.nan, reference).ok
    assert comparison.gradient("", reference + 7e-5, reference).ok
    assert not comparison.gradient("", reference + 9e-5, reference).ok
    assert not comparison.gradient("", np.full(3, 2e-7), np.zeros(3)).ok
    with pytest.raises(ValueError, match="shape"):
        comparison.relative("", reference[:, None], reference)
