"""from-open-clip and from-hf: random models of the real packages give the same embeddings; faults."""

import json
from typing import Any

import numpy as np
import open_clip
import open_clip.model as library
import pytest
import timm
import tokenizers
import torch
import transformers
from timm.models.vision_transformer import VisionTransformer

import grain_jax
from grain_jax import config as config_lib
from grain_jax.checkpoint import saved_model
from grain_jax.configs import finetune
from grain_jax.convert import parity, towers
from grain_jax.convert.exits import tokenizers as exits
from grain_jax.convert.faults import ConvertError
from grain_jax.convert.from_hugging_face import from_hf
from grain_jax.convert.open_clip import _outputs, from_open_clip, to_open_clip
from grain_jax.core import errors
from grain_jax.input_pipeline import clip_tokenizer
from grain_jax.train import initialise
from tests import foreign

pytestmark = pytest.mark.long

VOCAB, LENGTH, SIZE, PATCH = 300, 16, 32, 8
TEXT = dict(context_length=LENGTH, vocab_size=VOCAB, width=48, heads=3, layers=2)
VISION = dict(layers=2, width=64, head_width=32, mlp_ratio=2.0, patch_size=PATCH, image_size=SIZE)
HF_TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
HF_TEXT |= dict(vocab_size=VOCAB, max_position_embeddings=LENGTH, pad_token_id=1)
HF_TEXT |= dict(bos_token_id=VOCAB - 2, eos_token_id=VOCAB - 1)
HF_IMAGE = dict(hidden_size=24, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
HF_IMAGE |= dict(patch_size=PATCH, image_size=SIZE)


def _hf(kind, **text):
    joint = dict(projection_size=24) if kind == "Siglip" else dict(projection_dim=20)
    both = {} if kind == "Siglip" else joint
    config = getattr(transformers, f"{kind}Config")(
        text_config=HF_TEXT | joint | text, vision_config=HF_IMAGE | both, **both
    )
    return foreign.perturb(getattr(transformers, f"{kind}Model")(config))


def _changed(folder, **keys):
    """Changes keys of the config.json in a folder; `part__key` is a key of a part."""
    content = json.loads((folder / "config.json").read_text())
    for key, value in keys.items():
        part, _, name = key.partition("__")
        (content[part] if name else content)[name or key] = value
    (folder / "config.json").write_text(json.dumps(content))


def _check(folder, module):
    """The model in a folder, with the outputs of another package, on other inputs than the report's."""
    model, params, _ = saved_model.load_model(folder)
    inputs = parity.inputs_of(model, seed=1)
    is_hf = isinstance(module, transformers.PreTrainedModel)
    theirs = (parity.clip_outputs if is_hf else _outputs)(module, inputs)
    theirs = theirs["image_embed"], theirs["text_embed"]
    foreign.close_to_ours(model, params, inputs.images, inputs.token_ids, theirs)
    return model, params


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_hugging_face(kind, tmp_path):
    module = _hf(kind)
    module.save_pretrained(tmp_path / "theirs", max_shard_size="100kB" if kind == "CLIP" else "1GB")
    report = from_hf(tmp_path / "theirs", tmp_path / "ours")
    model, params = _check(tmp_path / "ours", module)
    assert report.verdict == "PROVEN", report.text
    assert (model.image.heads, model.text.heads) == (2, 4)
    assert model.text.packable == (kind == "CLIP")
    assert model.image.pool == ("class" if kind == "CLIP" else "map")
    assert model.image.pixel_mean == (towers.CLIP_PIXELS if kind == "CLIP" else ((0.5,) * 3,))[0]
    np.testing.assert_allclose(params["logit_scale"], module.logit_scale.detach().numpy().item())
    assert ("logit_bias" in params) == (kind != "CLIP")
    config = config_lib.from_dict(finetune.get_config(str(tmp_path / "ours")))
    assert config.model.decoder.queries == 8 and config.model.decoder.image_pool == "tower"
    loaded = initialise.load(config).params
    assert {x.split("/")[0] for x in loaded} == params.keys()  # with pooling and logit scale


@pytest.mark.parametrize("pad", [1, None])
def test_metaclip_2_ends_texts_with_an_id_that_is_not_the_highest(pad, tmp_path):
    """Its config.json asks for code of the Hub, quantized arrays and outputs without names."""
    module = _hf("MetaClip2", eos_token_id=2)
    module.save_pretrained(tmp_path / "theirs")
    evil = dict(attn_implementation="evil/kernel", return_dict=False)
    evil |= dict(_attn_implementation="evil/kernel", quantization_config={"quant_method": "x"})
    for part in ("", "vision_config__", "text_config__"):
        _changed(tmp_path / "theirs", **{part + key: x for key, x in evil.items()})
    _changed(tmp_path / "theirs", text_config__pad_token_id=pad)
    report = from_hf(tmp_path / "theirs", tmp_path / "ours")
    assert report.verdict == "PROVEN", report.text
    text = _check(tmp_path / "ours", module)[0].text
    assert (text.end_id, text.pad_id, text.cleaning, text.packable) == (2, 1, "none", True)


def _words(*more):
    """A tokenizer.json of two words and `more` tokens by id; [END] ends a text."""
    ids = {"wren": 7, "owl": 3, "[UNK]": 0, "[END]": 9, **dict(more)}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="[UNK]"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    end = dict(special_tokens=[("[END]", 9)])
    library.post_processor = tokenizers.processors.TemplateProcessing(single="$A [END]", **end)
    return library.to_str()


def test_the_tokenizer_of_a_folder_with_clips_vocabulary(tmp_path, monkeypatch):
    """CLIP's own is "clip"; another one is used, and none may have ids beyond the vocabulary."""
    monkeypatch.setitem(HF_TEXT, "vocab_size", clip_tokenizer.VOCAB_SIZE)
    theirs, module = tmp_path / "theirs", _hf("CLIP", eos_token_id=2)
    module.save_pretrained(theirs)
    tower = config_lib.TextTower(context_length=LENGTH)
    clips = exits.files(tower, None)[0]["tokenizer.json"]
    (theirs / "tokenizer.json").write_text(json.dumps(clips))
    assert from_hf(theirs, tmp_path / "clip").verdict == "PROVEN"
    assert saved_model.load_model(tmp_path / "clip")[0].text.tokenizer == "clip"
    (theirs / "tokenizer.json").write_text(_words())
    assert from_hf(theirs, tmp_path / "words").verdict == "PROVEN"
    with torch.no_grad():
        out = module.get_text_features(torch.tensor([[7, 3, 0, 9] + [0] * (LENGTH - 4)])).pooler_output
    expected = (out / out.norm(dim=-1, keepdim=True)).numpy()
    foreign.close(grain_jax.load(tmp_path / "words").encode_text(["wren owl Finch"]), expected)
    (theirs / "tokenizer.json").write_text(_words(("finch", clip_tokenizer.VOCAB_SIZE)))
    with pytest.raises(errors.UserError, match="tokenizer.json has ids up to 49408, but model.text.vocab_si"):
        from_hf(theirs, tmp_path / "beyond")
    (theirs / "tokenizer.json").unlink()
    vocabulary = {token: i for i, token in enumerate(clip_tokenizer.tokens_and_merges()[0])}
    (theirs / "vocab.json").write_text(json.dumps(vocabulary))
    assert from_hf(theirs, tmp_path / "clip").verdict == "PROVEN"
    (theirs / "vocab.json").write_text(json.dumps(vocabulary | {"finch": 7}))
    with pytest.raises(ConvertError, match="vocab.json: differs from CLIP's, expected a tokenizer.json"):
        from_hf(theirs, tmp_path / "beyond")
    assert not (tmp_path / "beyond").exists()


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("model_type", "siglip2", "got 'siglip2'.* take a fixed size such as hf://google/siglip2-base"),
        ("text_config__num_hidden_layers", 900, "values, its files have"),
        ("text_config__num_hidden_layers", 999_999, "999999"),
        ("vision_config__intermediate_size", 60, "fc1"),
        ("text_config__num_hidden_layers", 1, "layers.1."),
    ],
)
def test_a_config_that_does_not_fit_is_an_error(key, value, said, tmp_path):
    _hf("CLIP").save_pretrained(tmp_path / "theirs")
    _changed(tmp_path / "theirs", **{key: value})
    with pytest.raises(errors.UserError, match=said):
        from_hf(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("gated, registers", [(False, 4), (True, 0)])
def test_dinov3_embeds_images_alone(gated, registers, tmp_path):
    sizes = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=64)
    sizes |= dict(image_size=SIZE, patch_size=PATCH, num_register_tokens=registers)
    habits = dict(use_gated_mlp=gated, hidden_act="silu" if gated else "gelu", rope_theta=50.0)
    module = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**sizes, **habits))
    foreign.perturb(module).save_pretrained(tmp_path / "theirs")
    report = from_hf(tmp_path / "theirs", tmp_path / "ours")
    assert report.verdict == "PROVEN" and "no text tower" in report.text, report.text
    ours = grain_jax.load(tmp_path / "ours")
    images = np.random.default_rng(0).normal(size=(2, 112, 112, 3)).astype(np.float32)
    with torch.no_grad():
        pooled = module(foreign.torch_images(images)).pooler_output.numpy()
    expected = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    foreign.close(ours.encode_image(images, normalized=True), expected)
    with pytest.raises(errors.UserError, match="vocab_size"):
        ours.encode_text("a wren")
    c = finetune.get_config(str(tmp_path / "ours"))
    assert c.init.text is None and c.model.text.vocab_size == 49408
    c.model.update(dict(embed_dim=20, text=dict(depth=1, width=8, heads=1)))
    config = config_lib.from_dict(c)
    assert config.model.image.rope_theta == 50.0 and config.model.image.projection == "matrix"
    loaded = initialise.load(config).params
    assert (loaded["image/norm/scale"] == module.norm.weight.detach().numpy()).all()


