import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from grain_jax import config as config_lib
from grain_jax.losses.layout import make_layout
from grain_jax.losses.shard import Shard
from grain_jax.models import grain
from grain_jax.terms import prototypes
from grain_jax.terms.self_distillation import Options, SelfDistillation
from grain_jax.training import forward
from tests import tiny
from tests.models import test_towers
from tests.terms import linear

SMALL = dict(prototypes=12, hidden=10, bottleneck=7, tile=5)
MODEL = tiny.config().model


def _term(**options):
    return SelfDistillation(Options(**SMALL | options), MODEL)


def _setup(**options):
    """A term, random parameters of the student and of the teacher, and a state."""
    term = _term(**options)
    p, its = linear.params(0), linear.params(1)
    state = dict(term.initial_state())
    fresh = linear.shapes(term, linear.seen(MODEL, p, its, state=state))
    own, teacher = linear.perturbed(fresh, 1), linear.perturbed(fresh, 2)
    if state:
        rng = np.random.default_rng(3)
        usage = rng.random(12).astype(np.float32)
        state = {"centre": rng.normal(0, 0.1, 12).astype(np.float32), "usage": usage / usage.sum()}
    return term, own, p, its, teacher, state


def _loss(term, own, p, its, teacher, state):
    """The mean over images, and the term's output."""
    seen = linear.seen(MODEL, p, its, head=teacher, state=state)
    output = term.apply({"params": own}, seen)
    shard = Shard(None, None, None, None, make_layout(4, tiny.config().loss, 1), None)
    found = term.across(term.options, shard, output)
    return found.loss.sum / found.loss.count, (output, found)


def _read(options, p, image):
    if options.reads == "embedding":
        return linear.embed(p, image) * linear.EMBED**0.5
    tokens = linear.tokens(p, image)
    return tokens[:, 0] if options.reads == "class" else tokens[:, 1:].mean(1)


def _in_torch(term, own, p, its, teacher, state):
    """The loss of the paper, float64, and the teacher's logits and distributions."""
    options, seen = term.options, linear.seen(MODEL, p, its)
    image = lambda x: linear.normalised(x, MODEL)
    own, p = linear.double(own), linear.double(p)
    its, teacher = (jax.tree.map(lambda x: x.detach(), linear.double(x)) for x in (its, teacher))
    local = image(seen.views.local.image)
    students = [_read(options, p, local[:, v]) for v in range(local.shape[1])]
    if options.image:
        students.append(_read(options, p, image(seen.batch.image)))
    logits = [linear.head(own["head"], x, options.head_layers) for x in students]
    whole = _read(options, its, image(seen.views.global_view.image[:, 0]))
    z = linear.head(teacher["head"], whole, options.head_layers)
    temperature = 0.04 + 0.1 / 0.3 * (0.07 - 0.04)
    if options.centring == "centre":
        target = torch.softmax((z - torch.tensor(state["centre"])) / temperature, -1)
    else:
        target = torch.tensor(_sinkhorn(z.numpy() / temperature, options.iterations))
    losses = [linear.cross_entropy(target, x, options.student_temperature) for x in logits]
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), linear.gradients((own, p)), z.numpy(), target.numpy()


def _sinkhorn(z, iterations):
    """SwAV's: equal sums of the prototypes, then of the images."""
    q = np.exp(z.astype(np.float64)).T
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdims=True) * len(q)
        q /= q.sum(0, keepdims=True) * q.shape[1]
    return (q * q.shape[1]).T


CASES = (
    dict(image=True, reads="class", head_layers=1),
    dict(image=True, centring="sinkhorn", iterations=5),
    pytest.param(dict(), marks=pytest.mark.slow),
    pytest.param(dict(reads="mean", centring="sinkhorn", head_layers=2), marks=pytest.mark.slow),
)


