import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import torch
import transformers

import grain_jax
from grain_jax.checkpoint import saved_model, states
from grain_jax.convert import huggingface, parity
from grain_jax.convert.__main__ import main
from grain_jax.convert.from_hugging_face import from_hf
from grain_jax.convert.reference import names
from grain_jax.core import images, named
from grain_jax.input_pipeline import clip_tokenizer
from tests import perturbed, tiny
from tests.convert.test_exits import refused
from tests.convert.test_pack import State
from tests.paths import GOLDENS

pytestmark = pytest.mark.long

torch.set_num_threads(1)  # small matrices; threads would only wait for each other
REMOTE = dict(trust_remote_code=True, local_files_only=True)
TEXTS = ["a photo of a wren", "Blue &amp; WHITE,  1998!", "x"]
CLASSES = {"wren": ["a long beak", "a tail"], "owl": ["big eyes"]}


def raw_images():
    rng = np.random.default_rng(5)
    shapes = ((30, 50), (90, 41), (40, 40))
    return [PIL.Image.fromarray(rng.integers(0, 256, (*s, 3), np.uint8)) for s in shapes]


def _converted(root, sort="queries"):
    """(folder of ours, folder for transformers), with CLIP's vocabulary, of a sort of regions."""
    words = dict(text__vocab_size=clip_tokenizer.VOCAB_SIZE, text__context_length=20)
    model = perturbed.tiny(**words, **perturbed.REGIONS[sort])
    saved_model.save_model(root / "ours", model, perturbed.params(model))
    report = huggingface.to_hf(root / "ours", root / "hf")
    assert report.ok and report.text.endswith("parity: PROVEN"), report.text
    embeds = "image_embed", "text_embed", "region_embed", "boxes_xyxy"
    embeds += ("region_prior",) if sort in perturbed.PROPOSALS else ()
    for name in (*embeds, "logits", "pixels", "token_ids"):
        assert f"\n{name} " in report.text
    return root / "ours", root / "hf"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """`_converted` with queries."""
    return _converted(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def processor(converted):
    return transformers.AutoProcessor.from_pretrained(converted[1], **REMOTE)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """As `converted`, with a vocabulary that no tokenizer has, and a small file."""
    root = tmp_path_factory.mktemp("small")
    model = perturbed.tiny()
    saved_model.save_model(root / "ours", model, perturbed.params(model))
    huggingface.to_hf(root / "ours", root / "hf")
    return root / "ours", root / "hf"


@pytest.mark.parametrize("sort", perturbed.REGIONS)
def test_its_files_need_no_jax_and_give_our_outputs(sort, tmp_path):
    ours, hf = _converted(tmp_path, sort)
    processor = transformers.AutoProcessor.from_pretrained(hf, **REMOTE)
    code = "\n".join(path.read_text() for path in hf.glob("*_grain.py"))
    imported = set(re.findall(r"^ *(?:import|from) (\w+)", code, re.M))
    assert "torch" in imported and not imported & {"jax", "flax", "grain_jax"}
    module = transformers.AutoModel.from_pretrained(hf, **REMOTE).eval()
    ids = lambda texts: processor(text=texts)["input_ids"]
    with torch.no_grad():
        out = module(**processor(images=raw_images(), text=TEXTS))
        pixels = processor(images=raw_images())["pixel_values"]
        features = module.class_features([ids([f"a photo of a {x}", x]) for x in CLASSES])
        described = [module.get_text_features(ids(x)) for x in CLASSES.values()]
        found = module.get_regions(pixels)
        theirs = dict(
            image=out.image_embeds,
            text=out.text_embeds,
            regions=found.embeds,
            boxes=found.boxes_xyxy,
            priors=found.priors,
            global_scores=module.zero_shot_logits(pixels, features),
            both_scores=module.zero_shot_logits(pixels, features, described, alpha=0.3),
        )
        grounded = module.ground(pixels, ids(TEXTS))
        detected = [module.detect(pixels, ids(x), threshold=-1, top_k=12) for x in (TEXTS, TEXTS[:1])]
    model = grain_jax.load(ours)
    model.templates = ["a photo of a {}", "{}"]
    classes = model.class_features(list(CLASSES))
    classes = classes._replace(descriptions=tuple(map(model.encode_text, CLASSES.values())))
    regions = model.encode_regions(raw_images())
    expected = dict(
        image=model.encode_image(raw_images()),
        text=model.encode_text(TEXTS),
        regions=regions.embed,
        boxes=regions.boxes_xyxy,
        priors=regions.prior,
        global_scores=model.classify(raw_images(), classes),
        both_scores=model.classify(raw_images(), classes, alpha=0.3),
    )
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    for texts, of_images in zip((TEXTS, TEXTS[:1]), detected):
        found = model.detect(raw_images(), texts, threshold=-1, top_k=12)
        for mine, (boxes, score, labels) in zip(found, of_images, strict=True):
            assert mine.labels.tolist() == labels.tolist() and len(labels) > len(texts)
            close(mine.boxes_xyxy, boxes)
            close(mine.scores, score)
    for i, image in enumerate(raw_images()):
        for got, box, score in zip(model.ground(image, TEXTS), *(x[i] for x in grounded)):
            close(got.box_xyxy, box)
            close(got.score, score)
    theirs = {name: x.numpy() for name, x in theirs.items()}
    compared = parity.compare(expected, theirs, tolerance=parity.tolerance(model.model))
    report = parity.report(compared, "transformers")
    assert report.ok, report.text


def as_stored(folder):
    """The arrays of a folder of ours under transformers' names."""
    return names.state_dict(saved_model.load_model(folder)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_transformers_saves_comes_back(small, tmp_path, capsys, dtype):
    """Trained on in torch: another weight, in that precision, in one file or several. No code is run."""
    model = transformers.AutoModel.from_pretrained(small[1], dtype=dtype, **REMOTE)
    with torch.no_grad():
        model.decoder.img_proj += 0.25
    folder, marker = tmp_path / "tuned", tmp_path / "executed"
    model.save_pretrained(folder, max_shard_size="100kB" if dtype == torch.float32 else "1GB")
    for path in small[1].glob("*_grain.py"):
        (folder / path.name).write_text(f"import os; os.mkdir({str(marker)!r})\n")
    assert main(["from-hf", "--input", str(folder), "--output", str(tmp_path / "back")]) == 0
    assert capsys.readouterr().out.rstrip().endswith("parity: PROVEN") and not marker.exists()
    back = as_stored(tmp_path / "back")
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(back[name], tensor.float().numpy(), err_msg=name)
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) > 1) == (dtype == torch.float32)
    if len(files) > 1:
        files[0].unlink()
        said = " ".join(refused(capsys, "from-hf", folder, tmp_path / "out"))
        assert files[0].name in said and str(folder) in said


