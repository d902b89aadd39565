"""LoRA against torch, full fine-tuning and its own folded form; what it does not compute; errors; a run."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grain_jax
from grain_jax import config as config_lib
from grain_jax import inference
from grain_jax.checkpoint import files, saved_model
from grain_jax.convert.__main__ import main
from grain_jax.core import errors, low_rank
from grain_jax.inference.inputs import InputError
from grain_jax.models import grain, layers, lora
from grain_jax.train import flops, forward, optim, run, sharding, train_step
from tests import tiny

pytestmark = pytest.mark.long

RANK, ALPHA = 4, 6.0
FACTORS = dict(optim__lora__rank=RANK, optim__lora__alpha=ALPHA)
# Sizes that no other map of the model has.
UNLIKE = dict(
    model__image__width=48, model__image__mlp_dim=80, model__text__width=40, model__text__mlp_dim=72
)
TWO = tiny.TWO_TOWERS
BOTH = "(image|text)/blocks/(attention|mlp)/(query|key|value|out|in)"
# With the options of DINOv3: a gated MLP, rotary positions, registers, layer scale.
ROTARY = dict(
    model__image__mlp="gated",
    model__image__activation="silu",
    model__image__rope="centres",
    model__image__registers=2,
    model__image__layer_scale=True,
    model__image__key_bias=False,
)


def _config(**changes):
    return tiny.config(**FACTORS | changes)


def _model(c):
    return grain.GRAIN(c.model, c.dtype, c.remat, c.optim.lora.scale)


def _params(c):
    """Random parameters of step 0, B too."""
    return tiny.params(sharding.unbox(jax.eval_shape(lambda: lora.init(c))), spread=0.2)


def _applied(c, params):
    return jax.jit(_model(c).apply)({"params": params}, tiny.batch(c))


def _difference(a, b):
    """max|a - b| / max|b|."""
    a, b = np.asarray(a), np.asarray(b)
    return float(np.abs(a - b).max(initial=0) / max(np.abs(b).max(initial=0), 1e-30))


def test_step_0_is_the_base_with_factors_of_the_names_and_axes_of_their_maps():
    c = tiny.small(**FACTORS, **TWO, model__image__mlp="gated")
    both = jax.jit(lambda: (grain.init(_model(c), jax.random.key(c.seed)), lora.init(c)))
    base, boxed = both()
    base, params = grain.flat(base), grain.flat(boxed)
    assert base.keys() < params.keys()
    for name, x in base.items():
        np.testing.assert_array_equal(params[name], x, err_msg=name)
    maps = {name.rpartition("/")[0] for name in params.keys() - base.keys()}
    assert maps == set(low_rank.maps_in(sharding.unbox(boxed)))
    every = {f"{t}/blocks/{m}" for t in ("image", "text") for m in config_lib.LAYER_MAPS}
    assert maps == every - {"text/blocks/mlp/gate"}
    assert not any(params[f"{name}/lora_b"].any() for name in maps)
    many = np.concatenate(
        [(params[f"{n}/lora_a"] * math.sqrt(3 * 32)).ravel() for n in maps if "mlp/out" not in n]
    )
    assert abs(many.std() - 1) < 0.05 and abs(many.mean()) < 0.05
    out = boxed["image"]["blocks"]["attention"]["out"]
    assert out["lora_a"].names == ("layers", "heads", "head_dim", "vector")
    assert out["lora_b"].names == ("layers", "vector", "width")
    assert out["lora_a"].value.shape == (1, 4, 8, RANK) and out["lora_b"].value.shape == (1, RANK, 32)


@pytest.mark.parametrize(
    "more", [dict(model__attention="pallas", model__image__width=128), ROTARY], ids=["pallas", "rotary"]
)
def test_folded_in_is_beside(more):
    c = tiny.small(**FACTORS, **TWO, model__image__depth=2, **more)
    params = _params(c)
    if more is ROTARY:
        assert np.abs(params["image"]["blocks"]["mlp"]["gate"]["lora_b"]).mean() > 0.1
    apart = _applied(c, params)
    folded = lora.merged(jax.tree.map(jnp.asarray, params), c.optim.lora)
    assert not list(low_rank.maps_in(folded))
    together = _applied(dataclasses.replace(c, optim=config_lib.Optim()), folded)
    for name, a, b in zip(apart._fields, apart, together):
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            assert _difference(x, y) < 1e-5, name
    without = _applied(dataclasses.replace(c, optim=config_lib.Optim()), params)
    for name in ("image_embed", "text_embed"):  # the factors count
        assert _difference(getattr(without, name), getattr(apart, name)) > 0.05, name
    on_host = low_rank.merged(params, c.optim.lora.scale)
    for name, x in grain.flat(on_host).items():
        np.testing.assert_allclose(x, grain.flat(folded)[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "inputs,outputs,side_by_side",
    [
        ((6,), (3, 2), False),
        ((3, 2), (6,), False),
        ((6,), (11,), False),
        ((6,), (3, 2), True),
        ((3, 2), (6,), True),
    ],
)
def test_gradients_of_a_map_are_torchs(inputs, outputs, side_by_side):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    n, m = math.prod(inputs), math.prod(outputs)
    params = {"kernel": draw(*inputs, *outputs), "bias": draw(*outputs)}
    params |= {low_rank.A: draw(*inputs, 2), low_rank.B: draw(2, *outputs)}
    x = draw(5, n) if side_by_side else draw(5, *inputs)
    weight = draw(5, m)
    axes, init = (("a",) * len(inputs), ("b",) * len(outputs)), layers.normal(1.0)
    if side_by_side:
        module = layers.Affine(inputs, outputs, *axes, np.dtype("float32"), init, lora=1.5)
    else:
        module = layers.dense(outputs, *axes, dtype=np.dtype("float32"), kernel_init=init, lora=1.5)

    def loss(params, x):
        return (module.apply({"params": params}, x).reshape(5, m) * weight).sum()

    value, (ours, ours_x) = jax.value_and_grad(loss, argnums=(0, 1))(params, x)
    shapes = dict(kernel=(n, m), bias=(m,), lora_a=(n, 2), lora_b=(2, m))
    theirs = {
        k: torch.tensor(v.reshape(shapes[k]), dtype=torch.float64, requires_grad=True)
        for k, v in params.items()
    }
    their_x = torch.tensor(x.reshape(5, n), dtype=torch.float64, requires_grad=True)
    y = their_x @ theirs["kernel"] + 1.5 * (their_x @ theirs["lora_a"]) @ theirs["lora_b"] + theirs["bias"]
    total = (y * torch.tensor(weight, dtype=torch.float64)).sum()
    total.backward()
    assert float(value) == pytest.approx(total.item(), rel=1e-5)
    for name in ("lora_a", "lora_b"):
        assert _difference(ours[name].reshape(shapes[name]), theirs[name].grad.numpy()) < 1e-5
    assert _difference(ours_x.reshape(5, n), their_x.grad.numpy()) < 1e-5


def _products(jaxpr):
    """The shapes of the results of all matrix products in a jaxpr."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield tuple(sorted(equation.outvars[0].aval.shape))
        for part in flops.jaxprs(equation.params):
            yield from _products(part)


