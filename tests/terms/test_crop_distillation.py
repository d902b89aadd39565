"""crop_distillation against Pillow's crops, torchvision's RoIAlign and torch's gradients, in float64."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import torch
import torchvision

from grain_jax import config as config_lib
from grain_jax.core import errors
from grain_jax.models.grain import GRAIN
from grain_jax.terms import crop_distillation
from grain_jax.terms.crop_distillation import CropDistillation, Options
from tests import tiny
from tests.models import test_towers
from tests.terms import fake

SIZE = 12  # of the teacher's images
ENTRY = {"term": "crop_distillation", "weight": 1.0}


class Teacher(types.SimpleNamespace):
    """A teacher whose embedding is a fixed map of the pixels of a crop."""

    def __init__(self, width):
        super().__init__(kind="checkpoint")
        shape = SIZE * SIZE * 3, width
        self.weights = np.random.default_rng(5).normal(size=shape).astype(np.float32)

    def embed(self, image01):
        assert image01.shape[1:] == (SIZE, SIZE, 3)
        return (image01.reshape(len(image01), -1) - 0.5) @ self.weights


TOWERS = dict(
    model__decoder=None,
    model__image__pool="mean",
    loss__box=0.0,
    loss__region_description=0.0,
    loss__image_description=1.0,
)
CASES = {
    # (keys of the config, options, the teacher's width, names of what is compared)
    "two towers": (TOWERS, {}, 16, ["map_cosine"]),
    "two towers, wider teacher": (TOWERS, dict(margin=0.5), 20, ["map_cosine"]),
    "decoder": ({}, dict(crops=3), 16, ["map_cosine"]),
    "RoIAlign": (
        dict(model__boxes__kind="roi_align", loss__box_description=1.0),
        {},
        16,
        ["box_cosine"],
    ),
    "RoIAlign, own map": (
        dict(model__boxes__kind="roi_align", loss__box_description=1.0),
        dict(box_head=False, min_side=0.25),
        16,
        ["map_cosine"],
    ),
    "prompter, wider teacher": (
        dict(model__boxes__kind="prompter", loss__box_description=1.0),
        dict(crops=64),
        20,
        ["box_cosine", "map_cosine"],
    ),
}


COVERED = "two towers", "RoIAlign, own map"  # by other cases together


@functools.cache
def case(name):
    """(the term, what it sees, its parameters, the matrix of the student's image projection)."""
    changes, options, width, _ = CASES[name]
    c = tiny.config(batch_size=8, **changes)
    rng, teacher_model = np.random.default_rng(1), tiny.dictionary(model__embed_dim=width).model
    teacher_model.image.image_size = SIZE
    teacher_model.image.patch_size = 4
    term = CropDistillation(
        Options(**options), c.model, config_lib.model_from_dict(teacher_model.to_dict())
    )
    projection = rng.normal(size=(c.model.image.width, c.model.embed_dim)).astype(np.float32)
    leading = int(c.model.image.class_token) + c.model.image.registers

    model = GRAIN(c.model)
    of_model = {"image_projection": {"kernel": projection}, "logit_scale": np.float32(2)}

    def student(method, *tokens_and_places):
        return model.apply({"params": of_model}, *tokens_and_places, method=method)

    seen = fake.seen(c, Teacher(width), student, leading)
    seen.batch.region_boxes_cxcywh[2, 0, 2:] = [0, 0.3]  # without an area
    seen.batch.region_boxes_cxcywh[3, 0] = [0.95, 0.5, 0.3, 0.4]  # over the edge
    seen.batch.region_mask[5] = False
    return term, seen, fake.random_parameters(term, seen), projection


def pillow_crop(image, box, margin):
    """uint8 [H, W, 3] -> [S, S, 3] in [0, 1]: the pixels in the enlarged box, resized by Pillow as floats."""
    height, width, _ = image.shape
    x1, y1, x2, y2 = box
    dx, dy = (x2 - x1) * margin / 2, (y2 - y1) * margin / 2
    corners = np.clip([x1 - dx, y1 - dy, x2 + dx, y2 + dy], 0, 1) * [width, height, width, height]
    left, top = np.floor(corners[:2] + 1e-3).astype(int)
    right, bottom = np.ceil(corners[2:] - 1e-3).astype(int)
    box = tuple(np.clip(corners - [left, top] * 2, 0, [right - left, bottom - top] * 2).tolist())
    resized = [
        PIL.Image.fromarray(channel).resize((SIZE, SIZE), PIL.Image.Resampling.BILINEAR, box=box)
        for channel in np.moveaxis(image[top:bottom, left:right].astype(np.float32), 2, 0)
    ]
    return np.stack(resized, axis=-1).astype(np.float64) / 255


def replica(name):
    """(loss, mean cosines, gradients of tokens, box embeddings and parameters)."""
    term, seen, params, projection = case(name)
    batch, options, teacher = seen.batch, term.options, seen.teacher
    tensor = lambda x: torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True)
    tokens, p = tensor(seen.tokens), jax.tree.map(tensor, params)
    of_head = None if seen.outputs.box_embed is None else tensor(seen.outputs.box_embed)
    normalize = functools.partial(torch.nn.functional.normalize, dim=-1)
    found = {what: [] for what in CASES[name][3]}
    for i in range(len(tokens)):
        boxes = batch.region_boxes_cxcywh[i].astype(np.float64)
        low, side = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, 2:]
        usable = batch.region_mask[i] & (side > 0).all(1) & (side >= options.min_side).all(1)
        chance = np.where(usable, jax.random.uniform(seen.keys[i], usable.shape), -1)
        drawn = [r for r in np.argsort(-chance)[: options.crops] if usable[r]]
        patches = tokens[i, seen.leading :]
        if term.model.decoder is None:
            patches = normalize(patches @ torch.tensor(projection, dtype=torch.float64))
        grid = round(len(patches) ** 0.5)
        features = patches.T.reshape(1, -1, grid, grid)
        for r in drawn:
            box = np.concatenate([low[r], low[r] + side[r]])
            crop = pillow_crop(batch.image[i], box, options.margin)
            target = normalize(torch.tensor((crop.reshape(-1) - 0.5) @ teacher.weights))
            if "map_cosine" in found:
                rois = [torch.tensor(box * grid)[None]]
                x = torchvision.ops.roi_align(features, rois, 1, 1.0, 8, aligned=True)[0, :, 0, 0]
                x = x @ p["map_projection"]["kernel"] if "map_projection" in p else x
                found["map_cosine"].append(normalize(x) @ target)
            if "box_cosine" in found:
                x = of_head[i, r]
                x = x @ p["box_projection"]["kernel"] if "box_projection" in p else x
                found["box_cosine"].append(normalize(x) @ target)
    loss = 1 - torch.stack([x for values in found.values() for x in values]).mean()
    loss.backward()
    zero = lambda x: np.zeros(x.shape) if x.grad is None else x.grad.numpy()
    cosines = {name: torch.stack(values).mean().item() for name, values in found.items()}
    of_head = None if of_head is None else zero(of_head)
    return loss.item(), cosines, (zero(tokens), of_head, jax.tree.map(zero, p))


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] * (x in COVERED)) for x in CASES]
)
def test_values_and_gradients_equal_those_of_other_libraries(name):
    term, seen, params, _ = case(name)

    def run(tokens, box_embed, params):
        outputs = seen.outputs._replace(box_embed=box_embed)
        found = term.apply({"params": params}, seen._replace(tokens=tokens, outputs=outputs))
        return found.loss.sum.sum() / found.loss.count.sum(), found.measures

    grad = jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True)
    (loss, measures), gradients = jax.jit(grad)(seen.tokens, seen.outputs.box_embed, params)
    expected, cosines, expected_gradients = replica(name)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert sorted(measures) == CASES[name][3]
    for what, value in cosines.items():
        got = measures[what].sum.sum() / measures[what].count.sum()
        np.testing.assert_allclose(got, value, atol=1e-6)
    for a, b in zip(jax.tree.leaves(expected_gradients), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max() + 1e-9)


