"""The exports against the classes that load them, which we did not write; each model has perturbed weights."""

import dataclasses
import json
import subprocess
import sys
from typing import Any

import numpy as np
import open_clip
import PIL.Image
import pytest
import timm
import tokenizers
import torch
import transformers
from timm.models import _registry, vision_transformer
from transformers.utils import import_utils

import grain_jax
from grain_jax import config as config_lib
from grain_jax.checkpoint import saved_model
from grain_jax.convert import towers
from grain_jax.convert.__main__ import main
from grain_jax.convert.big_vision import from_big_vision
from grain_jax.convert.exits import needs, timm_trunk
from grain_jax.convert.exits import tokenizers as exit_tokenizers
from grain_jax.convert.huggingface import from_hf
from grain_jax.convert.reference import module as torch_module
from grain_jax.convert.reference import names
from grain_jax.input_pipeline import clip_tokenizer
from tests import foreign, perturbed
from tests.paths import GOLDENS

torch.set_num_threads(1)
TWO = dict(decoder=None, image__depth=1, text__depth=1)
CLIP = TWO | dict(
    image__pool="class", image__qk_norm=False, image__pre_norm=True, image__norm_eps=1e-5
)
SIGLIP = TWO | dict(
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
    text__tokenizer="tokenizer.json",
)
IDS = np.array([[298, 7, 8, 299] + [0] * 28, [298, *range(20, 50), 299]], np.int64)


def made(folder, **changes):
    """(the folder, the model as `grain_jax.load` gives it)."""
    model = perturbed.tiny(**changes)
    saved_model.save_model(folder, model, perturbed.params(model), source="test")
    if model.text.tokenizer == "tokenizer.json":
        perturbed.write_words(folder, "unknown pad a photo of wren two dogs and cat s bowl long x")
    return folder, grain_jax.load(folder)


def run(capsys, command, source, output, *flags):
    """What the command prints; its parity is proven."""
    status = main([*command.split(), "--input", str(source), "--output", str(output), *flags])
    printed = capsys.readouterr()
    assert status == 0 and "parity: PROVEN" in printed.out, printed.out + printed.err
    return printed.out


def refused(capsys, command, source, output, *flags):
    """The lines of a refusal; nothing is written."""
    assert main([*command.split(), "--input", str(source), "--output", str(output), *flags]) == 2
    assert not output.exists()
    return capsys.readouterr().err.splitlines()


def pixels(size):
    rng = np.random.default_rng(3)
    return rng.standard_normal((3, size, size, 3)).astype(np.float32)


def logits(ours, images, ids):
    image, text = ours.encode_image(images), ours.encode_text(ids)
    return image, text, ours.logit_scale * image @ text.T + (ours.logit_bias or 0)


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("CLIPModel", CLIP | dict(image__patch_bias=False, image__activation="quick_gelu")),
        pytest.param(
            "CLIPModel",
            CLIP | dict(image__patch_bias=True, text__projection="none", embed_dim=40),
            marks=pytest.mark.slow,
        ),
        ("SiglipModel", SIGLIP | dict(text__projection="affine")),
        ("SiglipModel", SIGLIP | dict(image__patch_bias=False, logit_bias_init=None)),
    ],
    ids=["clip", "clip folded", "siglip", "siglip filled"],
)
def test_two_towers_are_a_class_of_transformers(kind, changes, tmp_path, capsys):
    source, ours = made(tmp_path / "ours", **changes)
    printed = run(capsys, "to-hf", source, tmp_path / "hf")
    assert f"{kind}\n" in printed and "\nlogits " in printed and "\npixels " in printed
    assert ("\ntoken_ids " in printed) == (kind == "SiglipModel")
    module = getattr(transformers, kind).from_pretrained(tmp_path / "hf").eval()
    given = pixels(40)
    with torch.no_grad():
        out = module(input_ids=torch.tensor(IDS), pixel_values=foreign.torch_images(given))
    image, text, scores = logits(ours, given, IDS.astype(np.int32))
    foreign.close(image, out.image_embeds.numpy())
    foreign.close(text, out.text_embeds.numpy())
    foreign.close(scores, out.logits_per_image.numpy())
    assert "PROVEN" in (tmp_path / "hf" / "README.md").read_text()
    run(capsys, "to-hf", source, tmp_path / "hf")  # replaces its own
    report = from_hf(tmp_path / "hf", tmp_path / "back")
    assert report.verdict == "PROVEN", report.text