@pytest.mark.parametrize("more", [{}, dict(remat="qkv", microbatches=2)], ids=["plain", "remat"])
def test_no_gradient_of_a_matrix_is_computed_and_no_product_of_the_factors(more):
    matrices = {(48, 80), (4, 12, 48), (40, 72), (4, 10, 40), (48, 192), (40, 128)}

    def made(c):
        batch, params = forward.abstract_batch(c), sharding.unbox(jax.eval_shape(lambda: lora.init(c)))
        step = lambda p, b: train_step.loss_and_grads(c, None, p, b, None)
        return set(_products(jax.make_jaxpr(step)(params, batch).jaxpr))

    c = _config(**TWO, **UNLIKE, **more)
    if not more:
        plain = tiny.config(**TWO, **UNLIKE)
        assert made(plain) & matrices >= {(48, 80), (4, 12, 48), (40, 72)}
        ours, full = flops.per_image(c), flops.per_image(plain)
        assert full.forward < ours.forward and ours.train < 0.9 * full.train
    shapes = made(c)
    assert not shapes & matrices
    assert {(RANK, 80), (4, RANK, 12), (RANK, 48), (RANK, 72)} <= shapes  # of the factors


def test_a_predictor_refuses_factors():
    c = tiny.small(**FACTORS)
    with pytest.raises(InputError, match="params: got factors of LoRA"):
        inference.Predictor(c.model, _params(c))


