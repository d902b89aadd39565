"""examples/loss: the loss terms of a user, each alone against a float64 replica and both in a run of the trainer."""

import jax
import numpy as np
import pytest
import torch

from examples.loss.smoothness import Options, Smoothness
from examples.loss.uniformity import uniformity
from grain_jax import losses
from grain_jax.train import sharding
from tests import tiny
from tests.losses import fake
from tests.losses.test_losses import random_outputs

pytestmark = pytest.mark.long

TERM = f"{uniformity.__module__}:{uniformity.__name__}"
ENTRY = {"term": TERM, "weight": 0.25, "t": 3.0}
LOCAL = {"term": "examples.loss.smoothness:Smoothness", "weight": 0.5, "edge": 4.0}


def replica(region_embed, t):
    """(the loss, the mean cosine) in float64."""
    values, cosines = [], []
    for x in np.asarray(region_embed, np.float64):
        distances = [
            ((x[i] - x[j]) ** 2).sum() for i in range(len(x)) for j in range(len(x)) if i != j
        ]
        values.append(np.log(np.exp(-t * np.array(distances)).mean()))
        cosines.append(1 - np.mean(distances) / 2)
    return np.mean(values), np.mean(cosines)


def test_the_term_equals_a_float64_replica():
    c = tiny.config(loss__terms__uniformity=ENTRY, loss__box=1.5)
    batch, outputs = tiny.batch(c), random_outputs(c)
    mesh = sharding.make_mesh(c.mesh)

    result = jax.jit(
        lambda *x: losses.total_loss(*x, c.loss, mesh=mesh, batch_axes=sharding.BATCH_AXES)
    )(outputs, batch)
    loss, cosine = replica(outputs.region_embed, t=3.0)
    np.testing.assert_allclose(result.terms["uniformity"], loss, rtol=1e-5)
    np.testing.assert_allclose(result.measures["uniformity/cosine"], cosine, atol=1e-6)
    weights = {"image_caption": 1, "region_description": 1, "box": 1.5, "uniformity": 0.25}
    expected = sum(weight * result.terms[name] for name, weight in weights.items())
    np.testing.assert_allclose(result.total, expected, rtol=1e-6)


def smoothness_replica(patches, image, edge):
    """(the loss, the mean cosine) in float64: patches [B, P, E], uint8 images."""
    x = torch.tensor(np.asarray(patches), dtype=torch.float64)
    grid = round(x.shape[1] ** 0.5)
    unit = torch.nn.functional.normalize(x, dim=-1).reshape(len(x), grid, grid, -1)
    colours = torch.nn.functional.interpolate(
        torch.tensor(image / 255.0).permute(0, 3, 1, 2), grid, mode="bilinear", antialias=True
    )
    losses_, cosines = [], []
    for n in range(len(x)):
        for i in range(grid):
            for j in range(grid):
                for k, m in ((i + 1, j), (i, j + 1)):
                    if k < grid and m < grid:
                        cosine = unit[n, i, j] @ unit[n, k, m]
                        apart = (colours[n, :, i, j] - colours[n, :, k, m]).abs().mean()
                        losses_.append(torch.exp(-edge * apart) * (1 - cosine))
                        cosines.append(cosine.item())
    return torch.stack(losses_).mean().item(), np.mean(cosines)


def test_the_local_term_equals_a_float64_replica():
    c = tiny.config(batch_size=8)
    seen, term = fake.seen(c, leading=1), Smoothness(Options(edge=4.0), c.model)

    def run(tokens):
        result = term.apply({}, seen._replace(tokens=tokens))
        return result.loss.sum.sum() / result.loss.count.sum(), result.measures["cosine"]

    loss, measured = jax.jit(run)(seen.tokens)
    expected, cosine = smoothness_replica(seen.tokens[:, 1:], seen.batch.image, edge=4.0)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(measured.sum.sum() / measured.count.sum(), cosine, atol=1e-6)
