"""The exports against the classes of others that load them; each model has perturbed weights."""

import dataclasses
import re
from typing import Any

import jax
import numpy as np
import open_clip
import pytest
import tokenizers
import torch
import transformers
from timm.models import _registry, vision_transformer

import grain_jax
from grain_jax import config as config_lib
from grain_jax.checkpoint import saved_model
from grain_jax.convert import open_clip as to_open_clip
from grain_jax.convert import parity, towers
from grain_jax.convert.__main__ import main
from grain_jax.convert.big_vision import from_big_vision
from grain_jax.convert.exits import needs
from grain_jax.convert.from_hugging_face import from_hf
from grain_jax.convert.reference import commands as torch_module
from grain_jax.convert.reference import names
from grain_jax.inference.inputs import Normalized
from tests import foreign, perturbed

pytestmark = pytest.mark.long

torch.set_num_threads(1)
TWO = dict(decoder=None, image__depth=1, text__depth=1)
CLIP = TWO | dict(image__pool="class", image__qk_norm=False, image__pre_norm=True, image__norm_eps=1e-5)
QUICK = CLIP | dict(image__activation="quick_gelu")
WORDS = dict(text__tokenizer="tokenizer.json")
SIGLIP = TWO | WORDS | dict(
    embed_dim=48,
    logit_bias_init=-3.0,
    image__pool="map",
    image__qk_norm=False,
    image__class_token=False,
    image__activation="gelu_tanh",
    image__projection="none",
    text__activation="gelu_tanh",
    text__norm_eps=1e-6,
    text__causal=False,
    text__pool="last",
)  # fmt: skip
IDS = np.array([[298, 7, 8, 299] + [0] * 28, [298, *range(20, 50), 299]], np.int64)


def beside(towers):
    """The changes of a model that adds regions to these two towers."""
    regions = dict(decoder__image_pool="tower", decoder__depth=1, boxes__kind="roi_align")
    return {name: x for name, x in towers.items() if name != "decoder"} | regions


def made(folder, **changes):
    """(the folder, the model as `grain_jax.load` gives it)."""
    model = perturbed.tiny(**changes)
    saved_model.save_model(folder, model, perturbed.params(model), source="test")
    if model.text.tokenizer == "tokenizer.json":
        perturbed.write_words(folder, "unknown pad a photo of wren two dogs and cat s bowl long x")
    return folder, grain_jax.load(folder)


def run(capsys, command, source, output, *options):
    """What the command prints; its parity is proven."""
    status = main([command, "--input", str(source), "--output", str(output), *options])
    printed = capsys.readouterr()
    assert status == 0 and "parity: PROVEN" in printed.out, printed.out + printed.err
    return printed.out


def refused(capsys, command, source, output):
    """The lines of a refusal; nothing is written."""
    assert main([command, "--input", str(source), "--output", str(output)]) == 2
    assert not output.exists()
    return capsys.readouterr().err.splitlines()


def pixels():
    return np.random.default_rng(3).standard_normal((3, 40, 40, 3)).astype(np.float32)


def logits(ours):
    """Embeddings of images and texts, and their logits."""
    image = ours.encode_image(pixels(), normalized=True)
    text = ours.encode_text(IDS.astype(np.int32))
    return image, text, ours.logit_scale * image @ text.T + (ours.logit_bias or 0)


def logits_in_torch(kind, folder):
    """As `logits`, by a class of transformers or by open_clip."""
    images, ids = foreign.torch_images(pixels()), torch.tensor(IDS)
    module: Any
    with torch.no_grad():
        if kind != "open_clip":
            module = getattr(transformers, kind).from_pretrained(folder).eval()
            out = module(input_ids=ids, pixel_values=images)
            return [x.numpy() for x in (out.image_embeds, out.text_embeds, out.logits_per_image)]
        module = open_clip.create_model_and_transforms(f"local-dir:{folder}")[0].eval()
        encoded = module.encode_image(images, normalize=True), module.encode_text(ids, True)
        return [x.numpy() for x in (*encoded, module.get_logits(images, ids)[0])]


@pytest.fixture
def trunk(monkeypatch):
    """A model of timm as small as ours, by its class; open_clip takes trunks by name alone."""

    def vit_tiny_patch8_siglip_40(pretrained=False, **options):
        sizes = dict(img_size=40, patch_size=8, embed_dim=48, depth=1, num_heads=4, mlp_ratio=2)
        kinds = sizes | dict(class_token=False, global_pool="map", act_layer="gelu_tanh") | options
        for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            kinds.pop(name, None)
        model: Any = vision_transformer.VisionTransformer(**kinds)
        model.default_cfg = {}  # what open_clip asks of a registered model
        return model

    name = vit_tiny_patch8_siglip_40.__name__
    monkeypatch.setitem(_registry._model_entrypoints, name, vit_tiny_patch8_siglip_40)
    monkeypatch.setitem(_registry._model_to_module, name, "vision_transformer")
    monkeypatch.setitem(to_open_clip.TRUNKS, 48, "tiny")