@pytest.mark.parametrize(
    "changes,line",
    [
        (
            dict(lora__modules=("image/blocks/mlp/fc1",)),
            "optim.lora.modules: 'image/blocks/mlp/fc1' matches no module; expected",
        ),
        (
            dict(lora__modules=(BOTH, "image/blocks/.*")),
            r"'image/blocks/.\*' matches image/blocks/\w+/?\w*; expected dense",
        ),
        (dict(lora__modules=(".*/query",)), r"'.\*/query' matches decoder/\S+query; expected"),
        (
            dict(lora__rank=33),
            r"optim.lora.rank: got 33, expected at most 32, the smaller side of image/\S+, which maps 32 to",
        ),
        (dict(frozen=("image/.*",)), r"'image/\.\*' freezes image/blocks/\S+lora_a, which optim.lora trains"),
        (dict(frozen=(".*/lora_b",)), r"'\.\*/lora_b' freezes image/\S+lora_b, which optim.lora trains"),
    ],
)
def test_what_has_no_factors_is_one_line(changes, line):
    c = tiny.small(**{f"optim__{k}": v for k, v in (dict(lora__rank=2) | changes).items()})
    with pytest.raises(errors.UserError, match=line) as error:
        jax.eval_shape(lambda: lora.init(c))
    assert "\n" not in str(error.value)


def test_what_is_a_map_with_factors():
    """Not any module with such a name, as a tower of a user may have it; also one that lost a factor."""
    x = np.zeros((1, 2, 2), np.float32)
    assert not list(low_rank.maps_in({"a": {"lora_a": x}, "b": {"kernel": x}}))
    assert low_rank.merged({"a": {"lora_a": x}}, 1.0) == {"a": {"lora_a": x}}
    half = {"a": {"kernel": x, "lora_b": x}}
    assert list(low_rank.maps_in(half)) == ["a"]
    with pytest.raises(errors.UserError, match="kernel, lora_a, lora_b: got the shapes"):
        low_rank.merged(half, 1.0)


@pytest.mark.parametrize("name", ["kernel", "lora_a", "lora_b"])
def test_factors_that_do_not_fit_are_one_line(name):
    shapes = dict(kernel=(1, 6, 3, 2), lora_a=(1, 6, 4), lora_b=(1, 4, 3, 2))
    params = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
    assert low_rank.merged({"x": params}, 1.0)["x"].keys() == {"kernel"}
    for wrong in (np.zeros((1, 5), np.float32), np.zeros((2, *shapes[name][1:]), np.float32)):
        with pytest.raises(errors.UserError, match=r"kernel, lora_a, lora_b: got the shapes \("):
            low_rank.merged({"x": params | {name: wrong}}, 1.0)


def test_towers_of_users_have_no_factors():
    c = tiny.small(**FACTORS)
    text = dataclasses.replace(c.model.text, tower="examples.tower.mixer:TextMixer")
    model = dataclasses.replace(c.model, text=text)
    shapes = {"image/blocks/mlp/in/kernel": (1, 32, 64), "text/blocks/mlp/in/kernel": (1, 32, 64)}
    message = "matches text/blocks/mlp/in; expected dense maps of layers of built-in towers"
    with pytest.raises(errors.UserError, match=message):
        lora.maps_of(model, c.optim.lora, shapes)
    alone = dataclasses.replace(c.optim.lora, modules=("image/.*",))
    assert lora.maps_of(model, alone, shapes) == ["image/blocks/mlp/in"]
    # One in which the default names nothing would be frozen whole, without a word.
    shapes = {"image/blocks/mlp/in/kernel": (1, 32, 64), "text/stem/kernel": (32, 64)}
    message = "no map of the text tower \\(examples.tower.mixer:TextMixer\\) matches .*would be frozen"
    with pytest.raises(errors.UserError, match=message):
        lora.maps_of(model, c.optim.lora, shapes)


def test_what_is_frozen_beside_the_factors():
    image = ("image/blocks/attention/query",)
    two = dict(model__decoder=None, model__image__pool="map", input__max_regions=0)
    for c, frozen, trained in (
        (
            tiny.small(**FACTORS, optim__lora__modules=image),
            {"image"},
            {"text", "text_norm", "text_projection", "image_projection", "decoder", "logit_scale"},
        ),
        (
            tiny.small(**FACTORS, **two),
            {"image", "image_pool", "image_projection", "text", "text_norm", "text_projection"},
            {"logit_scale"},
        ),
    ):
        params = sharding.unbox(jax.eval_shape(lambda c=c: lora.init(c)))
        for name, is_frozen in grain.flat(optim.frozen_mask(params, c.frozen)).items():
            part = name.partition("/")[0]
            assert is_frozen == (part in frozen and "lora_" not in name), name
            assert part in frozen | trained | {"box_mlp", "region_projection"}


