"""What parameters start from: the reference's distributions, towers from elsewhere; and which ones stay."""

import functools
import json

import jax
import numpy as np
import pytest

from grain_jax import config as config_lib
from grain_jax.checkpoint import digests, pretrained, saved_model, states
from grain_jax.checkpoint.pretrained import hub
from grain_jax.configs import grain_vitb16_cc12m
from grain_jax.convert import tables
from grain_jax.core import errors
from grain_jax.evaluate import kinds
from grain_jax.models import grain, region_decoder, vit
from grain_jax.train import initialise, optim
from tests import paths, tiny
from tests import siglip as siglip_keys

pytestmark = pytest.mark.long


def test_short_periods_tell_the_patches_of_a_small_grid_apart():
    still = lambda period: (vit.sincos2d(8, 96, period).std(0) < 0.05).mean()
    assert still(16.0) < 0.05  # nearly every channel varies over the grid
    assert still(1e4) > 0.6  # MoCo's period: most do not


def test_the_gain_scales_queries_keys_and_values_alone():
    def params(gain):
        config = tiny.config(model__decoder__qkv_init_gain=gain).model.decoder
        decoder = region_decoder.QueryDecoder(config, np.dtype("float32"))
        variables = jax.jit(decoder.init)(jax.random.key(0), np.zeros((1, 5, 32), np.float32))
        return jax.tree.leaves_with_path(variables["params"]["blocks"])

    for (path, plain), (_, other) in zip(params(1.0), params(2.5), strict=True):
        name = jax.tree_util.keystr(path)
        scaled = any(f"['{part}']['kernel']" in name for part in ("query", "key", "value"))
        np.testing.assert_allclose(other, plain * (2.5 if scaled else 1.0), rtol=1e-5, err_msg=name)


def statistics(x):
    x = np.asarray(x, np.float64)
    moments = dict(mean=x.mean(), std=x.std(), min=x.min(), max=x.max(), zeros=np.mean(x == 0))
    return {"values": x.size} | {name: float(f"{v:.6g}") for name, v in moments.items()}  # as the golden


@pytest.mark.parametrize("block_init", ["torch", "trunc_normal"])
def test_every_parameter_starts_as_the_references(block_init):
    """At ViT-B/16's widths, with two layers a tower and 2,048 tokens; golden["about"] says what made it."""
    golden, c = (
        json.loads((paths.GOLDENS / "initialisation.json").read_text()),
        grain_vitb16_cc12m.get_config(),
    )
    c.model.image.update(depth=2, block_init=block_init)
    c.model.text.update(depth=2, vocab_size=2048)
    c.model.decoder.depth = 2
    model = config_lib.from_dict(c).model
    expected = dict(golden["reference"])
    texts = np.zeros((1, 1, model.text.context_length), np.int32)
    image = np.zeros((1, model.image.image_size, model.image.image_size, 3), np.uint8)

    def encode(module):
        if block_init == "trunc_normal":
            return module.image_tokens(image)
        encoded = module.embeddings(module.image_tokens(image))
        return encoded, module.encode_text(texts, texts, texts, texts[0, :, :2])

    if block_init == "trunc_normal":  # the documented difference: the image's blocks as timm makes them
        expected |= golden["timm_blocks"]
        expected = {x: expected[x] for x in expected if x.startswith(("image/", "logit_scale"))}
    init = jax.jit(lambda key: grain.GRAIN(model).init(key, method=encode))
    params = grain.flat(init(jax.random.key(0))["params"])
    ours = {name: statistics(x) for name, x in params.items()}
    assert ours.keys() == expected.keys()
    faults = []
    for name, theirs in expected.items():
        got = ours[name]
        error = 5 * (1 / got["values"] + 1 / theirs["values"]) ** 0.5 * theirs["std"]
        largest = max(-theirs["min"], theirs["max"])
        # The extremes of many values are near each other; of few they only stay below the largest.
        same = 0.2 * largest if got["values"] >= 1000 else 2 * largest
        if (
            abs(got["mean"] - theirs["mean"]) > error + 1e-9
            or abs(got["std"] - theirs["std"]) > error
            or max(-got["min"], got["max"]) > 1.2 * largest
            or abs(got["min"] - theirs["min"]) > same
            or abs(got["max"] - theirs["max"]) > same
            or abs(got["zeros"] - theirs["zeros"]) > 1e-4
        ):
            faults.append(f"{name}: {got}, the reference {theirs}")
    assert not faults, "\n".join(faults)


