"""from-open-clip of MetaCLIP 2, FG-CLIP 1 and 2, SigLIP 2 of a fixed size and TIPS v2: outputs, gradients, faults."""

import copy
import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")
pytest.importorskip("open_clip")
import open_clip.model as library  # noqa: E402
import safetensors.torch  # noqa: E402

from grain_jax import config as config_lib  # noqa: E402
from grain_jax.config import recipe  # noqa: E402
from grain_jax.convert import initialise, parity, tables, towers  # noqa: E402
from grain_jax.convert.exits import reasons  # noqa: E402
from grain_jax.convert.exits.open_clip import to_open_clip  # noqa: E402
from grain_jax.convert.faults import ConvertError  # noqa: E402
from grain_jax.convert.huggingface import from_hf  # noqa: E402
from grain_jax.convert.open_clip import checkpoint as files  # noqa: E402
from grain_jax.convert.open_clip import comparison, families  # noqa: E402
from grain_jax.convert.open_clip.command import from_open_clip  # noqa: E402
from grain_jax.convert.open_clip.towers import import_tower  # noqa: E402
from grain_jax.input_pipeline import file_tokenizer  # noqa: E402
from grain_jax.models import attention, grain, vit  # noqa: E402
from grain_jax.runtime import checkpoint  # noqa: E402
from grain_jax.training import flops  # noqa: E402
from tests import foreign, tiny  # noqa: E402

