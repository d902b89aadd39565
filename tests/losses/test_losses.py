"""The losses against a float64 replica that loops over images, written from docs/method.md."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from grain_jax import losses
from grain_jax.core import schema
from grain_jax.losses import matching
from tests import tiny
from tests.grids import some_of

D, Q = 16, 5
CONTRASTS = ("softmax", "sigmoid")


def _outputs(c, seed=0, layers=2, width=D):
    rng = np.random.default_rng(seed)
    b, r, captions = c.batch_size, c.input.max_regions, c.input.captions_per_image
    unit = lambda *shape: (x := rng.normal(size=shape)) / np.linalg.norm(x, axis=-1, keepdims=True)
    h = c.input.negatives_per_region
    low = rng.uniform(0.2, 0.8, (layers, b, Q, 4))
    shapes = (b,), (b, captions), (b, Q), (b, r)
    embeds = [unit(*shape, width) for shape in shapes]
    boxes, negatives = unit(b, r, width), unit(b, r, h, width) if h else None
    out = schema.Outputs(*embeds, low, np.float64(12.0), np.float64(0), boxes, negatives)
    return jax.tree.map(lambda x: np.asarray(x, np.float32), out)


def _total(outputs, batch, loss):
    """`losses.total_loss` as one program: its operations one by one take longer to compile."""
    return jax.jit(lambda *given: losses.total_loss(*given, loss))(outputs, batch)


def _corners(box):
    return np.concatenate([box[:2] - box[2:] / 2, box[:2] + box[2:] / 2])


def _overlap_and_union(p, t):
    overlap = np.prod(np.maximum(np.minimum(p[2:], t[2:]) - np.maximum(p[:2], t[:2]), 0))
    return overlap, np.prod(p[2:] - p[:2]) + np.prod(t[2:] - t[:2]) - overlap


def _iou(p, t):
    overlap, union = _overlap_and_union(_corners(p), _corners(t))
    return overlap / union


def _giou(p, t):
    p, t = _corners(p), _corners(t)
    overlap, union = _overlap_and_union(p, t)
    hull = np.prod(np.maximum(p[2:], t[2:]) - np.minimum(p[:2], t[:2]))
    return overlap / union - (hull - union) / hull


def _cross_entropy(logits, label, allowed):
    allowed = allowed | (np.arange(len(logits)) == label)
    z = logits[allowed]
    return np.log(np.exp(z - z.max()).sum()) + z.max() - logits[label]


def learnt(outputs, batch):
    """The outputs of a model that has learnt something: about half of what it says is right."""
    shown = outputs._replace(
        image_embed=outputs.image_embed + 0.6 * outputs.text_embed[:, 0],
        region_embed=outputs.region_embed + 0.6 * outputs.region_text_embed[:, :Q],
        box_embed=outputs.box_embed + 0.6 * outputs.region_text_embed,
    )
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    boxes = outputs.pred_boxes_cxcywh.copy()
    boxes[-1, ::2, :3] = batch.region_boxes_cxcywh[::2, :3] * 0.95
    return shown._replace(
        image_embed=unit(shown.image_embed),
        region_embed=unit(shown.region_embed),
        box_embed=unit(shown.box_embed),
        pred_boxes_cxcywh=boxes,
    )


def replica(outputs, batch, c):
    """(L_ic, L_box, L_rd) in float64."""
    return replica_and_measures(outputs, batch, c)[0]


def _beats_others(logits, label, allowed):
    return logits[label] > max(logits[allowed & (np.arange(len(logits)) != label)])


def replica_and_measures(outputs, batch, c):
    """((L_ic, L_box, L_rd), the measures by their names) in float64."""
    o = jax.tree.map(lambda x: np.asarray(x, np.float64), outputs)
    b, r = batch.region_mask.shape
    if batch.caption_mask.shape[1] > 1:
        texts = outputs.text_embed, batch.caption_id, batch.caption_mask
        ic, right = positives_replica(outputs, *texts, c)
    else:
        (caption_id,) = batch.caption_id.T
        same = caption_id[:, None] == caption_id[None]
        allowed = ~same if c.mask_duplicates else np.ones((b, b), bool)
        logits = o.logit_scale * o.image_embed @ o.text_embed[:, 0].T
        ic = [_cross_entropy(logits[i], i, allowed[i]) for i in range(b)]
        ic += [_cross_entropy(logits[:, i], i, allowed[:, i]) for i in range(b)]
        right = [_beats_others(logits[i], i, allowed[i]) for i in range(b)]
    size = c.group_size or b
    box, rd, region_right, overlaps, queries = [], [], [], [], []
    for start in range(0, b, size):
        pairs, real = [], []
        for i in range(start, start + size):
            t = [
                j
                for j in range(r)
                if batch.region_mask[i, j] and (batch.region_boxes_cxcywh[i, j, 2:] > 0).all()
            ]
            real += [(i, j) for j in t]
            target = batch.region_boxes_cxcywh[i, t].astype(np.float64)
            pred = o.pred_boxes_cxcywh[-1, i]
            cost = [
                [
                    c.match_l1 * np.abs(p - x).sum()
                    - c.match_giou * _giou(p, x)
                    - c.match_description * (o.region_embed[i, q] @ o.region_text_embed[i, j])
                    for x, j in zip(target, t)
                ]
                for q, p in enumerate(pred)
            ]
            for q, j in zip(*linear_sum_assignment(np.array(cost).reshape(len(pred), len(t)))):
                pairs.append((i, q, t[j]))
        if not real:
            box.append(0.0), rd.append(0.0)
            continue
        total = sum(
            np.abs(o.pred_boxes_cxcywh[-1, i, q] - batch.region_boxes_cxcywh[i, j]).sum()
            + 1
            - _giou(
                o.pred_boxes_cxcywh[-1, i, q],
                batch.region_boxes_cxcywh[i, j].astype(float),
            )
            for i, q, j in pairs
        )
        box.append(total / len(real))
        texts = np.array([o.region_text_embed[i, j] for i, j in real])
        ids = np.array([batch.description_id[i, j] for i, j in real])
        terms = []
        for i, q, j in pairs:
            label = real.index((i, j))
            ok = ids != ids[label] if c.mask_duplicates else np.ones(len(ids), bool)
            logits = o.logit_scale * texts @ o.region_embed[i, q]
            terms.append(_cross_entropy(logits, label, ok))
            region_right.append(_beats_others(logits, label, ok))
            overlaps.append(_iou(o.pred_boxes_cxcywh[-1, i, q], batch.region_boxes_cxcywh[i, j]))
            queries.append(q)
        rd.append(np.mean(terms))
    return (np.mean(ic), np.mean(box), np.mean(rd)), {
        "matched_iou": np.mean(overlaps),
        "matched_iou50": np.mean(np.array(overlaps) >= 0.5),
        "image_caption_accuracy": np.mean(right),
        "region_description_accuracy": np.mean(region_right),
        "query_share": np.bincount(queries, minlength=Q) / len(queries),
    }


def hard_negative_replica(outputs, batch, c, *, queries=True):
    """(L_hard, its measures by their names) in float64."""
    o = jax.tree.map(lambda x: np.asarray(x, np.float64), outputs)
    terms, right = [], {"hard_negative_accuracy": [], "hard_negative_box_accuracy": []}
    for i, mask in enumerate(batch.region_mask):
        boxes = batch.region_boxes_cxcywh[i].astype(np.float64)
        regions = np.flatnonzero(mask & (boxes[:, 2:] > 0).all(-1))
        cost = [
            [
                c.match_l1 * np.abs(p - boxes[j]).sum() - c.match_giou * _giou(p, boxes[j])
                for j in regions
            ]
            for p in o.pred_boxes_cxcywh[-1, i]
        ]
        matched = zip(*linear_sum_assignment(np.array(cost).reshape(Q, len(regions))))
        embeds = [("", regions[k], o.region_embed[i, q]) for q, k in matched if queries]
        if o.box_embed is not None:
            embeds += [("_box", j, o.box_embed[i, j]) for j in regions]
        for kind, j, embed in embeds:
            negatives = o.negative_text_embed[i, j][batch.negative_mask[i, j]]
            if not len(negatives):
                continue
            texts = np.concatenate([o.region_text_embed[i, j][None], negatives])
            z = o.logit_scale * texts @ embed + o.logit_bias
            if c.contrast == "softmax":
                terms.append(np.log(np.exp(z - z[0]).sum()))
            else:
                terms.append(np.log1p(np.exp(-z[0])) + np.log1p(np.exp(z[1:])).sum())
            right[f"hard_negative{kind}_accuracy"].append(z[0] > z[1:].max())
    return np.mean(terms), {name: np.mean(of) for name, of in right.items() if of}


@some_of(
    dict(contrast=CONTRASTS, compared=("queries", "boxes", "both")),
    ("softmax", "queries"),
    ("sigmoid", "boxes"),
    ("sigmoid", "both"),
)
def test_hard_negative_equals_float64_replica(contrast, compared):
    c = tiny.config(
        input__negatives_per_region=2,
        loss__hard_negative=0.5,
        loss__contrast=contrast,
        model__logit_bias_init=-10.0 if contrast == "sigmoid" else None,
    )
    batch = tiny.batch(c)
    assert batch.negative_mask.any(-1).sum() not in (0, batch.region_mask.sum())
    outputs = learnt(_outputs(c), batch)._replace(logit_bias=np.float32(-2))
    if compared == "queries":
        outputs = outputs._replace(box_embed=None)
    expected, right = hard_negative_replica(outputs, batch, c.loss, queries=compared != "boxes")
    if compared == "boxes":  # a model without a decoder
        boxes = outputs.pred_boxes_cxcywh[:, :, :0]
        outputs = outputs._replace(
            region_embed=outputs.region_embed[:, :0], pred_boxes_cxcywh=boxes
        )
    got = _total(outputs, batch, c.loss)
    np.testing.assert_allclose(got.terms["hard_negative"], expected, rtol=1e-5)
    measures = {name: x for name, x in got.measures.items() if name.startswith("hard_negative")}
    assert measures.keys() == right.keys() and 0.2 < min(right.values()) < 1
    for name, value in right.items():
        np.testing.assert_allclose(measures[name], value, rtol=1e-6)
    without = _total(outputs, batch, dataclasses.replace(c.loss, hard_negative=0.0))
    np.testing.assert_allclose(got.total, without.total + 0.5 * expected, rtol=1e-6)
    assert "hard_negative" not in without.terms


def test_hard_negatives_that_are_none_or_the_description_itself():
    c = tiny.config(input__negatives_per_region=2, loss__hard_negative=1.0)
    batch, outputs = tiny.batch(c), _outputs(c)
    # A tie with the description is not right, and a region without negatives does not count.
    same = np.repeat(outputs.region_text_embed[:, :, None], 2, axis=2)
    outputs = outputs._replace(negative_text_embed=same, box_embed=None)
    batch = batch._replace(negative_mask=batch.region_mask[..., None] & [True, False])
    found = _total(outputs, batch, c.loss)
    np.testing.assert_allclose(found.terms["hard_negative"], np.log(2), rtol=1e-6)
    assert found.measures["hard_negative_accuracy"] == 0
    batch = batch._replace(negative_mask=np.zeros_like(batch.negative_mask))

    def value(outputs):
        return losses.total_loss(outputs, batch, c.loss).terms["hard_negative"]

    nothing, grads = jax.jit(jax.value_and_grad(value))(outputs)
    assert nothing == 0 and not any(np.any(g) for g in jax.tree.leaves(grads))


def image_description_replica(outputs, batch, c):
    """(L_id, the share of descriptions whose nearest image has them) in float64."""
    of = outputs.region_text_embed, batch.description_id, batch.region_mask
    return positives_replica(outputs, *of, c)


def positives_replica(outputs, texts, text_id, real, c):
    """(the loss of images and all of their texts, the share of texts whose nearest image has them), pair by pair."""
    g, t = (np.asarray(x, np.float64) for x in (outputs.image_embed, texts))
    z = float(outputs.logit_scale) * np.einsum("id,jkd->ijk", g, t) + float(outputs.logit_bias)
    pairs = [(i, k) for i, k in np.argwhere(real)]
    ids = {pair: text_id[pair] if c.mask_duplicates else pair for pair in pairs}
    of_image = [{ids[pair] for pair in pairs if pair[0] == i} for i in range(len(g))]
    losses_, right = [], []
    for i, k in pairs:
        own = z[i, i, k]
        images = [z[j, i, k] for j in range(len(g)) if ids[i, k] not in of_image[j]]
        texts = [z[i, *pair] for pair in pairs if ids[pair] not in of_image[i]]
        if c.contrast == "softmax":
            losses_ += [np.log(np.exp([own, *z_]).sum()) - own for z_ in (images, texts)]
        else:  # each pair of an image and a description of the batch once
            losses_.append(np.log1p(np.exp(-own)) + np.log1p(np.exp(images)).sum())
        right.append(own > max(images, default=-np.inf) + 1e-5 * float(outputs.logit_scale))
    return np.mean(losses_), np.mean(right)


def box_description_replica(outputs, batch, c):
    """(L_bd, the share of boxes nearest to their own description) in float64, group by group and pair by pair."""
    e, t = (np.asarray(x, np.float64) for x in (outputs.box_embed, outputs.region_text_embed))
    size = c.group_size or len(e)
    means, right = [], []
    for start in range(0, len(e), size):
        real = batch.region_mask & (batch.region_boxes_cxcywh[..., 2:] > 0).all(-1)
        described = [(i, k) for i, k in np.argwhere(real) if start <= i < start + size]
        pairs = [p for p in described if e[p].any()]  # of zeros: no patch of the box was kept
        losses_ = []
        for pair in pairs:
            others = [p for p in described if p != pair]
            if c.mask_duplicates:
                own_id = batch.description_id[pair]
                others = [p for p in others if batch.description_id[p] != own_id]
            z = lambda a, b: float(outputs.logit_scale) * e[a] @ t[b] + float(outputs.logit_bias)
            own, texts, boxes = (
                z(pair, pair),
                [z(pair, p) for p in others],
                [z(p, pair) for p in others if p in pairs],
            )
            if c.contrast == "softmax":
                losses_.append(
                    np.mean([np.log(np.exp([own, *x]).sum()) - own for x in (texts, boxes)])
                )
            else:
                losses_.append(np.log1p(np.exp(-own)) + np.log1p(np.exp(texts)).sum())
            right.append(own > max(texts, default=-np.inf) + 1e-5 * float(outputs.logit_scale))
        means.append(np.mean(losses_) if pairs else 0.0)
    return np.mean(means), np.mean(right)


def assert_measures(got, expected):
    for name, value in expected.items():
        np.testing.assert_allclose(got.measures[name], value, rtol=1e-5, err_msg=name)


@some_of(
    dict(group_size=(0, 4), mask_duplicates=(True, False)),
    (0, True),
    (4, True),
    (4, False),
)
def test_equals_float64_replica(group_size, mask_duplicates):
    c = tiny.config(
        loss__group_size=group_size,
        loss__mask_duplicates=mask_duplicates,
        loss__box=1.5,
        loss__region_description=0.5,
    )
    batch, outputs = tiny.batch(c), _outputs(c)
    batch.region_boxes_cxcywh[3, 1, 2] = 0  # a box without area
    batch.region_mask[4:8] = False  # a group without regions
    got = _total(outputs, batch, c.loss)
    ic, box, rd = replica(outputs, batch, c.loss)
    np.testing.assert_allclose(
        [got.terms[name] for name in ("image_caption", "box", "region_description")],
        [ic, box, rd],
        rtol=1e-5,
    )
    np.testing.assert_allclose(got.total, ic + 1.5 * box + 0.5 * rd, rtol=1e-5)


# Without the terms whose weights are not 0 by default.
ALONE = dict(loss__image_caption=0.0, loss__box=0.0, loss__region_description=0.0)


def _of_type(contrast):
    bias = -1.0 if contrast == "sigmoid" else None
    return dict(loss__contrast=contrast, model__logit_bias_init=bias)


def _assert_alone(c, batch, outputs, name, expected, right):
    """The only loss, of weight 0.5, and its accuracy are those of a replica."""
    got = _total(outputs, batch, c.loss)
    assert 0 < right < 1
    np.testing.assert_allclose(got.terms[name], expected, rtol=1e-5)
    np.testing.assert_allclose(got.measures[f"{name}_accuracy"], right, rtol=1e-6)
    np.testing.assert_allclose(got.total, 0.5 * expected, rtol=1e-5)


@pytest.mark.parametrize("contrast", ["softmax", "sigmoid"])
@pytest.mark.parametrize("mask_duplicates", [True, False])
def test_image_description_equals_float64_replica(contrast, mask_duplicates):
    weights = ALONE | dict(loss__image_description=0.5, loss__mask_duplicates=mask_duplicates)
    c = tiny.config(**weights, **_of_type(contrast))
    batch = tiny.batch(c)
    outputs = learnt(_outputs(c), batch)
    batch.region_mask[4:6] = False  # images without descriptions are negatives of all of them
    batch.region_boxes_cxcywh[3, 0, 2] = 0  # a description needs no box
    batch.description_id[1, 0] = batch.description_id[3, 0]  # two images with one text
    found = image_description_replica(outputs, batch, c.loss)
    _assert_alone(c, batch, outputs, "image_description", *found)


@some_of(
    dict(captions=(2, 3), contrast=CONTRASTS, mask_duplicates=(True, False)),
    (3, "softmax", True),
    (2, "softmax", False),
    (2, "sigmoid", True),
    (3, "sigmoid", False),
)
def test_several_captions_equal_float64_replica(captions, contrast, mask_duplicates):
    weights = ALONE | dict(loss__image_caption=0.5, loss__mask_duplicates=mask_duplicates)
    c = tiny.config(input__captions_per_image=captions, **weights, **_of_type(contrast))
    batch = tiny.batch(c)
    outputs = learnt(_outputs(c), batch)._replace(logit_bias=np.float32(-1))
    batch.caption_mask[5] = False  # an image without captions is a negative of all of them
    batch.caption_id[8] = batch.caption_id[8, 0]  # one text twice on one image
    batch.caption_id[1, 0] = batch.caption_id[3, 1]  # and on two
    texts = outputs.text_embed, batch.caption_id, batch.caption_mask
    found = positives_replica(outputs, *texts, c.loss)
    _assert_alone(c, batch, outputs, "image_caption", *found)


@some_of(
    dict(group_size=(0, 4), contrast=CONTRASTS, mask_duplicates=(True, False)),
    (4, "softmax", True),
    (0, "softmax", False),
    (0, "sigmoid", True),
    (4, "sigmoid", False),
)
def test_box_description_equals_float64_replica(group_size, contrast, mask_duplicates):
    weights = ALONE | dict(loss__box_description=0.5, loss__mask_duplicates=mask_duplicates)
    boxes = dict(model__boxes__kind="roi_align", loss__group_size=group_size)
    c = tiny.config(**weights, **boxes, **_of_type(contrast))
    batch = tiny.batch(c)
    outputs = learnt(_outputs(c), batch)._replace(logit_bias=np.float32(-1))
    batch.region_mask[4:8] = False  # a group without regions
    batch.region_boxes_cxcywh[3, 0, 2] = 0  # a box without area has no embedding
    batch.description_id[1, 0] = batch.description_id[3, 1]  # two images with one text
    outputs.box_embed[2, :2] = 0  # boxes without a kept patch
    found = box_description_replica(outputs, batch, c.loss)
    _assert_alone(c, batch, outputs, "box_description", *found)


@pytest.mark.parametrize("group_size,mask_duplicates", [(0, True), (4, False)])
def test_measures_equal_the_replica(group_size, mask_duplicates):
    c = tiny.config(loss__group_size=group_size, loss__mask_duplicates=mask_duplicates)
    batch = tiny.batch(c)
    outputs = learnt(_outputs(c), batch)
    _, measures = replica_and_measures(outputs, batch, c.loss)
    assert all(0.2 < measures[name] < 0.9 for name in measures if name != "query_share"), measures
    assert_measures(_total(outputs, batch, c.loss), measures)


def test_an_iou_of_exactly_half_counts_as_in_evaluation():
    c = tiny.config()
    batch, outputs = tiny.batch(c), _outputs(c)
    batch.region_boxes_cxcywh[:] = [0.5, 0.5, 1, 1]
    outputs.pred_boxes_cxcywh[:] = [0.25, 0.5, 0.5, 1]
    got = _total(outputs, batch, c.loss)
    assert (float(got.measures["matched_iou"]), float(got.measures["matched_iou50"])) == (0.5, 1.0)


@pytest.mark.parametrize("contrast", ["softmax", "sigmoid"])
def test_a_model_that_says_the_same_of_everything_is_never_right(contrast):
    """Nor does rounding make it so: the own logit and the others are computed in different ways."""
    c = tiny.config(**_of_type(contrast))
    batch, outputs = tiny.batch(c), _outputs(c)
    names = ("image_embed", "text_embed", "region_embed", "region_text_embed")
    first = outputs.image_embed[0]
    outputs = outputs._replace(
        **{name: np.broadcast_to(first, getattr(outputs, name).shape) for name in names}
    )
    got = _total(outputs, batch, c.loss)
    assert got.measures["image_caption_accuracy"] == 0
    assert got.measures["region_description_accuracy"] == 0


WORDS = dict(loss__match_description=1.0)


@pytest.mark.parametrize(
    "changes",
    [
        WORDS,
        WORDS | dict(loss__match_l1=0, loss__match_giou=0),
        dict(input__max_regions=8, text__pack_rows=8),
    ],
    ids=["words and boxes", "words", "more regions than queries"],
)
def test_matching_equals_the_replica(changes):
    c = tiny.config(**changes)
    batch, outputs = tiny.batch(c), _outputs(c)
    got = _total(outputs, batch, c.loss)
    _, box, rd = replica(outputs, batch, c.loss)
    found = [got.terms["box"], got.terms["region_description"]]
    np.testing.assert_allclose(found, [box, rd], rtol=1e-5)
    if c.loss.match_description:
        without = dataclasses.replace(c.loss, match_description=0.0, match_l1=5.0)
        of_boxes = _total(outputs, batch, without).terms["region_description"]
        assert abs(of_boxes - rd) > 1e-3


def test_no_region_in_the_whole_batch_is_zero_with_zero_gradient():
    c = tiny.config()
    batch, outputs = tiny.batch(c), _outputs(c)
    batch = batch._replace(region_mask=np.zeros_like(batch.region_mask))

    def of_regions(outputs):
        terms = losses.total_loss(outputs, batch, c.loss).terms
        return terms["box"] + terms["region_description"]

    value, grads = jax.jit(jax.value_and_grad(of_regions))(outputs)
    assert float(value) == 0
    for g in grads:
        assert not np.any(g)


def test_equal_texts_are_negatives_only_with_the_switch_off():
    c = tiny.config()
    batch, outputs = tiny.batch(c), _outputs(c)
    batch = batch._replace(
        caption_id=np.zeros_like(batch.caption_id),
        description_id=np.zeros_like(batch.description_id),
    )
    # Every other text is the same text: nothing is left to tell apart.
    got = _total(outputs, batch, c.loss)
    np.testing.assert_allclose(
        [got.terms["image_caption"], got.terms["region_description"]], 0, atol=1e-6
    )
    off = _total(outputs, batch, dataclasses.replace(c.loss, mask_duplicates=False))
    assert off.terms["image_caption"] > 1 and off.terms["region_description"] > 1


def test_deep_supervision_adds_the_earlier_layers_boxes():
    c = tiny.config(loss__deep_supervision=True)
    batch, outputs = tiny.batch(c), _outputs(c, layers=3)
    boxes = outputs.pred_boxes_cxcywh
    layers = [outputs._replace(pred_boxes_cxcywh=boxes[: n + 1]) for n in range(3)]
    expected = sum(replica(layer, batch, c.loss)[1] for layer in layers)
    found = _total(outputs, batch, c.loss)
    np.testing.assert_allclose(found.terms["box"], expected, rtol=1e-5)


def test_no_gradient_flows_through_the_matching():
    cost = np.random.default_rng(0).normal(size=(2, 5, 5)).astype(np.float32)
    grad = jax.grad(
        lambda c: matching.match(c, np.ones((2, 5), bool)).query_index.astype(float).sum()
    )(cost)
    assert not np.any(grad)


def test_padded_regions_and_captions_change_nothing():
    c = tiny.config(input__captions_per_image=3)
    batch, outputs = tiny.batch(c), _outputs(c)
    first = _total(outputs, batch, c.loss)
    junk, no_caption = np.random.default_rng(5), ~batch.caption_mask

    def changed(x, hidden):
        return np.where(hidden[..., None], junk.uniform(0, 1, x.shape), x).astype(np.float32)

    second = _total(
        outputs._replace(
            region_text_embed=changed(outputs.region_text_embed, ~batch.region_mask),
            text_embed=changed(outputs.text_embed, no_caption),
        ),
        batch._replace(
            region_boxes_cxcywh=changed(batch.region_boxes_cxcywh, ~batch.region_mask),
            caption_id=np.where(no_caption, batch.caption_id[0, 0], batch.caption_id),
        ),
        c.loss,
    )
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-6)