@pytest.mark.parametrize("options", CASES)
def test_it_is_the_loss_of_the_paper(options):
    """Values, gradients of student and head, measures and the new centre against torch and numpy in float64."""
    term, own, p, its, teacher, state = _setup(**options)
    of = jax.jit(jax.value_and_grad(functools.partial(_loss, term), (0, 1, 2, 3), has_aux=True))
    (loss, (output, found)), (*grads, of_its, of_teacher) = of(own, p, its, teacher, state)
    expected, expected_grads, z, target = _in_torch(term, own, p, its, teacher, state)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert linear.worst(tuple(grads), expected_grads) < 1e-5
    assert not any(np.any(x) for x in jax.tree.leaves((of_its, of_teacher)))
    entropy = -(target * np.log(target)).sum(-1).mean()
    if state:
        measures = {k: v.sum.sum() / v.count.sum() for k, v in output.measures.items()}
        new = term.update(state, output.statistics)
        centre = 0.9 * state["centre"] + 0.1 * z.mean(0)
        usage = 0.9 * state["usage"] + 0.1 * target.mean(0)
        assert linear.worst(new, {"centre": centre, "usage": usage}) < 1e-6
        usage = state["usage"]
    else:
        measures, usage = {k: v.sum / v.count for k, v in found.measures.items()}, target.mean(0)
        assert term.update({}, {}) == {}
    most = np.log(12)
    assert measures["kl"] == pytest.approx(expected - entropy, rel=1e-5)
    assert measures["entropy_of_one"] == pytest.approx(entropy / most, rel=1e-5)
    assert measures["entropy"] == pytest.approx(-(usage * np.log(usage)).sum() / most, rel=1e-5)


def test_temperature_of_the_teacher():
    options = Options(warm_up=0.5)
    of = lambda share: float(options.temperature(jnp.float32(share)))
    assert [of(x) for x in (0, 0.25, 0.5, 1)] == pytest.approx([0.04, 0.055, 0.07, 0.07])
    assert float(Options(warm_up=0).temperature(jnp.float32(0))) == pytest.approx(0.07)


def test_the_warm_up_begins_when_the_term_comes_on():
    weights = dict(a=1.0, b={"end": 1.0, "from": 0.8}, c={"start": 1.0, "end": 0.0, "from": 0.8})
    c = tiny.dictionary(teacher__kind="ema", input__views__local=2, input__views__size=8)
    for name, weight in weights.items():
        c.loss.terms[name] = {"term": "self_distillation", "weight": weight}
    c = config_lib.from_dict(c)
    run = forward.Forward(grain.GRAIN(c.model), c)
    of = lambda name: [float(run.share_of_term(name, jnp.float32(x))) for x in (0.5, 0.8, 0.9)]
    assert of("a") == of("c") == pytest.approx([0.5, 0.8, 0.9])
    assert of("b") == pytest.approx([0, 0, 0.5], abs=1e-6)


def test_faults():
    config = tiny.config(model__image__class_token=False)
    assert SelfDistillation.faults(Options(reads="class"), config) == [
        "teacher.kind: got none, expected ema",
        "input.views.local: got 0, expected 1 or more",
        "model.image.class_token: got False, expected True with reads=class",
    ]
    entry = {"term": "self_distillation", "weight": 1.0}
    pooled = test_towers.dictionary(teacher__kind="ema", loss__terms__own=entry)
    pooled = config_lib.from_dict(pooled)
    _, line = SelfDistillation.faults(Options(reads="mean"), pooled)
    got = (
        f"reads: got mean with model.image.tower={pooled.model.image.tower}, which pools its tokens"
    )
    assert line == f"{got}; expected reads=embedding, or a tower with patches"
    config = dataclasses.replace(
        tiny.config(),
        teacher=config_lib.Teacher(kind="ema"),
        input=dataclasses.replace(config.input, views=config_lib.Views(local=2)),
    )
    assert SelfDistillation.faults(Options(), config) == []


def test_heads_of_the_papers():
    """Caron et al. 2021: 3 linear maps, 2048 hidden units, 256 numbers, 65,536 prototypes."""
    head = prototypes.Head(Options(), "float32")
    params = jax.eval_shape(lambda: nn.unbox(head.init(jax.random.key(0), jnp.zeros((1, 768)))))
    shapes = jax.tree.map(lambda x: x.shape, params["params"])
    assert shapes == {
        "hidden_0": {"kernel": (768, 2048), "bias": (2048,)},
        "hidden_1": {"kernel": (2048, 2048), "bias": (2048,)},
        "bottleneck": {"kernel": (2048, 256), "bias": (256,)},
        "prototypes": (65536, 256),
    }
