"""A share of the patches in training, and several sequence lengths: what is kept, its gradient, and a run with both."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchvision
from torch.nn import functional as F

from grain_jax import config as config_lib
from grain_jax import train
from grain_jax.cli import config_file
from grain_jax.config import keep as keep_lib
from grain_jax.core import errors, schema
from grain_jax.input_pipeline import order, synthetic
from grain_jax.launch import sweep_runs
from grain_jax.models import grain
from grain_jax.runtime import checkpoint
from grain_jax.training import flops, forward, kept, phases, sharding, train_step
from grain_jax.verify import command as verify
from tests import perturbed, runs, tiny

SIDE, PATCH = 4, 8
TWO_TOWERS = {
    "model__decoder": None,
    "model__image__pool": "mean",
    "model__image__image_size": SIDE * PATCH,
    "input__max_regions": 0,
}
BOXES = {
    "model__boxes__kind": "roi_align",
    "loss__box_description": 1.0,
    "input__max_regions": 5,
}
HALF = [[0, 0.5], [0.5, 1]]
LENGTHS = [[0, [12]], [0.5, [16, 12]]]
STEPS = 4


def config(**changes):
    return tiny.small(batch_size=8, **TWO_TOWERS | dict(total_steps=STEPS) | changes)


def keys_of(images):
    return train_step.dropout_keys(3, 0, jnp.arange(images))


def drawn(keep, by, image, images=64):
    tower = config(model__image__keep=keep, model__image__keep_by=by).model.image
    return np.asarray(kept.draw(keys_of(images), image, tower))


def square(images=64, side=SIDE):
    return jnp.zeros((images, side * PATCH, side * PATCH, 3), jnp.uint8)


def test_random_patches_of_squares():
    found = drawn(0.3, "random", square())
    assert found.shape == (64, 5) and (np.diff(found) > 0).all()  # 4.8 of 16
    counts = np.bincount(found.ravel(), minlength=16)
    assert counts.min() > 5 and counts.max() < 40  # 20 each on average
    assert len({tuple(row) for row in found}) > 60
    again = drawn(0.3, "random", square(3), 3)  # of an image and its key alone
    np.testing.assert_array_equal(found[:3], again)
    assert drawn(0.01, "random", square()).shape == (64, 1)


@pytest.mark.parametrize("keep,of_a_cell", [(0.25, 1), (0.5, 2), (0.75, 3)])
def test_a_grid_keeps_as_many_of_every_cell(keep, of_a_cell):
    found = drawn(keep, "grid", square())
    cells = found // SIDE // 2 * 2 + found % SIDE // 2
    for row in cells:
        assert (np.bincount(row, minlength=4) == of_a_cell).all()
    counts = np.bincount(found.ravel(), minlength=16)
    assert abs(counts / counts.mean() - 1).max() < 1.2 - keep
    assert [kept.cell(x) for x in (0.9, 0.25, 0.2, 1 / 9, 1 / 16)] == [2, 2, 2, 3, 4]


def test_a_grid_with_an_odd_side_favours_no_patch():
    """Cells of 2 x 2 on 5 x 5 patches are cut to 2 and to 1 at two edges."""
    found = drawn(0.25, "grid", square(1024, 5), 1024)
    assert found.shape == (1024, 6)
    shares = np.bincount(found.ravel(), minlength=25).reshape(5, 5) / 1024
    assert abs(shares / 0.24 - 1).max() < 0.2
    cells = found // 5 // 2 * 3 + found % 5 // 2
    whole = np.stack([(cells == cell).sum(1) for cell in (0, 1, 3, 4)])
    assert (whole <= 1).mean() > 0.95 and (whole == 1).mean() > 0.8


@pytest.mark.parametrize("by", keep_lib.BY)
def test_images_in_their_own_shape_keep_the_same_share(by):
    grids = np.array([(2, 6), (3, 5), (4, 4), (1, 9), (1, 1)] * 8, np.int32)
    image = schema.Patches(jnp.zeros((40, 16, 3 * PATCH**2), jnp.uint8), jnp.asarray(grids))
    found = drawn(0.5, by, image, 40)
    assert found.shape == (40, 8)
    for row, (h, w) in zip(found, grids):
        real = row[row < h * w]
        assert len(real) == len({*real}) == max(1, int(h * w / 2 + 0.5))
        assert (row[len(real) :] == 15).all()  # of the padding
        if by == "grid" and (h, w) == (2, 6):
            assert (np.bincount(real % 6 // 2, minlength=3) == 2).all()


def _tower_in_torch(p, pixels, at):
    """The image tower in float64: embeddings of images whose patches are `at`, and the tokens of these."""
    weight = lambda name: p[f"image/{name}"]
    norm = lambda x, name: F.layer_norm(
        x, x.shape[-1:], weight(f"{name}/scale"), weight(f"{name}/bias"), 1e-6
    )
    b, width = len(pixels), weight("class_token").shape[0]
    x = pixels.reshape(b, SIDE, PATCH, SIDE, PATCH, 3).permute(0, 1, 3, 2, 4, 5)
    x = x.reshape(b, SIDE**2, -1) @ weight("patch_embed/kernel") + weight("patch_embed/bias")
    x = torch.stack([image[i] + weight("position_embed")[1 + i] for image, i in zip(x, at)])
    first = weight("class_token") + weight("position_embed")[0]
    x = torch.cat([first.expand(b, 1, width), x], 1)
    layer = lambda name: weight(f"blocks/{name}")[0]
    of_layer = lambda x, name: F.layer_norm(
        x, x.shape[-1:], layer(f"{name}/scale"), layer(f"{name}/bias"), 1e-6
    )
    y = of_layer(x, "norm_1")
    q, k, v = (
        torch.einsum("bne,ekd->bknd", y, layer(f"attention/{name}/kernel"))
        + layer(f"attention/{name}/bias")[:, None]
        for name in ("query", "key", "value")
    )
    y = F.scaled_dot_product_attention(q, k, v)
    out = layer("attention/out/kernel")
    x = x + torch.einsum("bknd,kde->bne", y, out) + layer("attention/out/bias")
    y = of_layer(x, "norm_2") @ layer("mlp/in/kernel") + layer("mlp/in/bias")
    x = x + F.gelu(y) @ layer("mlp/out/kernel") + layer("mlp/out/bias")
    tokens = norm(x, "norm")[:, 1:]
    embed = F.normalize(tokens.mean(1) @ p["image_projection/kernel"], dim=-1)
    return embed, tokens


def _boxes_in_torch(p, tokens, at, corners):
    """RoIAlign of the kept tokens: torchvision's weights of each patch, divided by their sum; 0 without any."""
    one_hot = torch.eye(SIDE**2, dtype=torch.float64).reshape(1, SIDE**2, SIDE, SIDE)
    found = []
    for image, i, boxes in zip(tokens, at, corners):
        weights = torchvision.ops.roi_align(one_hot, [boxes * SIDE], 1, 1.0, 4, aligned=True)
        weights = weights.flatten(1)[:, i]
        found.append(weights @ image / weights.sum(1, keepdim=True).clamp(min=1e-12))
    return F.normalize(torch.stack(found) @ p["box_projection/kernel"], dim=-1)


