"""TIPS v2 of transformers and PE-core of timm and open_clip: small random models against their owners."""

import dataclasses
import functools
import json
from typing import Any

import jax
import numpy as np
import open_clip
import open_clip.model as library
import pytest
import timm
import torch
import transformers
from safetensors import torch as safetensors
from timm.models import eva

import grain_jax
from grain_jax.checkpoint import saved_model
from grain_jax.convert import huggingface, parity
from grain_jax.convert.from_hugging_face import from_hf
from grain_jax.convert.open_clip import OpenClipCheckpoint, _outputs, _towers, from_open_clip
from grain_jax.core import errors
from grain_jax.train import initialise
from tests import foreign, tiny

pytestmark = pytest.mark.long

torch.set_num_threads(1)
SIZE, PATCH = 32, 8
NAMES = ["wren", "a grey owl", "an emu in a very long and very wide field of grass and owls"]


def _images(seed=3):
    return np.random.default_rng(seed).uniform(size=(2, SIZE, SIZE, 3)).astype(np.float32)


def _sharp(module):
    """`foreign.perturb`, with attention that is far from uniform: else no output shows the rotations."""
    foreign.perturb(module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 2 and "att" in name:
                parameter.mul_(0.2 / parameter.std())
    return module


def _tips(folder, gated, temperature=True):
    """A random TIPS v2 in a folder, with a tokenizer to which "wren" is one token, and the module."""
    bytes_, merges = (
        [f"<0x{i:02X}>" for i in range(256)],
        [("w", "r"), ("wr", "e"), ("wre", "n"), ("▁", "wren")],
    )
    pieces = ["<pad>", "<unk>", *"▁abdefgilmnorstuvwxyz", *bytes_, *map("".join, merges)]
    words = transformers.Tipsv2Tokenizer(vocab={x: i for i, x in enumerate(pieces)}, merges=merges)
    words.save_pretrained(folder)
    text = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    text |= dict(vocab_size=300, max_position_embeddings=16, layer_norm_eps=1e-4)
    image = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE)
    image |= dict(patch_size=PATCH, layerscale_value=0.5, mlp_ratio=3, use_swiglu_ffn=gated)
    image |= dict(num_register_tokens=3 if gated else 1)
    config = transformers.Tipsv2Config(text_config=text, vision_config=image)
    module = _sharp(transformers.Tipsv2Model(config))
    with torch.no_grad():
        module.temperature.fill_(config.temperature_init_value if not temperature else 0.07)
    module.save_pretrained(folder)
    if not temperature:  # as in the published files
        file = folder / "model.safetensors"
        state = safetensors.load_file(file)
        del state["temperature"]
        safetensors.save_file(state, file, metadata={"format": "pt"})
    return module, words


@pytest.mark.parametrize("gated", [False, True])
def test_tips_scores_names_as_its_owner(gated, tmp_path):
    module, words = _tips(tmp_path / "theirs", gated, temperature=gated)
    report = from_hf(tmp_path / "theirs", tmp_path / "ours")
    assert report.verdict == "PROVEN", report.text
    ours, images = grain_jax.load(tmp_path / "ours"), _images()
    kind = ("gated", "silu", 3, 64) if gated else ("plain", "gelu", 1, 96)
    image, text = ours.model.image, ours.model.text
    assert (image.mlp, image.activation, image.registers, image.mlp_dim) == kind
    assert (image.pixel_mean, image.pixel_std) == ((0, 0, 0), (1, 1, 1)) and text.packable
    np.testing.assert_allclose(ours.logit_scale, 1 / (0.07 if gated else 0.005065968260169029), rtol=1e-5)
    given: Any = words(NAMES, padding="max_length", truncation=True, max_length=16, return_tensors="pt")
    assert given["attention_mask"].sum(1).tolist() == [1, 11, 16]
    with torch.no_grad():
        out = module(**given, pixel_values=foreign.torch_images(images))
    foreign.close(ours.encode_image(images, normalized=True), out.image_embeds.numpy())
    np.testing.assert_array_equal(ours.tokenizer(NAMES), given["input_ids"])
    for names in (NAMES, given["input_ids"].numpy()):
        foreign.close(ours.encode_text(names), out.text_embeds.numpy())
    ours.templates = ["{}"]
    scores = ours.classify(images, NAMES, normalized=True)
    foreign.close(ours.logit_scale * scores, out.logits_per_image.numpy())


