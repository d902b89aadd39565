"""The teacher of a run: its average, its outputs on every mesh, what a checkpoint holds of it, what is refused."""

import dataclasses
import json
import shutil
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grain_jax import config as config_lib
from grain_jax import inference, train
from grain_jax.convert import whole
from grain_jax.core import errors
from grain_jax.losses import local
from grain_jax.models import grain, layers
from grain_jax.runtime import checkpoint, saved_model
from grain_jax.training import forward, memory_need, sharding, teacher, train_step
from grain_jax.verify import command as verify_command
from tests import perturbed, tiny

TOTAL = 4
WIDE = (4, 1, 1)
CUT = (1, 2, 2)  # over fsdp and tensor
ALONE = {"model__decoder": None, "model__image__pool": "class"}  # less to compile
SIZES = dict(
    image__image_size=32, image__pool="class", text__vocab_size=600, text__context_length=32
)


@dataclasses.dataclass(frozen=True)
class Keys:
    """Options of the term."""

    reads_texts: bool = True


class Follow(local.LocalTerm):
    """A map of the image's embedding against the teacher's map of its own; with `reads_texts` also its texts."""

    Options: ClassVar[type] = Keys

    def setup(self):
        self.map = layers.dense(
            4, ("width",), ("vector",), dtype=jnp.float32, kernel_init=layers.normal(0.5)
        )

    def __call__(self, seen):
        of = seen.teacher
        mine, theirs = self.map(seen.outputs.image_embed), of.image_embed
        if of.params_of_term:
            kernel, bias = (of.params_of_term["map"][name] for name in ("kernel", "bias"))
            theirs = theirs @ kernel + bias
        value = jnp.square(mine - theirs[:, :4]).sum(1)
        if of.kind == "checkpoint":
            image01 = seen.batch.image[:, ::-1].astype(jnp.float32) / 255
            value += of.tokens(image01)[:, of.leading :].mean((1, 2)) * mine[:, 1]
        if self.options.reads_texts:
            mask = seen.batch.region_mask[..., None]
            value += (of.text_embed.sum((1, 2)) + (of.region_text_embed * mask).sum((1, 2))) * mine[
                :, 2
            ]
        if seen.views is not None:
            value += seen.views.local.image.mean((1, 2, 3, 4)) * mine[:, 3]
        value *= of.logit_scale
        one = jnp.ones(len(value))
        measures = {"teacher": local.PerImage(theirs.sum(1), one)}
        return local.LocalOutput(local.PerImage(value, one), measures)


ALL = jax.devices  # the function: a run takes all that there are


@pytest.fixture(autouse=True, scope="module")
def four_devices():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: ALL()[:4])
        yield


def config(kind, mesh=(1, 1, 1), reads_texts=True, path=None, part="all", **changes):
    c = tiny.dictionary(
        **dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), mesh)),
        **{f"model__{name}__depth": 1 for name in ("image", "text")},
        **ALONE,
        model__text__vocab_size=600,
        loss__image_description=0.5,
        **{"total_steps": TOTAL, "log_every": 2, **changes},
    )
    c.teacher.update(dict(kind=kind, part=part, decay=0.6, end_decay=0.9))
    c.teacher.path = path
    entry = {"term": f"{__name__}:Follow", "weight": 0.5, "reads_texts": reads_texts}
    c.loss.terms.follow = entry
    return config_lib.from_dict(c)


def built(c, mesh=(1, 1, 1)):
    devices = sharding.make_mesh(c.mesh, jax.devices()[: int(np.prod(mesh))])
    return train_step.build(c, devices, total_steps=c.total_steps, steps_per_epoch=1)


