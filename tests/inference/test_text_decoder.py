"""The text decoder in use: searches and likelihoods against whole forward passes, without the cache."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

import grain_jax
from grain_jax import config as config_lib
from grain_jax import inference
from grain_jax.inference import predictor as predictor_lib
from grain_jax.inference import text_decoder as in_use
from grain_jax.input_pipeline import tokenizer
from grain_jax.models import text_decoder
from grain_jax.runtime import checkpoint
from tests import perturbed

WORDS = "<unk> </s> a wren long beak red".split()
SIZES = config_lib.TextDecoder(
    width=24, depth=2, heads=3, mlp_dim=40, bins=10, row_length=24, leading_specials=0
)
PICTURES = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3)).astype(np.uint8)
ENDS = np.random.default_rng(1).random((2, 3, 2, 2), np.float32)
BOXES = list(np.concatenate([ENDS.min(0), ENDS.max(0)], axis=-1))  # [2, 4] of each image
CANDIDATES = [["a wren", "long red beak", "a"], [], ["red wren a long beak", "beak"]]


def write_words(folder):
    """A tokenizer.json that ends each text."""
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    library = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    library.save(f"{folder}/tokenizer.json")


def random_decoder(model, sizes=SIZES, seed=21, scale=0.6) -> checkpoint.StoredDecoder:
    """Random parameters of a text decoder beside this model."""
    sizes = sizes.beside(model)
    words = text_decoder.vocabulary(sizes, model)
    module = text_decoder.TextDecoder(sizes, words, np.dtype("float32"))
    zeros = jnp.zeros((1, 4), jnp.int32)
    of = functools.partial(module.init, jax.random.key(0), method=module.start)
    patches = jnp.zeros((1, 4, model.image.width))
    shapes = jax.eval_shape(lambda: of(patches, zeros, jnp.ones(1, jnp.int32), 4)["params"])
    rng = np.random.default_rng(seed)
    draw = lambda x: np.float32(scale * rng.normal(size=x.shape))
    return checkpoint.StoredDecoder(sizes, jax.tree.map(draw, nn.unbox(shapes)))


@functools.cache
def small_model(**changes) -> config_lib.Model:
    return perturbed.tiny(
        image__depth=1,
        text__depth=1,
        decoder__depth=1,
        text__vocab_size=len(WORDS),
        text__pad_id=1,
        text__tokenizer="tokenizer.json",
        **changes,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = small_model()
    decoder = random_decoder(model)
    checkpoint.save_model(folder, model, perturbed.params(model), decoder, source="test")
    write_words(folder)
    return folder


@pytest.fixture(scope="module")
def predictor(folder):
    return grain_jax.load(folder)


@functools.cache
def _forward(model):
    """The jitted (params, tokens, sequences [N, T]) -> log-probabilities, each sequence alone in its row."""
    sizes = SIZES.beside(model)
    words = text_decoder.vocabulary(sizes, model)
    module = text_decoder.TextDecoder(sizes, words, np.dtype("float32"))

    def run(params, tokens, sequences):
        place = jnp.broadcast_to(jnp.arange(sequences.shape[1]), sequences.shape)
        none = jnp.zeros_like(place)
        rows = text_decoder.Rows(sequences, place, none + 1, none, none > 0, none, none)
        patches = jnp.broadcast_to(tokens[1:], (len(sequences), *tokens[1:].shape))
        with jax.default_matmul_precision("highest"):
            found = module.apply({"params": params}, patches, rows, method=module.features)
            logits = found @ params["head"].T
        return jax.nn.log_softmax(logits[..., : words.size])

    return jax.jit(run), words


def log_probabilities(predictor, tokens, sequences):
    """Of the tokens after each position of sequences of one image, float64 [N, T, V]."""
    run, _ = _forward(predictor.model)
    found = []
    for first in range(0, len(sequences), 64):
        part = sequences[first : first + 64]
        padded = np.zeros((64, 16), np.int32)
        for row, sequence in zip(padded, part):
            row[: len(sequence)] = sequence
        found.append(run(predictor.text_decoder.params, tokens, padded)[: len(part)])
    return np.concatenate(found).astype(np.float64)


def log_p(predictor, tokens, given, predicted):
    """log p of the predicted tokens after the given ones."""
    found = log_probabilities(predictor, tokens, [[*given, *predicted]])[0]
    at = len(given) - 1 + np.arange(len(predicted))
    return found[at, predicted].sum()


def greedy(predictor, tokens, given, allowed, most, end=None):
    """The likeliest token each time, by whole forward passes."""
    written = []
    while len(written) < most and (not written or written[-1] != end):
        found = log_probabilities(predictor, tokens, [[*given, *written]])[0]
        of_next = found[len(given) + len(written) - 1]
        written.append(max(allowed, key=lambda i: of_next[i]))
    return written, log_p(predictor, tokens, given, written)


def ids_of(text):
    return [WORDS.index(word) for word in text.split()]


def givens(predictor):
    """(vocabulary, words that may be written, tokens of the images)."""
    words = _forward(predictor.model)[1]
    texts = [i for i in range(len(WORDS)) if i != 1]
    return words, [*texts, words.end], predictor.encode_tokens(PICTURES)


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


def test_greedy_captions_and_descriptions_equal_whole_forward_passes(predictor):
    words, allowed, tokens = givens(predictor)
    captions = predictor.caption(PICTURES, max_tokens=5)
    described = predictor.describe(PICTURES, BOXES, max_tokens=5)
    bins = np.asarray(words.quantise(jnp.array(BOXES)))
    for i, of_image in enumerate(tokens.values):
        givens_of = [([words.task("caption")], captions[i])]
        start = words.task("describe")
        givens_of += [([start, *box], one) for box, one in zip(bins[i], described[i])]
        for given, one in givens_of:
            written, score = greedy(predictor, of_image, given, allowed, 5, words.end)
            text = [i for i in written if i != words.end]
            assert one.text == " ".join(WORDS[i] for i in text)
            close(one.log_probability, score)
    assert len({one.text for of in described for one in of}) > 3


def test_boxes_that_texts_point_at_equal_whole_forward_passes(predictor):
    words, _, tokens = givens(predictor)
    bins = range(words.first_bin, words.size)
    pointed = predictor.point(PICTURES, CANDIDATES)
    assert [len(x) for x in pointed] == [3, 0, 2]
    for of_image, texts, found in zip(tokens.values, CANDIDATES, pointed):
        for text, one in zip(texts, found):
            given = [words.task("point"), *ids_of(text), words.end]
            written, score = greedy(predictor, of_image, given, bins, 4)
            x0, y0, x1, y1 = (np.array(written) - words.first_bin + 0.5) / 10
            close(one.box_xyxy, [min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)])
            close(one.log_probability, score)


def beam_search(predictor, tokens, given, allowed, beams, most, end):
    """As the module says, by whole forward passes: [(score, written), ...]."""
    found = [(0.0, [])]
    for _ in range(most):
        after = []
        alive = [[*given, *w] for _, w in found]
        of_next = log_probabilities(predictor, tokens, alive)
        for (score, written), p in zip(found, of_next):
            if written and written[-1] == end:
                after.append((score, written))
                continue
            p = p[len(given) + len(written) - 1]
            after += [(score + p[i], [*written, i]) for i in allowed]
        found = sorted(after, key=lambda x: -x[0])[:beams]
        if found[0][1][-1] == end:
            break
    return found[0]


@pytest.mark.parametrize("beams", [2, 5])
def test_beam_search_equals_one_in_numpy(predictor, beams):
    words, allowed, tokens = givens(predictor)
    captions = predictor.caption(PICTURES, beams, 5)
    for of_image, one in zip(tokens.values, captions):
        given = [words.task("caption")]
        score, written = beam_search(predictor, of_image, given, allowed, beams, 5, words.end)
        assert one.text == " ".join(WORDS[i] for i in written if i != words.end)
        close(one.log_probability, score)


def test_as_many_beams_as_there_are_texts_find_the_likeliest(predictor):
    words, allowed, tokens = givens(predictor)
    texts, most = allowed[:-1], 3
    every = [list(x) for x in itertools.product(texts, repeat=most)]  # those that are cut
    every += [[*x, words.end] for n in range(most) for x in itertools.product(texts, repeat=n)]
    assert len(every) == 259
    for of_image, one in zip(tokens.values, predictor.caption(PICTURES, 64, most)):
        sequences = [[words.task("caption"), *x] for x in every]
        found = log_probabilities(predictor, of_image, sequences)
        scores = [p[np.arange(len(x)), x].sum() for p, x in zip(found, every)]
        best = every[int(np.argmax(scores))]
        assert one.text == " ".join(WORDS[i] for i in best if i != words.end)
        close(one.log_probability, max(scores))


def test_likelihoods_equal_the_sums_of_whole_forward_passes(predictor):
    words, _, tokens = givens(predictor)
    bins = np.asarray(words.quantise(jnp.array(BOXES)))
    of_captions = predictor.caption_log_likelihood(PICTURES, CANDIDATES)
    for_boxes = [[["a wren", "beak"], []], [["red"], ["a"]], [[], ["a long beak"]]]
    of_boxes = predictor.description_log_likelihood(PICTURES, BOXES, for_boxes)
    of_texts = [["a wren", "beak"], ["red", "a"], ["a", "a long beak"]]
    pointed = predictor.box_log_likelihood(PICTURES, BOXES, of_texts)
    for i, of_image in enumerate(tokens.values):
        p = functools.partial(log_p, predictor, of_image)
        text = lambda x: [*ids_of(x), words.end]
        expected = [p([words.task("caption")], text(x)) for x in CANDIDATES[i]]
        close(of_captions[i], expected)
        for box, candidates, found in zip(bins[i], for_boxes[i], of_boxes[i], strict=True):
            close(found, [p([words.task("describe"), *box], text(x)) for x in candidates])
        given = [[words.task("point"), *text(x)] for x in of_texts[i]]
        close(pointed[i], [p(x, box) for x, box in zip(given, bins[i])])
        assert pointed[i].dtype == of_captions[i].dtype == np.float32


def test_what_is_written_has_the_likelihood_of_its_text(predictor):
    captions = predictor.caption(PICTURES, 5, 5)
    found = predictor.caption_log_likelihood(PICTURES, [[one.text] for one in captions])
    ended = [one.is_whole for one in captions]
    assert any(ended) and ended == [len(one.text.split()) < 5 for one in captions]
    for one, p, has_end in zip(captions, found, ended):
        if has_end:
            close(one.log_probability, p[0])
    assert not any(one.is_whole for one in predictor.caption(PICTURES, max_tokens=1) if one.text)


def same(one, other):
    """Texts equal, numbers close."""
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if isinstance(a, str):
            assert a == b
        else:
            close(a, b)


CALLS = {
    "caption": (lambda p, x, *_: p.caption(x, 2, 5)),
    "describe": (lambda p, x, boxes, _: p.describe(x, boxes, 2, 5)),
    "point": (lambda p, x, _, texts: p.point(x, texts, 2)),
    "caption_log_likelihood": (lambda p, x, _, texts: p.caption_log_likelihood(x, texts)),
    "description_log_likelihood": (
        lambda p, x, boxes, texts: p.description_log_likelihood(
            x, boxes, [[one] * 2 for one in texts] if np.ndim(boxes) == 3 else [texts] * 2
        )
    ),
    "box_log_likelihood": (
        lambda p, x, boxes, texts: p.box_log_likelihood(
            x, boxes, [["a wren", "red"]] * len(boxes) if np.ndim(boxes) == 3 else ["a wren", "red"]
        )
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_one_image_equals_a_batch_and_tokens_equal_images(predictor, call):
    found = call(predictor, PICTURES, BOXES, CANDIDATES)
    same(call(predictor, predictor.encode_tokens(PICTURES), BOXES, CANDIDATES), found)
    one = call(predictor, PIL.Image.fromarray(PICTURES[0]), BOXES[0], CANDIDATES[0])
    same(one, found[0])
    assert len(found) == 3 and call(predictor, [], np.zeros((0, 2, 4)), []) == []


def test_many_images_equal_few(predictor):
    """More than a batch, on all devices: with beams fewer rows of a device."""
    some = np.arange(70) % 3
    few, many = (predictor.caption(PICTURES[x], 2, 5) for x in ([0, 1, 2], some))
    same(many, [few[i] for i in some])


def test_the_tokens_of_an_image_are_copied_for_a_part_of_its_boxes_at_a_time(
    predictor, monkeypatch
):
    monkeypatch.setattr(predictor_lib, "MAX_BATCH", 8)
    boxes = [np.tile(own, (12, 1)) for own in BOXES]  # 72 in all, of 3 images
    few, seen, run = predictor.describe(PICTURES, BOXES, 4, 3), [], predictor._run

    def spied(program, tokens, *rows, **options):
        seen.append(len(tokens))
        return run(program, tokens, *rows, **options)

    tokens = predictor.encode_tokens(PICTURES)
    monkeypatch.setattr(predictor, "_run", spied)
    many = predictor.describe(tokens, boxes, 4, 3)
    assert seen == [16, 16, 16, 16, 8]  # of 8 devices 2 rows each, which have 4 beams
    same(many, [one * 12 for one in few])


def test_many_candidates_fill_several_rows(predictor, monkeypatch):
    monkeypatch.setattr(in_use, "_LONGEST_ROW", 60)
    monkeypatch.setattr(in_use, "_MOST_SEQUENCES", 7)
    words, _, tokens = givens(predictor)
    rng = np.random.default_rng(3)
    texts = [" ".join(rng.choice(WORDS[2:], n)) for n in rng.integers(1, 15, 60)]
    others = ["red"] * 9  # more than a row has, of another image
    found, last = predictor.caption_log_likelihood(PICTURES[:2], [texts, others])
    sequences = [[words.task("caption"), *ids_of(x), words.end] for x in texts]
    p = log_probabilities(predictor, tokens.values[0], sequences)
    close(found, [x[np.arange(len(s) - 1), s[1:]].sum() for x, s in zip(p, sequences)])
    red = [*ids_of("red"), words.end]
    close(last, [log_p(predictor, tokens.values[1], [words.task("caption")], red)] * 9)


def test_a_text_that_does_not_fit_is_cut_as_in_training(predictor):
    words, _, tokens = givens(predictor)
    long = ["a"] * 25  # a row holds 23 words of a caption, and the context of the text tower 31
    (found,) = predictor.caption_log_likelihood(PICTURES[0], [" ".join(long)])
    given, predicted = [words.task("caption")], [WORDS.index("a")] * 23
    run, _ = _forward(predictor.model)
    sequence = np.array([[*given, *predicted]])
    p = np.asarray(run(predictor.text_decoder.params, tokens.values[0], sequence), np.float64)[0]
    close(found, p[np.arange(23), predicted].sum())


def words_of(folder, texts, unknown_is_special, **sizes):
    """(the words that likelihoods read of texts, those that training does), each (ids of each text, whether whole)."""
    write_words(folder)
    if unknown_is_special:  # as in SentencePiece
        library = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
        library.add_special_tokens(["<unk>"])
        library.save(f"{folder}/tokenizer.json")
    model = small_model()
    text = dataclasses.replace(model.text, tokenizer=f"{folder}/tokenizer.json")
    model, library = dataclasses.replace(model, text=text), tokenizer.of_tower(text)
    of_decoder = dataclasses.replace(SIZES, **sizes).beside(model)
    given = in_use.Given(of_decoder, model, "float32", library.special_ids)
    used = in_use.sequences_of(library, given, "caption", [texts]).words
    found, context = library.encode(texts, text.context_length), text.context_length
    tokens = np.full((1, len(texts), context), text.pad_id, np.int32)
    tokens[0][np.arange(context) < found.lengths[:, None]] = found.ids
    positions = np.tile(np.arange(context), (1, len(texts), 1))
    at = np.stack([np.arange(len(texts)), found.lengths - 1], axis=-1)[None]
    real = np.ones(at.shape[:2], bool)
    most = of_decoder.row_length - 1
    given = map(jnp.asarray, (tokens, positions, at, real))
    trained = text_decoder.text_of_batch(*given, of_decoder, most)
    ids = [x[:n].tolist() for x, n in zip(trained.ids[0], trained.count[0])]
    return ([x.tolist() for x in used.ids], used.is_whole), (ids, trained.is_whole[0])


@pytest.mark.parametrize("unknown_is_special", [False, True])
def test_unknown_words_count_in_likelihoods_as_in_training(tmp_path, unknown_is_special):
    texts = ["a wren Ω beak", "Ω", "red"]
    (used, is_whole), (trained, trained_whole) = words_of(tmp_path, texts, unknown_is_special)
    assert used == trained == [[2, 3, 0, 5], [0], [6]]
    assert is_whole.all() and trained_whole.all()
    assert words_of(tmp_path, [""], unknown_is_special)[0][0] == [[]]  # not the padding


def test_a_text_that_the_tokenizer_cuts_has_no_end(tmp_path):
    """The context has 31 words and the special token; a row of the decoder has more."""
    texts = ["wren " * 30, "wren " * 42, "a"]
    (used, is_whole), (trained, trained_whole) = words_of(tmp_path, texts, False, row_length=64)
    assert used == trained and list(map(len, used)) == [30, 31, 1]
    (used, short), _ = words_of(tmp_path, texts, False, row_length=64, predictions=31)
    assert list(map(len, used)) == [30, 30, 1]  # 30 words and the end were predicted in training
    np.testing.assert_array_equal(short, is_whole)
    np.testing.assert_array_equal(is_whole, [True, False, True])
    np.testing.assert_array_equal(trained_whole, is_whole)


def test_half_the_precision_is_near(predictor, folder):
    rough = grain_jax.load(folder, "bfloat16")
    found, expected = (p.caption_log_likelihood(PICTURES, CANDIDATES) for p in (rough, predictor))
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, rtol=0.05, atol=0.5)
    assert len(rough.caption(PICTURES, 2, 5)) == 3


def test_ids_beyond_the_tokenizer_are_no_words(predictor):
    text = dataclasses.replace(predictor.model.text, vocab_size=len(WORDS) + 2)
    model = dataclasses.replace(predictor.model, text=text)
    options = dict(folder=predictor.folder, text_decoder=predictor.text_decoder)
    larger = inference.Predictor(model, predictor.params, **options)
    assert larger._given_decoder("caption").excluded == (1, 7, 8)
    assert predictor._given_decoder("caption").excluded == (1,)


FAULTS = {
    "beams: got 0, expected 1 to 64": lambda p: p.caption(PICTURES, 0),
    "beams: got True, expected 1 to 64": lambda p: p.point(PICTURES[0], "a", True),
    "beams: got 3.5, expected 1 to 64": lambda p: p.caption([], 3.5),
    "boxes_xyxy: got None, expected boxes": lambda p: p.describe(PICTURES, None),
    "boxes_xyxy: got 3, expected boxes": lambda p: p.box_log_likelihood(PICTURES, 3, [["a"]] * 3),
    "max_tokens: got 25, expected 1 to 24": lambda p: p.caption(PICTURES, max_tokens=25),
    "max_tokens: got 21, expected 1 to 20": lambda p: p.describe(PICTURES, BOXES, 1, 21),
    "boxes_xyxy: got those of 2 images, expected of 3": lambda p: p.describe(PICTURES, BOXES[:2]),
    "texts: got those of 4 images, expected of 3": lambda p: p.point(PICTURES, [["a"]] * 4),
    "texts: got 'a wren', expected a list": lambda p: p.caption_log_likelihood(PICTURES, "a wren"),
    r"texts\[1\]: got 'a', expected a list of texts of one image": lambda p: (
        p.caption_log_likelihood(PICTURES, [["a"], "a", ["a"]])
    ),
    r"texts\[0\]: got \[3\], expected a list of texts": lambda p: p.point(PICTURES[0], [3]),
    r"texts\[0\]: got 1 texts for 2 boxes, expected one a box": lambda p: p.box_log_likelihood(
        PICTURES, BOXES, [["a"]] * 3
    ),
    r"texts\[0\]\[1\]: got 'a', expected a list of texts of one box": lambda p: (
        p.description_log_likelihood(PICTURES, BOXES, [[["a"], "a"]] * 3)
    ),
    r"boxes_xyxy\[0\]: .* expected x1 <= x2": lambda p: p.describe(PICTURES[0], [[1, 0, 0, 1]]),
}


@pytest.mark.parametrize("told", FAULTS)
def test_what_cannot_be_asked_is_told_in_a_line(predictor, told):
    with pytest.raises(inference.InputError, match=told) as error:
        FAULTS[told](predictor)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_model_without_one_says_so(predictor, call):
    none = inference.Predictor(predictor.model, predictor.params, folder=predictor.folder)
    assert not none.has_text_decoder and "text decoder" not in repr(none)
    with pytest.raises(inference.InputError, match="the model has no text decoder, expected one"):
        call(none, PICTURES, BOXES, CANDIDATES)
    assert predictor.has_text_decoder
    assert "text decoder (depth 2, width 24; 22,928 parameters)" in repr(predictor)
    with pytest.raises(inference.InputError, match="no box head"):
        none.encode_tokens(PICTURES)