def test_text_positions_are_stretched_after_the_first_twenty():
    old = np.random.default_rng(0).standard_normal((77, 5)).astype(np.float32)
    new = initialise.resize_text_positions(old, 248)
    np.testing.assert_array_equal(new[:21], old[:21])
    np.testing.assert_array_equal(new[-1], old[-1])
    step = (76 - 20) / (248 - 20 - 1)  # places of the old table a place of the new one
    position = 20 + 100 * step
    low = int(position)
    expected = old[low] + (position - low) * (old[low + 1] - old[low])
    np.testing.assert_allclose(new[120], expected, rtol=1e-4)
    np.testing.assert_array_equal(initialise.resize_text_positions(old, 30), old[:30])
    np.testing.assert_array_equal(initialise.resize_text_positions(old[:4], 5)[[0, -1]], old[[0, 3]])


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """(folder of ours with the towers of big_vision's golden, their arrays by our names)."""
    folder = siglip_keys.convert_golden(tmp_path_factory.mktemp("siglip"))
    return folder, grain.flat(saved_model.load_model(folder)[1])


def _siglip(path, **overrides):
    """A tiny run with the golden's towers, whose images and texts are larger than there."""
    c = tiny.dictionary()
    sizes = dict(heads=2, mlp_dim=128)
    c.model.image.update(siglip_keys.IMAGE | sizes | dict(image_size=48, patch_size=8))
    c.model.text.update(
        siglip_keys.TEXT | sizes | dict(vocab_size=300, context_length=24, width=32, pad_id=0)
    )
    c.text.packing, c.model.embed_dim = False, 32
    c.update_from_flattened_dict({"init.image": str(path), "init.text": str(path), **overrides})
    return c


def test_a_run_starts_from_big_visions_towers_and_lit_trains_the_rest(siglip, tmp_path):
    path, params = siglip
    changes = {"optim.frozen": ("image/.*", "logit_scale"), "ema_decay": 0.9}
    c = config_lib.from_dict(_siglip(path, **changes))
    program = tiny.program(c, 1)
    moments = grain.flat(program.state.opt_state)
    assert not any("image/blocks" in name for name in moments)
    assert any("decoder/blocks" in name for name in moments)
    said: list[str] = []
    state = initialise.state_of_step_0(c, program, said.append)
    assert "init.image: 16 positions resized to 36" in said
    (unused,) = [x for x in said if "not used" in x]
    assert "image_pool/probe" in unused and "init.image" in unused
    flat = grain.flat(state.params)
    for name in ("image/patch_embed/kernel", "text_projection/bias"):
        np.testing.assert_array_equal(flat[name], params[name])
    np.testing.assert_allclose(  # as a tower that runs at this size resizes them
        flat["image/position_embed"], vit.resized_positions(params["image/position_embed"], 0, 6)
    )
    positions = params["text/position_embed"]
    np.testing.assert_array_equal(flat["text/position_embed"][:15], positions[:15])
    before = jax.tree.map(np.asarray, state)
    batch = jax.device_put(tiny.batch(c), program.batch_sharding)
    after, metrics = program.step(state, batch)
    assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    _frozen_alone_stay(before.params, after.params)
    _frozen_alone_stay(before.ema_params, after.ema_params)
    # Moments that only some parameters have go through a checkpoint and onto another mesh.
    two = tiny.program(config_lib.from_dict(_siglip(path, **changes, **{"mesh.fsdp": 2})), 2)
    checkpoints = states.Checkpoints(tmp_path / "run", c)
    checkpoints.save(after)
    checkpoints.wait()
    shape = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    placed = jax.tree.map(shape, two.state, two.shardings)
    restored = states.restore(checkpoints.directory / "1", placed)
    checkpoints.close()
    assert digests.of_state(restored) == digests.of_state(after)
    kernel = restored.params["image"]["patch_embed"]["kernel"]
    assert [shard.data.shape for shard in kernel.addressable_shards] == [(192, 16)] * 2


