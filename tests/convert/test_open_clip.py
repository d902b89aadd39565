"""from-open-clip: random models of the real packages give the same embeddings here; faults are named."""

import functools
import json
from collections import OrderedDict

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("open_clip")
import open_clip.model as library  # noqa: E402
import safetensors.numpy  # noqa: E402
import safetensors.torch  # noqa: E402

import grain_jax  # noqa: E402
from grain_jax import config as config_lib  # noqa: E402
from grain_jax.checkpoint import saved_model  # noqa: E402
from grain_jax.configs import finetune  # noqa: E402
from grain_jax.convert import parity, towers  # noqa: E402
from grain_jax.convert.exits.open_clip import to_open_clip  # noqa: E402
from grain_jax.convert.faults import ConvertError  # noqa: E402
from grain_jax.convert.huggingface import from_hf  # noqa: E402
from grain_jax.convert.open_clip import checkpoint as files  # noqa: E402
from grain_jax.convert.open_clip.command import from_open_clip  # noqa: E402
from grain_jax.convert.open_clip.towers import import_tower  # noqa: E402
from grain_jax.core import errors  # noqa: E402
from grain_jax.input_pipeline import tokenizer as tokenizer_lib  # noqa: E402
from grain_jax.train import initialise  # noqa: E402
from tests import foreign, siglip, tiny  # noqa: E402

VOCAB, LENGTH, SIZE, PATCH = 300, 16, 32, 8
NONE, TOLD = towers.Settings(), towers.Settings(heads={"image": 2, "text": 3})
TEXT = dict(context_length=LENGTH, vocab_size=VOCAB, width=48, heads=3, layers=2)
HF_TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
HF_TEXT |= dict(vocab_size=VOCAB, max_position_embeddings=LENGTH, pad_token_id=1)
HF_TEXT |= dict(bos_token_id=VOCAB - 2, eos_token_id=VOCAB - 1)
HF_IMAGE = dict(hidden_size=24, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
HF_IMAGE |= dict(patch_size=PATCH)


def _hf(kind):
    text, image = dict(HF_TEXT), dict(HF_IMAGE)
    if kind == "CLIP":
        extra = dict(projection_dim=20)
        text |= extra
        image |= dict(image_size=SIZE) | extra
    else:
        extra = {}
        text |= dict(projection_size=24)
        image |= dict(image_size=SIZE)
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=image, **extra)
    return foreign.perturb(getattr(transformers, f"{kind}Model")(config))


def _hf_outputs(module, images, ids):
    with torch.no_grad():
        pixels = foreign.torch_images(images)
        out = module(input_ids=torch.from_numpy(ids).long(), pixel_values=pixels)
    return out.image_embeds.numpy(), out.text_embeds.numpy()


def _check(folder, outputs_of):
    """Compares with what `outputs_of` the images and ids gives; the converted model."""
    model, params, _ = saved_model.load_model(folder)
    images, ids = parity.inputs(SIZE, VOCAB, LENGTH, seed=1)
    foreign.close_to_ours(model, params, images, ids, outputs_of(images, ids))
    return model, params


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_hugging_face(kind, tmp_path):
    module = _hf(kind)
    module.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ConvertError, match=r"transformers; grain-jax convert from-hf --input \S+"):
        from_open_clip(tmp_path / "theirs", tmp_path / "ours", NONE)
    report = from_hf(tmp_path / "theirs", tmp_path / "ours")
    model, params = _check(tmp_path / "ours", functools.partial(_hf_outputs, module))
    assert report.verdict == "PROVEN", report.text
    assert (model.image.heads, model.text.heads) == (2, 4)  # config.json tells
    assert model.text.packable == (kind == "CLIP")
    assert model.image.pool == ("class" if kind == "CLIP" else "map")
    assert model.image.pixel_mean == (towers.CLIP_PIXELS if kind == "CLIP" else ((0.5,) * 3,))[0]
    np.testing.assert_allclose(params["logit_scale"], module.logit_scale.detach().numpy().item())
    assert ("logit_bias" in params) == (kind != "CLIP")


def _open_clip(**changes):
    kwargs = dict(quick_gelu=False) | changes
    vision = dict(layers=2, width=64, head_width=32, mlp_ratio=2.0, patch_size=PATCH)
    vision |= dict(image_size=SIZE)
    text = dict(TEXT)
    return foreign.perturb(library.CLIP(20, vision, text, **kwargs)), vision, text


def _open_clip_outputs(module, images, ids):
    with torch.no_grad():
        return (
            module.encode_image(foreign.torch_images(images), normalize=True).numpy(),
            module.encode_text(torch.from_numpy(ids).long(), normalize=True).numpy(),
        )


