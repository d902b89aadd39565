"""to-onnx: what ONNX Runtime gives on the files, against our model; docs/howto/onnx.md runs."""

import json
import re
import sys
from typing import Any

import numpy as np
import PIL.Image
import pytest
import transformers

import grain_jax
from grain_jax.checkpoint import saved_model
from grain_jax.convert.__main__ import main
from grain_jax.convert.exits import folder as exits
from grain_jax.convert.exits import onnx_files, tokenizers
from grain_jax.input_pipeline import clip_tokenizer
from tests import perturbed
from tests.foreign import close
from tests.paths import ROOT

pytestmark = pytest.mark.long

SIGLIP = dict(
    decoder=None,
    embed_dim=48,
    logit_bias_init=-3.0,
    image__pool="map",
    image__qk_norm=False,
    image__class_token=False,
    image__activation="gelu_tanh",
    image__projection="none",
    text__activation="gelu_tanh",
    text__causal=False,
    text__pool="last",
    text__projection="affine",
    text__tokenizer="tokenizer.json",
    text__pad_id=1,
)


def convert(folder, **changes):
    """The folder of the ONNX files of a new model below `folder`, which is beside them."""
    model = perturbed.tiny(image__depth=1, text__depth=1, **changes)
    saved_model.save_model(folder / "ours", model, perturbed.params(model), source="test")
    if model.text.tokenizer != "clip":
        perturbed.write_words(folder / "ours", "unknown pad a photo of an wren owl long")
    arguments = ["--checkpoint", str(folder / "ours"), "--output", str(folder / "grain-onnx")]
    assert main(["to-onnx", *arguments]) == 0
    return folder / "grain-onnx"


@pytest.fixture(scope="module")
def grain(tmp_path_factory):
    sizes = dict(decoder__depth=1, text__vocab_size=clip_tokenizer.VOCAB_SIZE)
    sizes |= dict(image__rope="centres", image__registers=2, image__layer_scale=True)
    sizes |= dict(image__mlp="gated", image__key_bias=False)
    return convert(tmp_path_factory.mktemp("grain"), boxes__kind="roi_align", **sizes)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    return convert(tmp_path_factory.mktemp("siglip"), **SIGLIP)


@pytest.mark.parametrize("made", ["grain", "siglip"])
def test_the_page_gives_our_scores_and_maps(made, request, monkeypatch):
    folder = request.getfixturevalue(made)
    image = np.random.default_rng(4).integers(0, 256, (60, 90, 3), np.uint8)
    upright = PIL.Image.fromarray(image)
    exif = PIL.Image.Exif()
    exif[274] = 6  # a camera on its side: viewers turn the stored image by a quarter to the right
    upright.transpose(PIL.Image.Transpose.ROTATE_90).save(folder.parent / "bird.png", exif=exif)
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs/howto/onnx.md").read_text(), re.S)[0]
    monkeypatch.chdir(folder.parent)
    variables: dict[str, Any] = {}
    exec(code, variables)
    ours, texts = grain_jax.load(folder.parent / "ours"), ["a photo of a wren", "a photo of an owl"]
    text = ours.encode_text(texts)
    assert abs(text[0] - text[1]).max() > 0.01
    close(ours.encode_image([image]), variables["image_embeds"])
    close(text, variables["text_embeds"])
    close(ours.similarity_map(image, texts), variables["maps"][0])
    close(ours.encode_image([image]) @ text.T, variables["scores"])


def test_what_the_folders_say(grain, siglip):
    parts = {"grain": {*onnx_files.PARTS}, "siglip": {"image", "text", "maps"}}
    for made, folder in dict(grain=grain, siglip=siglip).items():
        about = json.loads((folder / "onnx.json").read_text())
        assert {name.removesuffix(".onnx") for name in about["files"]} == parts[made]
        assert {x.name for x in folder.glob("*.onnx.data")} == {f"{x}.data" for x in about["files"]}
    bias = grain_jax.load(siglip.parent / "ours").logit_bias
    assert bias is not None and about["logit_bias"] == pytest.approx(float(bias))
    assert about["text"]["pad_id"] == 1
    # It pads with another id than onnx.json says.
    assert not (grain / "tokenizer_config.json").exists()
    ids = transformers.AutoTokenizer.from_pretrained(siglip)(
        tokenizers.TEXTS, padding="max_length", truncation=True
    )["input_ids"]
    model = grain_jax.load(siglip.parent / "ours").model
    np.testing.assert_array_equal(ids, tokenizers.own_ids(model.text, siglip.parent / "ours"))


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
