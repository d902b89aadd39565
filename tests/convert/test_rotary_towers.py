"""DINOv3 and PE-core read from their files: random towers of transformers and timm give the same outputs here."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")
import open_clip.model as library  # noqa: E402
import safetensors.torch  # noqa: E402

from grain_jax import config as config_lib  # noqa: E402
from grain_jax.config import recipe  # noqa: E402
from grain_jax.configs import finetune  # noqa: E402
from grain_jax.convert import initialise, parity, tables  # noqa: E402
from grain_jax.convert.__main__ import main  # noqa: E402
from grain_jax.convert.faults import ConvertError  # noqa: E402
from grain_jax.models import grain, vit  # noqa: E402
from grain_jax.runtime import checkpoint  # noqa: E402
from tests import foreign, tiny  # noqa: E402

SIZE, PATCH = 32, 8
SIZES: dict[str, Any] = dict(image_size=SIZE, patch_size=PATCH, width=48, depth=2, heads=3)
SIZES |= dict(mlp_dim=64)
OF_TIMM: dict[str, Any] = dict(img_size=SIZE, patch_size=PATCH, embed_dim=48, depth=2, num_heads=3)
PE_CORE = {"T/16": "tiny_patch16_384", "S/16": "small_patch16_384"}
PE_CORE |= {"B/16": "base_patch16_224", "L/14": "large_patch14_336"}
DINOV3 = {"S/16": "small", "B/16": "base", "L/16": "large"}
OF_TIMM |= dict(mlp_ratio=4 / 3)


def _config(family, path, **image):
    c = tiny.dictionary(init__image=str(path))
    recipe.towers_of(c, family, ("image",))
    c.model.image.update(SIZES | image)
    return c


def _load(c):
    return initialise.load(config_lib.from_dict(c))


def _tokens(c, images):
    """What the image tower of the config gives with the weights that it starts from."""
    config = config_lib.from_dict(c)
    loaded = initialise.load(config)
    module = vit.ImageTransformer(config.model.image, jnp.dtype("float32"))
    params = tables.nested(loaded.params)["image"]
    return np.asarray(jax.jit(module.apply)({"params": params}, images)), loaded.report


def _images(size):
    return np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)


@pytest.mark.parametrize("gated", [False, True])
def test_a_run_starts_from_dinov3_of_transformers(gated, tmp_path):
    config = transformers.DINOv3ViTConfig(image_size=SIZE, patch_size=PATCH, num_register_tokens=4)
    config.update(dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3))
    config.update(dict(intermediate_size=64, use_gated_mlp=gated, rope_theta=50.0))
    config.update(dict(layer_norm_eps=1e-3, hidden_act="silu" if gated else "gelu"))
    module = foreign.perturb(transformers.DINOv3ViTModel(config))
    module.save_pretrained(tmp_path)
    kind = dict(mlp="gated", activation="silu") if gated else {}
    c = _config("dinov3", tmp_path, rope_theta=50.0, norm_eps=1e-3, image_size=48, **kind)
    images = _images(48)
    tokens, report = _tokens(c, images)
    with torch.no_grad():
        foreign.close(tokens, module(foreign.torch_images(images)).last_hidden_state.numpy())
    assert [line.split(": ", 1)[1][:7] for line in report] == [
        f"{25 if gated else 23} arra",
        "ASSUMED",
    ]
    c.model.image.update(registers=1, rope_theta=100.0)
    with pytest.raises(ConvertError) as error:
        _load(c)
    assert [line.split("model.image.")[1] for line in str(error.value).split("\n")] == [
        "rope_theta: got 100.0, but the checkpoint's tower has 50.0",
        "registers: got 1, but the checkpoint's tower has 4",
    ]


@pytest.mark.parametrize(
    "name",
    ["vit_small_patch16_dinov3", "vit_small_plus_patch16_dinov3", "vit_small_patch16_dinov3_qkvb"],
)
def test_a_run_starts_from_dinov3_of_timm(name, tmp_path):
    module = foreign.perturb(timm.create_model(name, **OF_TIMM))
    safetensors.torch.save_file(module.state_dict(), tmp_path / "model.safetensors")
    pixels = dict(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    told = dict(architecture=name, num_features=48, pretrained_cfg=pixels)
    (tmp_path / "config.json").write_text(json.dumps(told))
    kind: dict[str, Any] = dict(pixel_mean=(0.1, 0.2, 0.3), pixel_std=(0.4, 0.5, 0.6))
    if "plus" in name:
        kind |= dict(mlp="gated", activation="silu")
    c = _config("dinov3", tmp_path, **kind)
    images = _images(SIZE)
    tokens, _ = _tokens(c, images)
    with torch.no_grad():
        foreign.close(tokens, module.forward_features(foreign.torch_images(images)).numpy())
    told["architecture"] = "vit_small_patch16_rope_224"
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(
        ConvertError, match="got the architecture 'vit_small_patch16_rope_224', exp"
    ):
        _load(c)
    (tmp_path / "config.json").unlink()
    c.model.image.update(pixel_mean=(0.485, 0.456, 0.406), pixel_std=(0.229, 0.224, 0.225))
    again = _load(c)  # the arrays tell the family
    assert len(again.params) == (25 if "plus" in name else 23)
    assert sum("ASSUMED" in line for line in again.report) == 3  # heads, constants, pixels


def test_the_sizes_of_a_fine_tune_are_those_of_timms_models():
    names = {f"pe_core:{size}": f"vit_pe_core_{name}" for size, name in PE_CORE.items()}
    names |= {f"dinov3:{size}": f"vit_{name}_patch16_dinov3" for size, name in DINOV3.items()}
    assert names.keys() == {
        f"{family}:{size}" for family in ("pe_core", "dinov3") for size in finetune.FAMILIES[family]
    }
    for source, name in names.items():
        image = finetune.get_config(source).model.image
        with torch.device("meta"):
            trunk: Any = timm.create_model(name)
        block, patches = trunk.blocks[0], trunk.patch_embed.proj.weight
        assert (image.width, image.depth) == (trunk.embed_dim, len(trunk.blocks))
        assert (image.heads, image.mlp_dim) == (block.attn.num_heads, block.mlp.fc1.out_features)
        assert image.patch_size == patches.shape[-1] and image.norm_eps == trunk.norm.eps
        if image.rope == "grid":
            assert (image.rope_grid,) * 2 == trunk.rope.ref_feat_shape == trunk.rope.feat_shape
            assert (image.pool_heads, image.rope_theta) == (8, trunk.rope.temperature)
            assert image.image_size == trunk.patch_embed.img_size[0]
        else:
            assert image.registers == trunk.reg_token.shape[1]
            assert image.rope_theta == trunk.rope.temperature
    with pytest.raises(ValueError, match="got 'dinov3', which has no text tower"):
        recipe.towers_of(tiny.dictionary(), "dinov3")


def _pe_core(class_token=True):
    text = dict(context_length=16, vocab_size=300, width=48, heads=3, layers=2)
    vision = dict(layers=1, width=64, image_size=SIZE)
    module = library.CustomTextCLIP(20, vision, text)
    trunk = timm.create_model(
        "vit_pe_core_tiny_patch16_384",
        **OF_TIMM,
        num_classes=20,
        ref_feat_shape=(4, 4),
        attn_pool_num_heads=8,
        class_token=class_token,
    )
    module.visual = torch.nn.Sequential()
    module.visual.add_module("trunk", trunk)
    return foreign.perturb(module)


@pytest.mark.parametrize("class_token", [True, False])
def test_two_towers_of_pe_core(class_token, tmp_path, capsys):
    """With and without a class token (of G), another MLP in the pool than in the tower."""
    module = _pe_core(class_token)
    torch.save(module.state_dict(), tmp_path / "m.pt")
    given = ["--input", str(tmp_path / "m.pt"), "--output", str(tmp_path / "ours")]
    heads = ["--image-heads", "3", "--text-heads", "3"]
    assert main(["from-open-clip", *given, *heads]) == 0
    printed = capsys.readouterr().out
    assert "parity: PROVEN" in printed and "theta 10000 on 4 x 4 patches" in printed
    model, params, _ = checkpoint.load_model(tmp_path / "ours")
    images, ids = parity.inputs(SIZE, 300, 16, seed=1)
    with torch.no_grad():
        image = module.encode_image(foreign.torch_images(images), normalize=True).numpy()
        text = module.encode_text(torch.from_numpy(ids).long(), normalize=True).numpy()
    foreign.close_to_ours(model, params, images, ids, (image, text))
    tower = model.image
    assert (tower.rope, tower.rope_grid, tower.pool_heads, tower.pool_mlp_dim) == (
        "grid",
        4,
        8,
        192,
    )
    assert (tower.class_token, tower.projection, tower.pixel_mean) == (
        class_token,
        "affine",
        (0.5,) * 3,
    )
    assert (model.text.activation, model.text.pool) == ("gelu", "end")
    if class_token:
        _starts_from_its_trunk(module.visual.trunk, params, tmp_path)


def _starts_from_its_trunk(trunk, params, folder):
    """timm's file alone gives the same arrays; learned positions are resized, rotary ones stay those of their grid."""
    safetensors.torch.save_file(trunk.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text('{"architecture": "vit_pe_core_tiny_patch16_384"}')
    file = folder / "model.safetensors"
    loaded = _load(_config("pe_core", file, rope_grid=4))
    expected = grain.flat({"image": params["image"]})
    assert loaded.params.keys() == expected.keys()
    for name, array in loaded.params.items():
        np.testing.assert_array_equal(array, expected[name])
    larger = _config("pe_core", file, rope_grid=4, image_size=48)
    assert "init.image: 17 positions resized to 37" in _load(larger).report
    larger.model.image.rope_grid = 6
    with pytest.raises(ConvertError, match="rope_grid: got 6, but the checkpoint's tower has 4"):
        _load(larger)
