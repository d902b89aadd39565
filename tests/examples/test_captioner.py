"""examples/captioner: a run learns the captions and boxes of eight images by heart; writing is greedy decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grain_jax
from examples.captioner import __main__ as captioner
from examples.captioner import config as captioner_config
from examples.captioner import decoder as decoder_lib
from examples.captioner import evaluator, term, writer
from grain_jax import config as config_lib
from grain_jax import train
from grain_jax.core import images
from grain_jax.losses import boxes as boxes_lib
from tests import record_sets, tiny

# TFDS 4.9.10 asks protobuf for a field's label; protobuf 6 has another name for it.
pytestmark = pytest.mark.filterwarnings("ignore:label:DeprecationWarning")
COUNT = 8


def test_sequences():
    words = decoder_lib.Vocabulary(words=50, bins=10)
    assert (words.caption, words.point, words.first_bin, words.size) == (50, 51, 52, 64)
    text = jnp.array([[[7, 8, 9, 0, 0]]])
    tokens, predicted = term.caption_sequences(words, text, jnp.array([[3]]))
    assert tokens.tolist() == [[[50, 7, 8, 9, 0, 0]]]
    assert predicted.tolist() == [[[True, True, True, False, False]]]
    box = jnp.array([[[0.0, 0.25, 0.5, 1.0]]])
    tokens, predicted = term.box_sequences(words, text, jnp.array([[3]]), box)
    assert tokens[0, 0, :8].tolist() == [51, 7, 8, 9, 52, 54, 57, 61]
    assert predicted[0, 0].tolist() == [False] * 3 + [True] * 4 + [False] * 2
    assert not term.box_sequences(words, text, jnp.array([[0]]), box)[1].any()  # there is none
    np.testing.assert_allclose(words.boxes_of(np.array([52, 54, 57, 61])), [0.05, 0.25, 0.55, 0.95])
    # Texts of a packed batch, each with as many tokens as its last position says.
    c = tiny.config()
    batch = tiny.batch(c)
    found, count = term.texts_at(batch, batch.description_at, 9)
    group = np.arange(len(batch.image)) // (len(batch.image) // len(batch.text_tokens))
    row, end = np.moveaxis(batch.description_at, -1, 0)
    expected = batch.text_tokens[
        group[:, None, None], row[..., None], end[..., None] - 6 + np.arange(7)
    ]
    np.testing.assert_array_equal(found[..., :7], expected)
    assert (count == 7).all() and (term.texts_at(batch, batch.description_at, 6)[1] == 0).all()


def test_what_follows_is_the_most_probable_token():
    words = decoder_lib.Vocabulary(words=20, bins=6)
    decoder = decoder_lib.TextDecoder(words, 16, 1, 2, 12, np.dtype("float32"))
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, 5, 24)).astype(np.float32)
    start = np.array([[20, 3, 4], [21, 5, 0]], np.int32)
    boxed = decoder.init(jax.random.key(0), start[:, None], image)["params"]
    params = jax.tree.map(
        lambda x: rng.normal(size=x.value.shape), boxed, is_leaf=lambda x: hasattr(x, "value")
    )
    lengths = np.array([3, 2], np.int32)
    found = writer.generate(decoder, params, start, lengths, image, count=4, low=2, high=20)
    for i, length in enumerate(lengths):
        prefix = start[i, :length].tolist()
        for token in found[i].tolist():
            logits = decoder.apply({"params": params}, jnp.array([[prefix]]), image[i : i + 1])
            assert token == 2 + int(logits[0, 0, -1, 2:20].argmax())
            prefix.append(token)


def test_a_run_learns_eight_images_by_heart(tmp_path):
    lines = record_sets.write_annotations(tmp_path, COUNT)
    assert record_sets.build_set(tmp_path, tmp_path / "records") == 0
    tokenizer = captioner.make_tokenizer(captioner.texts_of(tmp_path / "A.jsonl"))
    tokenizer.save(str(tmp_path / captioner_config.TOKENIZER))
    c = tiny.dictionary(
        **tiny.SHALLOW,
        input__source="records",
        input__data_dir=str(tmp_path / "records"),
        input__name="tiny_set",
        input__lanes=1,
        input__synthetic_caption_rate=1.0,
        model__text__tokenizer=str(tmp_path / captioner_config.TOKENIZER),
        model__text__vocab_size=tokenizer.get_vocab_size(),
        model__text__end_id=captioner_config.SPECIALS.index("[END]"),
        batch_size=COUNT,
        total_steps=200,
        log_every=100,
        checkpoint_every=0,
        optim__learning_rate=5e-3,
        text__pack_group=1,
        text__pack_rows=4,
    )
    c.loss.terms.words = {"term": "examples.captioner.term:Words", "weight": 3.0, "bins": 16}
    train.train(config_lib.from_dict(c), tmp_path / "run")
    predictor = grain_jax.load(tmp_path / "run")
    words = writer.Writer(predictor)
    tokens = words.image_tokens([images.load_image(tmp_path / line["image"]) for line in lines])
    assert words.captions(tokens) == [line["synthetic_caption"] for line in lines]
    described = [line for line in lines if line["regions"]]
    which = np.array([lines.index(line) for line in described])
    found = words.boxes(tokens[which], [line["regions"][0]["description"] for line in described])
    true = np.array([line["regions"][0]["box"] for line in described]) / (16, 12, 16, 12)
    assert boxes_lib.iou_and_union(found, true)[0].min() > 0.8
    measured = evaluator.Written(images=str(tmp_path), annotations=str(tmp_path / "A.jsonl"))
    result = measured.evaluate(predictor)
    assert (result["pictures"], result["phrases"]) == (len(described), 12)
    assert result["phrase_acc50"] == 1.0 > result["chance_phrase_acc50"]
