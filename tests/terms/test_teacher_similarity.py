"""teacher_similarity over the global batch, against whole matrices in torch's float64, on every mesh."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch

from grain_jax import losses
from grain_jax.losses import local
from grain_jax.terms.teacher_similarity import Options, TeacherSimilarity
from grain_jax.training import sharding
from tests import tiny
from tests.terms import fake

WIDTH = 12  # of the teacher
ENTRY = {"term": "teacher_similarity", "weight": 0.5}


@functools.cache
def case(captions, **entry):
    """(config, batch, outputs with what the teacher hands on), and images without captions and equal captions."""
    c = tiny.config(
        batch_size=32,
        text__pack_rows=12,
        model__decoder=None,
        model__image__pool="mean",
        loss__box=0.0,
        loss__region_description=0.0,
        input__captions_per_image=captions,
        loss__terms__teacher={**ENTRY, **entry},
        loss__tile=5,
    )
    seen, rng = fake.seen(c), np.random.default_rng(2)
    seen.batch.caption_mask[8:11] = False
    seen.batch.caption_id[1, 0] = seen.batch.caption_id[30, -1]
    images = len(seen.batch.caption_mask)
    handed = {
        "image": fake.unit(rng, images, WIDTH),
        "caption": fake.unit(rng, images, captions, WIDTH),
    }
    zero = np.zeros(images, np.float32)
    output = local.LocalOutput(
        local.PerImage(zero, zero), handed=handed, shared={"scale": np.float32(20)}
    )
    return (
        c,
        seen.batch,
        seen.outputs._replace(
            pred_boxes_cxcywh=rng.random((1, images, 3, 4)).astype(np.float32),
            local={"teacher": output},
        ),
    )


def on_mesh(c, batch, outputs, sizes, gather=1):
    """(loss, measures, gradients of images, captions and logit scale) of the term alone."""
    data, fsdp = sizes
    mesh = sharding.make_mesh(
        dataclasses.replace(c.mesh, data=data, fsdp=fsdp), jax.devices()[: data * fsdp]
    )
    config = dataclasses.replace(c.loss, gather=gather)

    def run(image, text, scale):
        given = outputs._replace(image_embed=image, text_embed=text, logit_scale=scale)
        found = losses.total_loss(given, batch, config, mesh=mesh, batch_axes=sharding.BATCH_AXES)
        return found.terms["teacher"], found.measures

    run = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))
    (loss, measures), gradients = run(outputs.image_embed, outputs.text_embed, outputs.logit_scale)
    return loss, measures, gradients


def replica(c, batch, outputs):
    """As `on_mesh`, from the whole matrices."""
    tensor = lambda x, grad: torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=grad)
    image, text, scale = (
        tensor(x, True) for x in (outputs.image_embed, outputs.text_embed, outputs.logit_scale)
    )
    handed = outputs.local["teacher"].handed
    real, ids = batch.caption_mask, batch.caption_id
    images, captions = real.shape
    allowed = np.ones((images, images, captions), bool) & real
    for i in range(images):  # a caption that image i has as well is left out, unless it is its own
        for j in set(range(images)) - {i}:
            allowed[i, j] &= ~np.isin(ids[j], ids[i][real[i]])
    allowed = torch.tensor(allowed.reshape(images, -1))
    z = scale * image @ text.reshape(images * captions, -1).T
    w = 20.0 * tensor(handed["image"], False) @ tensor(handed["caption"], False).flatten(0, 1).T

    def divergence(z, w, allowed):
        some = allowed.any(1)
        z, w = (torch.where(allowed, v, -1e300)[some].log_softmax(1) for v in (z, w))
        each = torch.where(allowed[some], w.exp() * (w - z), 0).sum(1)
        return torch.zeros(len(allowed), dtype=torch.float64).index_put((some,), each)

    of_images = divergence(z, w, allowed)
    of_captions = divergence(z.T, w.T, allowed.T).reshape(images, captions)
    mask = torch.tensor(real)
    loss = ((of_captions + of_images[:, None]) / 2)[mask].mean()
    loss.backward()
    measures = {
        "teacher/caption_to_image": of_captions[mask].mean().item(),
        "teacher/image_to_caption": of_images[mask.any(1)].mean().item(),
    }
    return loss.item(), measures, [x.grad.numpy() for x in (image, text, scale)]


@pytest.mark.parametrize(
    "captions,sizes,gather,learn_scale",
    [
        pytest.param(3, (1, 1), 1, True, marks=pytest.mark.slow),
        (3, (4, 2), 1, True),
        (1, (2, 1), 2, False),
    ],
)
def test_values_and_gradients_equal_the_whole_matrices_on_every_mesh(
    captions, sizes, gather, learn_scale
):
    c, batch, outputs = case(captions, learn_scale=learn_scale)
    loss, measures, gradients = on_mesh(c, batch, outputs, sizes, gather)
    expected, expected_measures, expected_gradients = replica(c, batch, outputs)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for name, value in expected_measures.items():
        np.testing.assert_allclose(measures[name], value, rtol=1e-6)
    if not learn_scale:
        expected_gradients[2] = np.zeros(())
    for a, b in zip(expected_gradients, gradients, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max())


def test_it_hands_on_the_teachers_embeddings_and_scale():
    c = tiny.config()
    rng = np.random.default_rng(0)

    class Teacher:
        image_embed = rng.normal(size=(16, WIDTH)).astype(np.float16)
        text_embed = rng.normal(size=(16, 1, WIDTH)).astype(np.float16)
        logit_scale = 30.0

    seen = fake.seen(c, Teacher())
    found = TeacherSimilarity(Options(), c.model).apply({}, seen)
    assert found.shared["scale"] == 30
    found = TeacherSimilarity(Options(temperature=0.02), c.model).apply({}, seen)
    np.testing.assert_allclose(found.shared["scale"], 50, rtol=1e-6)
    for name, x in found.handed.items():
        assert x.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(x, axis=-1), 1, rtol=1e-6, err_msg=name)


def test_what_a_run_misses():
    of = lambda **changes: TeacherSimilarity.faults(
        Options(), tiny.config(loss__terms__teacher=ENTRY, **changes)
    )
    (fault,) = of()
    assert fault == "teacher.kind: got 'none', expected ema, checkpoint or embeddings"
    (fault,) = of(teacher__kind="ema", teacher__part="heads")
    assert fault == "teacher.part: got 'heads', whose towers are the student's; expected 'all'"
    assert not of(teacher__kind="ema")