def test_a_tips_without_bias_is_refused(tmp_path):
    _tips(tmp_path / "theirs", False)
    file = tmp_path / "theirs" / "config.json"
    stated = json.loads(file.read_text())
    stated["vision_config"]["qkv_bias"] = False
    file.write_text(json.dumps(stated))
    with pytest.raises(errors.UserError, match="vision_config.qkv_bias: got False, expected True"):
        from_hf(tmp_path / "theirs", tmp_path / "ours")


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    # As in size G: no class token, counting from 0, another MLP; and trained on another grid.
    "giant": dict(class_token=False, rope_grid_offset=0.0, mlp_ratio=280 / 48, ref_feat_shape=(3, 3)),
    "resized": dict(ref_feat_shape=(3, 3)),
    "rows_first": dict(rope_grid_indexing="ij"),
    "from_0": dict(rope_grid_offset=0.0),
}


@functools.cache
def _trunk(kind):
    """The name of a small trunk of timm, since open_clip takes trunks by name."""

    def trunk(pretrained, pretrained_cfg, pretrained_cfg_overlay, cache_dir=None, **more):
        sizes: Any = dict(img_size=SIZE, patch_size=PATCH, embed_dim=48, depth=2, num_heads=3)
        pool = dict(attn_pool_num_heads=8, attn_pool_mlp_ratio=4.0)
        rope = dict(attn_type="rope", use_rot_pos_emb=True, ref_feat_shape=(4, 4), rope_grid_offset=1.0)
        rope |= dict(rope_grid_indexing="xy", use_pre_transformer_norm=True)
        norm = functools.partial(torch.nn.LayerNorm, eps=1e-5)
        return eva.Eva(**(dict(norm_layer=norm) | sizes | pool | rope | KINDS[kind] | more))

    trunk.__name__ = f"tiny_pe_core_{kind}"
    timm.models.register_model(trunk)
    return trunk.__name__


def _pe_core(folder, kind):
    """A random PE-core in a folder of open_clip, and the module."""
    vision: Any = dict(timm_model_name=_trunk(kind), timm_pool="map", timm_proj=None, image_size=SIZE)
    text: Any = dict(context_length=16, vocab_size=49408, width=40, heads=5, layers=2)
    module = _sharp(library.CustomTextCLIP(20, vision, text))
    pixels = dict(mean=[0.5] * 3, std=[0.5] * 3)
    config = dict(model_cfg=dict(embed_dim=20, vision_cfg=vision, text_cfg=text), preprocess_cfg=pixels)
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(module.state_dict(), folder / "open_clip_pytorch_model.bin")
    return module


@pytest.mark.parametrize("kind", ["plain", "giant", "resized"])
def test_pe_core_scores_names_as_its_owner(kind, tmp_path):
    module = _pe_core(tmp_path / "theirs", kind)
    report = from_open_clip(tmp_path / "theirs", tmp_path / "ours")
    assert report.verdict == "PROVEN", report.text
    ours, images = grain_jax.load(tmp_path / "ours"), _images()
    image = ours.model.image
    assert (image.rope, image.rope_grid, image.rope_theta) == ("indices", 4 if kind == "plain" else 3, 1e4)
    assert (image.heads, image.pool_heads, image.projection) == (3, 8, "affine")
    ids = open_clip.tokenize(NAMES, 16)
    theirs = _outputs(module, parity.Inputs(images, ids.numpy()))
    foreign.close(ours.encode_image(images, normalized=True), theirs["image_embed"])
    foreign.close(ours.encode_text(NAMES), theirs["text_embed"])
    ours.templates = ["{}"]
    scores = ours.logit_scale * ours.classify(images, NAMES, normalized=True)
    foreign.close(scores, theirs["logits"])