def test_the_sums_of_an_image_do_not_depend_on_the_others():
    term, seen, params, _ = case("decoder")
    run = lambda seen: jax.jit(lambda: term.apply({"params": params}, seen).loss)()
    whole = run(seen)
    assert whole.count[5] == whole.sum[5] == 0 and whole.count.max() == 3
    found = run(fake.part(seen, 4, 8))
    np.testing.assert_allclose(found.sum, whole.sum[4:], rtol=1e-6)
    np.testing.assert_array_equal(found.count, whole.count[4:])


def test_regions_are_drawn_alike_among_the_usable_ones():
    usable = np.tile([True, False, True, True, False], (4000, 1))
    keys = jax.vmap(jax.random.key)(jnp.arange(4000, dtype=jnp.uint32))
    slot, drawn = crop_distillation.draw(keys, usable, 2)
    assert np.all(drawn) and np.all(slot[:, 0] != slot[:, 1])
    share = np.bincount(np.ravel(slot), minlength=5) / 4000
    np.testing.assert_allclose(share, [2 / 3, 0, 2 / 3, 2 / 3, 0], atol=0.03)
    _, drawn = crop_distillation.draw(keys, usable, 9)
    assert drawn.shape == (4000, 5) and np.all(drawn.sum(1) == 3)


@pytest.mark.parametrize(
    "changes,options,expected",
    [
        ({}, {}, "teacher.kind: got 'none', expected ema or checkpoint, which see crops"),
        (
            dict(
                teacher__kind="embeddings",
                teacher__path="folder",
                input__source="records",
                input__data_dir="data",
            ),
            {},
            "teacher.kind: got 'embeddings', expected ema or checkpoint, which see crops",
        ),
        (
            dict(teacher__kind="ema", input__max_regions=0),
            {},
            "input.max_regions: got 0, expected at least 1, for boxes",
        ),
        (
            dict(teacher__kind="ema"),
            dict(map=False),
            "map: got False, with box_head=True and model.boxes.kind=none, expected the map or a box head",
        ),
        (dict(teacher__kind="ema"), {}, None),
    ],
)
def test_what_a_run_misses(changes, options, expected):
    found = CropDistillation.faults(
        Options(**options), tiny.config(loss__terms__crop=ENTRY, **changes)
    )
    assert found == ([expected] if expected else [])


def test_a_tower_that_pools_its_tokens_has_no_map():
    pooled = config_lib.from_dict(
        test_towers.dictionary(teacher__kind="ema", loss__terms__crop=ENTRY)
    )
    _, fault = CropDistillation.faults(Options(), pooled)
    got = f"map: got True with model.image.tower={pooled.model.image.tower}, which pools its tokens"
    assert fault == f"{got}; expected map=False, or a tower with patches"


def test_options_have_bounds():
    entry = {**ENTRY, "margin": 9.0, "crops": 0}
    with pytest.raises(errors.UserError) as caught:
        config_lib.loss_term("loss.terms.crop", entry, {})
    assert str(caught.value).splitlines() == [
        "loss.terms.crop.crops: got 0, expected 1 to 64",
        "loss.terms.crop.margin: got 9.0, expected 0 to 4",
    ]
