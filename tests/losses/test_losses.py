"""The losses against a float64 replica that loops over images, written from docs/method.md."""

import dataclasses
import math
import types

import jax
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from benchmarks import replicas
from grain_jax import config as config_lib
from grain_jax import losses
from grain_jax.core import schema
from grain_jax.losses import box_loss, matching
from grain_jax.train import sharding
from tests import tiny

pytestmark = [pytest.mark.long, pytest.mark.quick]

D, Q, PATCHES = 16, 5, 9


def random_outputs(c, layers=2, width=D):
    rng = np.random.default_rng(0)
    b, r, captions = c.batch_size, c.input.max_regions, c.input.captions_per_image
    unit = lambda *shape: (x := rng.normal(size=shape)) / np.linalg.norm(x, axis=-1, keepdims=True)
    h = c.input.negatives_per_region
    low = rng.uniform(0.2, 0.8, (layers, b, Q, 4)).swapaxes(0, 1)
    shapes = (b,), (b, captions), (b, Q), (b, r)
    embeds = [unit(*shape, width) for shape in shapes]
    boxes, negatives = unit(b, r, width), unit(b, r, h, width) if h else None
    scale, bias = np.float64(12.0), np.float64(0)
    out = schema.Outputs(*embeds, low, schema.Scales(scale, bias), boxes, negative_text_embed=negatives)
    patches = rng.uniform(0.2, 0.8, (b, PATCHES, 4)), rng.normal(size=(b, PATCHES))
    centres = np.sort(rng.uniform(0, 1, (b, PATCHES, 2)), axis=1)
    out = out._replace(token_boxes=schema.TokenBoxes(*patches, centres))
    return jax.tree.map(lambda x: np.asarray(x, np.float32), out)


def learnt(outputs, batch):
    """The outputs of a model that has learnt something: about half of what it says is right."""
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    boxes = outputs.pred_boxes_cxcywh.copy()
    boxes[::2, -1, :3] = batch.region_boxes_cxcywh[::2, :3] * 0.95
    return outputs._replace(
        image_embed=unit(
            outputs.image_embed + 0.6 * outputs.text_embed[:, 0] + 0.4 * outputs.region_text_embed[:, 0]
        ),
        region_embed=unit(outputs.region_embed + 0.6 * outputs.region_text_embed[:, :Q]),
        box_embed=unit(outputs.box_embed + 0.6 * outputs.region_text_embed),
        pred_boxes_cxcywh=boxes,
    )


def _total(outputs, batch, loss):
    """`losses.total_loss` as one program: its operations one by one take longer to compile."""
    return jax.jit(lambda *given: losses.total_loss(*given, loss))(outputs, batch)


def _iou_and_giou(p, t):
    p, t = (np.concatenate([x[:2] - x[2:] / 2, x[:2] + x[2:] / 2]) for x in (p, t))
    overlap = np.prod(np.maximum(np.minimum(p[2:], t[2:]) - np.maximum(p[:2], t[:2]), 0))
    union = np.prod(p[2:] - p[:2]) + np.prod(t[2:] - t[:2]) - overlap
    hull = np.prod(np.maximum(p[2:], t[2:]) - np.minimum(p[:2], t[:2]))
    return overlap / union, overlap / union - (hull - union) / hull


