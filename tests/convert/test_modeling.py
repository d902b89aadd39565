"""The modeling file of to-hf with towers of every kind; each model has perturbed weights."""

from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers

import grain_jax
from benchmarks.parity import comparison
from grain_jax import config as config_lib
from grain_jax import losses
from grain_jax.checkpoint import saved_model
from grain_jax.convert import huggingface, parity
from grain_jax.convert.__main__ import main
from grain_jax.convert.from_hugging_face import from_hf
from grain_jax.convert.reference import names
from grain_jax.core import schema
from grain_jax.models import grain
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
    state = module.state_dict()
    loaded_again = type(module)(module.config)  # as of a config alone
    assert loaded_again.state_dict().keys() == state.keys()
    module.save_pretrained(tmp_path / "tuned")
    arguments = ["--input", str(tmp_path / "tuned"), "--output", str(tmp_path / "back")]
    assert main(["from-hf", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "parity: PROVEN" in printed and ("NOT FOUND" in printed) == has_words


def a_batch(model, regions=2):
    """(batch of ours with one text per row, inputs of the module)."""
    inputs = parity.inputs_of(model)
    count, length = len(inputs.images), model.text.context_length
    rng = np.random.default_rng(2)
    described = rng.integers(2, model.text.vocab_size - 2, (count * regions, length))
    described[:, -1] = model.text.vocab_size - 1
    described[3, 5:], described[3, 4] = model.text.pad_id, model.text.vocab_size - 1
    captions = inputs.token_ids.copy()
    after = np.arange(length) > captions.argmax(1)[:, None]
    captions[after] = model.text.pad_id
    texts = np.concatenate([captions, described]).astype(np.int32)
    ends = texts.argmax(1)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), texts.shape)
    where = np.stack([np.arange(len(texts)), ends], axis=1).astype(np.int32)
    mask = np.ones((count, regions), bool)
    mask[1, 1] = mask[2] = False
    boxes = rng.uniform(0.2, 0.6, (count, regions, 4)).astype(np.float32)
    batch = schema.Batch(
        image=inputs.images,
        text_tokens=texts[None],
        text_positions=positions[None],
        text_segments=(positions <= ends[:, None])[None].astype(np.int32),
        caption_at=where[:count, None],
        caption_id=np.arange(count, dtype=np.int32)[:, None],
        caption_mask=np.ones((count, 1), bool),
        description_at=where[count:].reshape(count, regions, 2),
        description_id=np.arange(count * regions, dtype=np.int32).reshape(mask.shape),
        region_boxes_cxcywh=boxes,
        region_mask=mask,
        texts_dropped=np.zeros(1, np.int32),
    )
    return batch, dict(
        pixel_values=foreign.torch_images(inputs.images),
        input_ids=torch.tensor(captions).long(),
        description_ids=torch.tensor(described).long().unflatten(0, mask.shape),
        region_boxes_cxcywh=torch.tensor(boxes),
        region_mask=torch.tensor(mask),
    )


@pytest.mark.parametrize("kind", ["siglip", "options", "own", "maps"])
def test_losses_and_gradients_are_ours(kind, written):
    """With regions, and for two towers, which read no regions; softmax, and sigmoid with a bias."""
    ours, hf, _ = written(kind)
    model, params, _ = saved_model.load_model(ours)
    batch, inputs = a_batch(model)
    contrast = "softmax" if model.logit_bias_init is None else "sigmoid"
    weights = {} if model.decoder else dict(region_description=0.0, box=0.0)
    loss = config_lib.Loss(contrast=contrast, deep_supervision=True, **weights)

    @jax.jit
    def step(params):
        def total(params):
            outputs = grain.GRAIN(model).apply({"params": params}, batch)
            result = losses.total_loss(outputs, batch, loss)
            return result.total, result

        return jax.grad(total, has_aux=True)(params)

    with jax.default_matmul_precision("highest"):
        grads, expected = step(params)
    module = loaded(hf)
    assert module.config.losses["contrast"] == contrast
    module.config.losses["deep_supervision"] = True
    out = module(**inputs, return_loss=True)
    assert out["loss"] is out.loss is out[0]  # as trainers of transformers read it
    assert len(out.losses) == (3 if model.decoder else 1)
    for name, value in out.losses.items():
        np.testing.assert_allclose(value.detach(), expected.terms[name], rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(out.loss.detach(), expected.total, rtol=1e-5)
    out.loss.backward()
    states = names.state_dicts(jax.tree.map(np.asarray, grads))
    compared = {f"{part}.{name}": x for part, state in states.items() for name, x in state.items()}
    assert compared.keys() == {name for name, _ in module.named_parameters()}
    for name, parameter in module.named_parameters():
        if not name.startswith("decoder.boxes."):  # of no loss in torch
            assert comparison.gradient(name, parameter.grad.numpy(), compared[name]).ok, name
    if model.decoder is None:
        with pytest.raises(ValueError, match="has no region decoder"):
            module.get_regions(inputs["pixel_values"])
        with pytest.raises(ValueError, match="has no region decoder"):
            embeds = out.text_embeds
            module.zero_shot_logits(inputs["pixel_values"], embeds, [embeds], alpha=0.5)


TEXTS = ["A photo of a WREN!", "two dogs &amp; a cat's  bowl, 1998", "", "x", "wren " * 50]


@pytest.mark.parametrize("kind", ["json", "sentencepiece"])
def test_the_processor_has_siglips_tokens(kind, written, tmp_path):
    if kind == "json":
        ours, hf, _ = written("siglip")
    else:
        ours, hf, _ = with_sentencepiece(tmp_path)
    expected = grain_jax.load(ours).encode_text(TEXTS)
    processor = transformers.AutoProcessor.from_pretrained(hf, **REMOTE)
    processor.save_pretrained(tmp_path / "again")
    again = transformers.AutoProcessor.from_pretrained(tmp_path / "again", **REMOTE)
    for each in (processor, again):
        with torch.no_grad():  # padded to the longest; the model fills the rest
            features = loaded(hf).get_text_features(each(text=TEXTS[:4])["input_ids"]).numpy()
            empty = loaded(hf).get_text_features(each(text=["", ""])["input_ids"]).numpy()
        foreign.close(expected[:4], features / np.linalg.norm(features, axis=1, keepdims=True))
        foreign.close(expected[2], empty[1] / np.linalg.norm(empty[1]))
    from_hf(hf, tmp_path / "back")
    np.testing.assert_array_equal(grain_jax.load(tmp_path / "back").encode_text(TEXTS), expected)


def with_sentencepiece(folder):
    model = perturbed.tiny(
        **DEPTH,
        decoder__depth=1,
        text__tokenizer="siglip.model",
        text__cleaning="canonical",
        text__pad_id=1,
        text__causal=False,
        text__pool="last",
    )
    saved_model.save_model(folder / "ours", model, perturbed.params(model), source="test")
    perturbed.write_sentencepiece(folder / "ours")
    report = huggingface.to_hf(folder / "ours", folder / "hf")
    assert report.verdict == "PROVEN" and "\ntoken_ids " in report.text, report.text
    return folder / "ours", folder / "hf", report.text