@pytest.mark.parametrize("origin", ["open_clip", "with its config", "openai"])
def test_open_clip_and_openai(origin, tmp_path):
    module, vision, text = _open_clip(quick_gelu=origin == "openai")
    state = module.state_dict()
    settings = TOLD
    if origin == "openai":  # as its archives: the layers of its activation, and three sizes
        for name in ("input_resolution", "context_length", "vocab_size"):
            state[name] = torch.tensor(1)
    if origin == "with its config":
        config = {"model_cfg": {"embed_dim": 20, "vision_cfg": vision, "text_cfg": text}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        settings = NONE
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "m.pt")
    report = from_open_clip(tmp_path / "m.pt", tmp_path / "ours", settings)
    model, _ = _check(tmp_path / "ours", functools.partial(_open_clip_outputs, module))
    assert report.verdict == "PROVEN"
    assert model.image.activation == ("quick_gelu" if origin == "openai" else "gelu")
    assert ("ASSUMED  image: activation gelu" in report.text) == (origin == "open_clip")
    assert "NOT PROVEN" not in report.text
    assert ("cannot show whether heads" in report.text) == (origin != "with its config")
    assert (model.image.pre_norm, model.image.patch_bias, model.image.mlp_dim) == (True, False, 128)


def _convert_with_config(module, config, folder, settings=NONE):
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(module.state_dict(), folder / "m.pt")
    return from_open_clip(folder / "m.pt", folder / "ours", settings)


