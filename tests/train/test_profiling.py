"""Traces of chosen steps: where TensorBoard's profile plugin looks, and holding these steps."""

import jax
import jax.numpy as jnp
import pytest

from grain_jax.train import profiling


def _run(workdir, ran, start, steps):
    trace = profiling.StepTrace(workdir, start, steps)
    for step in ran:
        trace.begin(step)
        outputs = jnp.arange(8) * step
        trace.end(step, outputs)
    trace.close()


def _steps(file):
    """The steps that the trace marks, as XProf finds them."""
    found = []
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                if event.name == "train":
                    found.append(dict(event.stats)["step_num"])
    return sorted(found)


@pytest.mark.parametrize(
    "ran,traced",
    [
        (range(1, 8), [3, 4]),
        (range(4, 6), [4]),  # resumed inside the range: the rest of it
    ],
)
def test_the_chosen_steps_are_in_the_trace(tmp_path, ran, traced):
    _run(tmp_path, ran, 3, 2)
    folders = list((tmp_path / "tensorboard" / "plugins" / "profile").glob("*"))
    (folder,) = folders
    assert folder.name == f"step_{traced[0]}"
    assert _steps(folder / "process_00000.xplane.pb") == traced
    assert (folder / "process_00000.trace.json.gz").exists()


def test_nothing_is_traced_unless_asked_for(tmp_path):
    _run(tmp_path, range(4), 0, 3)
    assert not list(tmp_path.iterdir())
