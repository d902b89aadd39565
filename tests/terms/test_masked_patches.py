import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from grain_jax import config as config_lib
from grain_jax.config import ConfigError
from grain_jax.config.parse import loss_term
from grain_jax.models.places import of_grid, of_square
from grain_jax.terms import masked_patches
from grain_jax.terms.masked_patches import MaskedPatches, Options
from tests import tiny
from tests.models import test_towers
from tests.terms import linear

SMALL = dict(prototypes=12, hidden=10, bottleneck=7, tile=5)
MODEL = tiny.config(model__image__width=linear.WIDTH, model__image__heads=2).model


def _setup(**options):
    """A term, random parameters of the student and of the teacher, and a state."""
    term = MaskedPatches(Options(**SMALL | options), MODEL)
    p, its = linear.params(0), linear.params(1)
    state = dict(term.initial_state())
    fresh = linear.shapes(term, linear.seen(MODEL, p, its, state=state))
    rng = np.random.default_rng(3)
    usage = rng.random(12).astype(np.float32)
    state = {"centre": rng.normal(0, 0.1, 12).astype(np.float32), "usage": usage / usage.sum()}
    return term, linear.perturbed(fresh, 1), p, its, linear.perturbed(fresh, 2), state


def _in_torch(term, own, p, its, teacher, state, masks):
    """The loss of iBOT, image by image and patch by patch, float64; the teacher's logits and distributions."""
    options, seen = term.options, linear.seen(MODEL, p, its)
    own, p = linear.double(own), linear.double(p)
    its, teacher = (jax.tree.map(lambda x: x.detach(), linear.double(x)) for x in (its, teacher))
    image = linear.normalised(seen.views.global_view.image[:, 0], MODEL)
    temperature = 0.04 + 0.1 / 0.3 * (0.07 - 0.04)
    losses, logits, targets = [], [], []
    for i, mask in enumerate(masks):
        one = image[i : i + 1]
        masked = torch.tensor(mask)[None], own["mask_token"]
        student = linear.tokens(p, one, masked)[0, 1:]
        of_teacher = linear.tokens(its, one)[0, 1:]
        which = np.arange(len(mask)) if options.visible else np.flatnonzero(mask)
        z = linear.head(teacher["head"], of_teacher[which], options.head_layers)
        target = torch.softmax((z - torch.tensor(state["centre"])) / temperature, -1)
        found = linear.head(own["head"], student[which], options.head_layers)
        losses.append(linear.cross_entropy(target, found, options.student_temperature).mean())
        logits.append(z.mean(0))
        targets.append(target.mean(0))
    loss = torch.stack(losses).mean()
    loss.backward()
    means = (torch.stack(x).mean(0).numpy() for x in (logits, targets))
    return loss.item(), linear.gradients((own, p)), *means


@pytest.mark.parametrize("options", (dict(), dict(mask="random", visible=True)))
def test_it_is_the_loss_of_the_paper(options):
    """Values, gradients of student, head and mask token, and the new centre against torch in float64."""
    term, own, p, its, teacher, state = _setup(**options)

    def of(own, p):
        output = term.apply({"params": own}, linear.seen(MODEL, p, its, head=teacher, state=state))
        return output.loss.sum.sum() / output.loss.count.sum(), output

    (loss, output), grads = jax.jit(jax.value_and_grad(of, (0, 1), has_aux=True))(own, p)
    keys = linear.seen(MODEL, p, its).keys
    masks = [np.asarray(_drawn(term.options, 4, key).mask) for key in keys]
    expected, expected_grads, z, target = _in_torch(term, own, p, its, teacher, state, masks)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert linear.worst(grads, expected_grads) < 1e-5
    new = term.update(state, output.statistics)
    centre, usage = 0.9 * state["centre"] + 0.1 * z, 0.9 * state["usage"] + 0.1 * target
    assert linear.worst(new, {"centre": centre, "usage": usage}) < 1e-6
    assert set(output.measures) == {"kl", "entropy", "entropy_of_one"}


def _drawn(options, side, key):
    """The mask of a square."""
    return masked_patches.draw_mask(options, jax.tree.map(lambda x: x[0], of_square(1, side)), key)