VOCAB, LENGTH, LONG, SIZE, PATCH, KEPT = 300, 12, 18, 32, 8, 5
NONE = towers.Settings()
TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
TEXT |= dict(vocab_size=VOCAB, max_position_embeddings=LENGTH)
IMAGE = dict(hidden_size=24, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
IMAGE |= dict(patch_size=PATCH)


def _stored(module, folder):
    """The arrays of a module by the names that its package writes to a file."""
    if isinstance(module, _FgClip):
        return {name: x.detach().numpy().copy() for name, x in module.state_dict().items()}
    module.save_pretrained(folder)
    return safetensors.torch.load_file(folder / "model.safetensors")


def _gradient(module, folder):
    """The gradients of a module by the names of a file."""
    held = copy.deepcopy(module)
    for of_gradient, parameter in zip(held.parameters(), module.parameters()):
        zero = torch.zeros_like(parameter)
        of_gradient.data = zero if parameter.grad is None else parameter.grad
    return {name: np.asarray(x) for name, x in _stored(held, folder).items()}


def _close_gradients(found, expected):
    """All but those of the keys' biases, which are 0."""
    top = max(np.abs(x).max() for x in expected.values())
    compared = [n for n, x in expected.items() if n in found and np.abs(x).max() > 1e-3 * top]
    assert len(compared) > 20 and len(found) - len(compared) <= 4
    for name in compared:
        foreign.close(found[name], expected[name])


def _theirs(module, encode, images, ids, weights, folder):
    """Both embeddings, and the gradient of their weighted sum by the names of a file."""
    embeds = encode(module, foreign.torch_images(images), torch.from_numpy(ids).long())
    sums = [(e * torch.from_numpy(w)).sum() for e, w in zip(embeds, weights)]
    torch.stack(sums).sum().backward()
    gradient = _gradient(module, folder)
    return [e.detach().numpy() for e in embeds], gradient


def _ours(model, params, images, ids, weights):
    """As `_theirs`, with the gradient by our names."""
    module = grain.GRAIN(model)

    def value(params):
        apply: Any = lambda method, *given: module.apply({"params": params}, *given, method=method)
        tokens = ids[:, None]
        at = np.stack([0 * ids[:, 0], model.text.ends(ids)], axis=1).astype(np.int32)
        positions = np.broadcast_to(np.arange(ids.shape[1]), tokens.shape)
        (text,) = apply(grain.GRAIN.encode_text, tokens, positions, np.ones_like(tokens), at)
        image, _, _ = apply(grain.GRAIN.encode_image, images)
        return (image * weights[0]).sum() + (text * weights[1]).sum(), (image, text)

    with jax.default_matmul_precision("highest"):
        (_, embeds), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(params)
    return embeds, grain.flat(gradient)


def _check(source, module, encode, tmp_path):
    """The folder or file `source` of `module` converts, with equal embeddings and gradients; model and report."""
    is_timm = "visual.trunk.blocks.0.norm1.weight" in files.read(source).state
    report = (from_open_clip if is_timm else from_hf)(source, tmp_path / "ours", NONE)
    assert report.verdict == "PROVEN", report.text
    model, params, _ = checkpoint.load_model(tmp_path / "ours")
    images, ids = parity.inputs(
        SIZE, VOCAB, model.text.context_length, seed=1, end_id=model.text.end_id
    )
    rng = np.random.default_rng(2)
    weights = rng.standard_normal((2, len(images), model.embed_dim)).astype(np.float32)
    embeds, gradient = _theirs(module, encode, images, ids, weights, tmp_path / "gradient")
    ours, own = _ours(model, params, images, ids, weights)
    for a, b in zip(ours, embeds):
        foreign.close(np.asarray(a), b)
    stored = files.read(source)
    head = files.split(source)[1]
    if head is not None:
        gradient = families.take(gradient, stored.hf, head).state
    rows = [row for which in towers.TOWERS for row in import_tower(which, stored, NONE).rows]
    found = tables.write(rows, own)
    _close_gradients(found, gradient)
    return model, params, report


def _hf_encode(module, images, ids):
    out = module(input_ids=ids, pixel_values=images)
    return out.image_embeds, out.text_embeds


def _hf(kind, **text):
    both = dict(projection_dim=20)
    config = getattr(transformers, f"{kind}Config")(
        text_config=TEXT | both | text,
        vision_config=IMAGE | dict(image_size=SIZE) | both,
        **both,
    )
    return foreign.perturb(getattr(transformers, f"{kind}Model")(config))


def _steer(folder):
    """config.json asks for code of the Hub, quantized arrays and outputs without names, of the model and of its towers."""
    stored = json.loads((folder / "config.json").read_text())
    for part in (stored, stored["vision_config"], stored["text_config"]):
        part |= dict(attn_implementation="evil/kernel", return_dict=False)
        part |= dict(_attn_implementation="evil/kernel", quantization_config={"quant_method": "x"})
    (folder / "config.json").write_text(json.dumps(stored))
    return stored


@pytest.mark.parametrize("pad", [1, None])
def test_metaclip_2(pad, tmp_path):
    module = _hf("MetaClip2", eos_token_id=2, pad_token_id=1)
    module.logit_scale.data.fill_(4.6052)  # a little above 100, where CLIP stops
    module.save_pretrained(tmp_path / "theirs")
    stored = _steer(tmp_path / "theirs")
    stored["text_config"]["pad_token_id"] = pad
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(stored))
    model, _, report = _check(tmp_path / "theirs", module, _hf_encode, tmp_path)
    assert "clips it at 100" not in report.text
    text = model.text
    assert (text.end_id, text.pad_id, text.cleaning, text.packable) == (2, 1, "none", True)
    assert (text.activation, model.image.pre_norm) == ("quick_gelu", True)