def test_the_config_decides_what_arrays_cannot_tell(tmp_path):
    """Patches' mean, a bias without SigLIP's other habits, norm epsilon, pixels: of open_clip's own classes."""
    vision = dict(layers=2, width=64, head_width=16, patch_size=PATCH, image_size=SIZE)
    vision |= dict(pool_type="avg", norm_kwargs=dict(eps=1e-2), act_kwargs=dict(approximate="tanh"))
    text = TEXT | dict(proj_bias=True)
    module = foreign.perturb(library.CustomTextCLIP(20, vision, text))
    pixels = dict(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    config = dict(
        model_cfg=dict(embed_dim=20, vision_cfg=vision, text_cfg=text), preprocess_cfg=pixels
    )
    report = _convert_with_config(module, config, tmp_path)
    assert report.verdict == "PROVEN" and "ASSUMED" not in report.text, report.text
    model, _ = _check(tmp_path / "ours", functools.partial(_open_clip_outputs, module))
    image, text = model.image, model.text
    assert (image.pool, image.class_token, image.heads) == ("mean", True, 4)
    assert (image.norm_eps, image.activation) == (1e-2, "gelu_tanh")
    assert (image.pixel_mean, image.pixel_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (text.causal, text.pool, text.projection, text.norm_eps) == (True, "end", "affine", 1e-5)

    vision["final_ln_after_pool"] = True
    with pytest.raises(ConvertError, match="m.pt: vision_cfg: final_ln_after_pool with pool_ty"):
        _convert_with_config(module, config, tmp_path)
    del vision["final_ln_after_pool"]
    vision["layers"] = 3
    with pytest.raises(ConvertError, match="vision_cfg.layers: got 3, but the arrays have 2"):
        _convert_with_config(module, config, tmp_path)


def test_a_wrong_assumption_fails_where_the_config_knows_better(tmp_path):
    """timm's name in the config has 2 heads of 32; we assume heads of 64."""
    vision = dict(timm_model_name="test_vit", timm_pool="", image_size=160)
    text = TEXT | dict(layers=1)
    module = foreign.perturb(library.CustomTextCLIP(20, vision, text))
    config = dict(model_cfg=dict(embed_dim=20, vision_cfg=vision, text_cfg=text))
    report = _convert_with_config(module, config, tmp_path)
    assert report.verdict == "FAILED" and "ASSUMED  image: 1 heads" in report.text
    right = towers.Settings(heads={"image": 2})
    report = _convert_with_config(module, config, tmp_path, right)
    assert report.verdict == "PROVEN", report.text
    assert "image: 2 heads, as told; towers of width 64 have 1 as a rule" in report.text


def test_one_tower_of_hugging_face_alone(tmp_path):
    """config.json is the tower's own then, without a group for it."""
    config = transformers.SiglipVisionConfig(**HF_IMAGE | dict(image_size=SIZE, hidden_act="gelu"))
    transformers.SiglipVisionModel(config).save_pretrained(tmp_path)
    stored = files.read(tmp_path)
    tower = import_tower("image", stored, NONE)
    assert (tower.config.heads, tower.config.activation) == (2, "gelu")
    with pytest.raises(ConvertError, match="no text tower; expected token_embedding.weight"):
        import_tower("text", stored, NONE)

    c = tiny.dictionary(init__image=str(tmp_path))
    c.model.image.update(siglip.IMAGE)
    c.model.image.update(width=24, depth=3, heads=2, image_size=SIZE, activation="gelu")
    loaded = initialise.load(config_lib.from_dict(c))
    assert {x.split("/")[0] for x in loaded.params} == {"image"} and not [
        x for x in loaded.report if "unknown" in x
    ]
    (not_used,) = [line for line in loaded.report if "not used" in line]
    assert not_used.split("not used: ")[1].split(", ")[:2] == [
        f"vision_model.head.attention.in_proj_{kind}" for kind in ("bias", "weight")
    ]


@pytest.mark.parametrize(
    "kind, of_tokenizer, vocab, is_first",
    [
        ("siglip", "", VOCAB, True),
        ("siglip2", "", 32000, False),
        ("siglip", "SiglipTokenizer", 256000, True),
        ("siglip", "GemmaTokenizer", VOCAB, False),  # SigLIP 2 at a fixed size
        ("siglip", "", 256000, False),
        (None, "", 32000, True),
    ],
)
def test_the_librarys_files_tell_siglip_from_siglip_2(
    kind, of_tokenizer, vocab, is_first, tmp_path
):
    for name in ("spiece.model", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    state = {k: v.numpy() for k, v in _hf("Siglip").state_dict().items()}
    table = "text_model.embeddings.token_embedding.weight"
    state[table] = np.ones((vocab, 32), np.float32)
    safetensors.numpy.save_file(state, tmp_path / "model.safetensors")
    for name, content in (
        ("config.json", kind and {"model_type": kind, "text_config": {"num_attention_heads": 4}}),
        ("tokenizer_config.json", of_tokenizer and {"tokenizer_class": of_tokenizer}),
    ):
        if content:
            (tmp_path / name).write_text(json.dumps(content))
    text = import_tower("text", files.read(tmp_path), NONE).config
    expected = ("spiece.model", "canonical", 1) if is_first else ("tokenizer.json", "lower", 0)
    assert (text.tokenizer, text.cleaning, text.pad_id) == expected


def test_of_a_folder_with_both_each_command_takes_its_own(tmp_path):
    _hf("CLIP").save_pretrained(tmp_path / "both")
    module, vision, text = _open_clip()
    config = {"model_cfg": {"embed_dim": 20, "vision_cfg": vision, "text_cfg": text}}
    (tmp_path / "both" / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(module.state_dict(), tmp_path / "both" / "open_clip_pytorch_model.bin")
    assert from_hf(tmp_path / "both", tmp_path / "hf").verdict == "PROVEN"
    report = from_open_clip(tmp_path / "both", tmp_path / "open_clip", NONE)
    assert report.verdict == "PROVEN" and "width 64" in report.text
    (tmp_path / "both" / "model.safetensors").unlink()
    with pytest.raises(
        ConvertError, match="no weights of transformers; grain-jax convert from-ope"
    ):
        from_hf(tmp_path / "both", tmp_path / "hf")


def test_a_fine_tune_starts_from_a_folder_of_transformers(tmp_path):
    _hf("CLIP").save_pretrained(tmp_path)
    config = config_lib.from_dict(finetune.get_config(str(tmp_path)))
    assert (config.model.image.width, config.model.text.heads, config.model.embed_dim) == (
        24,
        4,
        20,
    )
    assert config.model.decoder.queries == 8 and config.model.image.pool == "none"
    loaded = initialise.load(config).params
    assert {x.split("/")[0] for x in loaded} == {"image", "text", "text_norm", "text_projection"}


def _dinov3(folder, gated=False, registers=4):
    sizes = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=64)
    sizes |= dict(image_size=SIZE, patch_size=PATCH, num_register_tokens=registers)
    habits = dict(use_gated_mlp=gated, hidden_act="silu" if gated else "gelu", rope_theta=50.0)
    module = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**sizes, **habits))
    foreign.perturb(module).save_pretrained(folder)
    return module


@pytest.mark.parametrize("gated, registers", [(False, 4), (True, 0)])
def test_dinov3_embeds_images_alone(gated, registers, tmp_path):
    module = _dinov3(tmp_path / "theirs", gated, registers)
    report = from_hf(tmp_path / "theirs", tmp_path / "ours")
    assert report.verdict == "PROVEN" and "no text tower" in report.text, report.text
    ours = grain_jax.load(tmp_path / "ours")
    images = np.random.default_rng(0).normal(size=(2, 112, 112, 3)).astype(np.float32)
    with torch.no_grad():
        pooled = module(foreign.torch_images(images)).pooler_output.numpy()
    foreign.close(ours.encode_image(images), pooled / np.linalg.norm(pooled, axis=1, keepdims=True))
    with pytest.raises(errors.UserError, match="vocab_size"):
        ours.encode_text("a wren")
    for source in ("theirs", "ours"):
        c = finetune.get_config(str(tmp_path / source))
        assert c.init.text is None and c.model.text.vocab_size == 49408
        c.model.update(dict(embed_dim=20, text=dict(depth=1, width=8, heads=1)))
        config = config_lib.from_dict(c)
        assert config.model.image.rope_theta == 50.0 and config.model.image.projection == "matrix"
        loaded = initialise.load(config).params
        assert loaded.keys() >= {"image/class_token", "image/norm/scale"}
        assert (loaded["image/norm/scale"] == module.norm.weight.detach().numpy()).all()
    sizes = json.loads((tmp_path / "theirs" / "config.json").read_text())
    sizes["num_hidden_layers"] = 10**6
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(sizes))
    with pytest.raises(ConvertError, match="num_hidden_layers: got 1000000, but the arrays have 2"):
        from_hf(tmp_path / "theirs", tmp_path / "again")