def test_frozen_matrices_in_bfloat16_compute_the_same():
    c = tiny.small(**FACTORS, **TWO, dtype="bfloat16")
    params = sharding.unbox(jax.jit(lambda: lora.init(c))())
    types = {name: x.dtype.name for name, x in grain.flat(params).items()}
    short = {name for name, kind in types.items() if kind == "bfloat16"}
    towers = [name for name in types if name.startswith(("image/", "text/"))]
    assert short == {name for name in towers if name.endswith(("/kernel", "/embedding"))}
    assert {types[name] for name in types.keys() - short} == {"float32"}
    rng = np.random.default_rng(0)
    random = lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype)
    params = jax.tree.map(random, params)
    in_float32 = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    step = jax.jit(lambda params: train_step.loss_and_grads(c, None, params, tiny.batch(c), None))
    (losses, grads), (same_losses, same_grads) = step(params), step(in_float32)
    assert losses.total == same_losses.total
    for name, x in grain.flat(grads).items():
        if name not in short:
            np.testing.assert_array_equal(x, grain.flat(same_grads)[name], err_msg=name)


def test_a_model_that_is_stored_in_bfloat16_is_loaded_in_float32(tmp_path, one_device):
    run.train(tiny.small(**RUN | dict(total_steps=1, dtype="bfloat16")), tmp_path / "run")
    stored = grain.flat(saved_model.load_stored(tmp_path / "run").params)
    matrix, a, b = (stored[f"image/blocks/mlp/in/{name}"] for name in ("kernel", "lora_a", "lora_b"))
    assert matrix.dtype.name == "bfloat16" and a.dtype == b.dtype == np.float32
    loaded = grain.flat(saved_model.load_model(tmp_path / "run")[1])
    assert {x.dtype.name for x in loaded.values()} == {"float32"}
    expected = matrix.astype(np.float64) + 1.5 * a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(loaded["image/blocks/mlp/in/kernel"], expected, rtol=1e-5, atol=1e-6)


RUN = FACTORS | TWO | dict(ema_decay=0.9, total_steps=2, checkpoint_every=1, checkpoint_keep=4)
RUN |= dict(optim__learning_rate=0.02)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, one_device):
    workdir = tmp_path_factory.mktemp("lora") / "run"
    run.train(tiny.small(**RUN), workdir)
    return workdir


def test_it_does_not_go_on_with_another_scale(finished):
    message = "optim.lora.alpha: the run has 6.0, got 8.0\n.* use another --workdir"
    with pytest.raises(files.CheckpointError, match=message):
        run.train(tiny.small(**RUN | dict(optim__lora__alpha=8.0)), finished)


def test_it_is_loaded_and_merged_as_it_was_trained(finished, tmp_path, capsys):
    stored = saved_model.load_stored(finished)
    assert len(list(low_rank.maps_in(stored.params))) == 12
    predictor = grain_jax.load(finished)
    names = grain.parameter_shapes(predictor.model)
    assert grain.flat(predictor.params).keys() == names.keys()
    base = grain.flat(stored.params)["image/blocks/mlp/in/kernel"]
    a, b = (grain.flat(stored.params)[f"image/blocks/mlp/in/lora_{x}"] for x in "ab")
    expected = base.astype(np.float64) + 1.5 * a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(
        predictor.params["image"]["blocks"]["mlp"]["in"]["kernel"], expected, rtol=1e-5, atol=1e-6
    )
    assert np.abs(1.5 * a @ b).max() > 1e-4
    batch = tiny.batch(tiny.small(**RUN))
    apart = jax.jit(grain.GRAIN(stored.model, lora=1.5).apply)({"params": stored.params}, batch)
    folded = jax.jit(grain.GRAIN(stored.model).apply)({"params": predictor.params}, batch)
    for name in ("image_embed", "text_embed"):
        np.testing.assert_allclose(getattr(folded, name), getattr(apart, name), atol=1e-5)
    out = tmp_path / "merged"
    assert main(["average", str(finished), "--output", str(out)]) == 0
    assert "LoRA of rank 4 folded in" in capsys.readouterr().out
    for name, x in grain.flat(saved_model.load_model(out)[1]).items():
        np.testing.assert_array_equal(x, grain.flat(predictor.params)[name], err_msg=name)