class _FgClip(torch.nn.Module):
    """The facts of the public modelling files of FG-CLIP 1 and 2, on the towers of CLIP and SigLIP 2."""

    def __init__(self, kind):
        super().__init__()
        self.first = kind == "CLIP"
        text = TEXT | dict(projection_dim=20, eos_token_id=VOCAB - 1)
        image = IMAGE | dict(image_size=SIZE, projection_dim=20)
        if not self.first:
            text = TEXT | dict(projection_size=24)
            image = IMAGE | dict(num_patches=16)
        extra = dict(projection_dim=20) if self.first else {}
        config = getattr(transformers, f"{kind}Config")(
            text_config=text, vision_config=image, **extra
        )
        self.config = config
        base = getattr(transformers, f"{kind}Model")(config)
        self.text_model, self.vision_model = base.text_model, base.vision_model
        at = self.text_model.embeddings
        at.position_embedding_res = torch.nn.Embedding(LONG, 32)
        at.position_embedding_ori = torch.nn.Embedding(LONG, 32)
        scalar = lambda: torch.nn.Parameter(torch.tensor(2.0))
        self.logit_scale = scalar()
        if self.first:
            self.visual_projection, self.text_projection = (
                base.visual_projection,
                base.text_projection,
            )
            self.text_filip_projection = torch.nn.Linear(32, 20, bias=False)
            self.logit_scale_finegraind, self.logit_scale_hardneg = scalar(), scalar()
        else:
            self.logit_bias = scalar()
            self.longtext_head, self.boxtext_head = torch.nn.Linear(32, 24), torch.nn.Linear(32, 24)
            self.dense_feature_head = copy.deepcopy(self.vision_model.head)

    def image(self, images):
        if self.first:
            return self.visual_projection(self.vision_model(pixel_values=images).pooler_output)
        grid = SIZE // PATCH
        x = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 4, 5, 1)
        x = x.reshape(len(images), grid * grid, -1)
        mask, shapes = torch.ones(x.shape[:2]), torch.tensor([[grid, grid]] * len(x))
        return self.vision_model(x, mask, shapes).pooler_output

    def text(self, ids, head):
        at, kept = self.text_model.embeddings, 20 if self.first else KEPT

        def embeddings(input_ids, **_):
            place = torch.arange(ids.shape[1])
            if head != "long":
                return at.token_embedding(ids) + at.position_embedding(place)
            is_kept = (place < kept).float()[:, None]
            both = at.position_embedding_ori(place) * is_kept
            return at.token_embedding(ids) + both + at.position_embedding_res(place) * (1 - is_kept)

        own_forward, at.forward = at.forward, embeddings
        own_head = getattr(self.text_model, "head", None)
        if own_head is not None:
            self.text_model.head = torch.nn.Identity()
        pooled = self.text_model(input_ids=ids).pooler_output
        at.forward = own_forward
        if own_head is None:
            of = dict(short="text_projection", long="text_filip_projection")
            return getattr(self, of[head])(pooled)
        self.text_model.head = own_head
        of = dict(short=own_head, long=self.longtext_head, box=self.boxtext_head)
        return of[head](pooled)

    def save(self, folder):
        folder.mkdir()
        state = {name: x.contiguous() for name, x in self.state_dict().items()}
        safetensors.torch.save_file(state, folder / "model.safetensors")
        config = self.config.to_dict()
        if not self.first:
            config["model_type"] = "fgclip2"
            config["text_config"] |= dict(model_type="fgclip2_text_model", keep_len=KEPT)
            config["text_config"]["longtext_len"] = LONG
            config["vision_config"]["model_type"] = "fgclip2_vision_model"
        (folder / "config.json").write_text(json.dumps(config))


def _fg_encode(head):
    unit = lambda x: x / x.norm(dim=-1, keepdim=True)
    return lambda module, images, ids: (unit(module.image(images)), unit(module.text(ids, head)))


@pytest.mark.parametrize("kind,head", [("CLIP", "long"), ("Siglip2", "long"), ("Siglip2", "box")])
def test_fg_clip(kind, head, tmp_path):
    module = foreign.perturb(_FgClip(kind))
    module.save(tmp_path / "theirs")
    source = f"{tmp_path}/theirs:{head}"
    model, params, report = _check(source, module, _fg_encode(head), tmp_path)
    first, long = kind == "CLIP", head == "long"
    name = {"long": ("longtext_head", "text_filip_projection")[first], "box": "boxtext_head"}[head]
    length = LONG if long else LENGTH
    assert f"text head {head}: {name}, {length} positions" in report.text
    (left,) = [line for line in report.text.splitlines() if line.startswith("left out: ")]
    left = left.removeprefix("left out: ").split(", ")
    assert len(left) == {True: 4, False: 16}[first] + (not long)  # short positions, or two tables
    assert ("logit_scale_hardneg" in left, "dense_feature_head.probe" in left) == (first, not first)
    assert model.text.context_length == length and model.text.packable == first


