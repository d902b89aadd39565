"""Views: crops and colours against torchvision, draws that are of the key alone, boxes between image and view."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torchvision.transforms import functional

from grain_jax import config as config_lib
from grain_jax.losses import local
from grain_jax.models import grain, placement
from grain_jax.terms import views
from grain_jax.training import forward, sharding
from tests import foreign, tiny
from tests.models import test_towers

CONFIG = config_lib.Views(local=3, size=12, min_area=0.1, max_area=0.5, global_min_area=0.4)
PLAIN = dataclasses.replace(
    CONFIG, flip_rate=0, brightness=0, contrast=0, saturation=0, grey_rate=0
)


def _keys(number, seed=0):
    return jax.random.split(jax.random.key(seed), number)


def _images(number, height=16, width=None, seed=0):
    shape = (number, height, width or height, 3)
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def _float(images):
    return (images / np.float32(255)).astype(np.float32)


@functools.cache
def _jitted(config):
    return jax.jit(lambda images, keys: views.make(images, keys, config))


_crops = jax.jit(views.crops, static_argnums=2)


@pytest.mark.parametrize("size", [(6, 6), (23, 30), (48, 10)])
def test_crops_of_whole_pixels_are_those_of_torchvision(size):
    image = _float(_images(2, 24, 30))
    boxes = np.array([[0, 0, 30, 24], [3, 5, 20, 23], [11, 2, 12, 24], [29, 23, 30, 24]])
    found = _crops(image, np.stack([boxes / (30, 24, 30, 24)] * 2).astype(np.float32), size)
    for number, (x1, y1, x2, y2) in enumerate(boxes):
        wanted = functional.resized_crop(
            foreign.torch_images(image), y1, x1, y2 - y1, x2 - x1, list(size), antialias=True
        )
        np.testing.assert_allclose(found[:, number], wanted.permute(0, 2, 3, 1), atol=5e-6)


def _resized(line, start, end, size):
    """A line of pixels [n, ...] in float64, one number after the other."""
    step, out = (end - start) / size, []
    for i in range(size):
        centre, weights = start + (i + 0.5) * step, np.zeros(len(line))
        for j in range(len(line)):
            if j + 1 > start and j < end:
                weights[j] = max(0, 1 - abs(j + 0.5 - centre) / max(step, 1))
        out.append(np.tensordot(weights / weights.sum(), line, 1))
    return np.stack(out)


def test_crops_of_any_place_against_float64():
    image = _float(_images(1, 20))
    boxes = np.random.default_rng(1).uniform(0, 0.45, (1, 5, 4)).astype(np.float32)
    boxes[..., 2:] += 0.5
    found = _crops(image, boxes, (9, 14))
    for box, view in zip(boxes[0].astype(np.float64) * 20, found[0]):
        lines = _resized(image[0].astype(np.float64), box[1], box[3], 9)
        wanted = _resized(lines.swapaxes(0, 1), box[0], box[2], 14).swapaxes(0, 1)
        np.testing.assert_allclose(view, wanted, atol=2e-6)
    nothing = np.array([[[0, 0, 0, 0], [0.3, 0.3, 0.3, 0.3], [1.1, 0, 1.3, 1]]], np.float32)
    assert not np.asarray(_crops(image, nothing, (2, 2))).any()


def test_places_are_in_the_ranges_of_the_config():
    number = 2000
    config = dataclasses.replace(CONFIG, max_aspect=2.0, flip_rate=0.25)
    found = _jitted(config)(_images(1, 4).repeat(number, 0), _keys(number))
    for view, low, high in ((found.local, 0.1, 0.5), (found.global_view, 0.4, 1.0)):
        x1, y1, x2, y2 = np.moveaxis(np.asarray(view.boxes_xyxy, np.float64), -1, 0)
        area, aspect = (x2 - x1) * (y2 - y1), (x2 - x1) / (y2 - y1)
        assert min(x1.min(), y1.min()) >= 0 and max(x2.max(), y2.max()) <= 1
        assert low - 1e-5 <= area.min() and area.max() <= high + 1e-5
        np.testing.assert_allclose(np.quantile(area, [0.25, 0.5, 0.75]), low + (high - low) * np.array([0.25, 0.5, 0.75]), atol=0.025)  # fmt: skip
        assert 1 / 2 - 1e-4 <= aspect.min() and aspect.max() <= 2 + 1e-4
        assert abs(np.log(aspect).mean()) < 0.05
        free = x1 / np.maximum(1 - (x2 - x1), 1e-6)
        np.testing.assert_allclose(free.mean(), 0.5, atol=0.03)
        np.testing.assert_allclose(np.mean(view.flipped), 0.25, atol=0.04)
    of_views = np.asarray(found.local.boxes_xyxy)[:, :, 0]
    assert abs(np.corrcoef(of_views.T) - np.eye(3)).max() < 0.1  # views have draws of their own


def _factors(key, view, config):
    """What torchvision's functions take for this view."""
    drawn = np.asarray(jax.random.uniform(jax.random.fold_in(key, view), (9,)))
    mirrored, grey = drawn[4] < config.flip_rate, drawn[8] < config.grey_rate
    most = (config.brightness, config.contrast, config.saturation)
    return mirrored, grey, [float(1 + m * (2 * d - 1)) for m, d in zip(most, drawn[5:8])]


