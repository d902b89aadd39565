"""A short fault drill; the long one is a command (drill.py)."""

import pytest

from tests.faults import drill


@pytest.mark.slow
def test_a_run_that_is_ended_again_and_again_has_the_metrics_of_one_left_alone(tmp_path):
    count = drill.drill(tmp_path, kills=3, terms=1, seed=0)
    assert count["SIGKILL"] == 3 and count["SIGTERM"] == 1 and count["double kill"] == 1
    assert count["in a save"] >= 1 and count["in the start"] >= 1