def test_the_text_heads_of_fg_clip(tmp_path, monkeypatch):
    """The short head is where CLIP has it; what does not fit is named."""
    module = _FgClip("CLIP")
    state = {name: x.detach().numpy() for name, x in module.state_dict().items()}
    short = families.take(dict(state), {}, None)
    np.testing.assert_array_equal(
        short.state["text_projection.weight"], state["text_projection.weight"]
    )
    silent, said = (
        families.take(dict(state), {"text_config": cfg}, "long").state
        for cfg in ({"keep_len": None, "longtext_len": None}, {})
    )
    at = "text_model.embeddings.position_embedding.weight"
    np.testing.assert_array_equal(silent[at], said[at])
    assert short.state.keys() == state.keys() - set(
        short.notes[1].removeprefix("left out: ").split(", ")
    )
    at = "text_model.embeddings.position_embedding"
    faults = [
        (state, {}, "box", "got the text head box, expected short or long"),
        (
            {k: v for k, v in state.items() if "filip" not in k},
            {}, "long", "text_filip_projection.weight: missing, the text head long",
        ),
        (
            {k: v for k, v in state.items() if "embedding_ori" not in k},
            {}, "long", f"{at}_ori.weight: missing",
        ),
        (
            state | {f"{at}_ori.weight": np.zeros((4, 32))},
            {}, "long", r"ori.weight, .*res.weight: got the shapes \(4, 32\) and \(18, 32\)",
        ),
        (
            state, {"text_config": {"longtext_len": 9}}, "long",
            "text_config.longtext_len: got 9, but the arrays have 18",
        ),
        ({"a": np.zeros(1)}, {}, "long", "got the text head long, expected none: only FG-CLIP"),
    ]  # fmt: skip
    for arrays, config, head, said in faults:
        with pytest.raises(ConvertError, match=said) as error:
            families.take(dict(arrays), config, head)
        assert "\n" not in str(error.value)
    with pytest.raises(ConvertError, match="temperature: got .0.0., expected one number above 0"):
        families.take({"temperature": np.zeros(())}, {"model_type": "tipsv2"}, None)

    module.save(tmp_path / "theirs")
    source = f"{tmp_path}/theirs:long"
    c = tiny.dictionary(init__text=source)
    sizes = dict(vocab_size=VOCAB, context_length=LONG, width=32, depth=2, heads=4, mlp_dim=48)
    c.model.text.update(sizes, tokenizer="tokenizer.json")
    c.model.embed_dim = 20
    config = config_lib.from_dict(c)
    initialise.check(config.init)
    loaded = initialise.load(config)
    np.testing.assert_array_equal(
        loaded.params["text_projection/kernel"], state["text_filip_projection.weight"].T
    )
    assert f"init.text: text head long: text_filip_projection, {LONG} positions" in loaded.report
    asked = []
    monkeypatch.setattr(
        files.hub, "download", lambda name: asked.append(name) or tmp_path / "theirs"
    )
    c.init.text = "hf://qihoo360/fg-clip-base:long"
    config = config_lib.from_dict(c)
    initialise.check(config.init)
    assert not asked
    assert initialise.load(config).params.keys() == loaded.params.keys()
    assert set(asked) == {"hf://qihoo360/fg-clip-base"}
    safetensors.torch.save_file(
        module.state_dict() | {"dense_feature_head.new": torch.zeros(1)},
        tmp_path / "theirs" / "model.safetensors",
    )
    with pytest.raises(
        ConvertError, match="model.safetensors: dense_feature_head.new: unknown key"
    ):
        from_hf(tmp_path / "theirs", tmp_path / "ours")


