"""examples/self_distillation: the teacher is an average that survives a resume; the loss is DINO's."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.self_distillation import term as distillation
from grain_jax.checkpoint import files
from grain_jax.losses.local import Parameters
from grain_jax.train import run
from tests import tiny
from tests.losses import fake
from tests.tiny import TWO_SHALLOW as TWO_TOWERS

NAME, DECAY = "distillation", 0.75
ENTRY = {"term": "examples.self_distillation.term:SelfDistillation", "weight": 0.5, "decay": DECAY}
ENTRY |= {"crops": 2, "crop_size": 8, "hidden": 16, "bottleneck": 8, "prototypes": 12}
KEYS = dict(loss__terms__distillation=ENTRY, checkpoint_every=1, checkpoint_keep=9, total_steps=4)
KEYS |= TWO_TOWERS


def state_at(workdir, step):
    """(parameters, state of the term) of a checkpoint."""
    folder = workdir / "checkpoints" / str(step)
    read = lambda name: files.read_arrays(folder, only=name)[name]
    return read("params"), read("term_state")[NAME]


def test_the_teacher_is_an_average_that_survives_a_resume(tmp_path, one_device):
    c = tiny.small(**KEYS)
    run.train(c, tmp_path / "whole")
    params, states = zip(*(state_at(tmp_path / "whole", step) for step in (1, 2, 3, 4)))
    for step in (1, 2, 3):
        average = lambda old, new: DECAY * old + (1 - DECAY) * new
        of_term = params[step]["terms"][NAME]["head"]
        for name, new in (("tower", params[step]["image"]), ("head", of_term)):
            expected = jax.tree.map(average, states[step - 1][name], new)
            jax.tree.map(np.testing.assert_allclose, states[step][name], expected)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), states[3]["tower"], params[3]["image"])
    assert max(jax.tree.leaves(moved)) > 1e-5  # it is not the student
    with pytest.raises(SystemExit, match="75"):
        run.train(c, tmp_path / "stopped", handler=tiny.EndsAt(2))
    run.train(c, tmp_path / "stopped")
    resumed = state_at(tmp_path / "stopped", 4)
    jax.tree.map(np.testing.assert_array_equal, resumed, (params[3], states[3]))
    text = (tmp_path / "stopped/metrics.jsonl").read_text()
    losses = [json.loads(line)[f"loss_{NAME}"] for line in text.splitlines()]
    assert len(losses) == 4 and np.isfinite(losses).all()


def test_the_loss_is_that_of_dino():
    c = tiny.config(batch_size=8)
    options = distillation.Options(crops=2, crop_size=8, hidden=16, bottleneck=8, prototypes=12)
    module = distillation.SelfDistillation(options, c.model)
    rng, size = np.random.default_rng(0), c.model.image.width
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    tower = {"is": "the teacher's"}
    vectors = {16: draw(16, 5, size), 8: draw(8, 5, size)}  # of the crops, and of the images

    def apply(method, image, params=None):
        assert method == "image_tokens" and image.dtype == jnp.uint8
        assert params == (None if len(image) == 16 else {"image": tower})
        return vectors[len(image)]

    state = dict(tower=tower, head={}, centre=draw(12) / 9, mean=jnp.full(12, 1 / 12))
    seen = fake.seen(c, leading=1)._replace(apply=apply, state=state)
    unbox = lambda tree: jax.tree.map(lambda x: x.value, tree, is_leaf=lambda x: hasattr(x, "value"))
    trained, state["head"] = (unbox(module.init(jax.random.key(i), seen)["params"])["head"] for i in (0, 1))
    output = module.apply({"params": {"head": trained}}, seen)
    head = distillation.Head(options, np.dtype("float32"))
    cosines = lambda params, x: np.asarray(head.apply({"params": params}, x[:, 1:].mean(1)), np.float64)
    softmax = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    teacher = cosines(state["head"], vectors[8])
    target = softmax((teacher - np.asarray(state["centre"])) / options.teacher_temperature)
    student = softmax(cosines(trained, vectors[16]).reshape(8, 2, 12) / options.temperature)
    expected = -(target[:, None] * np.log(student)).sum((1, 2))
    np.testing.assert_allclose(output.loss.sum, expected, rtol=1e-4)
    assert output.loss.count.tolist() == [2.0] * 8
    np.testing.assert_allclose(output.measures["spread"].sum, np.log(12), rtol=1e-5)
    updated = module.update(
        state | {"tower": draw(3)}, output.statistics, Parameters({"image": draw(3)}, {"head": trained})
    )
    decay = options.centre_decay
    centre = decay * np.asarray(state["centre"]) + (1 - decay) * teacher.mean(0)
    np.testing.assert_allclose(updated["centre"], centre, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(updated["mean"], decay / 12 + (1 - decay) * target.mean(0), rtol=1e-4)