def test_colours_are_those_of_torchvision():
    config = dataclasses.replace(CONFIG, local=5, brightness=0.8, contrast=0.6, saturation=1.0)
    images, keys = _images(4), _keys(4)
    found = _jitted(config)(images, keys)
    plain = _jitted(dataclasses.replace(PLAIN, local=5))(images, keys)
    seen = set()
    for b, v in np.ndindex(4, 6):
        views_of = (found.global_view, plain.global_view) if v == 0 else (found.local, plain.local)
        got, base = (np.asarray(view.image)[b, max(v - 1, 0)] for view in views_of)
        mirrored, grey, (brightness, contrast, saturation) = _factors(keys[b], v, config)
        x = foreign.torch_images(base[None])
        x = functional.hflip(x) if mirrored else x
        x = functional.adjust_brightness(x, brightness)
        x = functional.adjust_contrast(x, contrast)
        x = functional.adjust_saturation(x, saturation)
        x = functional.rgb_to_grayscale(x, 3) if grey else x
        np.testing.assert_allclose(got, x[0].permute(1, 2, 0), atol=2e-6)
        assert bool(views_of[0].flipped[b, max(v - 1, 0)]) == mirrored
        seen.add((bool(mirrored), bool(grey)))
    assert len(seen) == 4


def test_a_view_is_of_its_key_alone():
    images, keys = _images(16), _keys(16)
    whole = _jitted(CONFIG)(images, keys)
    same = lambda a, b: jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), a, b)
    order = np.random.default_rng(0).permutation(16)[:4]  # a micro-batch
    same(_jitted(CONFIG)(images[order], keys[order]), jax.tree.map(lambda x: x[order], whole))
    more = _jitted(dataclasses.replace(CONFIG, local=5))(images, keys)
    same(more.global_view, whole.global_view)
    same(jax.tree.map(lambda x: x[:, :3], more.local), whole.local)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    cut = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    with placement.on(mesh, ("data", "fsdp")):
        on_mesh = _jitted(CONFIG)(jax.device_put(images, cut), jax.device_put(keys, cut))
    assert on_mesh.local.image.sharding.is_equivalent_to(cut, 5)
    same(jax.device_get(on_mesh), whole)
    other = _jitted(CONFIG)(images, _keys(16, seed=1))
    assert (np.asarray(other.local.boxes_xyxy) != np.asarray(whole.local.boxes_xyxy)).all()