def test_hostile_configs(tmp_path):
    module = _hf("MetaClip2", eos_token_id=2)
    module.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    for key, value, said in (
        (
            "num_hidden_layers",
            999_999,
            "text_config.num_hidden_layers: got 999999, but the arrays have 2",
        ),
        ("eos_token_id", "two", "text_config.eos_token_id: got two, expected a whole number up to"),
        ("keep_len", -3, "text_config.keep_len: got -3, expected a whole number from 0"),
        ("longtext_len", 10**9, "text_config.longtext_len: got 1000000000, expected"),
    ):
        changed = stored | {"text_config": stored["text_config"] | {key: value}}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ConvertError, match=said) as error:
            from_hf(tmp_path, tmp_path / "ours")
        assert "\n" not in str(error.value)


TEXTS = ["a photo of a wren", "A Photo of  A café &amp; wren, 1998! ", "x", "long " * 100]
_LETTERS = "▁abcdefghijklmnopqrstuvwxyz"


def _xlm():
    pieces = [(x, 0.0) for x in ("<s>", "<pad>", "</s>", "<unk>")]
    pieces += [(x, -2.0) for x in _LETTERS + ",!189"] + [
        ("▁wren", -1.0),
        ("▁a", -1.0),
        ("<mask>", 0.0),
    ]
    return transformers.XLMRobertaTokenizer(vocab=pieces)


def _tips_words():
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    merges = [("w", "r"), ("wr", "e"), ("wre", "n"), ("▁", "a")]
    tokens = ["<pad>", "<unk>", *_LETTERS, *bytes_, *("".join(pair) for pair in merges)]
    return transformers.Tipsv2Tokenizer(vocab={x: i for i, x in enumerate(tokens)}, merges=merges)


@pytest.mark.parametrize("words,pad_id,end_id", [(_xlm, 1, 2), (_tips_words, 0, None)])
def test_the_tokenizers_give_the_same_ids(words, pad_id, end_id, tmp_path):
    """Texts as they are, and padding on the right, as `from-open-clip` sets for both."""
    tokenizer = words()
    tokenizer.save_pretrained(tmp_path)
    options = dict(padding="max_length", truncation=True, max_length=16, return_tensors="np")
    theirs = tokenizer(TEXTS, **options)["input_ids"]
    ours = file_tokenizer.FileTokenizer(tmp_path / "tokenizer.json", "none", pad_id)
    np.testing.assert_array_equal(ours(TEXTS, 16), theirs)
    if end_id is not None:
        text = config_lib.TextTower(pool="end", end_id=end_id)
        np.testing.assert_array_equal(text.ends(theirs), ours.encode(TEXTS, 16).lengths - 1)


def _tips_text(**changes):
    config = transformers.Tipsv2TextConfig(**TEXT | changes)
    return foreign.perturb(transformers.Tipsv2TextModel(config))


@pytest.mark.parametrize("scaled", [True, False])
def test_the_text_tower_of_tips_alone(scaled, tmp_path):
    module = _tips_text(scale_sqrt_depth=scaled, layer_norm_eps=1e-3, pad_token_id=7)
    module.save_pretrained(tmp_path)
    c = tiny.dictionary(init__text=str(tmp_path), text__packing=False)
    recipe.towers_of(c, "tipsv2", ("text",))
    sizes = dict(vocab_size=VOCAB, context_length=LENGTH, width=32, depth=2, heads=4, mlp_dim=48)
    c.model.text.update(sizes, scale_tokens=scaled, norm_eps=1e-3, pad_id=7)
    c.model.embed_dim = 32
    config = config_lib.from_dict(c)
    loaded = initialise.load(config)
    assert not [line for line in loaded.report if "not used" in line]

    ids = np.random.default_rng(0).integers(8, VOCAB, (4, LENGTH)).astype(np.int32)
    for row, length in zip(ids, (1, 5, 9, LENGTH)):
        row[length:] = 7
    weights = np.random.default_rng(1).standard_normal((4, 32)).astype(np.float32)
    model = grain.GRAIN(config.model)

    def value(flat):
        variables = {"params": tables.nested({**flat, "logit_scale": np.float32(0)})}
        tokens, positions = ids[:, None], np.broadcast_to(np.arange(LENGTH), ids[:, None].shape)
        given = tokens, positions, np.ones_like(tokens), np.zeros((4, 2), np.int32)
        apply: Any = model.apply
        (text,) = apply(variables, *given, method=grain.GRAIN.encode_text)
        return (text * weights).sum(), text

    (_, ours), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(loaded.params)
    tokens = torch.from_numpy(ids).long()
    theirs = module(tokens, attention_mask=(tokens != 7).long()).pooler_output
    theirs = theirs / theirs.norm(dim=-1, keepdim=True)
    (theirs * torch.from_numpy(weights)).sum().backward()
    foreign.close(np.asarray(ours), theirs.detach().numpy())
    (tmp_path / "gradient").mkdir()
    stored = _gradient(module, tmp_path / "gradient")
    found = tables.write(import_tower("text", files.read(tmp_path), NONE).rows, gradient)
    _close_gradients(found, {f"text_encoder.{name}": x for name, x in stored.items()})