def replica(outputs, batch, c):
    """(all losses, their measures), by name, in float64, pair by pair."""
    o = jax.tree.map(lambda x: np.asarray(x, np.float64), outputs)
    b, softmax = len(batch.region_mask), c.contrast == "softmax"
    target = batch.region_boxes_cxcywh.astype(np.float64)
    (scale, bias), of_regions = o.scales[:2], o.scales.of_regions
    logit = lambda x, y: float(scale * (x @ y) + bias)
    beats = lambda own_logit, others: own_logit > max(others, default=-np.inf) + 1e-5 * scale
    pairs_of = lambda mask: list(map(tuple, np.argwhere(mask)))
    terms, right = {}, {}

    def loss_of(own_logit, others):
        if softmax:
            return np.log(np.exp([own_logit, *others]).sum()) - own_logit
        return np.log1p(np.exp(-own_logit)) + np.log1p(np.exp(others)).sum()

    def of_texts(name, texts, ids, real, by_text):
        pairs = pairs_of(real)
        id_of = lambda pair: ids[pair] if c.mask_duplicates else pair
        has = [{id_of(pair) for pair in pairs if pair[0] == i} for i in range(b)]
        values, nearest = [], []
        for pair in pairs:
            image = o.image_embed[pair[0]]
            own_logit = logit(image, texts[pair])
            absent = [j for j in range(b) if id_of(pair) not in has[j]]
            images = [logit(o.image_embed[j], texts[pair]) for j in absent]
            others = [logit(image, texts[p]) for p in pairs if id_of(p) not in has[pair[0]]]
            values += [loss_of(own_logit, images), *([loss_of(own_logit, others)] if softmax else [])]
            nearest.append(beats(own_logit, images if by_text else others))
        terms[name], right[f"{name}_accuracy"] = np.mean(values), nearest

    captions = o.text_embed, batch.caption_id, batch.caption_mask
    of_texts("image_caption", *captions, by_text=captions[0].shape[1] > 1)
    descriptions = o.region_text_embed, batch.description_id, batch.region_mask
    of_texts("image_description", *descriptions, by_text=True)

    scale, bias = of_regions  # from here on
    real = batch.region_mask & (target[..., 2:] > 0).all(-1)
    matched = []  # (image, query, region)
    for i in range(b):
        regions = np.flatnonzero(real[i])
        cost = np.array(
            [
                [
                    c.match_l1 * np.abs(p - target[i, j]).sum()
                    - c.match_giou * _iou_and_giou(p, target[i, j])[1]
                    - c.match_description * (o.region_embed[i, q] @ o.region_text_embed[i, j])
                    for j in regions
                ]
                for q, p in enumerate(o.pred_boxes_cxcywh[i, -1])
            ]
        )
        queries = linear_sum_assignment(cost.reshape(len(cost), len(regions)))
        matched += [(i, q, regions[k]) for q, k in zip(*queries)]
    overlaps = {m: _iou_and_giou(o.pred_boxes_cxcywh[m[0], -1, m[1]], target[m[0], m[2]]) for m in matched}
    box, rd, bd, from_tokens = [], [], [], []

    def of_patches(i, j):
        """The loss of the patches of a region, and of whether patches of its image show an object."""
        patches, own, entropy = o.token_boxes, [], []
        for box_of_patch, logit, (x, y) in zip(*(part[i] for part in patches)):
            at = [abs(x - cx) < w / 2 and abs(y - cy) < h / 2 for cx, cy, w, h in target[i]]
            around = [k for k in np.flatnonzero(real[i]) if at[k]]
            smallest = min((np.prod(target[i, k, 2:]) for k in around), default=0)
            if j in around and np.prod(target[i, j, 2:]) == smallest:
                giou = _iou_and_giou(box_of_patch, target[i, j])[1]
                own.append(np.abs(box_of_patch - target[i, j]).sum() + 1 - giou)
            entropy.append(np.log1p(np.exp(-logit if around else logit)))
        return (np.mean(own) if own else 0.0) + np.mean(entropy)

    right |= {"region_description_accuracy": [], "box_description_accuracy": []}
    size = c.group_size or b
    for start in range(0, b, size):
        described = [p for p in pairs_of(real) if start <= p[0] < start + size]
        id_of = lambda p: batch.description_id[p] if c.mask_duplicates else p
        text = lambda p: o.region_text_embed[p]
        in_group = [m for m in matched if start <= m[0] < start + size]
        counts = lambda p: 1.0  # of a region

        if c.agreement:

            def counts(p):
                texts = [p, *(x for x in described if x[0] == p[0] and id_of(x) != id_of(p))]
                z = np.exp([scale * (o.box_embed[p] @ text(x)) for x in texts])
                return z[0] / z.sum()

        distance = lambda m: np.abs(o.pred_boxes_cxcywh[m[0], -1, m[1]] - target[m[0], m[2]]).sum()
        of_boxes = [counts((m[0], m[2])) * (distance(m) + 1 - overlaps[m][1]) for m in in_group]
        of_tokens = [of_patches(*p) for p in described]
        from_tokens += of_tokens
        of_tokens = [counts(p) * value for p, value in zip(described, of_tokens)]
        total = sum(map(counts, described)) or 1
        box.append((sum(of_boxes) + c.token_boxes * sum(of_tokens)) / total)
        of_group = []
        for i, q, j in in_group:
            others = [p for p in described if id_of(p) != id_of((i, j))]
            z = [logit(o.region_embed[i, q], text(p)) for p in ((i, j), *others)]
            of_group.append(loss_of(z[0], z[1:]))
            right["region_description_accuracy"].append(beats(z[0], z[1:]))
        weights = [counts((i, j)) for i, _, j in in_group]
        rd.append(np.average(of_group, weights=weights) if of_group else 0.0)
        embedded, of_group = [p for p in described if o.box_embed[p].any()], []
        for pair in embedded:
            different = lambda p, pair=pair: id_of(p) != id_of(pair)
            own_logit = logit(o.box_embed[pair], text(pair))
            texts = [logit(o.box_embed[pair], text(p)) for p in filter(different, described)]
            boxes = [logit(o.box_embed[p], text(pair)) for p in filter(different, embedded)]
            both = (texts, boxes) if softmax else (texts,)
            of_group.append(np.mean([loss_of(own_logit, others) for others in both]))
            right["box_description_accuracy"].append(beats(own_logit, texts))
        weights = [counts(p) for p in embedded]
        bd.append(np.average(of_group, weights=weights) if of_group else 0.0)
    terms |= dict(box=np.mean(box), region_description=np.mean(rd), box_description=np.mean(bd))

    hard = []
    embeds = [("hard_negative_accuracy", (i, j), o.region_embed[i, q]) for i, q, j in matched]
    for p in pairs_of(real & o.box_embed.any(-1)):
        embeds.append(("hard_negative_box_accuracy", p, o.box_embed[p]))
    for name, pair, embed in embeds:
        negatives = [] if o.negative_text_embed is None else o.negative_text_embed[pair]
        others = [logit(embed, x) for x, is_one in zip(negatives, batch.negative_mask[pair]) if is_one]
        if others:
            own_logit = logit(embed, o.region_text_embed[pair])
            hard.append(loss_of(own_logit, others))
            right.setdefault(name, []).append(beats(own_logit, others))
    terms["hard_negative"] = np.mean(hard)
    measures = {name: np.mean(values) for name, values in right.items()}
    iou = np.array([overlaps[m][0] for m in matched])
    shares = np.bincount([q for _, q, _ in matched], minlength=Q) / len(matched)
    measures["token_boxes"] = np.mean(from_tokens)
    measures |= dict(matched_iou=iou.mean(), matched_iou50=(iou >= 0.5).mean(), query_share=shares)
    return terms, measures


