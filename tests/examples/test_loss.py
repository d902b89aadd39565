"""examples/loss: a user's loss terms, each against a float64 replica and both in a run of the trainer."""

import jax
import numpy as np
import pytest
import torch

from examples.loss.phrases import phrases
from examples.loss.smoothness import Options, Smoothness
from grain_jax import losses
from grain_jax.train import sharding
from tests import tiny
from tests.losses import fake
from tests.losses.test_losses import random_outputs

pytestmark = pytest.mark.long

TERM = f"{phrases.__module__}:{phrases.__name__}"
ENTRY = {"term": TERM, "weight": 0.25, "temperature": 2.0}
LOCAL = {"term": "examples.loss.smoothness:Smoothness", "weight": 0.5, "edge": 4.0}


def replica(outputs, batch, query, temperature):
    """(the loss, the share that is found) in float64; query int [b, R], that of each region."""
    o, values, found = outputs, [], []
    scale = np.float64(o.scales.logit_scale) / temperature
    for i, regions in enumerate(batch.region_mask):
        text = lambda j, i=i: batch.description_id[i, j]
        for j in np.flatnonzero(regions):
            same = {query[i, k] for k in np.flatnonzero(regions) if text(k) == text(j)}
            logits = scale * (np.float64(o.region_embed[i]) @ np.float64(o.region_text_embed[i, j]))
            own_logit, others = logits[query[i, j]], np.delete(logits, list(same))
            values.append(np.log(np.exp([own_logit, *others]).sum()) - own_logit)
            found.append(own_logit > others.max())
    return np.mean(values), np.mean(found)


def test_the_term_equals_a_float64_replica():
    c = tiny.config(loss__terms__phrases=ENTRY, loss__box=1.5)
    batch, outputs = tiny.batch(c), random_outputs(c)
    batch.description_id[:, 1] = batch.description_id[:, 0]  # equal texts
    regions, rng = batch.region_mask.shape[1], np.random.default_rng(0)
    queries = np.arange(outputs.region_embed.shape[1])
    query = np.stack([rng.permutation(queries)[:regions] for _ in batch.region_mask])
    boxes = outputs.pred_boxes_cxcywh.copy()
    for i, of_image in enumerate(query):  # queries that have the boxes are matched to them
        boxes[i, -1, of_image] = batch.region_boxes_cxcywh[i]
    outputs = outputs._replace(pred_boxes_cxcywh=boxes)
    mesh = sharding.make_mesh(c.mesh)

    result = jax.jit(lambda *x: losses.total_loss(*x, c.loss, mesh=mesh, batch_axes=sharding.BATCH_AXES))(
        outputs, batch
    )
    loss, accuracy = replica(outputs, batch, query, temperature=2.0)
    np.testing.assert_allclose(result.terms["phrases"], loss, rtol=1e-5)
    np.testing.assert_allclose(result.measures["phrases/accuracy"], accuracy, atol=1e-6)
    weights = {"image_caption": 1, "region_description": 1, "box": 1.5, "phrases": 0.25}
    expected = sum(weight * result.terms[name] for name, weight in weights.items())
    np.testing.assert_allclose(result.total, expected, rtol=1e-6)

    no_queries = dict(region_embed=outputs.region_embed[:, :0], pred_boxes_cxcywh=boxes[:, :, :0])
    result = jax.jit(lambda *x: losses.total_loss(*x, c.loss))(outputs._replace(**no_queries), batch)
    assert result.terms["phrases"] == 0


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