def test_siglip_of_open_clip(tmp_path):
    from timm.models.vision_transformer import VisionTransformer

    text = TEXT | dict(width=32, heads=4, no_causal_mask=True, proj_bias=True, pool_type="last")
    text |= dict(norm_kwargs=dict(eps=1e-6))
    vision = dict(layers=1, width=64, image_size=SIZE)
    module = library.CustomTextCLIP(24, vision, text, init_logit_bias=-10)
    sizes = dict(img_size=SIZE, patch_size=PATCH, embed_dim=24, depth=2, num_heads=2)
    habits = dict(class_token=False, global_pool="map", num_classes=0, act_layer="gelu_tanh")
    trunk = VisionTransformer(**sizes, **habits)
    module.visual = torch.nn.Sequential(OrderedDict(trunk=trunk))
    foreign.perturb(module)
    torch.save(module.state_dict(), tmp_path / "m.pt")
    settings = towers.Settings(heads={"image": 2, "text": 4}, activation={"image": "gelu_tanh"})
    report = from_open_clip(tmp_path / "m.pt", tmp_path / "ours", settings)
    model, params = _check(tmp_path / "ours", functools.partial(_open_clip_outputs, module))
    assert report.verdict == "PROVEN"
    assert not model.text.causal and model.text.pool == "last"
    np.testing.assert_allclose(params["logit_bias"], module.logit_bias.item())


@pytest.mark.parametrize("pad", [1, None])
def test_metaclip_2_ends_texts_with_an_id_that_is_not_the_highest(pad, tmp_path):
    """Its config.json asks for code of the Hub, quantized arrays and outputs without names, of the model and its towers."""
    both = dict(projection_dim=20)
    config = transformers.MetaClip2Config(
        text_config=HF_TEXT | both | dict(eos_token_id=2),
        vision_config=HF_IMAGE | both | dict(image_size=SIZE),
        **both,
    )
    module = foreign.perturb(transformers.MetaClip2Model(config))
    module.save_pretrained(tmp_path / "theirs")
    stored = json.loads((tmp_path / "theirs" / "config.json").read_text())
    stored["text_config"]["pad_token_id"] = pad
    for part in (stored, stored["vision_config"], stored["text_config"]):
        part |= dict(attn_implementation="evil/kernel", return_dict=False)
        part |= dict(_attn_implementation="evil/kernel", quantization_config={"quant_method": "x"})
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(stored))
    report = from_hf(tmp_path / "theirs", tmp_path / "ours")
    assert report.verdict == "PROVEN", report.text
    model, params, _ = saved_model.load_model(tmp_path / "ours")
    text = model.text
    assert (text.end_id, text.pad_id, text.cleaning, text.packable) == (2, 1, "none", True)
    images, ids = parity.inputs(SIZE, VOCAB, LENGTH, seed=1, end_id=2)
    foreign.close_to_ours(model, params, images, ids, _hf_outputs(module, images, ids))
    for key, value, said in (
        ("num_hidden_layers", 999_999, "num_hidden_layers: got 999999, but the arrays have 2"),
        ("eos_token_id", "two", "text_config.eos_token_id: got two, expected a whole number up to"),
    ):
        changed = stored | {"text_config": stored["text_config"] | {key: value}}
        (tmp_path / "theirs" / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ConvertError, match=said):
            from_hf(tmp_path / "theirs", tmp_path / "again")