def _tips(gated, **vision):
    config = transformers.Tipsv2Config(
        text_config=TEXT | dict(pad_token_id=0, layer_norm_eps=1e-4),
        vision_config=dict(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=PATCH
        )
        | dict(image_size=SIZE, use_swiglu_ffn=gated, layerscale_value=0.5)
        | vision,
    )
    return foreign.perturb(transformers.Tipsv2Model(config))


def _tips_encode(module, images, ids):
    out = module(input_ids=ids, pixel_values=images, attention_mask=(ids != 0).long())
    return out.image_embeds, out.text_embeds


@pytest.mark.parametrize(
    "gated,vision",
    [
        (False, dict(mlp_ratio=2, layer_norm_eps=1e-3)),
        (True, dict(mlp_ratio=3, num_register_tokens=3)),
    ],
)
def test_tips(gated, vision, tmp_path):
    module = _tips(gated, **vision)
    module.save_pretrained(tmp_path / "theirs")
    model, params, report = _check(tmp_path / "theirs", module, _tips_encode, tmp_path)
    image, text = model.image, model.text
    assert (image.mlp, image.registers, image.layer_scale) == (
        ("gated", 3, True) if gated else ("plain", 1, True)
    )
    assert (image.pixel_mean, image.pixel_std) == ((0, 0, 0), (1, 1, 1))
    assert (image.projection, text.projection, image.pool) == ("none", "none", "class")
    scale = 1 / module.temperature.item()
    np.testing.assert_allclose(np.exp(params["logit_scale"]), scale, rtol=1e-6)
    assert ("training clips it at 100" in report.text) == (scale > 100)
    assert "left out: vision_encoder.mask_token" in report.text


@pytest.mark.parametrize("size,gated", [("base", False), ("giant", True)])
def test_a_run_starts_from_tips_of_timm(size, gated, tmp_path):
    name = f"vit_{size}_patch14_reg1_tipsv2"
    sizes = dict(img_size=SIZE, patch_size=PATCH, embed_dim=128, depth=1, num_heads=2, mlp_ratio=2)
    module = foreign.perturb(timm.create_model(name, **sizes))
    safetensors.torch.save_file(module.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name}))
    c = tiny.dictionary(init__image=str(tmp_path))
    recipe.towers_of(c, "tipsv2", ("image",))
    own = dict(image_size=SIZE, patch_size=PATCH, width=128, depth=1, heads=2)
    gate = dict(mlp="gated", activation="silu", mlp_dim=128) if gated else dict(mlp_dim=256)
    c.model.image.update(own | gate)
    config = config_lib.from_dict(c)
    loaded = initialise.load(config)
    tower = vit.ImageTransformer(config.model.image, np.dtype("float32"))
    images = np.random.default_rng(0).standard_normal((2, SIZE, SIZE, 3)).astype(np.float32)
    theirs = module.forward_features(foreign.torch_images(images))
    weights = np.random.default_rng(1).standard_normal(theirs.shape).astype(np.float32)

    def value(flat):
        tokens: Any = tower.apply({"params": tables.nested(flat)["image"]}, images)
        return (tokens * weights).sum(), tokens

    (_, ours), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(loaded.params)
    (theirs * torch.from_numpy(weights)).sum().backward()
    foreign.close(np.asarray(ours), theirs.detach().numpy())
    rows = import_tower("image", files.read(tmp_path), NONE).rows
    found = tables.write(rows, gradient)
    found["pos_embed"] = found["pos_embed"][:, 1:]  # the class token has none there
    expected = {n: x.grad.numpy() for n, x in module.named_parameters() if x.grad is not None}
    assert found.keys() == expected.keys()
    for entry, array in expected.items():
        foreign.close(found[entry], array)