@pytest.fixture(scope="module")
def case():
    """(config, parameters, batch, keys, kept patches)."""
    c = config(model__image__keep=0.5, model__image__qk_norm=False, **BOXES)
    keys = keys_of(8)
    at = kept.draw(forward._folded(keys, forward.KEEP), square(8), c.model.image)
    return c, perturbed.params(c.model), tiny.batch(c), keys, np.asarray(at)


def test_the_gradient_is_that_of_the_kept_patches(case):
    c, params, batch, keys, at = case
    of_run = forward.Forward(grain.GRAIN(c.model), c)
    rng = np.random.default_rng(0)
    read = lambda out: (out.image_embed, out.box_embed)
    shapes = jax.eval_shape(lambda: read(of_run(params, batch, keys)))
    ahead = [rng.normal(size=x.shape).astype(np.float32) for x in shapes]

    @jax.jit
    def ours(params):
        found = read(of_run(params, batch, keys))
        return sum((x * a).sum() for x, a in zip(found, ahead)), found

    grads, found = jax.grad(ours, has_aux=True)(params)

    theirs = {
        name: torch.tensor(np.asarray(x, np.float64), requires_grad=True)
        for name, x in grain.flat(params).items()
    }
    pixels = torch.tensor((batch.image / 255 - schema.IMAGE_MEAN) / schema.IMAGE_STD)
    at = torch.tensor(at).long()
    embed, tokens = _tower_in_torch(theirs, pixels.double(), at)
    centre, half = np.split(batch.region_boxes_cxcywh * np.array([1, 1, 0.5, 0.5]), 2, -1)
    corners = torch.tensor(np.concatenate([centre - half, centre + half], -1)).double()
    expected = embed, _boxes_in_torch(theirs, tokens, at, corners)
    sum((x * torch.tensor(a)).sum() for x, a in zip(expected, ahead)).backward()
    for one, other in zip(found, expected):
        np.testing.assert_allclose(one, other.detach(), atol=2e-6)
    of_images = {k: v for k, v in grain.flat(grads).items() if not k.startswith(("text", "logit"))}
    most = max(abs(theirs[name].grad.numpy()).max() for name in of_images)
    for name, grad in of_images.items():
        other = theirs[name].grad.numpy()  # that of the biases of keys is 0
        np.testing.assert_allclose(grad, other, rtol=1e-5, atol=1e-6 * most, err_msg=name)