@pytest.mark.parametrize("clean, cleaning", [("canonicalize", "canonical"), (None, "none")])
def test_a_worldwide_config_of_open_clip(clean, cleaning, tmp_path):
    """Its text is read at the first token with `eos_id`, which is not the highest."""
    vision = dict(layers=1, width=32, head_width=16, patch_size=PATCH, image_size=SIZE)
    text = TEXT | dict(hf_tokenizer_name="facebook/xlm-v-base", pool_type="eos", eos_id=2)
    if clean is not None:
        text["tokenizer_kwargs"] = dict(clean=clean)
    module = foreign.perturb(library.CLIP(20, vision, text, quick_gelu=True))
    cfg = dict(embed_dim=20, quick_gelu=True, vision_cfg=vision, text_cfg=text)
    report = _convert_with_config(module, dict(model_cfg=cfg), tmp_path)
    assert report.verdict == "PROVEN", report.text
    model, _, _ = saved_model.load_model(tmp_path / "ours")
    assert (model.text.end_id, model.text.cleaning) == (2, cleaning)
    if clean is None:
        report = to_open_clip(tmp_path / "ours", tmp_path / "back")
        assert report.verdict == "PROVEN", report.text


def test_the_tokenizer_of_metaclip_2_gives_the_same_ids(tmp_path):
    """Texts as they are, and padding on the right, as `from-hf` sets for both."""
    pieces = [(x, 0.0) for x in ("<s>", "<pad>", "</s>", "<unk>")]
    pieces += [(x, -2.0) for x in "▁abcdefghijklmnopqrstuvwxyz,!189"]
    pieces += [("▁wren", -1.0), ("▁a", -1.0), ("<mask>", 0.0)]
    tokenizer = transformers.XLMRobertaTokenizer(vocab=pieces)
    tokenizer.save_pretrained(tmp_path)
    texts = ["a photo of a wren", "A Photo of  A café &amp; wren, 1998! ", "x", "long " * 100]
    options = dict(padding="max_length", truncation=True, max_length=16, return_tensors="np")
    theirs = tokenizer(texts, **options)["input_ids"]
    ours = tokenizer_lib.FileTokenizer(tmp_path / "tokenizer.json", "none", 1)
    np.testing.assert_array_equal(ours(texts, 16), theirs)
    text = config_lib.TextTower(pool="end", end_id=2)
    np.testing.assert_array_equal(text.ends(theirs), ours.encode(texts, 16).lengths - 1)


def test_images_in_their_own_shape_are_refused(tmp_path):
    state = {"vision_model.embeddings.patch_embedding.weight": np.ones((24, 192), np.float32)}
    safetensors.numpy.save_file(state, tmp_path / "naflex.safetensors")
    with pytest.raises(ConvertError, match=r"\(NaFlex\), expected SigLIP 2 of a fixed size"):
        from_hf(tmp_path / "naflex.safetensors", tmp_path / "ours")


def test_half_precision_is_read(tmp_path):
    numbers = torch.tensor([1.0, -0.15625, 3e4])
    kinds = {"b": torch.bfloat16, "h": torch.float16, "d": torch.float64}
    stored = {name: numbers.to(kind) for name, kind in kinds.items()}
    safetensors.torch.save_file(stored, tmp_path / "m.safetensors")
    for name, array in files.read(tmp_path / "m.safetensors").state.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, stored[name].float().numpy())


class _Program(torch.nn.Module):
    """A module with a program of its own, half numbers and a transposed parameter, as OpenAI's files."""

    def __init__(self):
        super().__init__()
        self.visual = torch.nn.Sequential(torch.nn.Linear(3, 2).half())
        self.proj = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).t())
        self.register_buffer("input_resolution", torch.tensor(224))

    def forward(self, x):
        return self.visual(x) + self.proj.sum()


@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated")
def test_the_arrays_of_a_program_are_read(tmp_path):
    module = _Program()
    torch.jit.script(module).save(str(tmp_path / "m.pt"))
    found = files.read(tmp_path / "m.pt")
    expected = {k: v.float().numpy() for k, v in module.state_dict().items()}
    assert found.openai and found.state.keys() == expected.keys() - {"input_resolution"}
    for name, array in found.state.items():
        np.testing.assert_array_equal(array, expected[name])
