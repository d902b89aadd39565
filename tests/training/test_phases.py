"""Loss terms that are on in a part of a run: the steps without one compute nothing of it; resume across the switch."""

import jax
import numpy as np
import pytest

from grain_jax import train
from grain_jax.core import errors
from grain_jax.models import grain
from grain_jax.runtime import checkpoint, ending
from grain_jax.training import flops, phases, sharding, train_step
from grain_jax.verify import command as verify
from tests import runs, tiny
from tests.training.test_local_terms import Smooth

TERM = f"{Smooth.__module__}:Smooth"
HALF = {"end": 0.5, "from": 0.5}
STEPS = 4
pytestmark = pytest.mark.usefixtures("no_curves")
ALL = jax.devices  # the function: tests replace it


@pytest.fixture(autouse=True, scope="module")
def two_devices():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: ALL()[:2])
        yield


def config(weight=HALF, **changes):
    entry = {"loss__terms__smooth": {"term": TERM, "weight": weight}} if weight else {}
    return tiny.small(
        total_steps=STEPS,
        checkpoint_every=1,
        checkpoint_keep=STEPS,
        loss__image_description={"start": 1, "to": 0.5},
        **entry,
        **changes,
    )


def program(c):
    mesh = sharding.make_mesh(c.mesh, jax.devices())
    return train_step.build(c, mesh, total_steps=STEPS, steps_per_epoch=1)


class _EndsAt(ending.PreemptionHandler):
    """Tells the run to end after so many steps."""

    def __init__(self, step):
        super().__init__()
        self._left = step

    def reached(self):
        self._left -= 1
        return self._left <= 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("whole")
    train.train(config(), workdir)
    return workdir


def test_lines_have_the_weights_and_the_terms_that_are_on(whole):
    lines = runs.lines(whole)
    assert [line["weight/smooth"] for line in lines] == [0, 0, 0.5, 0.5]
    assert [line["weight/image_description"] for line in lines] == [1, 0.5, 0, 0]
    assert ["loss_smooth" in line for line in lines] == [False, False, True, True]
    assert ["loss_image_description" in line for line in lines] == [True, True, False, False]
    for line in lines:
        names = [name for name in line if name.startswith("loss_")]
        weights = [line.get(f"weight/{name.removeprefix('loss_')}", 1.0) for name in names]
        total = sum(weight * line[name] for weight, name in zip(weights, names))
        np.testing.assert_allclose(line["loss"], total, rtol=1e-6)


@pytest.mark.parametrize("step", [1, 3])
def test_a_run_that_resumes_is_the_same_bit_for_bit(whole, tmp_path, step, capfd):
    with pytest.raises(SystemExit):
        train.train(config(), tmp_path, handler=_EndsAt(step))
    capfd.readouterr()
    train.train(config(), tmp_path)
    assert ("2 programs, compiled in" in capfd.readouterr().err) == (step == 1)
    assert runs.lines(tmp_path) == runs.lines(whole)
    stored = [
        checkpoint.read_json(folder / "checkpoints" / str(STEPS), "receipt")["state"]
        for folder in (tmp_path, whole)
    ]
    assert stored[0] == stored[1] and set(stored[0]) >= {"params", "opt_state"}


def test_verify_trains_across_the_switch_again(whole, capsys):
    verify.main([str(whole), "--from", "1", "--steps", "2"])
    assert "the same batches, and the same parameters bit for bit" in capsys.readouterr().out


def test_a_term_that_is_off_keeps_its_parameters_and_its_state():
    c = config()
    found = program(c)
    batch = jax.device_put(tiny.batch(c), found.batch_sharding)
    state = jax.device_put(tiny.state(found), found.shardings)
    own = lambda state: jax.device_get((state.params["terms"]["smooth"], state.term_state))
    before, kernel = own(state), jax.device_get(state.params["image_projection"]["kernel"])
    steps = [phase.step.lower(found.state, found.batch).compile() for phase in found.phases]
    state, _ = steps[0](state, batch)
    jax.tree.map(np.testing.assert_array_equal, own(state), before)
    assert (jax.device_get(state.params["image_projection"]["kernel"]) != kernel).any()
    after, _ = steps[1](state._replace(step=state.step + 1), batch)
    for a, b in zip(jax.tree.leaves(own(after)), jax.tree.leaves(before)):
        assert (a != b).any()


def test_a_step_costs_what_it_costs_without_the_terms_that_are_off():
    found, plain = program(config()), program(config(None))
    count = lambda one, step: flops.matmul_flops(step, one.state, one.batch)
    first, second = (count(found, phase.step) for phase in found.phases)
    without = [count(plain, phase.step) for phase in plain.phases]
    assert first == without[0] and second > 1.02 * without[1]
    costs = [
        one.phases[0].step.lower(one.state, one.batch).cost_analysis()["flops"]
        for one in (found, plain)
    ]
    assert 1 <= costs[0] / costs[1] < 1.0005  # the moments of the parameters of the term
    assert [phase.first for phase in found.phases] == [0, 2] and found.step is found.phases[0].step
    of_phases = flops.of_phases(config(), STEPS)
    assert phases.shares(phases.of(config(), STEPS), STEPS) == [0.5, 0.5]
    assert of_phases[0] == flops.per_image(tiny.small(loss__image_description=1)).train


def test_the_phases_of_a_run():
    c = tiny.config(
        loss__box={"end": 1, "from": 0.3, "to": 0.8},
        loss__image_caption={"start": 1, "from": 0.8},
        loss__region_description={"start": 1, "end": 2, "to": 1},
    )
    found = phases.of(c, 10)
    assert [(one.first, set(one.off)) for one in found] == [
        (0, {"box"}),
        (4, set()),
        (8, {"image_caption"}),
    ]
    assert phases.of(tiny.config(), 10) == [phases.Phase(0, frozenset())]
    half = {"start": 1, "from": 0.5}
    names = ("image_caption", "region_description", "box")
    c = tiny.config(**{f"loss__{name}": half for name in names})
    with pytest.raises(errors.UserError, match=r"all 0 in step 5 of 10, .* off are box, image_cap"):
        phases.of(c, 10)


@pytest.mark.parametrize(
    "off,kept",
    [
        (set(), set()),
        ({"box_description"}, {"box_head/a", "box_projection/a"}),
        ({"box"}, {"box_mlp/a"}),
        ({"image_description"}, set()),
    ],
)
def test_what_only_terms_that_are_off_train_keeps_its_bits(off, kept):
    names = ("box_head", "box_projection", "box_mlp", "image")
    before = {name: {"a": np.zeros(2)} for name in names}
    params = {name: {"a": np.ones(2)} for name in names}
    head = dict(model__boxes__kind="roi_align")
    weights = {f"loss__{name}": HALF for name in ("box", "box_description", "image_description")}
    found = phases.held(params, before, tiny.config(**head, **weights), off)
    assert {name for name, x in grain.flat(found).items() if not x.any()} == kept
    with_term = weights | {"loss__terms__x": {"term": "box", "weight": 1.0}}
    found = phases.held(params, before, tiny.config(**head, **with_term), off)
    assert all(x.all() for x in jax.tree.leaves(found))
