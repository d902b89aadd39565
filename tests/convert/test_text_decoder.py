"""The text decoder in the formats of others: the Hugging Face folder, ONNX, StableHLO; each has random weights."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from grain_jax import config as config_lib
from grain_jax.convert import huggingface, parity, text_decoder
from grain_jax.convert.__main__ import main
from grain_jax.convert.exits import folder as exits
from grain_jax.input_pipeline import clip_tokenizer
from grain_jax.models.text_decoder import vocabulary
from grain_jax.runtime import checkpoint
from grain_jax.runtime.saved_model import StoredDecoder
from tests import foreign, perturbed

torch.set_num_threads(1)
REMOTE = dict(trust_remote_code=True, local_files_only=True)
SIZES = dict(width=24, depth=2, heads=3, mlp_dim=44, bins=13, row_length=20)
DEPTH = dict(image__depth=1, text__depth=1, image__registers=2)
WORDS = "unknown pad a photo of wren two dogs and cat s bowl long x & ; ! , ' </s>"


def a_decoder(model, **changes) -> StoredDecoder:
    sizes = config_lib.TextDecoder(**SIZES | changes).beside(model)
    rng, shapes = np.random.default_rng(3), text_decoder._shapes(sizes, model)
    draw = lambda shape: rng.normal(size=shape).astype(np.float32) * 0.3
    params: Any = text_decoder.tables.nested({name: draw(shape) for name, shape in shapes.items()})
    words = vocabulary(sizes, model)
    for name in ("token_embed", "head"):
        params[name][words.size :] = 0
    return StoredDecoder(sizes, params)


def saved(folder, decoder_changes=None, **changes):
    """(model, decoder) of a new model in that folder."""
    model = perturbed.tiny(**DEPTH | changes)
    decoder = a_decoder(model, **decoder_changes or {})
    checkpoint.save_model(folder, model, perturbed.params(model), decoder, source="test")
    return model, decoder


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """(our folder, folder of to-hf, what the command printed), with CLIP's vocabulary."""
    root = tmp_path_factory.mktemp("hf")
    sizes = dict(text__vocab_size=clip_tokenizer.VOCAB_SIZE, decoder__depth=1)
    saved(root / "ours", **sizes)
    report = huggingface.to_hf(root / "ours", root / "hf")
    assert report.verdict == "PROVEN", report.text
    return root / "ours", root / "hf", report.text


def loaded(folder) -> Any:
    return transformers.AutoModel.from_pretrained(folder, **REMOTE).eval()