def test_images_of_every_mode_and_the_golden_strings_are_as_ours(processor):
    rng = np.random.default_rng(7)
    rgba = PIL.Image.fromarray(rng.integers(0, 256, (61, 33, 4), np.uint8), "RGBA")
    raw = [rgba, *(rgba.convert("RGB").convert(mode) for mode in ("L", "P", "1", "CMYK"))]
    raw += [np.asarray(raw_images()[0])]
    pixels = processor(images=raw)["pixel_values"].permute(0, 2, 3, 1).numpy()
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    levels = np.rint((pixels * std + mean) * 255)
    np.testing.assert_array_equal(levels, [images.resize(image, 40) for image in raw])
    strings = json.loads((GOLDENS / "tokenizer.json").read_text())["strings"]
    ids = processor(text=[s["text"] for s in strings], max_length=77, padding="max_length")
    wrong = [
        s["text"]
        for s, row in zip(strings, ids["input_ids"].tolist())
        if row[: len(s["ids"])] != s["ids"] or set(row[len(s["ids"]) :]) - {clip_tokenizer.END_OF_TEXT}
    ]
    assert not wrong


def test_the_zero_shot_pipeline_of_transformers_takes_it(converted, processor):
    ours, hf = converted
    pipeline = transformers.pipeline(
        "zero-shot-image-classification",
        model=transformers.AutoModelForZeroShotImageClassification.from_pretrained(hf, **REMOTE),
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
    )
    (entries,) = pipeline(raw_images()[:1], candidate_labels=["wren", "owl"], hypothesis_template="{}")
    model = grain_jax.load(ours)
    model.templates = ["{}"]
    odds = np.exp(np.exp(2.5) * model.classify(raw_images()[:1], ["wren", "owl"])[0])
    by_label = {entry["label"]: entry["score"] for entry in entries}
    np.testing.assert_allclose([by_label["wren"], by_label["owl"]], odds / odds.sum(), rtol=1e-5)