EVERY = dict(
    batch_size=32,
    text__pack_rows=12,
    input__negatives_per_region=2,
    model__boxes__kind="roi_align",
    loss__tile=7,
    loss__box=1.5,
    loss__region_description=0.5,
    loss__hard_negative=0.6,
    loss__image_description=0.7,
    loss__box_description=0.9,
)
BY_DESCRIPTION = dict(loss__match_description=1.0, loss__match_l1=0, loss__match_giou=0)


@pytest.mark.parametrize(
    "contrast,group_size,masked,captions,sizes,changes",
    [
        ("softmax", 0, True, 1, None, dict(input__max_regions=8, text__pack_rows=13)),  # than queries
        ("softmax", 4, False, 3, None, dict(loss__match_description=1.0)),
        ("sigmoid", 4, True, 3, None, BY_DESCRIPTION),
        ("sigmoid", 0, False, 1, None, dict(loss__agreement=True)),
        ("softmax", 16, True, 3, (2, 2, 2), dict(loss__agreement=True)),  # a group spans two devices
        ("sigmoid", 0, True, 1, (8, 1, 1), {}),
        pytest.param("softmax", 0, False, 2, (8, 1, 1), {}, marks=pytest.mark.slow),
        pytest.param("sigmoid", 16, False, 3, (4, 2, 1), {}, marks=pytest.mark.slow),
    ],
)
def test_equals_float64_replica(contrast, group_size, masked, captions, sizes, changes):
    """Values and measures of every loss; on a mesh also the gradients, which one device gives, too.

    Padded regions and captions hold random values, which the replica never reads.
    """
    keys = dict(loss__group_size=group_size, loss__mask_duplicates=masked, input__captions_per_image=captions)
    bias = dict(model__logit_bias_init=-2.0) if contrast == "sigmoid" else {}
    c = tiny.config(**EVERY | keys | changes | bias, loss__contrast=contrast)
    batch = tiny.batch(c)
    outputs = learnt(random_outputs(c), batch)._replace(
        scales=schema.Scales(*map(np.float32, (12, -2, 9, -1)))
    )
    batch.region_boxes_cxcywh[3, 1, 2] = 0  # a box without area
    batch.region_mask[4:8] = False  # a group, or a device, without regions
    mask = batch.caption_mask.copy()
    mask[8:11] = mask[30] = False  # images without captions
    batch.description_id[1, 0] = batch.description_id[30, 0]  # one text on two devices
    batch.caption_id[1, 0] = batch.caption_id[29, -1]
    outputs.box_embed[2, :2] = 0  # boxes without a kept patch
    negative_mask = batch.negative_mask & batch.region_mask[..., None]
    caption_id = np.where(mask, batch.caption_id, 0)
    batch = batch._replace(caption_mask=mask, caption_id=caption_id, negative_mask=negative_mask)
    options = {}
    if sizes is not None:
        axes = dict(zip(("data", "fsdp", "tensor"), sizes))
        mesh = sharding.make_mesh(dataclasses.replace(c.mesh, **axes), jax.devices()[: math.prod(sizes)])
        options = dict(mesh=mesh, batch_axes=sharding.BATCH_AXES)

    def total(outputs, batch, **options):
        values = losses.total_loss(outputs, batch, c.loss, **options)
        return values.total, values

    run = total if sizes is None else jax.grad(total, has_aux=True)
    first, values = jax.jit(lambda o, b: run(o, b, **options))(outputs, batch)
    terms, measures = replica(outputs, batch, c.loss)
    for name, expected in terms.items():
        np.testing.assert_allclose(values.terms[name], expected, rtol=1e-5, err_msg=name)
    assert measures.keys() == values.measures.keys()
    for name, expected in measures.items():
        np.testing.assert_allclose(values.measures[name], expected, rtol=1e-5, err_msg=name)
        assert name in ("query_share", "token_boxes") or 0 < expected < 1, name
    weighted = sum(getattr(c.loss, name) * value for name, value in terms.items())
    np.testing.assert_allclose(values.total, weighted, rtol=1e-5)
    if sizes is not None:
        alone, _ = jax.jit(jax.grad(total, has_aux=True))(outputs, batch)
        assert np.abs(first.token_boxes.logit).max() > 0
        for (path, a), b in zip(jax.tree.leaves_with_path(alone), jax.tree.leaves(first)):
            atol = 1e-5 * max(np.abs(a).max(), 0.1)
            np.testing.assert_allclose(b, a, rtol=1e-4, atol=atol, err_msg=str(path))


