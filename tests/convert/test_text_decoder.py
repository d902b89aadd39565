"""The text decoder in the formats of others: the Hugging Face folder, ONNX, StableHLO; each has random weights."""

import json
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers

import grain_jax
from grain_jax import config as config_lib
from grain_jax.convert import export, huggingface, parity, text_decoder
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


def test_captions_descriptions_and_boxes_are_ours(hf):
    """Texts, boxes and their log-probabilities, greedy."""
    ours, folder, _ = hf
    predictor, module = grain_jax.load(ours), loaded(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder, **REMOTE)
    given = parity.inputs_of(predictor.model)
    pixels = foreign.torch_images(given.images)

    def log_probabilities(begun, written):
        whole = torch.cat([begun.long(), written], dim=1)
        shares = module.next_logits(pixels, whole[:, :-1]).log_softmax(-1)
        shares = shares[:, begun.shape[1] - 1 :].gather(2, written[..., None])[..., 0]
        return shares.masked_fill(written == module.text_decoder.config.pad, 0).sum(1)

    with torch.no_grad():
        expected, found = predictor.caption(list(given.images)), module.caption(pixels)
        assert processor.batch_decode(found) == [x.text for x in expected]
        assert len({x.text for x in expected}) > 1
        begun = torch.full((4, 1), module.text_decoder.config.tasks["caption"])
        scores = [x.log_probability for x in expected]
        np.testing.assert_allclose(log_probabilities(begun, found), scores, rtol=1e-5)

        boxes = np.float32([[0, 0.1, 0.5, 1], [0.3, 0.3, 0.31, 0.99]])
        boxes = np.broadcast_to(boxes, (4, 2, 4))
        expected = predictor.describe(list(given.images), boxes, max_tokens=7)
        found = module.describe(pixels, torch.tensor(boxes), max_new_tokens=7)
        assert processor.batch_decode(found) == [[x.text for x in each] for each in expected]

        texts = ["a wren", "two dogs and a cat", "x"]
        expected = predictor.point(list(given.images), [texts] * 4)
        pointed = module.point(pixels, processor(text=texts)["input_ids"])
    corners = [[x.box_xyxy for x in each] for each in expected]
    np.testing.assert_allclose(pointed.boxes_xyxy, corners, atol=1e-6)
    scores = [[x.log_probability for x in each] for each in expected]
    np.testing.assert_allclose(pointed.log_probs, scores, rtol=1e-5)


def test_generate_of_transformers_takes_its_options(hf):
    _, folder, _ = hf
    module = transformers.AutoModelForImageTextToText.from_pretrained(folder, **REMOTE).eval()
    pixels = foreign.torch_images(parity.inputs_of(exits.read(hf[0]).model).images)
    config = module.text_decoder.config
    cached, without = (module.generate(pixels, use_cache=x) for x in (True, False))
    assert torch.equal(cached, without) and cached.shape[1] > 3
    assert (cached[:, 0] == config.tasks["caption"]).all() and (cached[:, 1:] <= config.pad).all()
    ours = grain_jax.load(hf[0])
    written = ours.caption(list(parity.inputs_of(ours.model).images), beams=3, max_tokens=5)
    found = module.caption(pixels, num_beams=3, max_new_tokens=5)
    processor = transformers.AutoProcessor.from_pretrained(folder, **REMOTE)
    assert processor.batch_decode(found) == [x.text for x in written]
    with pytest.raises(ValueError, match="max_new_tokens: got 21, expected 1 to 20"):
        module.caption(pixels, max_new_tokens=21)


def test_onnx_has_a_step_with_a_cache(tmp_path, capsys):
    model, decoder = saved(tmp_path / "ours", decoder=None, image__pool="mean", text__vocab_size=60)
    out = tmp_path / "onnx"
    assert main(["to-onnx", "--checkpoint", str(tmp_path / "ours"), "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "parity: PROVEN" in printed
    assert "\ntext_decoder " in printed and "\ntext_decoder, one " in printed
    about = json.loads((out / "onnx.json").read_text())
    tokens = dict(end=60, caption=62, describe=63, point=64, first_bin=65, bins=13)
    others = dict(positions=20, leading_specials=1, trailing_specials=1)
    assert about["text_decoder"] == tokens | others
    given = about["files"]["text_decoder.onnx"]
    assert given["inputs"]["past_keys"] == "float32[batch, 2, 3, past, 8]"
    assert given["outputs"]["logits"] == "float32[batch, tokens, 78]"


def test_stablehlo_has_the_whole_search(tmp_path, capsys):
    saved(tmp_path / "ours", decoder=None, image__pool="mean", text__vocab_size=60)
    out = tmp_path / "out"
    assert export.main(["--checkpoint", str(tmp_path / "ours"), "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "caption: tokens" in printed and "point: box_xyxy" in printed
    params = jax.device_put(dict(np.load(out / "params.npz")))