def _open_clip(folder, vision, text, kind=library.CLIP, pixels=None, dim=20, **options):
    """(what from-open-clip makes of a random model with its config, the module)."""
    module = foreign.perturb(kind(dim, vision, text, **options))
    config = dict(model_cfg=dict(embed_dim=dim, vision_cfg=vision, text_cfg=text, **options))
    if pixels:
        config["preprocess_cfg"] = pixels
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(module.state_dict(), folder / "open_clip_pytorch_model.bin")
    return from_open_clip(folder, folder / "ours"), module


def test_a_file_without_a_config_needs_the_name_of_its_model(tmp_path, monkeypatch):
    """As OpenAI's weights: QuickGELU, three sizes among the arrays, names with `module.`."""
    vision = dict(layers=2, width=64, patch_size=PATCH, image_size=SIZE)
    config: Any = dict(embed_dim=20, quick_gelu=True, vision_cfg=vision, text_cfg=TEXT)
    module = foreign.perturb(library.CLIP(20, vision, TEXT, quick_gelu=True))
    sizes = dict.fromkeys(("input_resolution", "context_length", "vocab_size"), torch.tensor(1))
    state = {f"module.{k}": v for k, v in (module.state_dict() | sizes).items()}
    torch.save({"state_dict": state}, tmp_path / "m.pt")
    with pytest.raises(ConvertError, match="--model NAME"):
        from_open_clip(tmp_path / "m.pt", tmp_path / "ours")
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config)
    assert from_open_clip(tmp_path / "m.pt", tmp_path / "ours", "tiny").verdict == "PROVEN"
    image = _check(tmp_path / "ours", module)[0].image
    assert (image.activation, image.pre_norm, image.patch_bias) == ("quick_gelu", True, False)