def test_tips_of_the_hub(tmp_path):
    """Its files have no temperature; what config.json says must fit the arrays."""
    _tips(False).save_pretrained(tmp_path)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del state["temperature"], state["vision_encoder.mask_token"]
    file = tmp_path / "tips.safetensors"  # the other file has other weights
    safetensors.torch.save_file({k: 1.1 * v for k, v in state.items()}, file)
    stored = files.read(file)
    np.testing.assert_allclose(stored.state["logit_scale"], -np.log(0.005065968), rtol=1e-6)
    assert "temperature 0.00506597, of the config: the weights have none" in stored.notes
    config = _steer(tmp_path)
    report = from_hf(file, tmp_path / "ours")
    assert report.verdict == "PROVEN", report.text
    for part, key, value, said in (
        ("vision_config", "mlp_ratio", 10**5, "got 100000, but the arrays have an MLP of 128"),
        ("vision_config", "num_register_tokens", 10**5, "got 100000, but the arrays have 1"),
        ("text_config", "max_position_embeddings", 10**6, "got 1000000, expected at most 4096"),
        ("vision_config", "use_swiglu_ffn", True, "blocks.0.mlp.w12.bias: missing"),
        ("text_config", "scale_sqrt_depth", 2, "got 2, expected true or false"),
    ):
        changed = config | {part: config[part] | {key: value}}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ConvertError, match=said) as error:
            from_hf(file, tmp_path / "ours")
        assert "\n" not in str(error.value)


def test_the_image_tower_of_tips_alone(tmp_path):
    module = _tips(False, mlp_ratio=2, layer_norm_eps=1e-3).vision_model
    module.save_pretrained(tmp_path)
    c = tiny.dictionary(init__image=str(tmp_path))
    recipe.towers_of(c, "tipsv2", ("image",))
    sizes = dict(image_size=SIZE, patch_size=PATCH, width=32, depth=2, heads=2, mlp_dim=64)
    c.model.image.update(sizes, norm_eps=1e-3)
    config = config_lib.from_dict(c)
    loaded = initialise.load(config)
    assert not [line for line in loaded.report if "not used" in line]
    tower = vit.ImageTransformer(config.model.image, np.dtype("float32"))
    images = np.random.default_rng(0).standard_normal((2, SIZE, SIZE, 3)).astype(np.float32)
    ours: Any = jax.jit(tower.apply)({"params": tables.nested(loaded.params)["image"]}, images)
    with torch.no_grad():
        theirs = module(foreign.torch_images(images)).last_hidden_state
    foreign.close(np.asarray(ours), theirs.numpy())