def test_the_whole_image_is_itself():
    config = dataclasses.replace(PLAIN, global_min_area=1.0)
    images = _float(_images(2, 10, 14))
    found = _jitted(config)(images, _keys(2))
    np.testing.assert_array_equal(found.global_view.image[:, 0], images)
    np.testing.assert_array_equal(found.global_view.boxes_xyxy[:, 0], [[0, 0, 1, 1]] * 2)
    assert found.local.image.shape == (2, 3, 12, 12, 3) and not found.local.flipped.any()
    assert views.make(images, _keys(2), dataclasses.replace(config, local=0)) is None
    of_bytes = _jitted(config)(_images(2, 10, 14), _keys(2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-7), of_bytes, found)


def _bounds(bright):
    """The box round the bright pixels of an image [S, S]: xyxy shares."""
    rows, columns = (np.flatnonzero(bright.any(axis)) for axis in (1, 0))
    ends = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    return np.array(ends) / len(bright)


def test_boxes_follow_the_pixels_of_a_view():
    """A white rectangle on black is, in each view that shows it, where its box is moved to."""
    images = np.zeros((8, 64, 64, 3), np.uint8)
    images[:, 20:36, 24:48] = 255
    boxes = np.array([[[24, 20, 48, 36]]] * 8, np.float32) / 64
    config = dataclasses.replace(PLAIN, local=6, size=64, flip_rate=0.5, min_area=0.3, max_area=0.9)
    found = jax.device_get(_jitted(config)(images, _keys(8)))
    moves = jax.jit(lambda view: (views.to_view(boxes, view), views.share_inside(boxes, view)))
    count = 0
    for view in found:
        moved, shares = map(np.asarray, moves(view))
        back = views.to_image(moved, view)
        np.testing.assert_allclose(back, np.broadcast_to(boxes[:, None], back.shape), atol=1e-6)
        for at in np.ndindex(view.flipped.shape):
            bright = view.image[at].mean(-1) > 0.5
            if shares[at][0] > 0.1:
                wanted = np.clip(moved[at][0], 0, 1)
                np.testing.assert_allclose(_bounds(bright), wanted, atol=1.1 / 64)
                count += 1
    assert count > 30 and 0.2 < np.mean(found.local.flipped) < 0.8


def test_boxes_of_known_views():
    view = views.View(
        image=np.zeros(()),
        boxes_xyxy=np.array([[[0.2, 0.4, 0.6, 0.9]] * 2], np.float32),
        flipped=np.array([[False, True]]),
    )
    boxes = np.array(
        [[[0.3, 0.4, 0.5, 0.65], [0.5, 0.8, 0.7, 1.0], [0.7, 0, 0.8, 1], [0.3] * 4]], np.float32
    )
    found = np.asarray(views.to_view(boxes, view))
    assert found.shape == (1, 2, 4, 4)
    np.testing.assert_allclose(found[0, :, 0], [[0.25, 0, 0.75, 0.5]] * 2, atol=1e-6)
    np.testing.assert_allclose(
        found[0, :, 1], [[0.75, 0.8, 1.25, 1.2], [-0.25, 0.8, 0.25, 1.2]], atol=1e-6
    )
    shares = views.share_inside(boxes, view)
    np.testing.assert_allclose(shares, [[[1, 0.25, 0, 0]] * 2], atol=1e-6)
    ends = np.random.default_rng(0).uniform(-1, 2, (2, 1, 3, 2))
    boxes = np.sort(ends, 0).transpose(1, 2, 0, 3).reshape(1, 3, 4).astype(np.float32)
    back = views.to_view(views.to_image(views.to_view(boxes, view), view)[:, 0], view)
    np.testing.assert_allclose(back, views.to_view(boxes, view), atol=1e-5)


def test_normalised_is_that_of_torchvision():
    c, images = tiny.config(), _float(_images(2))
    mean, std = (
        torch.tensor(x).tolist() for x in (c.model.image.pixel_mean, c.model.image.pixel_std)
    )
    wanted = functional.normalize(foreign.torch_images(images), mean, std)
    found = views.normalised(images, c.model.image)
    np.testing.assert_allclose(found, wanted.permute(0, 2, 3, 1), atol=1e-5)


