"""A text decoder in the Hugging Face folder, and where it stays behind; ONNX is in test_to_onnx.py."""

import json
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors import numpy as safetensors

import grain_jax
from grain_jax.convert import huggingface, parity, text_decoder
from grain_jax.convert.__main__ import main
from grain_jax.convert.exits import folder as exits
from grain_jax.input_pipeline import clip_tokenizer
from grain_jax.runtime import checkpoint
from tests import foreign, perturbed

torch.set_num_threads(1)
REMOTE = dict(trust_remote_code=True, local_files_only=True)


def saved(folder, sizes=None, **changes):
    """The folder of a new model with a text decoder."""
    model = perturbed.tiny(image__depth=1, text__depth=1, **changes)
    decoder = perturbed.decoder(model, **sizes or {})
    checkpoint.save_model(folder, model, perturbed.params(model), decoder, source="test")
    return folder


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """(our folder, folder of to-hf, what the command printed), with CLIP's vocabulary."""
    root = tmp_path_factory.mktemp("hf")
    sizes = dict(text__vocab_size=clip_tokenizer.VOCAB_SIZE, decoder__depth=1)
    saved(root / "ours", **sizes, image__registers=2)
    report = huggingface.to_hf(root / "ours", root / "hf")
    assert report.verdict == "PROVEN", report.text
    return root / "ours", root / "hf", report.text


def loaded(folder) -> Any:
    return transformers.AutoModel.from_pretrained(folder, **REMOTE).eval()


def test_the_folder_comes_back(hf, tmp_path, capsys):
    ours, folder, said = hf
    assert "\ntext_decoder " in said
    stored, again = decoder_of(ours), decoder_of(folder)
    assert again.config == stored.config
    jax.tree.map(np.testing.assert_array_equal, again.params, stored.params)
    loaded(folder).save_pretrained(tmp_path / "tuned")
    arguments = ["--input", str(tmp_path / "tuned"), "--output", str(tmp_path / "back")]
    assert main(["from-hf", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "\ntext_decoder " in printed and "parity: PROVEN" in printed
    back = decoder_of(tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, back.params, stored.params)


def decoder_of(folder) -> Any:
    return checkpoint.load_stored(folder).text_decoder


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

        boxes = np.array([[0, 0.1, 0.5, 1], [0.3, 0.3, 0.31, 0.99]], np.float32)
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
    auto: Any = transformers.AutoModelForImageTextToText
    module = auto.from_pretrained(folder, **REMOTE).eval()
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


CLIP = dict(
    decoder=None,
    image__pool="class",
    image__pre_norm=True,
    image__qk_norm=False,
    image__activation="quick_gelu",
    text__activation="quick_gelu",
)


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """Two towers that CLIPModel holds, with a text decoder."""
    return saved(tmp_path_factory.mktemp("towers") / "ours", **CLIP)


def test_a_damaged_folder_is_told_in_lines(towers, tmp_path, capsys):
    report = huggingface.to_hf(towers, tmp_path / "hf")
    assert "trust_remote_code: CLIPModel cannot hold the text decoder" in report.text
    assert report.verdict == "PROVEN"
    arrays = safetensors.load_file(tmp_path / "hf" / "model.safetensors")
    arrays["text_decoder.norm.weight"] = np.zeros(7, np.float32)
    del arrays["text_decoder.head.weight"]
    safetensors.save_file(arrays, tmp_path / "hf" / "model.safetensors")
    capsys.readouterr()
    said = refused(capsys, "from-hf", tmp_path / "hf", tmp_path / "out")
    file = f"{tmp_path / 'hf'}/model.safetensors: text_decoder"
    assert said[:2] == [
        f"{file} norm.weight: got shape (7,), expected (24,)",
        f"{file} head.weight: missing",
    ]
    path = tmp_path / "hf" / "config.json"
    stored = json.loads(path.read_text())
    for sizes, fault in (
        ({**stored["text_decoder"], "bins": 1}, "text_decoder.bins: got 1, expected"),
        ("large", "text_decoder: got 'large', expected to-hf's config.json"),
    ):
        path.write_text(json.dumps(stored | {"text_decoder": sizes}))
        assert fault in refused(capsys, "from-hf", tmp_path / "hf", tmp_path / "out")[0]


def refused(capsys, command, source, out):
    """The lines of the command on a wrong input."""
    assert main([command, "--input", str(source), "--output", str(out)]) == 2
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    "command, line",
    [
        (["to-hf", "--part", "towers"], "left behind: text decoder"),
        (["to-hf", "--part", "vision"], "left behind: text tower, image projection, text decoder"),
        (["to-open-clip"], "left behind: text decoder"),
    ],
)
def test_other_formats_leave_it_behind_in_a_line(command, line, towers, tmp_path, capsys):
    arguments = ["--checkpoint", str(towers), "--output", str(tmp_path / "out")]
    assert main([*command, *arguments]) == 0
    assert line in capsys.readouterr().out.splitlines()


def test_the_table_says_where_it_goes(towers, capsys):
    assert main(["table", "--checkpoint", str(towers)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "text decoder: in to-hf, to-onnx, export, pack; the others leave it behind"


def test_the_id_that_follows_the_words_is_the_tokenizers(tmp_path):
    model = perturbed.tiny(text__tokenizer="tokenizer.json", text__pad_id=1, text__end_id=5)
    words = {word: i for i, word in enumerate("<unk> <pad> a </s> wren".split())}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.save(f"{tmp_path}/tokenizer.json")
    of = lambda folder, **sizes: [
        text_decoder.stored_sizes(perturbed.decoder(model, **sizes), model, folder)[key]
        for key in ("end_of_text", "special_ids", "words")
    ]
    assert of(tmp_path, leading_specials=0, trailing_specials=0) == [1, [], 5]
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 3)]
    )
    library.save(f"{tmp_path}/tokenizer.json")
    assert of(tmp_path, leading_specials=0) == [3, [3], 5]
    assert of(None) == [5, [], 300]