def test_the_folder_comes_back(hf, tmp_path, capsys):
    ours, folder, said = hf
    assert "\ntext_decoder " in said
    stored, again = (checkpoint.load_stored(x) for x in (ours, folder))
    assert again.text_decoder.config == stored.text_decoder.config
    jax.tree.map(
        np.testing.assert_array_equal, again.text_decoder.params, stored.text_decoder.params
    )
    loaded(folder).save_pretrained(tmp_path / "tuned")
    arguments = ["--input", str(tmp_path / "tuned"), "--output", str(tmp_path / "back")]
    assert main(["from-hf", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "\ntext_decoder " in printed and "parity: PROVEN" in printed
    back = checkpoint.load_stored(tmp_path / "back").text_decoder
    jax.tree.map(np.testing.assert_array_equal, back.params, stored.text_decoder.params)


def greedy(stored, images, prompt, steps):
    """Tokens by our cache, one after another: words and END, or after POINT location tokens, int32 [B, steps]."""
    decoder, model = stored.text_decoder, stored.model
    made, words = text_decoder.module(decoder.config, model), vocabulary(decoder.config, model)
    apply = functools.partial(made.apply, {"params": jax.tree.map(jnp.asarray, decoder.params)})
    patches = text_decoder.patches_of(model, stored.merged(), images)
    ids = np.arange(words.rows)
    allowed = ids <= words.end
    if prompt[0, 0] == words.task("point"):
        allowed = (ids >= words.first_bin) & (ids < words.size)
    count = jnp.full(len(prompt), prompt.shape[1], jnp.int32)
    capacity = prompt.shape[1] + steps
    logits, state = apply(patches, jnp.asarray(prompt), count, capacity, method="start")
    step, found = jax.jit(functools.partial(apply, method="step")), []
    for _ in range(steps):
        found.append(np.where(allowed, logits, -np.inf).argmax(1))
        logits, state = step(state, jnp.asarray(found[-1]))
    return np.stack(found, axis=1)


def ended(tokens, end):
    """Tokens after the first end are ends."""
    return np.where(np.cumsum(tokens == end, axis=1) > 0, end, tokens)


def test_captions_descriptions_and_boxes_are_ours(hf):
    ours, folder, _ = hf
    stored, module = checkpoint.load_stored(ours), loaded(folder)
    words = vocabulary(stored.text_decoder.config, stored.model)
    given = parity.inputs_of(stored.model)
    pixels = foreign.torch_images(given.images)
    prompt = np.full((4, 1), words.task("caption"), np.int32)
    expected = ended(greedy(stored, given.images, prompt, 19), words.end)
    found = module.caption(pixels)
    np.testing.assert_array_equal(found, expected[:, : found.shape[1]])
    assert set(expected[:, found.shape[1] :].flat) <= {words.end}

    corners = np.array([[0, 0.1, 0.5, 1], [0.3, 0.3, 0.31, 0.99]], np.float32)
    boxes = np.broadcast_to(corners, (4, 2, 4))
    found = module.describe(pixels, torch.tensor(boxes), max_new_tokens=7)
    for i in range(2):
        prompt = np.full((4, 5), words.task("describe"), np.int32)
        prompt[:, 1:] = words.quantise(boxes[:, i])
        expected = ended(greedy(stored, given.images, prompt, 7), words.end)
        np.testing.assert_array_equal(found[:, i], expected[:, : found.shape[2]])

    processor = transformers.AutoProcessor.from_pretrained(folder, **REMOTE)
    texts = ["a wren", "two dogs and a cat", "x"]
    asked = processor(text=texts)["input_ids"]
    pointed = module.point(pixels, asked)
    assert pointed.boxes_xyxy.shape == (4, 3, 4)
    for i, text in enumerate(texts):
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        prompt = np.tile(np.array([[words.task("point"), *ids, words.end]], np.int32), (4, 1))
        box = greedy(stored, given.images, prompt, 4)
        np.testing.assert_allclose(pointed.boxes_xyxy[:, i], words.boxes(box), atol=1e-6)
        whole = np.concatenate([prompt, box], axis=1)
        params = stored.merged()
        logits = text_decoder.logits(stored.text_decoder, stored.model, params, given.images, whole)
        shares = np.asarray(jax.nn.log_softmax(logits))[:, prompt.shape[1] - 1 : -1]
        expected = np.take_along_axis(shares, box[..., None], axis=2).sum((1, 2))
        np.testing.assert_allclose(pointed.log_probs[:, i], expected, rtol=1e-5)


def test_generate_of_transformers_takes_its_options(hf):
    _, folder, _ = hf
    module = transformers.AutoModelForImageTextToText.from_pretrained(folder, **REMOTE).eval()
    pixels = foreign.torch_images(parity.inputs_of(exits.read(hf[0]).model).images)
    config = module.text_decoder.config
    cached, without = (module.generate(pixels, use_cache=x) for x in (True, False))
    assert torch.equal(cached, without) and cached.shape[1] > 3
    assert (cached[:, 0] == config.tasks["caption"]).all() and (cached[:, 1:] <= config.end).all()
    scores = {}
    for beams in (1, 3):
        out = module.generate(pixels, num_beams=beams, max_new_tokens=5, length_penalty=0.0)
        logits = module.next_logits(pixels, out[:, :-1]).log_softmax(-1)
        shares = logits.gather(2, out[:, 1:, None])[..., 0]
        after = (out[:, :-1] == config.end) & (torch.arange(out.shape[1] - 1) > 0)
        scores[beams] = shares.masked_fill(after, 0).sum(1)
    assert (scores[3] >= scores[1] - 1e-4).all() and (scores[3] > scores[1] + 1e-4).any()


def test_onnx_has_a_step_with_a_cache(tmp_path, capsys):
    model, decoder = saved(tmp_path / "ours", decoder=None, image__pool="mean", text__vocab_size=60)
    out = tmp_path / "onnx"
    assert main(["to-onnx", "--checkpoint", str(tmp_path / "ours"), "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "parity: PROVEN" in printed
    assert "\ntext_decoder " in printed and "\ntext_decoder, one " in printed
    about = json.loads((out / "onnx.json").read_text())
    assert about["text_decoder"] == {
        **dict(end=60, caption=62, describe=63, point=64, first_bin=65, bins=13, positions=20)
    }
    given = about["files"]["text_decoder.onnx"]
    assert given["inputs"]["past_keys"] == "float32[batch, 2, 3, past, 8]"
    assert given["outputs"]["logits"] == "float32[batch, tokens, 78]"