def stepped(c, mesh=(1, 1, 1), steps=1):
    """(states after each step, the first is that of step 0; the metrics of the steps)."""
    program = built(c, mesh)
    state = tiny.state(program)
    if c.teacher.kind == "ema":
        params = {k: v for k, v in state.params.items() if c.teacher.part == "all" or k == "terms"}
        state = state._replace(teacher=params)
    state = jax.device_put(state, program.shardings)
    state = whole.place(c, state, program.shardings)
    batch = jax.device_put(tiny.batch(c), program.batch_sharding)
    states, metrics = [jax.device_get(state)], []
    step = program.step.lower(program.state, program.batch).compile()
    for _ in range(steps):
        state, found = step(state, batch)
        states.append(jax.device_get(state))
        metrics.append({name: float(value) for name, value in found.items()})
    return states, metrics


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The folder of a model of other widths, image size and patch size, with the run's texts; and the model."""
    folder = tmp_path_factory.mktemp("other")
    return str(folder), *made(folder)


def made(folder, seed=0, **changes):
    sizes = {
        **SIZES,
        "image__patch_size": 8,
        "image__depth": 1,
        "text__depth": 1,
        "decoder": None,
        **changes,
    }
    model = perturbed.tiny(**sizes)
    params = perturbed.params(model, seed)
    saved_model.save_model(folder, model, params)
    return model, params


def test_a_teacher_of_other_patches_is_why_own_shapes_are_not_taken(other):
    c = config("checkpoint", path=other[0], model__image__patch_size=4)
    fault = teacher.shape_fault(c)
    assert fault == (
        f"teacher.path: {other[0]} has model.image.patch_size = 8, the run 4; expected the same, as images in their own"
        " shape come cut into patches, or input.sequence_lengths=()"
    )
    assert fault in forward.shape_faults(c)
    same = config("checkpoint", path=other[0], model__image__patch_size=8)
    assert teacher.shape_fault(same) == teacher.shape_fault(config("ema")) == ""


def test_the_decay_is_a_cosine_over_the_run():
    c = config("ema").teacher
    share = np.arange(TOTAL) / (TOTAL - 1)
    expected = 0.9 - (0.9 - 0.6) * (np.cos(np.pi * share) + 1) / 2
    found = [float(teacher.decay_at(c, np.int32(step), TOTAL)) for step in range(TOTAL)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found[0] == pytest.approx(0.6) and found[-1] == pytest.approx(0.9)
    assert float(teacher.decay_at(c, np.int32(0), 1)) == pytest.approx(0.6)  # a run of one step


def averaging(**changes):
    """A run with views that averages all parameters, of which those of the text tower are frozen."""
    changes |= dict(input__views__local=1, input__views__size=8)
    changes |= dict(optim__frozen=("text.*",), optim__learning_rate=0.01, optim__warmup_steps=0)
    return config("ema", WIDE, reads_texts=False, **changes)


def test_an_average_of_all_is_numpys_and_what_is_frozen_keeps_its_bits():
    c = averaging()
    states, metrics = stepped(c, WIDE, steps=3)
    average = jax.tree.map(np.float64, states[0].params)
    for step, state in enumerate(states[1:]):
        decay = 0.9 - 0.3 * (np.cos(np.pi * step / (TOTAL - 1)) + 1) / 2
        average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, average, state.params)
        for expected, got in zip(jax.tree.leaves(average), jax.tree.leaves(state.teacher)):
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)
    assert jax.tree.structure(states[3].teacher) == jax.tree.structure(states[3].params)
    for got, first in zip(*(jax.tree.leaves(s.teacher["text"]) for s in (states[3], states[0]))):
        np.testing.assert_array_equal(got, first)
    scales = (tree["image"]["norm"]["scale"] for tree in (states[3].teacher, states[3].params))
    assert np.abs(np.subtract(*scales)).max() > 1e-4
    # What the term saw at the third step: the teacher after the second, by the model alone.
    of_model = {k: v for k, v in states[2].teacher.items() if k != "terms"}
    embed = inference.Predictor(c.model, of_model).encode_image(tiny.batch(c).image)
    own = states[2].teacher["terms"]["follow"]["map"]
    seen = (embed @ own["kernel"] + own["bias"]).sum(1).mean()
    assert metrics[2]["follow/teacher"] == pytest.approx(seen, rel=1e-5)