def test_models_of_another_kind_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(named.VARIABLE, "examples.tower.mixer")
    for kind in (dict(), dict(decoder=None, image__pool="mean")):
        model = perturbed.tiny(image__tower="examples.tower.mixer:Mixer", **kind)
        saved_model.save_model(tmp_path / "mixer", model, {"logit_scale": np.zeros(())})
        assert refused(capsys, "to-hf", tmp_path / "mixer", tmp_path / "hf") == [
            "model.image.tower: got examples.tower.mixer:Mixer, modeling_grain.py has vit",
            "1 fault; nothing was written",
        ]


METRICS = """{"step": 5, "eval/birds/accuracy": 0.25}
{"step": 9, "loss": 1.0}
{"step": 12, "eval/birds/accuracy": 0.75}
{"step": 13, "eval/bi"""  # the last two are of weights that no checkpoint has


def test_a_run_is_in_the_model_card_and_its_moving_average_is_written(tmp_path, capsys):
    model = perturbed.tiny()
    average = perturbed.params(model, seed=1)
    state = jax.tree.map(jnp.asarray, State(9, perturbed.params(model), (), average))
    c = tiny.config(input__name="cc12m", loss__box=1.5, ema_decay=0.99,
                    model__decoder__queries=3, loss__image_description=0.5, loss__group_size=4)  # fmt: skip
    c, workdir = dataclasses.replace(c, model=model), tmp_path / "run"
    with states.Checkpoints(workdir, c) as checkpoints:
        checkpoints.save(state)
    (workdir / "metrics.jsonl").write_text(METRICS)
    out = tmp_path / "hf"
    assert main(["to-hf", "--input", str(workdir), "--output", str(out)]) == 0
    card = (out / "README.md").read_text()
    for words in (
        *("| input.name | cc12m |", "| step of these weights | 9 |", "| ema_decay | 0.99 |"),
        *("| loss.box | 1.5 |", "During training, at step 5:", "| eval/birds/accuracy | 0.25 |"),
        *("parity: PROVEN", "The weights: not stated by the run"),
        "The folder has no tokenizer files: a vocabulary of 300 is not CLIP's",
    ):
        assert words in card
    module = transformers.AutoModel.from_pretrained(out, **REMOTE)
    kernel = average["image_projection"]["kernel"]
    np.testing.assert_array_equal(module.decoder.img_proj.detach(), kernel)


def test_a_tokenizer_elsewhere_leaves_its_name_alone(tmp_path):
    changes = dict(image__depth=1, text__depth=1, decoder__depth=1)
    model = perturbed.tiny(text__tokenizer="/home/me/words.json", **changes)
    saved_model.save_model(tmp_path / "ours", model, perturbed.params(model))
    huggingface.to_hf(tmp_path / "ours", tmp_path / "hf")
    texts = [path.read_text() for path in tmp_path.glob("hf/*") if path.suffix != ".safetensors"]
    assert any("words.json is no file in the folder of the model" in text for text in texts)
    assert not any("/home/me" in text for text in texts)
    report = from_hf(tmp_path / "hf", tmp_path / "back")
    assert "tokenizer NOT FOUND" in report.text
