"""The loss of the text decoder against torch in float64; what is drawn of each image."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from grain_jax import config as config_lib
from grain_jax.input_pipeline import assemble
from grain_jax.input_pipeline.text_cleaning import Texts
from grain_jax.models import text_decoder
from grain_jax.terms.text_decoder import Options, TextDecoderTerm, draw
from tests import tiny
from tests.models import test_text_decoder as of_decoder
from tests.terms import fake

OPTIONS = Options(
    **dict(width=24, depth=2, heads=3, mlp_dim=40, bins=10, row_length=40, dropout=0.0, group=1),
    **dict(caption_weight=0.5, describe_weight=1.5, point_weight=2.0, label_smoothing=0.1),
)
IN_PARALLEL = dataclasses.replace(OPTIONS, parallel_rate=0.5)


@functools.cache
def case(options=OPTIONS):
    """(the term, what it sees, its parameters)."""
    c = tiny.config(model__text__vocab_size=50)
    term = TextDecoderTerm(options, c.model)
    seen = fake.seen(c, leading=1)
    batch = seen.batch._replace(text_tokens=seen.batch.text_tokens % 50)
    batch.region_mask[6] = False
    batch.caption_mask[5] = False
    seen = seen._replace(batch=batch)
    return term, seen, jax.tree.map(jnp.asarray, fake.random_parameters(term, seen))


def loss(term, params, seen):
    """(the mean loss, what the term gave)."""
    found = term.apply({"params": params}, seen)
    return found.loss.sum.sum() / found.loss.count.sum(), found


def drawn(options=OPTIONS):
    term, seen, _ = case(options)
    words = text_decoder.vocabulary(options, term.model)
    run = lambda batch, keys: draw(options, words, seen._replace(batch=batch, keys=keys))
    return words, jax.jit(run)(seen.batch, seen.keys)


def replica(params, tokens, rows, words, score=lambda i, at: 1.0):
    """(loss, accuracy of each task, gradients of parameters and tokens), sequence after sequence."""
    tensor = lambda x: torch.tensor(np.array(x), dtype=torch.float64, requires_grad=True)
    p, tokens = jax.tree.map(tensor, params["decoder"]), tensor(tokens)
    weights, smoothing = [*OPTIONS.weights, None, OPTIONS.caption_weight], OPTIONS.label_smoothing
    total, count, right = 0, 0, [[], [], [], [], []]
    for i in range(len(tokens)):
        for segment in range(1, int(rows.segments[i].max()) + 1):
            at = np.flatnonzero(rows.segments[i] == segment)
            if not len(at):
                continue
            causal = np.tril(np.ones((len(at), len(at)), bool))
            given = tokens[i, 1:], rows.tokens[i, at], np.arange(len(at)), causal
            of_words = of_decoder.replica(p, *given)[:, : words.size]
            where = np.flatnonzero(rows.predicted[i, at])
            target = torch.tensor(np.array(rows.targets[i, at][where]), dtype=torch.long)
            task = int(rows.task[i, at[0]])
            cost = torch.nn.functional.cross_entropy
            found = cost(of_words[where], target, reduction="sum", label_smoothing=smoothing)
            weight = weights[task] * score(i, at)
            total, count = total + weight * found, count + weight * len(where)
            right[task] += (of_words[where].argmax(1) == target).tolist()
    (total / count).backward()
    gradients = {"decoder": jax.tree.map(lambda x: x.grad.numpy(), p)}, tokens.grad.numpy()
    return (total / count).item(), [np.mean(x) if x else None for x in right], gradients


@pytest.mark.parametrize(
    "options",
    [pytest.param(OPTIONS, marks=pytest.mark.slow), IN_PARALLEL],
    ids=["causal", "in parallel"],
)
def test_values_and_gradients_equal_torchs_cross_entropy(options):
    term, seen, params = case(options)
    run = lambda params, tokens: loss(term, params, seen._replace(tokens=tokens))
    run = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))
    (value, found), gradients = run(params, jnp.asarray(seen.tokens))
    words, rows = drawn(options)
    expected, accuracy, expected_gradients = replica(params, seen.tokens, rows.rows, words)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    names = [*text_decoder.TASKS, "boxes", "caption_parallel"]
    shares = {name: x for name, x in zip(names, accuracy) if x is not None}
    assert ("caption_parallel" in shares) == ("caption_parallel" in found.measures)
    for task, share in shares.items():
        measured = found.measures[f"{task}_accuracy"]
        np.testing.assert_allclose(measured.sum.sum() / measured.count.sum(), share, rtol=1e-6)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(expected_gradients),
        jax.tree.leaves(gradients),
        strict=True,
    ):
        np.testing.assert_allclose(
            b, a, rtol=0, atol=1e-5 * np.abs(a).max() + 1e-9, err_msg=str(path)
        )


def test_scores_of_annotations_weigh_their_regions():
    options = changed(by_score=True, bins=500)
    alone, seen, params = case(changed(bins=500))
    term = TextDecoderTerm(options, alone.model)
    batch, rng = seen.batch, np.random.default_rng(0)
    scores = rng.uniform(0, 1, batch.region_mask.shape).astype(np.float32)
    seen = seen._replace(batch=batch._replace(region_scores=scores))
    words = text_decoder.vocabulary(options, term.model)
    rows = jax.tree.map(np.asarray, draw(options, words, seen).rows)
    boxes = np.asarray(words.quantise(text_boxes(batch.region_boxes_cxcywh.reshape(-1, 4))))
    boxes = boxes.reshape(*scores.shape, 4)

    def score(i, at):
        box = {0: None, 1: rows.tokens[i, at][1:5], 2: rows.targets[i, at][-4:]}[
            rows.task[i, at[0]]
        ]
        if box is None:
            return 1.0
        (place,) = np.flatnonzero((boxes[i] == box).all(1) & batch.region_mask[i])
        return scores[i, place]

    value, gradient = jax.jit(jax.value_and_grad(lambda p: loss(term, p, seen)[0]))(params)
    expected, _, (of_params, _) = replica(params, seen.tokens, rows, words, score)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(of_params), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max() + 1e-8)


def test_each_image_reads_one_caption_and_drawn_regions_of_its_own():
    _, seen, _ = case()
    words, found = drawn()
    batch, rows = seen.batch, found.rows
    start = {words.task(task): i for i, task in enumerate(text_decoder.TASKS)}
    for i in range(len(batch.image)):
        regions = int(batch.region_mask[i].sum())
        expected = int(batch.caption_mask[i].any()) + 2 * min(OPTIONS.regions, regions)
        assert found.count[i] == expected
        first = rows.tokens[i][(rows.positions[i] == 0) & (rows.segments[i] > 0)]
        assert set(first.tolist()) <= set(start)
        boxes = words.quantise(text_boxes(batch.region_boxes_cxcywh[i]))[batch.region_mask[i]]
        for at in np.flatnonzero(np.asarray(rows.tokens[i]) == words.task("describe")):
            assert np.asarray(rows.tokens[i, at + 1 : at + 5]).tolist() in boxes.tolist()


def text_boxes(cxcywh):
    centre, half = cxcywh[:, :2], cxcywh[:, 2:] / 2
    return jnp.asarray(np.concatenate([centre - half, centre + half], axis=1))


def test_a_caption_that_packing_may_have_cut_has_no_end():
    """Groups of two images, which share a row of 32 tokens."""
    c = tiny.config(batch_size=8, text__pack_group=2, text__pack_rows=1, input__lanes=1)
    count, no = np.array([20, 25, 10, 12, 20, 14, 12, 20], np.int32), c.input.max_regions
    texts = lambda n: Texts(np.full(n.sum(), 7), n, np.zeros(len(n), bool), np.arange(len(n)))
    mask = np.zeros((8, no), bool)
    mask[6, 0] = True  # a description, which is dropped
    batch = assemble.assemble(
        **dict(image=np.zeros((8, 16, 16, 3), np.uint8), config=c),
        **dict(captions=texts(count), caption_mask=np.ones((8, 1), bool)),
        **dict(descriptions=texts(np.array([5])), region_boxes_cxcywh=np.zeros((8, no, 4))),
        **dict(region_mask=mask, region_scores=np.zeros((8, no), np.float32)),
    )
    assert batch.texts_dropped.tolist() == [2, 0, 1, 1]
    words = text_decoder.vocabulary(OPTIONS, c.model)
    rows = draw(OPTIONS, words, fake.seen(tiny.config(batch_size=8))._replace(batch=batch)).rows
    ends = (rows.predicted & (rows.targets == words.end)).any(1)
    # Both to 16; none; the first to 18; the last one alone could have been cut.
    assert ends.tolist() == [False, False, True, True, False, True, True, False]
    assert rows.predicted.sum(1).tolist() == [14, 14, 9, 11, 16, 13, 11, 18]


def test_a_text_as_long_as_those_of_the_run_may_be_has_no_end():
    """Those of input.text_length are cut before they share rows, which are longer; all have 7 tokens here."""
    _, seen, _ = case()
    words = text_decoder.vocabulary(OPTIONS, tiny.config(model__text__vocab_size=50).model)
    for longest in (0, 8, 7):
        rows = draw(OPTIONS, words, seen._replace(text_length=longest)).rows
        assert (rows.predicted & (rows.targets == words.end)).any() == (longest != 7)


def test_the_loss_of_a_part_has_the_sums_of_the_whole():
    term, seen, params = case()
    whole = jax.jit(lambda: term.apply({"params": params}, seen))()
    groups = len(seen.batch.text_tokens)
    part = fake.part(seen, 8, 16)
    cut = {
        name: getattr(seen.batch, name)[groups // 2 :]
        for name in ("text_tokens", "text_positions", "text_segments", "texts_dropped")
    }
    part = part._replace(batch=part.batch._replace(**cut))
    found = jax.jit(lambda: term.apply({"params": params}, part))()
    np.testing.assert_allclose(found.loss.sum, whole.loss.sum[8:], rtol=1e-5)
    np.testing.assert_array_equal(found.loss.count, whole.loss.count[8:])


def test_predictions_alone_have_the_same_loss_and_gradient():
    term, seen, params = case(changed(label_smoothing=0.0))
    words, whole = drawn(changed(label_smoothing=0.0))
    most = int(whole.rows.predicted.sum(1).max())
    assert most < OPTIONS.row_length
    few = case(changed(label_smoothing=0.0, predictions=most))[0]
    step = lambda term: jax.jit(jax.value_and_grad(lambda p: loss(term, p, seen)[0]))(params)
    (a, of_all), (b, of_few) = step(term), step(few)
    np.testing.assert_allclose(b, a, rtol=1e-6)
    for x, y in zip(jax.tree.leaves(of_all), jax.tree.leaves(of_few), strict=True):
        np.testing.assert_allclose(y, x, rtol=0, atol=2e-6 * np.abs(x).max() + 1e-8)


@pytest.mark.parametrize("together", [False, True])
def test_no_row_predicts_more_than_its_predictions(together):
    _, found = drawn(changed(predictions=14, together=together))
    count = np.asarray(found.rows.predicted.sum(1))
    assert (
        count.max()
        <= 14
        < np.asarray(drawn(changed(together=together))[1].rows.predicted.sum(1)).max()
    )
    assert (found.kept < found.count).any()


def test_of_each_group_one_image_is_read_as_if_all_were():
    """Its sums are those without groups, and so is the gradient of its tokens; others have none."""
    term, seen, params = case(changed(label_smoothing=0.0))
    grouped = case(changed(label_smoothing=0.0, group=2))[0]
    sums = lambda term: lambda tokens: term.apply({"params": params}, seen._replace(tokens=tokens))
    of_sum = lambda term: lambda tokens: (lambda x: (x.loss.sum.sum(), x))(sums(term)(tokens))
    step = lambda term: jax.jit(jax.grad(of_sum(term), has_aux=True))(jnp.asarray(seen.tokens))
    (gradient, every), (of_read, found) = step(term), step(grouped)
    is_read = np.asarray(found.measures["filled"].count) > 0
    assert (is_read.reshape(-1, 2).sum(1) == 1).all() and 0 < is_read[::2].sum() < len(is_read) / 2
    for a, b in zip(jax.tree.leaves(every), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(b, np.where(is_read, a, 0), rtol=2e-6)
    np.testing.assert_allclose(
        of_read, np.where(is_read[:, None, None], gradient, 0), rtol=0, atol=1e-6
    )


def test_parallel_prediction_hides_the_words_of_captions_alone():
    words, found = drawn(changed(parallel_rate=1.0))
    plain = drawn()[1].rows
    first = np.asarray(plain.segments == 1)
    assert (plain.task[first] == text_decoder.TASKS.index("caption")).all()
    np.testing.assert_array_equal(found.rows.tokens[first], words.mask)
    np.testing.assert_array_equal(found.rows.tokens[~first], plain.tokens[~first])
    np.testing.assert_array_equal(found.rows.task, np.where(first, 4, plain.task))
    np.testing.assert_array_equal(found.rows.targets, plain.targets)


def test_parallel_prediction_does_not_see_the_length_of_the_caption():
    term, seen, params = case(changed(parallel_rate=1.0))
    words, found = drawn(changed(parallel_rate=1.0))
    captions = np.asarray(found.rows.segments == 1)
    few = jax.tree.map(lambda x: jnp.asarray(x)[:2], found.rows)
    shorter = few._replace(segments=jnp.where(captions[:2] & (few.positions > 1), 0, few.segments))
    module = text_decoder.TextDecoder(OPTIONS.beside(term.model), words, np.dtype("float32"))
    run = jax.jit(functools.partial(module.apply, method=module.features))
    given, patches = {"params": params["decoder"]}, seen.tokens[:2, 1:]
    a, b = (run(given, patches, rows)[:, :2] for rows in (few, shorter))
    assert (captions[:2].sum(1) > 2).all()
    np.testing.assert_array_equal(a, b)


def changed(**changes):
    return OPTIONS.__class__(**{**vars(OPTIONS), **changes})


def test_all_boxes_in_one_sequence():
    """The sequence, its targets and what is counted, against lists made by hand."""
    options = changed(together=True, regions=3, row_length=28, caption_weight=0.0)
    words, found = drawn(options)
    _, alone = drawn(changed(regions=3, row_length=200, predictions=None, caption_weight=0.0))
    rows, end = found.rows, words.end
    left_out = 0
    for i in range(len(rows.tokens)):
        # Descriptions of the same regions alone, in the same order: DESCRIBE x0 y0 x1 y1 w1 .. wn.
        items, of_points = [], []
        for segment in range(1, 7):
            at = np.flatnonzero(alone.rows.segments[i] == segment)
            sequence = np.asarray(alone.rows.tokens[i, at]).tolist()
            if sequence and sequence[0] == words.task("describe"):
                items.append([*sequence[1:], end])
            elif sequence:
                of_points.append(sequence)
        stream = []
        for item in items:
            if 1 + len(stream) + len(item) <= options.row_length:
                stream += item
        sequence = [words.task("describe"), *stream]
        at = np.flatnonzero(rows.segments[i] == 1)
        if not stream:
            assert not len(at)
            continue
        assert rows.tokens[i, at].tolist() == sequence
        assert rows.targets[i, at].tolist() == [*stream, end]
        assert rows.predicted[i, at].all()
        is_box = np.array([*stream, end]) >= words.first_bin
        np.testing.assert_array_equal(rows.task[i, at], np.where(is_box, 3, 1))
        assert found.count[i] == len(items) + len(of_points) == 2 * len(items)
        assert found.needed[i] == 1 + sum(map(len, items)) + sum(map(len, of_points))
        boxes = sum(is_box) // 4
        points = len({*rows.segments[i].tolist()} - {0, 1})
        assert found.kept[i] == boxes + points
        left_out += len(items) - boxes
    assert left_out  # some row was too short


def test_the_loss_of_all_boxes_in_one_sequence_equals_torchs():
    """Its weights: those of `describe` for words and ends, of `point` for coordinates."""
    options = changed(together=True, row_length=64, label_smoothing=0.0)
    term, seen, params = case(options)
    value, found = jax.jit(lambda: loss(term, params, seen))()
    words, rows = drawn(options)
    total = count = 0.0
    p = jax.tree.map(lambda x: torch.tensor(np.array(x), dtype=torch.float64), params["decoder"])
    weights = [*options.weights, options.point_weight]
    rows = jax.tree.map(np.asarray, rows.rows)
    for i, patches in enumerate(torch.tensor(np.array(seen.tokens), dtype=torch.float64)):
        for segment in range(1, int(rows.segments[i].max()) + 1):
            at = np.flatnonzero(rows.segments[i] == segment)
            if not len(at):
                continue
            causal = np.tril(np.ones((len(at), len(at)), bool))
            given = patches[1:], rows.tokens[i, at], np.arange(len(at)), causal
            logits = of_decoder.replica(p, *given)[:, : words.size]
            target = torch.tensor(rows.targets[i, at], dtype=torch.long)
            cost = torch.nn.functional.cross_entropy(logits, target, reduction="none").numpy()
            weight = np.array(weights)[rows.task[i, at]] * rows.predicted[i, at]
            total, count = total + (weight * cost).sum(), count + weight.sum()
    np.testing.assert_allclose(value, total / count, rtol=1e-6)
    assert found.measures["boxes"].count.sum() > 0


def test_advice_names_a_row_length_that_fits():
    say = lambda **measures: TextDecoderTerm.advice(
        Options(row_length=128, predictions=None), measures
    )
    assert say(filled=0.7, left_out=0.0, needed=90.0) == ""
    assert say(filled=0.97, left_out=0.25, needed=140.0) == (
        "25% of the sequences do not fit into rows of 128 tokens, which are 97% full; an image has 140 on average:"
        " row_length=192 would fit"
    )
    assert say(filled=0.2, left_out=0.0, needed=25.0).endswith("row_length=64 would fit")


def test_advice_names_predictions_where_these_are_too_few():
    few = functools.partial(TextDecoderTerm.advice, Options(predictions=16))
    found = dict(filled=0.3, left_out=0.4, needed=60.0, predicted=15.0)
    assert few(found) == (
        "40% of the sequences do not fit into predictions=16, of which 15 are used on average: more, or None, would fit"
    )
    assert few(found | {"needed": 140.0}).endswith("row_length=192 with more predictions would fit")
    assert few(found | {"predicted": 9.0}) == ""


def test_a_stopped_gradient_reaches_no_token():
    options = changed(stop_gradient=True)
    term, seen, params = case(options)
    run = lambda tokens: loss(term, params, seen._replace(tokens=tokens))[0]
    assert not jax.jit(jax.grad(run))(jnp.asarray(seen.tokens)).any()


def test_faults_of_a_run_that_cannot_have_it():
    of = lambda options, **changes: TextDecoderTerm.faults(options, tiny.config(**changes))
    assert of(Options()) == []
    assert of(Options(heads=5)) == [
        "heads: got 5, expected a divisor of the width 32 (None: the text tower's)"
    ]
    assert of(Options(by_score=True, together=True)) == [
        "by_score: got True, expected input.region_scores=True, which reads scores",
        "by_score: got True with together, expected False for boxes in one sequence",
    ]
    assert of(Options(by_score=True), input__region_scores=True) == []
    none = Options(caption_weight=0, describe_weight=0, point_weight=0)
    assert of(none) == ["caption_weight: got 0 as all weights, expected a task with a weight"]
    assert of(Options(caption_weight=0), input__max_regions=0) == [
        "caption_weight: got 0 as all weights without regions (regions, input.max_regions), expected a task with a weight"
    ]
    assert isinstance(Options().sizes, config_lib.TextDecoder)