def test_the_heads_alone_are_averaged_beside_the_towers_of_the_step():
    c = config("ema", part="heads")
    program = built(c)
    assert list(program.state.teacher) == ["terms"]
    sizes = memory_need.state_bytes(program)
    assert sizes["teacher"] == 4 * (16 * 4 + 4) and sizes["parameters"] > 100 * sizes["teacher"]
    params = tiny.state(program).params
    old = {"terms": jax.tree.map(lambda x: x + 1, params["terms"])}
    new = teacher.updated(c, old, params, np.int32(0), TOTAL)
    assert list(new) == ["terms"]
    for a, p, got in zip(*map(jax.tree.leaves, (old, {"terms": params["terms"]}, new))):
        np.testing.assert_allclose(got, 0.6 * np.float64(a) + 0.4 * np.float64(p), rtol=1e-6)
    batch = tiny.batch(c)
    whole_one: Any = teacher.of_step(c, new, params, batch)
    seen = whole_one.of_term("follow")
    assert seen.params_of_term["map"]["bias"] is not None and seen.leading == 1
    of_model = {k: v for k, v in params.items() if k != "terms"}
    embed = inference.Predictor(c.model, of_model).encode_image(batch.image)
    np.testing.assert_allclose(seen.image_embed, embed, atol=1e-6)
    assert seen.image_embed is seen.of_term("another").image_embed  # computed once