@pytest.mark.parametrize("kind", ("block", "random"))
def test_masks_of_images_in_their_own_shape(kind):
    """No padding is masked; blocks are rectangles of the grid; the rest of what holds for a square."""
    options = Options(mask=kind, min_share=0.2, max_share=0.4, visible=True)
    grids = jnp.asarray([(3, 20), (20, 3), (8, 8), (1, 7)])
    at, key = of_grid(grids, 70), jax.random.split(jax.random.key(0), 4)
    found = jax.jit(jax.vmap(lambda *x: masked_patches.draw_mask(options, *x)))(at, key)
    count = np.asarray(found.mask.sum(1))
    share = count / np.asarray(grids.prod(1))
    assert not (found.mask & ~at.mask).any() and share.min() >= 0.14 and share.max() <= 0.43
    np.testing.assert_allclose(found.weight.sum(1), 1, rtol=1e-5)
    for i in range(4):
        np.testing.assert_array_equal(
            np.sort(found.at[i, : count[i]]), np.flatnonzero(found.mask[i])
        )
    if kind == "block":
        tall = np.asarray(found.mask[1, :60]).reshape(20, 3)
        assert (tall[1:] & tall[:-1]).sum() > 0.5 * count[1]


@pytest.mark.parametrize("kind", ("block", "random"))
def test_masks(kind):
    """Their sizes are uniform between the shares, they depend on the key alone, and blocks hang together."""
    options = Options(mask=kind, min_share=0.1, max_share=0.5)
    draw = jax.jit(jax.vmap(lambda key: _drawn(options, 14, key)))
    keys = jax.random.split(jax.random.key(0), 400)
    mask, at, weight = map(np.asarray, draw(keys))
    np.testing.assert_array_equal(mask[7:9], draw(keys[7:9]).mask)
    count = mask.sum(1)
    assert count.min() >= 20 and count.max() <= 98 and at.shape == (400, 98)
    assert count.mean() == pytest.approx(0.3 * 196, rel=0.05)
    np.testing.assert_allclose(weight.sum(1), 1, rtol=1e-5)
    for i in range(20):
        np.testing.assert_array_equal(np.sort(at[i, : count[i]]), np.flatnonzero(mask[i]))
        np.testing.assert_array_equal(weight[i] > 0, np.arange(98) < count[i])
    square = mask.reshape(-1, 14, 14)
    neighbours = (square[:, 1:] & square[:, :-1]).sum() / square[:, 1:].sum()
    assert (neighbours > 0.7) == (kind == "block")


def test_the_smallest_masks():
    """Of a single patch, and of all of them."""
    one = _drawn(Options(min_share=0, max_share=0.001), 4, jax.random.key(0))
    assert one.mask.sum() == 1 and one.at.shape == (1,) and one.weight[0] == 1
    every = _drawn(Options(min_share=1, max_share=1), 4, jax.random.key(0))
    assert every.mask.all() and every.at.shape == (16,)


def test_without_views_it_sees_the_image_of_the_batch():
    seen = linear.seen(MODEL, linear.params(0), linear.params(1))
    pixels = np.asarray(seen.views.global_view.image[:, 0] * 255).round().astype(np.uint8)
    batch = collections.namedtuple("Batch", "image")(jnp.asarray(pixels))
    of_view = seen.views.global_view._replace(image=jnp.asarray(pixels[:, None] / np.float32(255)))
    of_batch = masked_patches.global_images(seen._replace(views=None, batch=batch))
    views = seen.views._replace(global_view=of_view)
    of_view = masked_patches.global_images(seen._replace(views=views))
    np.testing.assert_allclose(of_batch, of_view, rtol=1e-6)


def test_faults():
    line = "teacher.kind: got none, expected ema"
    assert MaskedPatches.faults(Options(), tiny.config()) == [line]
    entry = {"term": "masked_patches", "weight": 1.0}
    pooled = test_towers.dictionary(teacher__kind="ema", loss__terms__own=entry)
    pooled = config_lib.from_dict(pooled)
    (line,) = MaskedPatches.faults(Options(), pooled)
    got = f"model.image.tower: got {pooled.model.image.tower}"
    assert line == f"{got}, expected one with patches and maskable = True, such as vit"
    config = dataclasses.replace(tiny.config(), teacher=config_lib.Teacher(kind="ema"))
    assert MaskedPatches.faults(Options(), config) == []
    with pytest.raises(ValueError, match="got min_share=0.6 and max_share=0.5"):
        Options(min_share=0.6)
    entry = {"term": "masked_patches", "weight": 1.0, "min_share": 0.6}
    with pytest.raises(ConfigError, match="^loss.terms.mim: got min_share=0.6"):
        loss_term("loss.terms.mim", entry, {})
