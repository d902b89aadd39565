"""Loss terms that are on in a part of a run: the steps without one compute nothing of it; resume across the switch."""

import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grain_jax import losses, train
from grain_jax.core import errors
from grain_jax.losses import local
from grain_jax.models import grain
from grain_jax.runtime import checkpoint
from grain_jax.training import flops, phases, sharding, train_step
from grain_jax.verify import command as verify
from tests import perturbed, runs, tiny
from tests.training.test_local_terms import Smooth

TERM = f"{__name__}:Centred"
HALF = {"end": 0.5, "from": 0.5}
STEPS = 4
ALONE = {"model__decoder": None, "model__image__pool": "class"}  # less to compile
ALL, OF_PHASES = jax.devices, flops.of_phases  # the functions: tests replace them


class Centred(Smooth):
    """Tokens through a map, against the centre in its state."""

    def __call__(self, seen):
        tokens = self.map(seen.tokens)
        loss = jnp.square(tokens - seen.state["centre"]).sum((1, 2))
        sums = {"sum": tokens.mean(1).sum(0), "count": len(loss)}
        return local.LocalOutput(local.PerImage(loss, jnp.ones(len(loss))), statistics=sums)


@pytest.fixture(autouse=True, scope="module")
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: ALL()[:1])
        patch.setattr(
            train.flops, "of_phases", lambda *_: {(0, None): 1.0, (2, None): 1.0}
        )  # of the runs
        yield


def config(weight=HALF, **changes):
    entry = {"loss__terms__smooth": {"term": TERM, "weight": weight}} if weight else {}
    return tiny.small(
        **ALONE,
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


def test_a_run_that_resumes_is_the_same_bit_for_bit(whole, tmp_path, capfd):
    """It ends before the switch, and again behind it."""
    for step in (1, 2):
        with pytest.raises(SystemExit):
            train.train(config(), tmp_path, handler=tiny.EndsAt(step))
    assert "2 programs, compiled in" in capfd.readouterr().err
    train.train(config(), tmp_path)
    assert "2 programs, compiled in" not in capfd.readouterr().err
    assert runs.lines(tmp_path) == runs.lines(whole)
    stored = [
        checkpoint.read_json(folder / "checkpoints" / str(STEPS), "receipt")["state"]
        for folder in (tmp_path, whole)
    ]
    assert stored[0] == stored[1] and set(stored[0]) >= {"params", "opt_state"}


def test_the_best_metric_may_be_of_a_phase_that_is_over(whole, tmp_path):
    """At a resume behind the switch; no other name is taken."""
    folder = tmp_path / "checkpoints" / "3"
    shutil.copytree(whole / "checkpoints" / "3", folder)
    with pytest.raises(errors.UserError, match="did you mean 'loss_image_description'"):
        train.train(config(checkpoint_best_metric="loss_imag_description"), tmp_path)
    train.train(config(checkpoint_best_metric="loss_image_description"), tmp_path)
    assert runs.lines(tmp_path) == runs.lines(whole)[3:]


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
    costs = [
        one.phases[0].step.lower(one.state, one.batch).cost_analysis()["flops"]
        for one in (found, plain)
    ]
    assert 1 <= costs[0] / costs[1] < 1.00003  # the moments of the parameters of the term
    assert [phase.key for phase in found.phases] == [
        (0, None),
        (2, None),
    ] and found.step is found.phases[0].step


def test_flops_are_those_of_the_terms_that_are_on(monkeypatch):
    # The first phase has no parameter that is frozen.
    c = config(optim__frozen=("terms/smooth/.*",))
    assert flops.per_image(phases.without(c, {"smooth"})).terms == 0
    monkeypatch.setattr(flops, "per_image", lambda c: types.SimpleNamespace(train=[*c.loss.terms]))
    assert OF_PHASES(c, STEPS) == {(0, None): [], (2, None): ["smooth"]}
    assert phases.shares(phases.of(c, STEPS), STEPS) == [0.5, 0.5]


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


TERMS = {"image_caption", "region_description", "box", "image_description", "box_description"}


def test_what_only_terms_that_are_off_train_keeps_its_bits():
    """That is what has no gradient, in a real model."""
    c = tiny.small(
        model__boxes__kind="roi_align",
        loss__match_description=1.0,
        **{f"loss__{name}": HALF for name in TERMS},
    )
    model, batch = grain.GRAIN(c.model), tiny.batch(c)
    every = [TERMS - {name} for name in TERMS] + [{name} for name in TERMS] + [set()]
    every += [{"image_caption", "image_description"}]

    @jax.jit
    def gradients(params):
        """Of each term alone; that of several is their sum."""
        outputs, back = jax.vjp(lambda p: model.apply({"params": p}, batch), params)
        cotangents = []
        for name in TERMS:
            loss = phases.without(c, TERMS - {name}).loss
            of = lambda x, loss=loss, on={name: 1.0}: (
                losses.total_loss(x, batch, loss, weights=on).total
            )
            cotangents.append(jax.grad(of)(outputs))
        return jax.vmap(back)(jax.tree.map(lambda *x: jnp.stack(x), *cotangents))[0]

    before = perturbed.params(c.model)
    found = grain.flat(gradients(before))
    after = jax.tree.map(lambda x: x + 1, before)
    by = {name: {term for term, x in zip(TERMS, of) if x.any()} for name, of in found.items()}
    names = {name for name, terms in by.items() if terms}
    assert set.union(*by.values()) == TERMS
    for off in every:
        held = grain.flat(phases.held(after, before, c, off))
        kept = {name for name in names if (held[name] == grain.flat(before)[name]).all()}
        assert kept == {name for name in names if by[name] <= off}, off
    summed = tiny.small(loss__region_description=HALF, model__decoder__image_pool="all")
    with_term = tiny.small(loss__box=HALF, loss__terms__x={"term": "box", "weight": 1.0})
    for one, off in ((summed, {"region_description"}), (with_term, {"box"})):
        jax.tree.map(np.testing.assert_array_equal, phases.held(after, before, one, off), after)
