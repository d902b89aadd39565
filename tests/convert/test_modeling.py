"""The modeling file of to-hf with towers of every kind; each model has perturbed weights."""

from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers

import grain_jax
from grain_jax.checkpoint import saved_model
from grain_jax.convert import huggingface, parity
from grain_jax.convert.__main__ import main
from grain_jax.convert.from_hugging_face import from_hf
from tests import foreign, perturbed

torch.set_num_threads(1)
REMOTE = dict(trust_remote_code=True, local_files_only=True)
DEPTH = dict(image__depth=1, text__depth=1)
WORDS = "unknown pad a photo of wren two dogs and cat s bowl long x & ; ! , '"
SIGLIP = DEPTH | dict(
    decoder__depth=2,
    logit_bias_init=-3.0,
    image__qk_norm=False,
    image__class_token=False,
    image__activation="gelu_tanh",
    text__activation="gelu_tanh",
    text__norm_eps=1e-6,
    text__causal=False,
    text__pool="last",
    text__projection="affine",
    text__tokenizer="tokenizer.json",
    text__pad_id=1,
)
TWO = DEPTH | dict(decoder=None)
KINDS = {
    "siglip": SIGLIP | dict(boxes__kind="roi_align", boxes__bins=2),
    "beside": SIGLIP | dict(decoder__image_pool="tower", image__pool="map", boxes__kind="roi_align"),
    "regions": DEPTH | dict(decoder__depth=1),
    "own": TWO | dict(image__pool="class", image__projection="affine", text__causal=False),
    "maps": TWO
    | dict(image__pool="map", image__activation="quick_gelu", image__projection="none")
    | dict(image__width=40, embed_dim=40, text__pool="map", text__projection="none", logit_bias_init=-2.0)
    | dict(text__causal=False, text__mask_padding=True),
    "means": TWO | dict(image__pool="mean", text__pool="mean", boxes__kind="roi_align"),
    "options": DEPTH
    | dict(decoder__depth=1, decoder__image_pool="all", boxes__kind="roi_align", image__positions=False, image__rope="centres", image__registers=2)
    | dict(image__layer_scale=True, image__mlp="gated", image__activation="silu", image__key_bias=False)
    | dict(text__causal=False, text__pool="mean", text__activation="relu", text__tokenizer="tokenizer.json"),
    "rotary": TWO
    | dict(image__pool="map", image__rope="centres", image__rope_theta=50.0, image__registers=1, image__mlp="gated")
    | dict(text__end_id=2),
}  # fmt: skip


def made(folder, changes):
    """(our folder, folder of to-hf, what the command printed)."""
    model = perturbed.tiny(**changes)
    saved_model.save_model(folder / "ours", model, perturbed.params(model), source="test")
    if model.text.tokenizer == "tokenizer.json":
        perturbed.write_words(folder / "ours", WORDS)
    report = huggingface.to_hf(folder / "ours", folder / "hf")
    assert report.verdict == "PROVEN", report.text
    return folder / "ours", folder / "hf", report.text


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """kind -> `made`, once for the file."""
    folders: dict[str, Any] = {}

    def make(kind):
        if kind not in folders:
            folders[kind] = made(tmp_path_factory.mktemp(kind), KINDS[kind])
        return folders[kind]

    return make


def loaded(folder) -> Any:
    return transformers.AutoModel.from_pretrained(folder, **REMOTE).eval()


def tensors(inputs):
    return foreign.torch_images(inputs.images), torch.tensor(inputs.token_ids).long()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_goes_out_and_comes_back(kind, written, tmp_path, capsys):
    ours, hf, said = written(kind)
    assert ("for AutoModel with trust_remote_code: " in said) == ("decoder" in KINDS[kind]), said
    assert ("\nbox_embed " in said) == ("boxes__kind" in KINDS[kind])
    has_words = "text__tokenizer" in KINDS[kind]
    assert ("\ntoken_ids " in said) == has_words
    model, params, _ = saved_model.load_model(ours)
    from_hf(hf, tmp_path / "again")
    again, back, _ = saved_model.load_model(tmp_path / "again")
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, back, params)
    module, predictor = loaded(hf), grain_jax.load(tmp_path / "again")
    inputs = parity.inputs_of(model)
    with torch.no_grad():
        maps = module.similarity_maps(*tensors(inputs)).numpy()
    texts = predictor.encode_text(inputs.token_ids)
    foreign.close(np.stack(predictor.similarity_maps(inputs.images, [texts] * len(maps))), maps)
    module.save_pretrained(tmp_path / "tuned")
    arguments = ["--input", str(tmp_path / "tuned"), "--output", str(tmp_path / "back")]
    assert main(["from-hf", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "parity: PROVEN" in printed and ("NOT FOUND" in printed) == has_words