# A model, and the class that loads what an export makes of it.
TABLE = {
    "clip folded": ("CLIPModel", CLIP | dict(text__projection="none", embed_dim=40)),
    "siglip filled": (
        "SiglipModel",
        SIGLIP | dict(image__patch_bias=False, logit_bias_init=None, text__cleaning="siglip2"),
    ),
    "regions of siglip": ("SiglipModel", beside(SIGLIP) | dict(text__projection="affine")),
    "regions of clip": ("open_clip", beside(QUICK)),
    "mean": ("open_clip", CLIP | dict(image__pool="mean", text__projection="affine", logit_bias_init=-2.0)
             | dict(image__activation="gelu_tanh", text__activation="gelu")),
    "last": ("open_clip", QUICK | dict(text__causal=False, text__pool="last")),
    "timm projected": ("open_clip", SIGLIP | dict(image__projection="affine", embed_dim=28)),
}  # fmt: skip


@pytest.mark.parametrize("start", TABLE)
def test_the_class_that_loads_an_export_gives_our_outputs(start, trunk, tmp_path, capsys):
    kind, changes = TABLE[start]
    source, ours = made(tmp_path / "ours", **changes)
    command = "to-open-clip" if kind == "open_clip" else "to-hf"
    part = ["--part", "towers"] if kind != "open_clip" else []
    printed = run(capsys, command, source, tmp_path / "out", *part)
    assert f"our outputs against {kind}, " in printed
    compared = set(re.findall(r"^(\w+) +\d.* [1-9]\.\de-06$", printed, re.M))
    of_texts = {"encode_text"} if "text__tokenizer" in changes else set()
    assert compared == {"image_embed", "text_embed", "logits", "pixels"} | of_texts
    assert ("\ntoken_ids " in printed) == ("text__tokenizer" in changes)
    for one, other in zip(logits(ours), logits_in_torch(kind, tmp_path / "out"), strict=True):
        foreign.close(one, other)
    assert "PROVEN" in (tmp_path / "out" / "README.md").read_text()
    if kind != "open_clip":
        report = from_hf(tmp_path / "out", tmp_path / "back")
        assert report.verdict == "PROVEN", report.text