def test_streamed_losses_equal_their_plain_forms():
    """Losses and gradients; query j has box j, so that the matching is known."""
    outputs, batch = replicas.example(32, D)
    config = config_lib.Loss(image_description=1.0, box_description=1.0)
    streamed = lambda o: losses.total_loss(o, batch, config).terms
    plain = lambda o: replicas.losses(o, batch)
    (got, got_gradient), (expected, gradient) = (
        jax.jit(lambda o, f=f: (f(o), jax.grad(lambda o: sum(f(o).values()))(o)))(outputs)
        for f in (streamed, plain)
    )
    assert got.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=2e-6, err_msg=name)
    for ours, theirs in zip(jax.tree.leaves(got_gradient), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_hard_negatives_without_queries_or_boxes():
    c = tiny.config(input__negatives_per_region=2, loss__hard_negative=0.5)
    batch = tiny.batch(c)
    outputs = learnt(random_outputs(c), batch)
    no_boxes = outputs._replace(box_embed=None)
    no_queries = outputs._replace(
        region_embed=outputs.region_embed[:, :0], pred_boxes_cxcywh=outputs.pred_boxes_cxcywh[:, :, :0]
    )
    both, *alone = (_total(x, batch, c.loss) for x in (outputs, no_boxes, no_queries))
    for result, name in zip(alone, ("hard_negative_accuracy", "hard_negative_box_accuracy")):
        of_hard = {key: x for key, x in result.measures.items() if key.startswith("hard")}
        assert of_hard == {name: both.measures[name]}
    # A mean over all: as many boxes as matched queries, since each region has one.
    mean = sum(x.terms["hard_negative"] for x in alone) / 2
    np.testing.assert_allclose(both.terms["hard_negative"], mean, rtol=1e-5)
    # A tie with the description is not right, and a region without negatives does not count.
    same = np.repeat(outputs.region_text_embed[:, :, None], 2, axis=2)
    one_negative = batch._replace(negative_mask=batch.region_mask[..., None] & [True, False])
    result = _total(no_boxes._replace(negative_text_embed=same), one_negative, c.loss)
    np.testing.assert_allclose(result.terms["hard_negative"], np.log(2), rtol=1e-6)
    assert result.measures["hard_negative_accuracy"] == 0


def test_nothing_to_learn_from_is_zero_with_zero_gradient():
    c = tiny.config(input__negatives_per_region=2, loss__hard_negative=1.0)
    batch, outputs = tiny.batch(c), random_outputs(c)
    batch = batch._replace(
        region_mask=np.zeros_like(batch.region_mask), negative_mask=np.zeros_like(batch.negative_mask)
    )

    def of_regions(outputs):
        terms = losses.total_loss(outputs, batch, c.loss).terms
        return terms["box"] + terms["region_description"] + terms["hard_negative"]

    value, grads = jax.jit(jax.value_and_grad(of_regions))(outputs)
    assert float(value) == 0 and not any(np.any(g) for g in jax.tree.leaves(grads))


def test_an_iou_of_exactly_half_counts_as_in_evaluation():
    c = tiny.config()
    batch, outputs = tiny.batch(c), random_outputs(c)
    batch.region_boxes_cxcywh[:] = [0.5, 0.5, 1, 1]
    outputs.pred_boxes_cxcywh[:] = [0.25, 0.5, 0.5, 1]
    got = _total(outputs, batch, c.loss)
    assert (float(got.measures["matched_iou"]), float(got.measures["matched_iou50"])) == (0.5, 1.0)


@pytest.mark.parametrize("contrast", ["softmax", "sigmoid"])
def test_a_model_that_says_the_same_of_everything_is_never_right(contrast):
    """Nor does rounding make it so: the own logit and the others are computed in different ways."""
    bias = -1.0 if contrast == "sigmoid" else None
    c = tiny.config(loss__contrast=contrast, model__logit_bias_init=bias)
    batch, outputs = tiny.batch(c), random_outputs(c)
    names = ("image_embed", "text_embed", "region_embed", "region_text_embed")
    first = lambda name: np.broadcast_to(outputs.image_embed[0], getattr(outputs, name).shape)
    got = _total(outputs._replace(**{name: first(name) for name in names}), batch, c.loss)
    assert got.measures["image_caption_accuracy"] == 0
    assert got.measures["region_description_accuracy"] == 0


def test_deep_supervision_adds_the_earlier_layers_boxes():
    c = tiny.config(loss__deep_supervision=True)
    plain = dataclasses.replace(c.loss, deep_supervision=False)
    batch = tiny.batch(c)
    outputs = random_outputs(c, layers=2)._replace(token_boxes=None)
    boxes = outputs.pred_boxes_cxcywh
    layers = [outputs._replace(pred_boxes_cxcywh=boxes[:, n : n + 1]) for n in range(2)]
    expected = sum(_total(layer, batch, plain).terms["box"] for layer in layers)
    np.testing.assert_allclose(_total(outputs, batch, c.loss).terms["box"], expected, rtol=1e-5)


def test_no_gradient_flows_through_the_matching():
    cost = np.random.default_rng(0).normal(size=(2, 5, 5)).astype(np.float32)
    grad = jax.grad(lambda c: matching.match(c, np.ones((2, 5), bool)).query_index.astype(float).sum())(cost)
    assert not np.any(grad)


@pytest.mark.parametrize("offset, shows", [(0.25, False), (0.249, True)])
def test_a_patch_on_the_edge_of_a_box_is_outside(offset, shows):
    """FCOS: the centre lies in the box, not on its edge. A logit of 10 costs 10 where no object is."""
    box = np.full((1, 1, 4), 0.5, np.float32)
    centre = np.array([[[0.5 - offset, 0.5]]], np.float32)
    tokens = schema.TokenBoxes(box, np.full((1, 1), 10, np.float32), centre)
    targets = types.SimpleNamespace(boxes_cxcywh=box, box_mask=np.ones((1, 1), bool))
    loss = box_loss._of_tokens(tokens, targets)
    np.testing.assert_allclose(loss, [[np.log1p(np.exp(-10 if shows else 10))]], atol=1e-5)
