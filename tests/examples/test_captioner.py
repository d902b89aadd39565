"""examples/captioner: a run writes, the term learns by heart, and writing is greedy decoding."""

import functools

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

import grain_jax
from examples.captioner import __main__ as captioner
from examples.captioner import config as captioner_config
from examples.captioner import evaluator, term, writer
from grain_jax import config as config_lib
from grain_jax.core import boxes as boxes_lib
from grain_jax.core import images
from grain_jax.train import run
from tests import record_sets, tiny
from tests.losses import fake

# TFDS 4.9.10 asks protobuf for a field's label; protobuf 6 has another name for it.
pytestmark = pytest.mark.filterwarnings("ignore:label:DeprecationWarning")


def test_the_term_learns_captions_and_boxes_by_heart():
    c = tiny.config(batch_size=8, model__text__vocab_size=400)
    options = term.Options(width=32, depth=1, heads=2, bins=8, phrases=1, caption_length=8, phrase_length=8)
    module, image = term.Words(options, c.model), np.random.default_rng(1).normal(size=(8, 5, 32))
    real = np.ones_like(tiny.batch(c).caption_mask), np.arange(5) < np.ones((8, 1))
    batch = tiny.batch(c)._replace(caption_mask=real[0], region_mask=real[1])
    seen = fake.seen(c, leading=1)._replace(batch=batch, tokens=image.astype(np.float32))
    params = nn.unbox(module.init(jax.random.key(0), seen)["params"])
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        def loss(params):
            output = module.apply({"params": params}, seen)
            return output.loss.sum.sum() / output.loss.count.sum(), output

        (_, output), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, output

    state = optimizer.init(params)
    for _ in range(150):
        params, state, output = step(params, state)
    assert output.loss.count.tolist() == [7.0 + 4.0] * 8  # the words of a caption, a box
    assert {name: float(x.sum.sum() / x.count.sum()) for name, x in output.measures.items()} == dict(
        caption=1, box=1
    )
    decoder = term.make_decoder(options, c.model)
    vocabulary = decoder.vocabulary
    write = functools.partial(writer.generate, decoder, params["decoder"])
    captions, _ = term.texts_of(batch, batch.caption_at, 7)
    start = np.full((8, 1), vocabulary.caption, np.int32)
    got = write(start, np.ones(8, np.int32), seen.tokens[:, 1:], count=7, low=0, high=400)
    np.testing.assert_array_equal(got, captions[:, 0])
    phrases, _ = term.texts_of(batch, batch.description_at[:, :1], 7)
    start = np.concatenate([np.full((8, 1), vocabulary.point), phrases[:, 0]], axis=1).astype(np.int32)
    ends = dict(low=vocabulary.first_bin, high=vocabulary.first_bin + 8)
    got = write(start, np.full(8, 8, np.int32), seen.tokens[:, 1:], count=4, **ends)
    boxes = boxes_lib.cxcywh_to_xyxy(batch.region_boxes_cxcywh[:, 0])
    np.testing.assert_array_equal(got, vocabulary.tokens_of(boxes))


class Knowing:
    """A writer that knows the annotations; of the last image it says nothing right."""

    def __init__(self, lines):
        self.lines = lines

    def image_tokens(self, pictures):
        return np.arange(len(pictures))

    def captions(self, tokens):
        said = [" and ".join(x["description"] for x in line["regions"]) for line in self.lines]
        return [*said[:-1], said[0]]

    def boxes(self, tokens, phrases):
        output = []
        for i, phrase in zip(tokens, phrases, strict=True):
            box = {x["description"]: x["box"] for x in self.lines[i]["regions"]}.get(phrase)
            output.append(np.array(box or [0, 0, 0, 0]) / (16, 12, 16, 12))
        return np.array(output)


def test_a_run_writes(tmp_path, monkeypatch, one_device):
    lines = record_sets.write_annotations(tmp_path, 8)
    assert record_sets.build_set(tmp_path, tmp_path / "records") == 0
    tokenizer = captioner.make_tokenizer(captioner.texts_of(tmp_path / "A.jsonl"))
    tokenizer.save(str(tmp_path / captioner_config.TOKENIZER))
    c = tiny.dictionary(
        **tiny.SHALLOW,
        input__source="records",
        input__data_dir=str(tmp_path / "records"),
        input__name="tiny_set",
        model__text__tokenizer=str(tmp_path / captioner_config.TOKENIZER),
        model__text__vocab_size=tokenizer.get_vocab_size(),
        model__text__end_id=captioner_config.SPECIALS.index("[END]"),
        batch_size=8,
        total_steps=1,
        text__pack_group=1,
        text__pack_rows=4,
    )
    c.loss.terms.words = {"term": "examples.captioner.term:Words", "weight": 3.0, "bins": 16}
    c.loss.terms.words.update(width=32, depth=1, heads=2, caption_length=8, phrase_length=8)
    run.train(config_lib.from_dict(c), tmp_path / "run")
    predictor = grain_jax.load(tmp_path / "run")
    generator = writer.Writer(predictor)
    tokens = generator.image_tokens([images.load_image(tmp_path / line["image"]) for line in lines])
    boxes = generator.boxes(tokens, [line["synthetic_caption"] for line in lines])
    assert ((boxes * 16) % 1 == 0.5).all() and ((0 < boxes) & (boxes < 1)).all()
    captions = generator.captions(tokens)
    assert len(captions) == 8 and {*" ".join(captions).split()} <= tokenizer.get_vocab().keys()
    described = [line for line in lines if line["regions"]]
    monkeypatch.setattr(evaluator, "Writer", lambda _: Knowing(described))
    measured = evaluator.Written(images=str(tmp_path), annotations=str(tmp_path / "A.jsonl"))
    result = measured.evaluate(predictor)
    assert (result["images"], result["phrases"]) == (len(described), 12) == (6, 12)
    assert (result["phrase_iou"], result["phrase_acc50"]) == (pytest.approx(1), 1.0)
    assert result["chance_phrase_acc50"] == 0.0
    named = sum(len(line["regions"]) for line in described[:-1]) + len(described[0]["regions"])
    assert result["parts_named"] == named / 6
    assert result["parts_right"] == pytest.approx(9 / named)