ELSEWHERE = """
import sys
sys.modules["jax"] = sys.modules["grain_jax"] = None  # importing them is an error
import json, PIL.Image, transformers
for family in ("clip", "siglip"):
    load = lambda x, **options: x.from_pretrained(family, local_files_only=True, **options)
    classify = transformers.pipeline(
        "zero-shot-image-classification",
        model=load(transformers.AutoModel).eval(),
        tokenizer=load(transformers.AutoTokenizer),
        image_processor=load(transformers.AutoImageProcessor, backend="pil"),
    )
    found = classify(
        PIL.Image.open("a.png"),
        candidate_labels=["wren", "owl", "bowl"],
        hypothesis_template="a photo of {}",
    )
    print(json.dumps({x["label"]: x["score"] for x in found}))
"""


@pytest.mark.slow
def test_pipelines_without_jax_give_our_scores(tmp_path, capsys):
    clip = CLIP | dict(text__vocab_size=clip_tokenizer.VOCAB_SIZE)
    siglip = SIGLIP | dict(text__pad_id=1, text__context_length=64)
    image = np.random.default_rng(4).integers(0, 256, (60, 90, 3), np.uint8)
    PIL.Image.fromarray(image).save(tmp_path / "a.png")
    expected = []
    for family, changes in dict(clip=clip, siglip=siglip).items():
        source, ours = made(tmp_path / f"ours_{family}", **changes)
        assert "\ntoken_ids " in run(capsys, "to-hf", source, tmp_path / family)
        texts = ["a photo of wren", "a photo of owl", "a photo of bowl"]
        scores = ours.logit_scale * ours.encode_image([image]) @ ours.encode_text(texts).T
        scores = np.exp(scores[0] + (ours.logit_bias or 0))
        expected.append(scores / (scores.sum() if family == "clip" else 1 + scores))
    printed = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], cwd=tmp_path, check=True, capture_output=True
    ).stdout
    for scores, line in zip(expected, printed.splitlines()[-2:], strict=True):
        got = json.loads(line)
        foreign.close(scores, np.array([got[x] for x in ("wren", "owl", "bowl")]))


def test_sentencepiece_goes_out_as_siglips_tokenizer(tmp_path, capsys, monkeypatch):
    import sentencepiece

    source, _ = made(
        tmp_path / "ours",
        **SIGLIP | dict(text__tokenizer="siglip.model", text__cleaning="canonical", text__pad_id=1),
    )
    words = ["a photo of a wren", "two dogs and a cat s bowl 1998", "x long long words"] * 9
    options: Any = dict(
        vocab_size=60, bos_id=-1, unk_id=2, eos_id=1, pad_id=0, hard_vocab_limit=False
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words),
        model_prefix=str(tmp_path / "m"),
        minloglevel=2,
        **options,
    )
    (tmp_path / "m.model").rename(source / "siglip.model")
    printed = run(capsys, "to-hf", source, tmp_path / "hf")
    assert "\ntoken_ids " in printed
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert type(tokenizer).__name__ == "SiglipTokenizer"
    absent = (lambda: False, "{0} requires the protobuf library")
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, "protobuf", absent)
    assert main(["to-hf", "--input", str(source), "--output", str(tmp_path / "hf")]) == 0
    said = "NOT PROVEN. SiglipTokenizer requires the protobuf library; pip install 'grain_jax[interop]'"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        CLIP | dict(image__patch_bias=False, image__activation="quick_gelu"),
        CLIP | dict(image__qk_norm=True, image__pre_norm=False, text__activation="gelu"),
        CLIP
        | dict(image__pool="mean", text__projection="affine", logit_bias_init=-2.0)
        | dict(image__activation="gelu_tanh", text__activation="gelu"),
        CLIP | dict(text__causal=False, text__pool="last", image__activation="quick_gelu"),
    ],
    ids=["clip", "qk norm", "mean", "last"],
)
def test_open_clip_loads_its_own_towers(changes, tmp_path, capsys):
    source, ours = made(tmp_path / "ours", **changes)
    _check_open_clip(capsys, source, ours, tmp_path / "out")


def loaded_by_open_clip(folder) -> Any:
    return open_clip.create_model_and_transforms(f"local-dir:{folder}")[0].eval()