def _frozen_alone_stay(before, after):
    old, new = grain.flat(before), grain.flat(after)
    for name in old:
        frozen = name.startswith("image/") or name == "logit_scale"
        frozen |= name.endswith("cross_attention/key/bias")  # softmax does not see it
        assert np.array_equal(old[name], new[name]) == frozen, name


def test_whole_images_are_scored_as_published_after_every_step(siglip):
    published, _ = siglip
    c = tiny.regions_of(published, **{"model.decoder.boxes": "pointer", "model.decoder.reads_box": True})
    program = tiny.program(c, 1)
    state = initialise.state_of_step_0(c, program, lambda line: None)
    first = jax.device_get(state.params)
    model, stored, _ = saved_model.load_model(published)
    batch = tiny.batch(c)
    outputs = lambda config, params: jax.jit(grain.GRAIN(config).apply)({"params": params}, batch)
    expected = outputs(model, stored)
    for _ in range(2):
        state, _ = program.step(state, batch)
    got = outputs(c.model, jax.device_get(state.params))
    of_images = lambda x: (x.image_embed, x.text_embed, *x.scales[:2])
    for ours, theirs in zip(of_images(got), of_images(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    assert got.scales.region_logit_bias != got.scales.logit_bias
    before, after = grain.flat(first), grain.flat(jax.device_get(state.params))
    moved = {name for name in after if not np.array_equal(before[name], after[name])}
    stored = set(grain.flat(stored))
    assert not moved & stored
    assert {name.partition("/")[0] for name in moved} >= {
        *("decoder", "pointer", "region_projection", "region_logit_scale", "region_logit_bias")
    }
    moments = {n.split("/mu/")[-1] for n in grain.flat(program.state.opt_state) if "/mu/" in n}
    assert moments and not moments & stored


def test_a_pattern_that_freezes_nothing_is_named():
    with pytest.raises(errors.UserError, match="optim.frozen: 'img/.\\*' matches no parameter"):
        optim.frozen_mask({"image": {"bias": np.zeros(2)}}, ("img/.*",))


def _load(c):
    return initialise.load(config_lib.from_dict(c))


THERE = "but the model there has"
OTHERS = [  # keys of the config; what each line says
    (
        {"model.image.pre_norm": True, "model.image.depth": 3, "model.image.activation": "gelu"},
        [
            f"image.depth: got 3, {THERE} 2",
            f"image.pre_norm: got True, {THERE} False",
            f"image.activation: got 'gelu', {THERE} 'gelu_tanh'",
            "image/pre_norm/bias: missing",
        ],
    ),
    ({"model.image.pixel_mean": (0.4, 0.4, 0.4)}, [f"model.image.pixel_mean: got (0.4, 0.4, 0.4), {THERE}"]),
    (
        {"model.embed_dim": 16},
        [
            "text_projection/bias: got shape (32,), expected (16,)",
            "text_projection/kernel: got shape (32, 32), expected (32, 16)",
        ],
    ),
    ({"init.image": "nowhere"}, ["nowhere: no such folder"]),
]


@pytest.mark.parametrize("change,messages", OTHERS)
def test_another_tower_than_the_configs_is_refused(change, messages, siglip):
    with pytest.raises(errors.UserError) as error:
        _load(_siglip(siglip[0], **change))
    said = str(error.value)
    assert all(message in said for message in messages), said


def test_what_the_config_says_otherwise_is_told(siglip):
    report = _load(_siglip(siglip[0])).report
    assert not [x for x in report if "CHECK" in x]
    changes = {"model.text.pad_id": 2, "model.text.cleaning": "none"}
    report = _load(_siglip(siglip[0], **changes)).report
    assert [x.partition(":")[2].split()[1] for x in report if "CHECK" in x] == [
        "model.text.cleaning:",
        "model.text.pad_id:",
    ]
    assert [x for x in report if "attends to its padding" in x]


def test_towers_of_our_own_checkpoints(tmp_path, monkeypatch):
    c = tiny.config()
    rng = np.random.default_rng(0)
    expected = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in grain.parameter_shapes(c.model).items()
    }
    saved_model.save_model(tmp_path / "ours", c.model, tables.nested(expected))
    other = tiny.dictionary(init__image=str(tmp_path / "ours"), init__text=str(tmp_path / "ours"))
    loaded = _load(other).params
    assert loaded.keys() == {k for k in expected if k.startswith(("image/", "text"))}
    for name, array in loaded.items():
        np.testing.assert_array_equal(array, expected[name])
    other.init.decoder, other.model.decoder.class_score = str(tmp_path / "ours"), "best"
    everything = _load(other)
    assert everything.params.keys() == expected.keys()
    for name, array in everything.params.items():
        np.testing.assert_array_equal(array, expected[name])
    monkeypatch.setattr(hub, "download", lambda name: tmp_path / name.removeprefix("hf://ORG/"))
    other.init.update(dict.fromkeys(("image", "text", "decoder"), "hf://ORG/ours"))
    pretrained.check(config_lib.from_dict(other).init)
    assert _load(other).params.keys() == expected.keys()
    other.init.decoder = str(tmp_path / "ours")
    rest = len(expected) - len(loaded)
    assert everything.report[-1] == f"init.decoder: {rest} arrays from {tmp_path / 'ours'}"
    other.model.decoder.depth = 3
    with pytest.raises(initialise.InitError, match="init.decoder: .*model.decoder.depth: got 3,"):
        _load(other)


def test_evaluations_that_need_regions_are_refused_before_the_run():
    described = functools.partial(kinds.evaluator, "zeroshot", "seen", descriptions="D.json")
    for entry, fine in (
        (kinds.evaluator("grounding", "test", annotations="A.jsonl"), False),
        (described(), False),
        (described(alphas=(1.0,)), True),
        (kinds.evaluator("zeroshot", "seen"), True),  # without descriptions alpha is 1
        (kinds.evaluator("retrieval", "test", annotations="A.jsonl"), True),
    ):
        c = tiny.dictionary(**tiny.TWO_TOWERS, evals__x=entry)
        run = config_lib.from_dict(c)
        if fine:
            assert kinds.from_entries(run.evals, run.model)
            continue
        with pytest.raises(config_lib.ConfigError, match="^evals.x.kind: got [^\n]*regions[^\n]*$"):
            kinds.from_entries(run.evals, run.model)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"model.text.causal": False}, "text.packing: got True, expected False"),
        ({"model.text.pool": "last"}, "text.packing: got True, expected False"),
        ({"model.text.pool": "map"}, "or model.text.mask_padding=True"),
        ({"input.text_length": 33}, "input.text_length: got 33, expected 3 to model.text.context"),
        ({"model.image.pool": "map"}, "image.pool, model.image.projection: got 'map', 'matrix'"),
        ({"model.text.cleaning": "none"}, "text.cleaning: got 'none', expected lower, which is"),
        ({"model.text.end_id": 10**6}, "model.text.end_id: got 1000000, expected less than"),
        ({"model.text.end_id": -1}, "model.text.end_id: got -1, expected None or an id, unless"),
        ({"model.image.pool_heads": 5}, "model.image.pool_heads: got 5, expected 0 or a divisor of"),
        ({"model.image.keep": 1.5}, "model.image.keep: got 1.5, expected float, 0.01 to 1"),
        (
            {"model.image.rope": "centres", "model.image.heads": 16},
            "model.image.rope: got 'centres', expected none unless",
        ),
        ({"model.image.positions": False}, "model.image.positions: got False, expected True"),
        ({"model.image.rope": "axial"}, "rope: got 'axial', expected one of none, centres, indices"),
        (
            {"optim.lora.rank": 4, "optim.lora.modules": ("(",)},
            "optim.lora.modules: got ('(',), expected regular",
        ),
    ],
)
def test_configs_that_contradict_themselves(change, message):
    c = tiny.dictionary()
    c.update_from_flattened_dict(change)
    with pytest.raises(config_lib.ConfigError) as error:
        config_lib.from_dict(c)
    assert message in str(error.value) and "\n" not in str(error.value)