TOWER = f"{test_towers.__name__}:Colours"


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(min_area=0.5, max_area=0.3),
            "input.views.min_area: got 0.5, expected at most input.views.max_area = 0.3",
        ),
        (
            dict(size=13),
            "input.views.size: got 13, expected a multiple of model.image.patch_size = 8, such as 8 or 16",
        ),
        (dict(size=3), "model.image.patch_size = 8, such as 8"),
        (dict(terms=False), "input.views.local: got 2 without loss.terms, whose terms alone read"),
        (dict(local=65), "input.views.local: got 65, expected 0 to 64"),
        (
            dict(global_min_area=0.5, lengths=(4,)),
            "input.views.global_min_area: got 0.5 with input.sequence_lengths = (4,); expected 1",
        ),
        (dict(max_aspect=0.5), "input.views.max_aspect: got 0.5, expected 1 to 10"),
        (
            dict(size=8, tower=TOWER),
            f"input.views.size: got 8 with the tower {TOWER}, which takes no other size than model.image.image_size = 16",
        ),
    ],
)
def test_what_views_cannot_is_a_line(changes, message):
    c = tiny.dictionary(input__views__local=2, input__views__size=8)
    if changes.pop("terms", True):
        c.loss.terms["seeing"] = {"term": f"{__name__}:Seeing", "weight": 1.0}
    if tower := changes.pop("tower", None):
        c.model.decoder, c.model.image.tower, c.input.max_regions = None, tower, 0
    c.input.sequence_lengths = changes.pop("lengths", ())
    c.input.views.update(changes)
    with pytest.raises(config_lib.ConfigError) as error:
        config_lib.from_dict(c)
    assert message in str(error.value) and "\n" not in str(error.value)
    c.input.views.local = 0
    if "max_aspect" not in changes:  # without views their other keys do not matter
        config_lib.from_dict(c)


class Seeing(local.LocalTerm):
    """A number of each image, of the tokens of its views and of its boxes in them."""

    def __call__(self, seen):
        loss = jnp.zeros(len(seen.keys))
        for view in seen.views:
            rows = view.image.reshape(-1, *view.image.shape[2:])
            tokens = seen.student("image_tokens", views.normalised(rows, self.model.image))
            loss += jnp.square(tokens).mean((1, 2)).reshape(view.flipped.shape).sum(1)
            centre, side = jnp.split(seen.batch.region_boxes_cxcywh, 2, -1)
            corners = jnp.concatenate([centre - side / 2, centre + side / 2], -1)
            loss += views.share_inside(corners, view).sum((1, 2))
        return local.LocalOutput(local.PerImage(loss, jnp.ones_like(loss)))


def test_terms_see_views_that_are_the_same_in_every_part_and_on_every_mesh():
    c = tiny.dictionary(model__image__depth=1, model__text__depth=1, model__decoder=None)
    c.loss.update(box=0.0, region_description=0.0)
    c.model.image.pool = "mean"
    c.input.views.update(local=2, size=8, global_min_area=0.5)
    c.loss.terms["seeing"] = {"term": f"{__name__}:Seeing", "weight": 1.0}
    c = config_lib.from_dict(c)
    run = forward.Forward(grain.GRAIN(c.model), c)
    rng = np.random.default_rng(0)
    draw = lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32)
    params = jax.tree.map(draw, sharding.unbox(jax.eval_shape(run.init)))
    batch, keys = tiny.batch(c), _keys(c.batch_size)
    of = lambda run: jax.jit(lambda *args: run(*args).local["seeing"].loss.sum)
    on_one = of(run)
    whole = np.asarray(on_one(params, batch, keys))
    part = jax.tree.map(lambda x: x[len(x) // 2 :], (batch, keys))
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    part = jax.device_put(part, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    found = of(dataclasses.replace(run, mesh=mesh))(params, *part)
    np.testing.assert_allclose(found, whole[len(whole) // 2 :], rtol=1e-5)
    others = on_one(params, batch, _keys(c.batch_size, seed=1))
    assert np.std(whole) > 0 and (np.abs(whole - others) > 1e-4).all()