def test_siglip_2_of_a_fixed_size(tmp_path):
    """transformers has it as Siglip, with a vocabulary of its own; every option away from its default."""
    habits = dict(hidden_act="gelu", layer_norm_eps=1e-4)
    config = transformers.SiglipConfig(
        text_config=TEXT | dict(projection_size=24, pad_token_id=0) | habits,
        vision_config=IMAGE
        | dict(image_size=SIZE, layer_norm_eps=1e-3, hidden_act="gelu_pytorch_tanh"),
    )
    module = foreign.perturb(transformers.SiglipModel(config))
    module.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "GemmaTokenizerFast"}'
    )
    model, params, _ = _check(tmp_path / "theirs", module, _hf_encode, tmp_path)
    text = model.text
    assert (text.cleaning, text.pad_id, text.pool, text.activation) == ("lower", 0, "last", "gelu")
    assert (model.image.norm_eps, model.image.activation) == (1e-3, "gelu_tanh")
    np.testing.assert_allclose(params["logit_bias"], module.logit_bias.detach().numpy().item())


@pytest.mark.parametrize("clean,cleaning", [("canonicalize", "canonical"), (None, "none")])
def test_a_worldwide_config_of_open_clip(clean, cleaning, tmp_path):
    """Its text is read at the first token with `eos_id`, which is not the highest."""
    vision: Any = dict(layers=1, width=32, head_width=16, patch_size=PATCH, image_size=SIZE)
    text: Any = dict(context_length=LENGTH, vocab_size=VOCAB, width=32, heads=4, layers=1)
    text |= dict(hf_tokenizer_name="facebook/xlm-v-base", pool_type="eos", eos_id=2)
    if clean is not None:
        text["tokenizer_kwargs"] = dict(clean=clean)
    module = foreign.perturb(library.CLIP(20, vision, text, quick_gelu=True))
    cfg = dict(embed_dim=20, quick_gelu=True, vision_cfg=vision, text_cfg=text)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=cfg)))
    safetensors.torch.save_file(module.state_dict(), tmp_path / "open_clip_model.safetensors")
    report = from_open_clip(tmp_path, tmp_path / "ours", NONE)
    assert report.verdict == "PROVEN", report.text
    model, _, _ = checkpoint.load_model(tmp_path / "ours")
    assert (model.text.end_id, model.text.cleaning) == (2, cleaning)
    last = dataclasses.replace(model, text=dataclasses.replace(model.text, pool="last"))
    assert comparison.open_clip_config(last)[1]["pool_type"] == "last"
    if clean is None:
        report = to_open_clip(tmp_path / "ours", tmp_path / "back")
        assert report.verdict == "PROVEN", report.text


@pytest.mark.parametrize(
    "decoder,pool,sizes,named",
    [
        (False, "class", (2, 99), ()),
        (True, "none", (2, 99), ()),
        (False, "map", (4, 384), ()),  # those of the tower
        (False, "map", (2, 99), ("pool_heads", "pool_mlp_dim")),
    ],
)
def test_exits_name_the_sizes_of_a_pool_where_it_has_them(decoder, pool, sizes, named):
    c = recipe.model("tiny")
    if not decoder:
        c.decoder = None
    c.image.update(pool=pool, pool_heads=sizes[0], pool_mlp_dim=sizes[1])
    model = config_lib.model_from_dict(c.to_dict())
    for kind in (reasons.SIGLIP, reasons.SIGLIP_VISION, reasons.CLIP, reasons.BIG_VISION):
        faults = [fault.split(":")[0] for fault in kind.faults(model)]
        assert [x for x in faults if ".pool_" in x] == [f"model.image.{key}" for key in named]


def test_a_masked_mean_costs_what_a_mean_costs():
    """Its masks are no products, and every program of attention has them."""
    text = dict(model__text__causal=False, text__packing=False)
    mean, masked = (
        tiny.config(model__text__pool=pool, **text, model__attention="pallas")
        for pool in ("mean", "masked_mean")
    )
    assert flops.per_image(masked) == flops.per_image(mean)
    for c in (mean, masked):
        assert attention.of_towers(c.model, "float32") == "pallas"
    words = dataclasses.replace(masked.model.text, position_kind="sinusoidal")
    shapes = grain.parameter_shapes(dataclasses.replace(masked.model, text=words))
    assert grain.parameter_shapes(masked.model).keys() - shapes.keys() == {"text/position_embed"}