def _check_open_clip(capsys, source, ours, output):
    printed = run(capsys, "to-open-clip", source, output)
    assert "\npixels " in printed and "\nlogits " in printed
    module = loaded_by_open_clip(output)
    given = pixels(40)
    with torch.no_grad():
        images, ids = foreign.torch_images(given), torch.tensor(IDS)
        theirs = (
            module.encode_image(images, normalize=True),
            module.encode_text(ids, normalize=True),
        )
        scores = module.get_logits(images, ids)[0]
    image, text, ours_scores = logits(ours, given, IDS.astype(np.int32))
    foreign.close(image, theirs[0].numpy())
    foreign.close(text, theirs[1].numpy())
    foreign.close(ours_scores, scores.numpy())


def test_clips_tokenizer_is_open_clips(tmp_path, capsys):
    source, _ = made(tmp_path / "ours", **CLIP, text__vocab_size=clip_tokenizer.VOCAB_SIZE,
                     image__activation="quick_gelu")  # fmt: skip
    assert "\ntoken_ids " in run(capsys, "to-open-clip", source, tmp_path / "out")


@pytest.fixture
def trunk(monkeypatch):
    """A model of timm as small as ours, by its class; open_clip takes trunks by name alone."""

    def vit_tiny_patch8_siglip_test(pretrained=False, **options):
        sizes = dict(img_size=40, patch_size=8, embed_dim=48, depth=1, num_heads=4, mlp_ratio=2)
        habits = dict(class_token=False, global_pool="map", act_layer="gelu_tanh")
        kinds = {"img_size": 40, **sizes, **habits, **options}
        for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            kinds.pop(name, None)
        model: Any = vision_transformer.VisionTransformer(**kinds)
        model.default_cfg = {}  # what open_clip asks of a registered model
        return model

    name = vit_tiny_patch8_siglip_test.__name__
    monkeypatch.setitem(_registry._model_entrypoints, name, vit_tiny_patch8_siglip_test)
    monkeypatch.setitem(_registry._model_to_module, name, "vision_transformer")
    monkeypatch.setattr(timm, "list_models", lambda pattern: [name])
    timm_trunk._find.cache_clear()
    yield name
    timm_trunk._find.cache_clear()


@pytest.mark.parametrize("projection", ["none", "affine"])
def test_open_clip_loads_siglip_around_a_trunk_of_timm(projection, trunk, tmp_path, capsys):
    width = {"none": 48, "affine": 28}[projection]
    changes = SIGLIP | dict(
        image__projection=projection, embed_dim=width, text__projection="affine"
    )
    source, ours = made(tmp_path / "ours", **changes)
    _check_open_clip(capsys, source, ours, tmp_path / "out")
    stated = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())["model_cfg"]
    assert stated["vision_cfg"]["timm_model_name"] == trunk


def test_a_trunk_that_timm_has_not_is_refused(tmp_path, capsys):
    source, _ = made(tmp_path / "ours", **SIGLIP)
    said = refused(capsys, "to-open-clip", source, tmp_path / "out")
    assert said[0].startswith(
        "model.image: got 40 px, patch 8, width 48, depth 1, heads 4, MLP 96 "
    )
    assert said[1:] == ["1 fault; nothing was written"]


# Of a tower: keys whose values every exit takes from the arrays, or that matter to new weights and speed alone.
SIZES = {
    *("options", "width", "depth", "heads", "mlp_dim", "unroll", "image_size", "patch_size"),
    *("vocab_size", "context_length"),
    *towers.OF_TRAINING,
}
# Of the others, a value that a plain tower has not, with what it needs beside it; None: the other one of the two.
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
GRAIN_KEYS = dict(image__depth=1, text__depth=1, decoder__depth=1)
# Exit -> a model that it writes, and the lines of what it cannot hold of one.
EXITS: dict[str, tuple[dict[str, Any], Any]] = {
    "to-hf, CLIPModel": (CLIP, lambda m: needs.of_hugging_face(m)[1]),
    "to-hf, SiglipModel": (SIGLIP, lambda m: needs.of_hugging_face(m)[1]),
    "to-open-clip, own": (
        CLIP | dict(image__activation="quick_gelu"),
        lambda m: needs.of_open_clip(m)[1],
    ),
    "to-open-clip, timm": (
        SIGLIP,
        lambda m: needs.of_open_clip(m)[1] + [""] * (timm_trunk._find(m.image) is None),
    ),
    "to-big-vision": (SIGLIP | dict(image__norm_eps=1e-6), needs.of_big_vision),
    "to-torch": (GRAIN_KEYS, lambda m: names.faults(m, "to-torch")),
    "to-hf, decoder": (GRAIN_KEYS, lambda m: names.faults(m, "to-hf")),
    "to-hf, pooled": (CLIP, lambda m: names.faults(m, "to-hf")),
}