@pytest.mark.parametrize("cleaning", ["siglip", "siglip2", "canonical"])
def test_sentencepiece_goes_out_with_its_cleaning(cleaning, tmp_path, capsys):
    keys = dict(text__tokenizer="siglip.model", text__cleaning=cleaning, text__pad_id=1)
    source, _ = made(tmp_path / "ours", **SIGLIP | keys)
    perturbed.write_sentencepiece(source)
    assert "\ntoken_ids " in run(capsys, "to-hf", source, tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (type(tokenizer).__name__ == "SiglipTokenizer") == (cleaning == "siglip")


REGIONS = dict(image__depth=1, text__depth=1, decoder__depth=1)
KINDS = {
    "beside": beside(SIGLIP) | dict(text__projection="affine"),
    "boxes": SIGLIP | dict(text__projection="affine", boxes__kind="roi_align", boxes__bins=2),
    "maps": TWO | dict(image__pool="map", image__activation="quick_gelu", image__projection="none")
    | dict(image__width=40, embed_dim=40, text__pool="map", text__projection="none", logit_bias_init=-2.0)
    | dict(text__causal=False, text__mask_padding=True),
    "options": REGIONS | WORDS
    | dict(decoder__image_pool="all", boxes__kind="roi_align", image__positions=False, image__rope="centres")
    | dict(image__layer_scale=True, image__mlp="gated", image__activation="silu", image__key_bias=False)
    | dict(text__causal=False, text__pool="mean", text__activation="relu", image__registers=2),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_our_modeling_file_goes_out_and_comes_back(kind, tmp_path, capsys):
    source, ours = made(tmp_path / "ours", **KINDS[kind])
    said = run(capsys, "to-hf", source, tmp_path / "hf")
    assert ("for AutoModel with trust_remote_code: " in said) == (ours.model.decoder is None)
    assert ("\nbox_embed " in said) == ("boxes__kind" in KINDS[kind])
    assert ("\ntoken_ids " in said) == ("text__tokenizer" in KINDS[kind])
    run(capsys, "from-hf", tmp_path / "hf", tmp_path / "again")
    model, params, _ = saved_model.load_model(tmp_path / "again")
    assert model == ours.model
    jax.tree.map(np.testing.assert_array_equal, params, ours.params)
    options: Any = dict(trust_remote_code=True, local_files_only=True)
    module = transformers.AutoModel.from_pretrained(tmp_path / "hf", **options).eval()
    inputs = parity.inputs_of(model)
    with torch.no_grad():
        if not model.image.key_bias:  # what stands there for the keys changes nothing
            module.backbone.visual.blocks[0].attn.qkv.bias.chunk(3)[1].uniform_(-1, 1)
        maps = module.similarity_maps(*parity.for_torch(inputs)).numpy()
    texts = [ours.encode_text(inputs.token_ids)] * len(maps)
    foreign.close(np.stack(ours.similarity_maps(Normalized(inputs.images), texts)), maps)


# Keys of a tower whose values every export takes from the arrays, or that matter to new weights and speed.
SIZES = {
    *("options", "width", "depth", "heads", "mlp_dim", "unroll", "image_size", "patch_size"),
    *("vocab_size", "context_length"),
    *towers.OF_TRAINING,
}
# For the other keys, a value that a plain tower has not, with what it needs; None: the other one of the two.
OTHERS: dict[str, dict[str, dict[str, Any]]] = {
    "image": dict(
        tower=dict(tower="a:Tower"),
        qk_norm=dict(qk_norm=None),
        norm_eps=dict(norm_eps=1e-3),
        class_token=dict(class_token=None, pool="mean"),
        patch_bias=dict(patch_bias=None),
        pre_norm=dict(pre_norm=None),
        activation=dict(activation="silu"),
        positions=dict(positions=False, rope="centres"),
        rope=dict(rope="centres"),
        rope_theta=dict(rope="centres", rope_theta=50.0),
        rope_grid=dict(rope="indices", rope_grid=3),
        pool_heads=dict(pool="map", pool_heads=2),
        registers=dict(registers=2),
        layer_scale=dict(layer_scale=True),
        mlp=dict(mlp="gated"),
        key_bias=dict(key_bias=False),
        pool=dict(pool="mean"),
        projection=dict(projection="affine"),
        pixel_mean=dict(pixel_mean=(0.4, 0.5, 0.6)),
        pixel_std=dict(pixel_std=(0.2, 0.3, 0.4)),
    ),
    "text": dict(
        tower=dict(tower="a:Tower"),
        norm_eps=dict(norm_eps=1e-3),
        causal=dict(causal=None),
        activation=dict(activation="relu"),
        mask_padding=dict(pool="last", causal=False, mask_padding=True),
        pool=dict(pool="map", causal=False),
        projection=dict(projection="affine"),
        tokenizer=dict(tokenizer="tokenizer.json"),
        cleaning=dict(tokenizer="tokenizer.json", cleaning="canonical"),
        pad_id=dict(tokenizer="tokenizer.json", pad_id=1),
        end_id=dict(end_id=3),
    ),
}


def faults_in_open_clip(model):
    kind, faults = needs.nearest(model, needs.OPEN_CLIP, needs.OPEN_CLIP_TIMM)
    is_of_timm = (model.image.norm_eps, model.image.activation) == (1e-6, "gelu_tanh")
    return faults + [""] * (kind is needs.OPEN_CLIP_TIMM and not is_of_timm)


# Export -> a model that it writes, and the lines of what it cannot hold of one.
EXITS: dict[str, tuple[dict[str, Any], Any]] = {
    "to-hf, CLIPModel": (CLIP, lambda m: needs.nearest(m, needs.CLIP, needs.SIGLIP)[1]),
    "to-hf, SiglipModel": (SIGLIP, lambda m: needs.nearest(m, needs.CLIP, needs.SIGLIP)[1]),
    "to-open-clip, own": (QUICK, faults_in_open_clip),
    "to-open-clip, timm": (SIGLIP, faults_in_open_clip),
    "to-big-vision": (SIGLIP | dict(image__norm_eps=1e-6), needs.BIG_VISION.faults),
    "to-torch": (REGIONS, needs.TORCH.faults),
    "to-hf, decoder": (REGIONS, needs.MODELING.faults),
    "to-hf, pooled": (CLIP, needs.MODELING.faults),
}


def with_keys(model: config_lib.Model, tower: str, keys: dict[str, Any]) -> config_lib.Model:
    old = getattr(model, tower)
    keys = {key: not getattr(old, key) if value is None else value for key, value in keys.items()}
    return dataclasses.replace(model, **{tower: dataclasses.replace(old, **keys)})


def valid(model: config_lib.Model) -> bool:
    try:
        config_lib.model_from_dict(dataclasses.asdict(model))
    except config_lib.ConfigError:
        return False
    return True


def written_models(base, faults_of) -> list[config_lib.Model]:
    """Models with all the keys that an export does not refuse, as many in one as there can be."""
    models: list[config_lib.Model] = []
    for tower in ("image", "text"):
        fields = {x.name for x in dataclasses.fields(getattr(base, tower))}
        assert OTHERS[tower].keys() | SIZES >= fields
        for keys in OTHERS[tower].values():
            alone = with_keys(base, tower, keys)
            if faults_of(alone) or not valid(alone):
                continue
            changed = {key: getattr(getattr(alone, tower), key) for key in keys}
            for i, before in enumerate(models):
                both = with_keys(before, tower, changed)
                if not faults_of(both) and valid(both):
                    models[i] = both
                    break
            else:
                models.append(alone)
    return models


@pytest.mark.parametrize("exit_name", EXITS)
def test_no_key_of_a_tower_is_lost_in_silence(exit_name, trunk, tmp_path, capsys):
    """Each key is refused, or in a model whose outputs the class that loads it gives."""
    changes, faults_of = EXITS[exit_name]
    base = perturbed.tiny(**changes)
    assert not faults_of(base)
    for i, model in enumerate(written_models(base, faults_of)):
        params = perturbed.params(model)
        if exit_name in ("to-hf, decoder", "to-hf, pooled"):
            proof = torch_module.prove(model, params, names.state_dict(params))
            assert proof.verdict == "PROVEN", proof.text
            continue
        source, out = tmp_path / f"ours{i}", tmp_path / f"out{i}.npz"
        saved_model.save_model(source, model, params, source="test")
        if model.text.tokenizer == "tokenizer.json":
            write_words_with_end(source, model.text.end_id or 7)
        if exit_name != "to-big-vision":
            run(capsys, exit_name.partition(",")[0], source, out)
            continue
        assert main(["to-big-vision", "--input", str(source), "--output", str(out)]) == 0
        from_big_vision(out, tmp_path / f"back{i}")
        back = grain_jax.load(tmp_path / f"back{i}")
        for one, other in zip(logits(grain_jax.load(source)), logits(back)):
            foreign.close(one, other)


def write_words_with_end(folder, end):
    """A tokenizer.json whose texts end with the id `end`, which is not the highest."""
    tokens = "unknown pad a photo of wren two dogs and cat s".split()
    tokens.insert(end, "</s>")
    vocabulary = {word: i for i, word in enumerate(tokens)}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="unknown"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", end)]
    )
    library.save(f"{folder}/tokenizer.json")


ENDS = WORDS | dict(text__pad_id=1)
GRAIN_ENDS = REGIONS | ENDS | dict(image__qk_norm=False, image__pre_norm=True)


@pytest.mark.parametrize(
    "changes, kind, end",
    [(CLIP | ENDS, "CLIPModel", 7), (CLIP | ENDS, "CLIPModel", 11), (GRAIN_ENDS, "AutoModel", 7)],
    ids=["CLIP", "CLIP, highest id of the file", "GRAIN"],
)
def test_a_text_is_read_where_its_tokenizer_ends_it(changes, kind, end, tmp_path, capsys):
    """The id that ends it is not the highest of the tower: the export finds it in the tokenizer's file."""
    source, _ = made(tmp_path / "ours", **changes)
    write_words_with_end(source, end)
    ours = grain_jax.load(source)
    report = run(capsys, "to-hf", source, tmp_path / "hf")
    assert "\ntoken_ids " in report and "\nencode_text " in report
    load: Any = dict(trust_remote_code=True, local_files_only=True)
    module = getattr(transformers, kind).from_pretrained(tmp_path / "hf", **load).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", **load)
    texts = ["two dogs and a cat", "wren", "s"]
    ids = tokenizer(texts, return_tensors="pt", padding="max_length")["input_ids"]
    assert (ids.argmax(1) != (ids == end).int().argmax(1)).any() == (end == 7)
    with torch.no_grad():
        theirs = module.get_text_features(ids)
    theirs = getattr(theirs, "pooler_output", theirs).numpy()
    foreign.close(ours.encode_text(texts), theirs / np.linalg.norm(theirs, axis=1, keepdims=True))
    if kind == "AutoModel":
        from_hf(tmp_path / "hf", tmp_path / "back")
        back = grain_jax.load(tmp_path / "back")
        assert back.model.text.end_id == 7
        np.testing.assert_array_equal(back.encode_text(texts), ours.encode_text(texts))


@pytest.mark.parametrize("command", ["to-hf", "to-onnx"])
def test_texts_without_an_id_that_ends_them_are_refused(command, tmp_path, capsys):
    source, _ = made(tmp_path / "ours", **QUICK | ENDS)
    said = refused(capsys, command, source, tmp_path / "out")
    assert said[0].startswith("model.text.end_id: got None, ")