def test_the_config_decides_what_arrays_cannot_tell(tmp_path):
    """Patches' mean, a bias without SigLIP's other habits, norm epsilon, pixels: of open_clip's classes."""
    vision = VISION | dict(head_width=16, pool_type="avg", norm_kwargs=dict(eps=1e-2))
    vision |= dict(act_kwargs=dict(approximate="tanh"))
    text, pixels = TEXT | dict(proj_bias=True), dict(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    kind = library.CustomTextCLIP
    report, module = _open_clip(tmp_path / "a", vision, text, kind, pixels)
    assert report.verdict == "PROVEN", report.text
    model, _ = _check(tmp_path / "a" / "ours", module)
    image, text_tower = model.image, model.text
    assert (image.pool, image.class_token, image.heads) == ("mean", True, 4)
    assert (image.norm_eps, image.activation, image.mlp_dim) == (1e-2, "gelu_tanh", 128)
    assert (image.pixel_mean, image.pixel_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (text_tower.causal, text_tower.pool, text_tower.projection) == (True, "end", "affine")
    with pytest.raises(ConvertError, match="final_ln_after_pool"):
        _open_clip(tmp_path / "b", vision | dict(final_ln_after_pool=True), text, kind)


def tiny_siglip(pretrained, pretrained_cfg, pretrained_cfg_overlay, cache_dir=None, **options):
    """A model of timm by name, as small as no other of its kind."""
    sizes = dict(img_size=SIZE, patch_size=PATCH, embed_dim=24, depth=2, num_heads=2)
    return VisionTransformer(**sizes, class_token=False, act_layer="gelu_tanh", **options)


def test_a_trunk_of_timm_with_siglips_texts(tmp_path):
    timm.models.register_model(tiny_siglip)
    vision = dict(timm_model_name="tiny_siglip", timm_pool="map", timm_proj="none", image_size=SIZE)
    text = TEXT | dict(width=32, heads=4, no_causal_mask=True, proj_bias=True, pool_type="last")
    text |= dict(hf_tokenizer_name="timm/a", tokenizer_kwargs=dict(clean="canonicalize"))
    report, module = _open_clip(
        tmp_path / "a", vision, text, library.CustomTextCLIP, dim=24, init_logit_bias=-10
    )
    assert report.verdict == "PROVEN", report.text
    model, params = _check(tmp_path / "a" / "ours", module)
    image = model.image
    assert (image.heads, image.activation, image.pool) == (2, "gelu_tanh", "map")
    assert not model.text.causal and model.text.pool == "last"
    assert model.text.cleaning == "canonical"
    np.testing.assert_allclose(params["logit_bias"], module.logit_bias.item())


@pytest.mark.parametrize("clean, cleaning", [("canonicalize", "canonical"), (None, "none")])
def test_a_worldwide_config_of_open_clip(clean, cleaning, tmp_path):
    """Its text is read at the first token with `eos_id`, which is not the highest."""
    text = TEXT | dict(hf_tokenizer_name="facebook/xlm-v-base", pool_type="eos", eos_id=2)
    if clean is not None:
        text["tokenizer_kwargs"] = dict(clean=clean)
    report, module = _open_clip(tmp_path / "a", VISION, text, quick_gelu=True)
    assert report.verdict == "PROVEN", report.text
    model, _ = _check(tmp_path / "a" / "ours", module)
    assert (model.text.end_id, model.text.cleaning) == (2, cleaning)
    if clean is None:
        report = to_open_clip(tmp_path / "a" / "ours", tmp_path / "back")
        assert report.verdict == "PROVEN", report.text
