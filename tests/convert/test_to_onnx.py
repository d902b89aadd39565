"""to-onnx: what ONNX Runtime gives on the files, against our model; docs/howto/onnx.md runs."""

import json
import re
import sys

import numpy as np
import pytest
import tokenizers as tokenizer_files

import grain_jax
from grain_jax.checkpoint import saved_model
from grain_jax.convert.__main__ import main
from grain_jax.convert.exits import folder as exits
from grain_jax.convert.exits import onnx_files, tokenizers
from tests import perturbed
from tests.paths import ROOT

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def grain(tmp_path_factory):
    """The folder of the ONNX files of a new model, which is beside them."""
    folder = tmp_path_factory.mktemp("grain")
    changes = dict(image__depth=1, text__depth=1, decoder__depth=1, **perturbed.POINTER)
    changes |= dict(image__rope="centres", image__registers=2, image__layer_scale=True)
    changes |= dict(image__mlp="gated", image__key_bias=False, logit_bias_init=-3.0)
    changes |= dict(text__causal=False, text__pool="last", text__tokenizer="tokenizer.json")
    model = perturbed.tiny(text__pad_id=1, **changes)
    saved_model.save_model(folder / "ours", model, perturbed.params(model), source="test")
    perturbed.write_words(folder / "ours", "unknown pad a photo of an wren owl long")
    arguments = ["--checkpoint", str(folder / "ours"), "--output", str(folder / "grain-onnx")]
    assert main(["to-onnx", *arguments]) == 0
    return folder / "grain-onnx"


def test_the_page_finds_damage(grain, monkeypatch):
    """Its outputs are compared in test_snippets.py."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs/howto/onnx.md").read_text(), re.S)[0]
    monkeypatch.chdir(grain.parent)
    for file in [path for path in grain.iterdir() if path.name != "onnx.json"]:
        whole = file.read_bytes()
        bit = bytes([whole[len(whole) // 2] ^ 1])
        file.write_bytes(whole[: len(whole) // 2] + bit + whole[len(whole) // 2 + 1 :])
        with pytest.raises(ValueError, match=f"^{file.name}: damaged$"):
            exec(code, {})
        file.write_bytes(whole)


def test_what_the_folder_says(grain):
    about = json.loads((grain / "onnx.json").read_text())
    assert about["files"] == [f"{part}.onnx" for part in onnx_files.PARTS]
    assert {x.name for x in grain.glob("*.onnx.data")} == {f"{x}.data" for x in about["files"]}
    ours = grain_jax.load(grain.parent / "ours")
    assert about["logit_bias"] == pytest.approx(float(ours.logit_bias or 0))
    assert about["text"]["pad_id"] == 1
    library = tokenizer_files.Tokenizer.from_file(str(grain / "tokenizer.json"))
    ids = [x.ids for x in library.encode_batch(tokenizers.TEXTS)]
    np.testing.assert_array_equal(ids, ours.tokenizer(tokenizers.TEXTS))


@pytest.mark.parametrize("sort", perturbed.PROPOSALS)
def test_proposals_detect_in_onnx_runtime_what_ours_do(sort, tmp_path):
    import onnxruntime

    changes = dict(text__causal=False, text__pool="last", text__tokenizer="tokenizer.json")
    changes |= dict(text__pad_id=1, **perturbed.PROPOSALS[sort])
    perturbed.saved(tmp_path / "ours", **changes)
    perturbed.write_words(tmp_path / "ours", "unknown pad a photo of an wren owl long")
    report = onnx_files.to_onnx(tmp_path / "ours", tmp_path / "onnx")
    assert report.verdict == "PROVEN" and "region_prior" in {c.name for c in report.comparisons}
    ours = grain_jax.load(tmp_path / "ours")
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3)).astype(np.uint8)
    pixels = np.stack([ours.preprocess(x) for x in images]).transpose(0, 3, 1, 2)
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "image.onnx")
    names = ("boxes_xyxy", "region_embeds", "region_priors")
    regions = session.run(names, {"pixel_values": np.ascontiguousarray(pixels)})
    for texts in (["a wren", "an owl", "long"], ["a wren"]):
        expected = ours.detect(images, texts, top_k=12, threshold=-1.0)
        perturbed.same_detections(ours, expected, *regions, ours.encode_text(texts))


def test_the_report_compares_every_output(grain, monkeypatch):
    source = exits.read(grain.parent / "ours")
    report = onnx_files._prove(grain, source)
    outputs = {"image_embed", "text_embed", "region_embed", "boxes_xyxy", "box_embed"}
    outputs |= {"similarity_map"}
    assert {c.name for c in report.comparisons} == outputs
    assert report.verdict == "PROVEN" and max(c.error for c in report.comparisons) < 1e-5
    other = perturbed.params(source.model, seed=1)
    assert onnx_files._prove(grain, source._replace(params=other)).verdict == "FAILED"
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    report = onnx_files._prove(grain, source)
    assert "NOT PROVEN" in report.text and "pip install 'grain_jax[interop]'" in report.text