def test_micro_batches_and_meshes_keep_the_same_patches():
    """Two parts on two devices, and all at once: another patch would change the gradient by far more than rounding."""
    whole, parts = (config(model__image__keep=0.5, microbatches=n) for n in (1, 2))
    params, given = perturbed.params(whole.model), (tiny.batch(whole), keys_of(8))
    mesh = sharding.make_mesh(parts.mesh, jax.devices()[:2])

    def gradient(c, mesh, *given):
        step = lambda *given: train_step.loss_and_grads(grain.GRAIN(c.model), c, mesh, *given)
        losses, grads = jax.jit(step)(params, *given)
        return jax.device_get((losses.total, grads["image"]))

    expected = gradient(whole, None, *given)
    found = gradient(parts, mesh, *jax.device_put(given, sharding.batch_sharding(mesh)))
    most = max(abs(x).max() for x in jax.tree.leaves(expected[1]))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-6 * most)


class Counts(tiny.EndsAt):
    """Counts what is compiled between the steps of a run."""

    def __init__(self):
        super().__init__(STEPS + 1)
        self.compiled, self.after = 0, []

    def reached(self):
        self.after.append(self.compiled)
        return super().reached()

    def heard(self, name, *_, **__):
        self.compiled += name.endswith("backend_compile_duration")


def of_run(**changes):
    given = dict(model__image__keep=HALF, input__sequence_lengths=LENGTHS)
    return config(**given | dict(checkpoint_every=1, checkpoint_keep=STEPS) | changes)


def of_epochs():
    """The same run, whose steps follow from its data set."""
    return of_run(total_steps=None, total_epochs=STEPS * 8 / synthetic.NUM_EXAMPLES)