@pytest.mark.parametrize("kind", ["rows_first", "from_0"])
def test_other_rotary_positions_of_timm_are_refused(kind, tmp_path):
    _pe_core(tmp_path / "theirs", kind)
    with pytest.raises(
        errors.UserError, match="got a tower of timm with rotary positions, expected PE-core's"
    ):
        from_open_clip(tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize("name", [x for x in open_clip.list_models() if x.startswith("PE-Core")])
def test_the_sizes_of_published_pe_cores(name, tmp_path):
    config: Any = open_clip.get_model_config(name)
    with torch.device("meta"):
        vision, text = (
            library.CLIPVisionCfg(**config["vision_cfg"]),
            library.CLIPTextCfg(**config["text_cfg"]),
        )
        state = library.CustomTextCLIP(config["embed_dim"], vision, text).state_dict()
    arrays = {key: np.broadcast_to(np.float32(0), x.shape) for key, x in state.items()}
    stated = _towers(OpenClipCheckpoint(tmp_path, arrays, config, ((0.5,) * 3, (0.5,) * 3)))
    image = stated.image
    grid = image.image_size // image.patch_size
    assert (image.rope_grid, image.pool_heads or image.heads) == (grid, 8)
    assert image.class_token == (name != "PE-Core-bigG-14-448")
    assert {row.theirs.format(0) for row in stated.rows if "{}" not in row.theirs} >= {
        key for key in arrays if ".blocks." not in key and ".resblocks." not in key
    } - {"visual.trunk.reg_token"}


@pytest.mark.parametrize("kind", ["tips", "pe"])
def test_regions_are_added_and_whole_images_are_scored_as_before(kind, tmp_path):
    if kind == "tips":
        _tips(tmp_path / "theirs", False)
        from_hf(tmp_path / "theirs", tmp_path / "ours")
    else:
        _pe_core(tmp_path / "theirs", "plain")
        from_open_clip(tmp_path / "theirs", tmp_path / "ours")
    published = grain_jax.load(tmp_path / "ours")
    c = tiny.regions_of(
        tmp_path / "ours",
        **{"model.decoder.boxes": "pointer", "model.decoder.reads_box": True, "model.decoder.depth": 1},
    )
    assert c.model.text == dataclasses.replace(published.model.text, tokenizer=c.model.text.tokenizer)
    program = tiny.program(c, 1)
    state = initialise.state_of_step_0(c, program, lambda line: None)
    state, metrics = program.step(state, tiny.batch(c))
    assert np.isfinite(metrics["loss"])
    params = jax.device_get(state.params)
    saved_model.save_model(tmp_path / "whole", c.model, params)
    ours, images = grain_jax.load(tmp_path / "whole"), _images()
    embed, regions = ours.encode_image_and_regions(images, normalized=True)
    foreign.close(embed, published.encode_image(images, normalized=True))
    ids = parity.inputs_of(published.model).token_ids
    foreign.close(ours.encode_text(ids), published.encode_text(ids))
    assert ours.logit_scale == published.logit_scale
    np.testing.assert_allclose(np.linalg.norm(regions.embed, axis=-1), 1, rtol=1e-5)
    assert huggingface.to_hf(tmp_path / "whole", tmp_path / "hf").verdict == "PROVEN"
    assert from_hf(tmp_path / "hf", tmp_path / "back").verdict == "PROVEN"
    back = saved_model.load_model(tmp_path / "back")[1]
    jax.tree.map(np.testing.assert_array_equal, back, params)