def test_another_model_is_the_same_teacher_on_every_mesh_and_under_micro_batches(other):
    path, model, params = other
    states, (metrics,) = stepped(config("checkpoint", CUT, path=path), CUT)
    for got, expected in zip(jax.tree.leaves(states[1].teacher), jax.tree.leaves(params)):
        np.testing.assert_array_equal(got, expected)
    given = forward.Given(params, {}, jnp.zeros(()))
    # One device and two micro-batches.
    c = config("checkpoint", path=path, microbatches=2)
    batch, student = tiny.batch(c), grain.GRAIN(c.model, c.dtype, c.remat)
    of_parts = lambda p, b: train_step.loss_and_grads(student, c, None, p, b, None, given)
    losses, grads = jax.jit(of_parts)(states[0].params, batch)
    found = train_step.loss_metrics(losses) | train_step.grad_norms(grads, ())
    for name, value in found.items():
        assert float(value) == pytest.approx(metrics[name], rel=2e-5, abs=1e-6), name
    # The images of the batch, resized, by the model alone.
    assert batch.image.shape[1] == 16 and model.image.image_size == 32
    x = jax.image.resize(batch.image / np.float32(255), (16, 32, 32, 3), "bilinear")
    x = (x - np.array(model.image.pixel_mean)) / np.array(model.image.pixel_std)
    embed = grain.GRAIN(model).apply({"params": params}, x, method="encode_image")[0]
    assert metrics["follow/teacher"] == pytest.approx(float(embed.sum(1).mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    (
        (dict(text__context_length=20), "its model.text.context_length is 20, the run's 32"),
        (dict(text__vocab_size=700), "its model.text.vocab_size is 700, the run's 600"),
        (dict(text__tokenizer="t.json"), "its tokenizer t.json is not the run's clip"),
        (
            dict(text__causal=False, text__pool="last"),
            "its text tower sees the padding of a row; set text.packing=False",
        ),
    ),
)
def test_texts_of_another_tokenizer_are_a_line(changes, words, tmp_path):
    made(tmp_path, **changes)
    c = config("checkpoint", path=str(tmp_path))
    assert teacher.line(c, {}).endswith(f"no texts ({words})")
    with pytest.raises(errors.UserError) as error:
        seen: Any = teacher.of_step(c, {}, {}, tiny.batch(c))
        print(seen.text_embed)
    assert str(error.value) == (
        f"teacher.path: {tmp_path} cannot read the texts of the run, which a term of loss.terms compares: {words};"
        " expected a teacher with the run's text keys, or stored embeddings (grain-jax embed --texts)"
    )


def test_a_teacher_has_the_attention_of_the_run_and_counts_in_its_memory(tmp_path):
    model, params = made(tmp_path)
    by_cudnn = dataclasses.replace(model, attention="cudnn")  # which no CPU has
    saved_model.save_model(tmp_path, by_cudnn, params)
    c = config("checkpoint", path=str(tmp_path))
    own = teacher.model_of(c)
    assert own and own.attention == "cudnn" and c.model.attention == "auto"
    resized = 4 * 16 * 32 * 32 * 3
    assert memory_need._of_terms(c, 16) >= 3 * resized


FAULTS = (
    (
        dict(kind="checkpoint"),
        "teacher.path: got None with teacher.kind=checkpoint, expected a model",
    ),
    (
        dict(kind="ema", path="x"),
        "teacher.path: got 'x' with teacher.kind=ema, which reads none; expected teacher.kind=checkpoint or embeddings, or"
        " no path",
    ),
    (
        dict(kind="checkpoint", path="x", part="heads"),
        "teacher.part: got heads with teacher.kind=checkpoint, expected teacher.kind=ema, or all",
    ),
    (
        dict(kind="embeddings", path="x"),
        "input.source: got synthetic with teacher.kind=embeddings, which are stored by record; expected records",
    ),
    (
        dict(kind="embeddings", path="x", input__source="records", input__flip_rate=0.5),
        "input.flip_rate: got 0.5 with teacher.kind=embeddings, those of whole images and texts as they are stored;"
        " expected 0",
    ),
)


@pytest.mark.parametrize(("changes", "line"), FAULTS)
def test_contradictions_are_a_line(changes, line):
    with pytest.raises(config_lib.ConfigError) as error:
        config(**changes)
    assert str(error.value).splitlines() == [line]


def test_a_teacher_that_no_term_reads_is_a_line():
    c = tiny.dictionary()
    c.teacher.kind = "ema"
    with pytest.raises(
        config_lib.ConfigError, match="got ema without a term in loss.terms that rea"
    ):
        config_lib.from_dict(c)


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(train, "report", lambda *_: None)
    monkeypatch.setattr(train.flops, "of_phases", lambda *_: {(0, None): 1.0})


def trained(c, workdir):
    """The states that the receipts of a run say."""
    train.train(c, train.epath.Path(workdir))
    lines = (workdir / "receipts.jsonl").read_text().splitlines()
    return {record["step"]: record["state"] for record in map(json.loads, lines)}


def parts_of(folder):
    """The arrays of the teacher in a checkpoint."""
    return checkpoint.metadata_of(train.epath.Path(folder / "state"))["teacher"]


def test_a_run_goes_on_with_the_bits_of_its_average(tmp_path, capsys):
    c = averaging(checkpoint_every=2, checkpoint_keep=3)
    states = trained(c, tmp_path)
    told = "teacher: the average of all parameters (0.0M parameters), decay 0.6 to 0.9\n"
    assert told in capsys.readouterr().err
    assert states[4].keys() == {"params", "opt_state", "teacher"}
    assert parts_of(tmp_path / "checkpoints" / "4")
    assert verify_command.main([str(tmp_path)]) == 0  # from the checkpoint of step 2 to step 4
    assert "equal bit for bit at step 4" in capsys.readouterr().out
    assert "terms" not in saved_model.load_model(tmp_path)[1]


def test_a_run_reads_its_teacher_again_and_refuses_another(other, tmp_path, capsys):
    path, model, _ = other
    c = config("checkpoint", CUT, path=path, checkpoint_every=2, checkpoint_keep=3)
    states = trained(c, tmp_path)
    size = sum(int(np.prod(x)) for x in grain.parameter_shapes(model).values()) / 1e6
    told = f"teacher: {path}, {size:.1f}M parameters, images of 32 px, D 28, texts\n"
    assert told in capsys.readouterr().err
    assert states[4].keys() == {"params", "opt_state"}
    assert not parts_of(tmp_path / "checkpoints" / "4")
    assert verify_command.main([str(tmp_path)]) == 0
    assert "equal bit for bit at step 4" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    aside = shutil.move(path, f"{path}_aside")
    try:
        made(path, seed=1)
        with pytest.raises(checkpoint.CheckpointError) as error:
            trained(c, tmp_path)
    finally:
        shutil.rmtree(path)
        shutil.move(aside, path)
        whole.forget()
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"teacher.path: {path} has other content (digest ")