def on_one_device(patch):
    """And without a count of FLOPs."""
    devices = jax.devices()[:1]
    patch.setattr(jax, "devices", lambda: devices)
    patch.setattr(train.flops, "per_image", lambda c: flops.PerImage(1.0, 0, 0, 0))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with two shares and two lengths that nothing interrupts, and what it compiled."""
    workdir, counts = tmp_path_factory.mktemp("whole"), Counts()
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch)
        jax.monitoring.register_event_duration_secs_listener(counts.heard)
        try:
            train.train(of_epochs(), workdir, handler=counts)
        finally:
            jax.monitoring.unregister_event_duration_listener(counts.heard)
    return workdir, counts


def test_a_program_for_each_share_and_length_and_none_in_the_run(whole):
    workdir, counts = whole
    lines = runs.lines(workdir)
    assert [line["keep"] for line in lines] == [0.5, 0.5, 1, 1]
    lengths = [order.sequence_length(of_run(), step) for step in range(STEPS)]
    assert [line["sequence_length"] for line in lines] == lengths
    assert lengths == [12, 12, 12, 16]
    assert checkpoint.load_stored(workdir).sequence_lengths == (16, 12)
    assert counts.compiled >= 3 and counts.after[0] == counts.after[-1], counts.after
    # The steps that follow from the data set make no other config, as for a sweep that goes on.
    stored = json.loads((workdir / "config.json").read_text())
    assert stored["total_steps"] is None and stored["total_epochs"] == of_epochs().total_epochs
    sweep_runs.check_folders([sweep_runs.SweepRun("point", {}, of_epochs(), (), workdir)])


def test_a_run_that_resumes_before_the_switch_is_the_same(whole, tmp_path, capfd, monkeypatch):
    workdir, _ = whole
    on_one_device(monkeypatch)
    shutil.copytree(workdir / "checkpoints" / "1", tmp_path / "checkpoints" / "1")
    train.train(of_epochs(), tmp_path)
    assert "3 programs, compiled in" in capfd.readouterr().err
    assert runs.lines(tmp_path) == runs.lines(workdir)[1:]
    stored = [
        checkpoint.read_json(folder / "checkpoints" / str(STEPS), "receipt")["state"]
        for folder in (tmp_path, workdir)
    ]
    assert stored[0] == stored[1] and set(stored[0]) >= {"params", "opt_state"}
    verify.main([str(workdir), "--from", "1", "--steps", "2"])
    assert "the same batches, and the same parameters bit for bit" in capfd.readouterr().out


def test_the_phases_of_shares_and_lengths():
    c = of_run(
        input__sequence_lengths=(12, 16),
        loss__image_description={"end": 1, "from": 0.3},
        model__image__keep=[[0, 0.25], [0.5, 1]],
        input__max_regions=5,
    )
    found = phases.of(c, 10)
    off = frozenset({"image_description"})
    assert found[::2] == [
        phases.Phase(0, off, 0.25, 12),
        phases.Phase(3, frozenset(), 0.25, 12),
        phases.Phase(5, frozenset(), 1.0, 12),
    ]
    assert [phase.length for phase in found] == [12, 16] * 3
    assert phases.shares(found, 10) == pytest.approx([0.15, 0.15, 0.1, 0.1, 0.25, 0.25])
    assert [len(own) for own in phases.steps(found, 10)] == [3, 3, 2, 2, 5, 5]
    part = phases.at(c, found[3])
    assert (part.model.image.keep, part.input.sequence_lengths) == (0.25, (16,))
    assert forward.abstract_batch(part).image.pixels.shape == (8, 16, 192)
    assert (forward.patches_seen(part), forward.patches_seen(c)) == (4, 16)
    assert phases.largest(found) == 5
    keys = [phase.key for phase in found]
    assert phases.of_step(keys, c, 4) == (3, order.sequence_length(c, 4))
    of_key = dict(zip(keys, range(6)))
    steps = [of_key[phases.of_step(keys, c, step)] for step in range(2, 7)]
    assert flops.of_steps(of_key, c, range(2, 7)) == np.mean(steps)
    assert keep_lib.of_steps(((0.0, 0.5), (0.07, 1.0)), 100) == [(0, 0.5), (7, 1.0)]


def test_the_phases_of_lengths_by_the_share_of_the_run():
    c = of_run(model__image__keep=[[0, 0.5], [0.75, 1]], total_steps=100)
    found = phases.of(c, 100)
    assert [(x.first, x.keep, x.length) for x in found] == [
        (0, 0.5, 12),
        *((50, 0.5, 16), (50, 0.5, 12)),
        *((75, 1.0, 16), (75, 1.0, 12)),
    ]
    assert phases.shares(found, 100) == [0.5, *[0.125] * 4]
    lengths = [order.sequence_length(c, step) for step in range(100)]
    assert lengths[:50] == [12] * 50 and 15 < lengths[50:].count(16) < 35
    keys = [phase.key for phase in found]
    assert phases.of_step(keys, c, 99) == (75, lengths[99])
    assert forward.patches_seen(c) == 16 and c.input.last_lengths == (16, 12)
    short_last = [[0, [16]], [0.75, [6]]]  # half of 16 patches, then all of 6
    c = of_run(model__image__keep=[[0, 0.5], [0.75, 1]], input__sequence_lengths=short_last)
    assert phases.largest(phases.of(c, 100)) == 0 and forward.patches_seen(c) == 8
    alone_first = [[0, [12]], [0.3, [16]], [0.6, [12, 16]]]
    found = phases.of(of_run(input__sequence_lengths=alone_first, model__image__keep=1), 10)
    assert [phase.key for phase in found] == [(0, 12), (3, 16), (6, 12), (6, 16)]
    with pytest.raises(ValueError, match="total_steps: got None with input.sequence_lengths="):
        order.sequence_length(of_epochs(), 0)


def test_flops_are_those_of_the_kept_tokens():
    """By hand, of one layer: 4 maps, the MLP, two products of attention; embedding, positions, projection."""
    c = config()
    width, mlp, pixels = 32, 64, 3 * PATCH**2

    def by_hand(n):
        layer = (n + 1) * (8 * width**2 + 4 * width * mlp) + 4 * (n + 1) ** 2 * width
        return layer + 2 * n * pixels * width + 2 * width * c.model.embed_dim

    positions = 2 * 4 * SIDE**2 * width
    assert flops.per_image(config(model__image__keep=0.25)).image == by_hand(4) + positions
    assert flops.per_image(c).image == by_hand(16)


def test_pairs_on_the_command_line_and_in_a_stored_config():
    c = config_file.load("demo", ["--config.model.image.keep=[[0, 0.5], [0.9, 1]]"])
    assert c.model.image.keep == ((0, 0.5), (0.9, 1))
    c = config_file.load("demo", ["--config.input.sequence_lengths=[[0, [64]], [0.8, [64, 196]]]"])
    assert c.input.sequence_lengths == ((0, (64,)), (0.8, (64, 196)))
    assert config_lib.from_dict(json.loads(config_lib.to_json(c))) == c


@pytest.mark.parametrize(
    "keep",
    [0, 1.5, "half", [], [[0.1, 0.5]], [[0, 0.5], [0.5, 2]], [[0, 0.5], [0, 1]], [[0, 1, 2]]],
)
def test_other_shares_are_refused(keep):
    with pytest.raises(errors.UserError, match=r"^model\.image\.keep: got .*, expected a share"):
        config(model__image__keep=keep)


@pytest.mark.parametrize(
    "lengths", [64, [1.5], [[0.1, [4]]], [[0, []]], [[0, 4]], [[0, [4]], [0, [9]]]]
)
def test_other_lengths_are_refused(lengths):
    with pytest.raises(
        errors.UserError, match=r"^input\.sequence_lengths: got .*, expected numbers of"
    ):
        config(input__sequence_lengths=lengths)