def with_keys(model: config_lib.Model, tower: str, keys: dict[str, Any]) -> config_lib.Model:
    own = getattr(model, tower)
    keys = {key: not getattr(own, key) if value is None else value for key, value in keys.items()}
    return dataclasses.replace(model, **{tower: dataclasses.replace(own, **keys)})


def valid(model: config_lib.Model) -> bool:
    try:
        config_lib.model_from_dict(dataclasses.asdict(model))
    except config_lib.ConfigError:
        return False
    return True


def written_models(base, faults_of, of_towers) -> list[config_lib.Model]:
    """Models with all the keys that an exit does not refuse, as many in one as there can be."""
    models: list[config_lib.Model] = []
    for tower in of_towers:
        fields = {x.name for x in dataclasses.fields(getattr(base, tower))}
        assert OTHERS[tower].keys() | SIZES >= fields
        for keys in OTHERS[tower].values():
            alone = with_keys(base, tower, keys)
            if faults_of(alone) or not valid(alone):
                continue
            own = {key: getattr(getattr(alone, tower), key) for key in keys}
            for i, before in enumerate(models):
                both = with_keys(before, tower, own)
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
    for i, model in enumerate(written_models(base, faults_of, ("image", "text"))):
        params = perturbed.params(model)
        if exit_name in ("to-hf, decoder", "to-hf, pooled"):
            proof = torch_module.prove(model, params, names.state_dicts(params))
            assert proof.verdict == "PROVEN", proof.text
            continue
        source = tmp_path / f"ours{i}"
        saved_model.save_model(source, model, params, source="test")
        if model.text.tokenizer == "tokenizer.json":
            write_words_with_end(source, model.text.end_id or 7)
        if exit_name != "to-big-vision":
            run(capsys, exit_name.partition(",")[0], source, tmp_path / f"out{i}")
            continue
        arguments = ["--input", str(source), "--output", str(tmp_path / "out.npz")]
        assert main(["to-big-vision", *arguments]) == 0
        from_big_vision(tmp_path / "out.npz", tmp_path / f"back{i}")
        ours, back = grain_jax.load(source), grain_jax.load(tmp_path / f"back{i}")
        given, ids = pixels(40), IDS.astype(np.int32)
        for one, other in zip(logits(ours, given, ids), logits(back, given, ids)):
            foreign.close(one, other)


@pytest.mark.parametrize("which", ["map", "tok"])
def test_big_visions_arrays_come_out_as_they_went_in(which, tmp_path, capsys):
    """The goldens are of big_vision; its outputs are compared in test_big_vision.py."""
    with np.load(GOLDENS / f"big_vision_{which}.npz") as stored:
        theirs = {k: v for k, v in stored.items() if k.startswith("params/")}
    np.savez(tmp_path / "theirs.npz", **theirs)
    from_big_vision(tmp_path / "theirs.npz", tmp_path / "ours")
    arguments = ["--input", str(tmp_path / "ours"), "--output", str(tmp_path / "out.npz")]
    assert main(["to-big-vision", *arguments]) == 0
    assert "for its config: {'image': {'width': 32," in capsys.readouterr().out
    with np.load(tmp_path / "out.npz") as written:
        assert set(written) == set(theirs)
        for name, array in theirs.items():
            np.testing.assert_array_equal(written[name], array, err_msg=name, strict=True)


def test_a_refusal_lists_all_faults(tmp_path, capsys):
    source, _ = made(tmp_path / "ours", **TWO, image__pool="mean", text__activation="gelu")
    said = refused(capsys, "to-big-vision", source, tmp_path / "out.npz")
    assert "model.text.causal: got True, big_vision's two_towers has False" in said
    assert said[-1] == f"{len(said) - 1} faults; nothing was written"
    source, _ = made(tmp_path / "grain", image__depth=1, text__depth=1)
    said = refused(capsys, "to-open-clip", source, tmp_path / "out")
    assert said[0] == "model.decoder: got one, open_clip's own towers has None"


def test_names_of_timm():
    tower = config_lib.ImageTower(
        qk_norm=False, class_token=False, activation="gelu", pool="map", projection="none"
    )
    assert timm_trunk.name_of(tower) == "vit_base_patch16_siglip_224"
    tanh = dataclasses.replace(tower, patch_size=32, image_size=256, activation="gelu_tanh")
    assert timm_trunk.name_of(tanh) == "vit_base_patch32_siglip_256"


@pytest.mark.parametrize("cleaning", ["none", "lower", "canonical"])
def test_a_tokenizer_goes_out_again_as_it_came(cleaning, tmp_path):
    tower = dataclasses.replace(
        perturbed.tiny(**SIGLIP).text, cleaning=cleaning, tokenizer="tokenizer.json"
    )
    perturbed.write_words(tmp_path, "unknown pad a photo")
    (tmp_path / "again").mkdir()
    first, _ = exit_tokenizers.files(tower, tmp_path)
    (tmp_path / "again" / "tokenizer.json").write_text(json.dumps(first["tokenizer.json"]))
    assert exit_tokenizers.files(tower, tmp_path / "again") == (first, "")


@pytest.mark.parametrize(
    "changes,line",
    [
        (
            SIGLIP | dict(text__tokenizer="clip", text__vocab_size=clip_tokenizer.VOCAB_SIZE),
            "CLIP's tokenizer of transformers pads with the end token",
        ),
    ],
)
def test_a_tokenizer_that_theirs_reads_otherwise_is_left_out(tmp_path, capsys, changes, line):
    out = tmp_path / "out"
    words = SIGLIP | dict(text__vocab_size=49)
    run(capsys, "to-hf", made(tmp_path / "words", **words)[0], out)
    assert (out / "tokenizer.json").exists()
    printed = run(capsys, "to-hf", made(tmp_path / "model", **changes)[0], out)
    assert f"no tokenizer files: {line}" in printed
    assert not list(out.glob("tokenizer*")) and line in (out / "README.md").read_text()


def write_words_with_end(folder, end):
    """A tokenizer.json whose texts end with the id `end`, which is not the highest."""
    words = "unknown pad a photo of wren two dogs and cat s".split()
    words.insert(end, "</s>")
    vocabulary = {word: i for i, word in enumerate(words)}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="unknown"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", end)]
    )
    library.save(f"{folder}/tokenizer.json")


ENDS = dict(text__tokenizer="tokenizer.json", text__pad_id=1)
GRAIN_ENDS = GRAIN_KEYS | ENDS | dict(image__qk_norm=False, image__pre_norm=True)


@pytest.mark.parametrize(
    "changes, kind, end",
    [(CLIP | ENDS, "CLIPModel", 7), (CLIP | ENDS, "CLIPModel", 11), (GRAIN_ENDS, "AutoModel", 7)],
    ids=["CLIP", "CLIP, highest id of the file", "GRAIN"],
)
def test_a_text_is_read_where_its_tokenizer_ends_it(changes, kind, end, tmp_path, capsys):
    """The id that ends it is not the highest of the tower: the exit finds it in the file of the tokenizer."""
    source, _ = made(tmp_path / "ours", **changes)
    write_words_with_end(source, end)
    ours = grain_jax.load(source)
    report = run(capsys, "to-hf", source, tmp_path / "hf")
    assert "\ntoken_ids " in report and "\nencode_text " in report
    load: Any = dict(trust_remote_code=True, local_files_only=True)
    module = getattr(transformers, kind).from_pretrained(tmp_path / "hf", **load).eval()
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", **load)
    texts = ["two dogs and a cat", "wren", "s"]
    given = words(texts, return_tensors="pt", padding="max_length")["input_ids"]
    assert (given.argmax(1) != (given == end).int().argmax(1)).any() == (end == 7)
    with torch.no_grad():
        found = module.get_text_features(given)
    found = getattr(found, "pooler_output", found).numpy()
    foreign.close(ours.encode_text(texts), found / np.linalg.norm(found, axis=1, keepdims=True))
    if kind == "AutoModel":
        assert (
            main(["from-hf", "--input", str(tmp_path / "hf"), "--output", str(tmp_path / "back")])
            == 0
        )
        back = grain_jax.load(tmp_path / "back")
        assert back.model.text.end_id == 7
        np.testing.assert_array_equal(back.encode_text(texts), ours.encode_text(texts))


@pytest.mark.parametrize("command", ["to-hf", "to-open-clip", "to-onnx"])
def test_texts_without_an_id_that_ends_them_are_refused(command, tmp_path, capsys):
    source, _ = made(tmp_path / "ours", **CLIP | ENDS | dict(image__activation="quick_gelu"))
    said = refused(capsys, command, source, tmp_path / "out")
    assert (
        said[0].startswith("model.text.end_id: got None, but ")
        and "ends texts with the ids [" in said[0]
    )
    if command == "to-hf":
        (source / "tokenizer.json").unlink()
        assert main([command, "--input", str(source), "--output", str(tmp_path / "out")]) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith("parity: NOT PROVEN. Texts: tokenizer.json is no file in ")
