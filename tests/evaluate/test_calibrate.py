import json
import shutil

import numpy as np
import pytest
from scipy import special

import grain_jax
from grain_jax.checkpoint import pretrained
from grain_jax.data.aviary import samples
from grain_jax.evaluate import __main__ as command
from grain_jax.evaluate import calibrate
from grain_jax.inference import calibration
from grain_jax.inference.inputs import InputError
from tests.evaluate.stub import StubPredictor, annotate, measure, region


def _pairs(count, scale, bias, seed=0):
    """Random cosines, and whether a class is present by the probability that scale and bias say."""
    rng = np.random.default_rng(seed)
    cosines = rng.normal(0.2, 0.1, (count, 20))
    return cosines, rng.random((count, 20)) < special.expit(scale * cosines + bias)


def test_a_known_scale_and_bias_are_recovered():
    cosines, present = _pairs(20000, 30, -9)
    scale, bias = calibrate.fit(cosines, present)
    assert scale == pytest.approx(30, rel=0.01) and bias == pytest.approx(-9, rel=0.01)
    # No other pair near it has a smaller loss.
    loss = lambda s, b: calibrate.reliability(s * cosines + b, present)["log_loss"]
    assert loss(scale, bias) <= min(loss(scale * a, bias + b) for a in (0.99, 1, 1.01) for b in (-0.05, 0.05))
    assert calibrate.reliability(scale * cosines + bias, present)["ece"] < 0.005


def test_cosines_that_separate_have_the_largest_scale():
    scale, bias = calibrate.fit(np.array([[0.1, 0.2], [0.3, 0.4]]), np.array([[0, 0], [1, 1]], bool))
    assert 100 < scale <= calibrate.MAX_SCALE and -scale * 0.3 < bias < -scale * 0.2
    assert calibrate.fit(np.array([0.1, 0.2]), np.array([True, False]))[0] == 0.0  # never below it


def test_reliability_is_what_numpy_says():
    cosines, present = _pairs(500, 12, -4, seed=1)
    logits = 20 * cosines - 3
    p = 1 / (1 + np.exp(-logits))
    bins = [(p >= low / 15) & (p < (low + 1) / 15) for low in range(15)]
    gaps = sum(x.mean() * abs(p[x].mean() - present[x].mean()) for x in bins if x.any())
    got = calibrate.reliability(logits, present)
    assert got["ece"] == pytest.approx(gaps, rel=1e-9) and got["ece"] > 0.05
    truth = np.where(present, p, 1 - p)
    assert got["log_loss"] == pytest.approx(-np.log(truth).mean(), rel=1e-9)
    assert got["brier"] == pytest.approx(np.mean((1 - truth) ** 2), rel=1e-9)


def test_the_best_threshold_is_that_of_a_search():
    rng = np.random.default_rng(2)
    for _ in range(50):
        p = rng.integers(0, 8, 30) / 8 + 0.01  # ties
        y = rng.random(30) < p / 2
        y[0] = True
        f1 = lambda t: 2 * (y & (p >= t)).sum() / ((p >= t).sum() + y.sum())
        got = calibrate.best_threshold(p, y)
        assert f1(got) == max(map(f1, np.linspace(0, 1.1, 500))) and got not in p


NAMES = ["long beak", "red tail", "blue wing"]


@pytest.fixture
def stub(tmp_path):
    """60 images, with embedding and regions near to their descriptions; only one has a blue wing."""
    rng = np.random.default_rng(0)
    lines, images, regions = [], {}, {}
    for i in range(60):
        has = [0, 1] if i % 3 == 0 else [i % 2]
        has += [2] if i == 59 else []
        lines.append({"regions": [region([0, 0, 5, 5], NAMES[k]) for k in has]})
        noise = rng.normal(0, 0.4, (3, 4))
        images[i] = np.eye(4)[has].sum(axis=0) + noise[0]
        regions[i] = (np.tile([0, 0, 1, 1], (2, 1)), np.eye(4)[[has[0], has[-1]]] + noise[1:])
    predictor = StubPredictor(images, dict(zip(NAMES, np.eye(4))), regions)
    predictor.logit_scale, predictor.logit_bias = 100.0, None
    predictor.region_logit_scale, predictor.region_logit_bias = 10.0, -10.0
    return predictor, annotate(tmp_path, lines)


def test_annotations(stub):
    predictor, options = stub
    got = measure("calibrate", predictor, **options, share=0.4)
    assert got["fitted"] + got["held_out"] == got["images"] == 60 and 14 < got["fitted"] < 34
    assert got["classes"] == 3
    for way in ("image", "regions"):
        before, after = got[way]["before"], got[way]["after"]
        assert after["ece"] < 0.15 < before["ece"] and after["log_loss"] < before["log_loss"]
    content = got["calibration"]
    assert set(content["image"]["thresholds"]) == set(NAMES) and content["image"]["templates"] == []
    # The only blue wing is on the side that measures: it has the common threshold.
    assert content["image"]["thresholds"]["blue wing"] == content["image"]["threshold"]
    assert got["notes"] == ["1 classes without images to fit have the common threshold: blue wing"]
    common = measure("calibrate", predictor, **options, share=0.4, thresholds="common")
    assert common["calibration"]["image"]["thresholds"] == {}
    assert common["calibration"]["image"]["threshold"] == content["image"]["threshold"]
    json.dumps(got)


@pytest.mark.parametrize("blind", [["image"], ["image", "regions"]])
def test_scores_that_separate_nothing_are_not_stored(blind, stub):
    """Before, their scale was 0: all was present, with an ECE of 0%."""
    predictor, options = stub
    predictor.images = {i: -x for i, x in predictor.images.items()}
    if "regions" in blind:
        predictor.regions = {i: (box, -x) for i, (box, x) in predictor.regions.items()}
    else:  # a single class has a score that is always the same
        predictor.texts["long beak"] = np.zeros(4)
    got = measure("calibrate", predictor, **options)
    kept = calibrate.Calibrate(**{k: str(v) for k, v in options.items()}).finish(predictor, got)
    for way in ("image", "regions"):
        said = f"{way}: the scores are not higher where present; nothing is stored"
        assert (said in got["notes"]) == ("after" not in got[way]) == (way in blind)
        assert (got["calibration"][way] is None) == (way in blind)
    assert kept.startswith("not stored: no score is higher") == (len(blind) == 2)
    if len(blind) == 1:
        assert set(got["calibration"]["regions"]["thresholds"]) == {"red tail", "blue wing"}
        said = "the scores are not higher where these are present; no threshold: long beak"
        assert f"regions: {said}" in got["notes"]


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    """A copy of aviary-tiny, and drawn birds as class folders and as A.jsonl."""
    folder = tmp_path_factory.mktemp("birds")
    shutil.copytree(pretrained.folder_of("aviary-tiny"), folder / "model")
    (folder / "model" / calibration.NAME).unlink(missing_ok=True)
    lines = []
    for i, bird in enumerate(samples.birds(24, seen=True)):
        name = f"images/{bird.name.replace(' ', '_')}/{i}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        bird.image.save(folder / name)
        boxes = zip(bird.boxes_xyxy, np.array(list(bird.boxes_xyxy.values())) * bird.image.width)
        regions = [region(box.tolist(), text) for text, box in boxes]
        lines.append(json.dumps({"image": name, "regions": regions}))
    (folder / "A.jsonl").write_text("\n".join(lines))
    return folder


def _run(folder, *flags):
    where = ["--checkpoint", str(folder / "model"), "--output", str(folder / "out.json")]
    status = command.main(["calibrate", *where, *flags])
    return status, json.loads((folder / "out.json").read_text()) if status == 0 else None


def test_the_command_and_present(birds, capsys):
    drawn = samples.birds(3, seen=True)
    images, text = [bird.image for bird in drawn], next(iter(drawn[0].boxes_xyxy))
    model = grain_jax.load(birds / "model")
    with pytest.raises(InputError, match="grain-jax evaluate calibrate --checkpoint .*model --images"):
        model.present(images, [text])
    status, result = _run(birds, "--images", str(birds), "--annotations", str(birds / "A.jsonl"))
    assert status == 0
    out = capsys.readouterr().out
    assert f"stored: {birds}/model/calibration.json\n" in out
    assert "calibrate: image/after/ece" in out
    assert json.loads((birds / "model" / "calibration.json").read_text()) == result["calibration"]
    assert result["regions"]["after"]["log_loss"] < result["regions"]["before"]["log_loss"]
    ways = {"image": model.encode_image(images)[:, None], "regions": model.encode_regions(images).embed}
    for by, embeds in ways.items():
        got = model.present(images, [text, "a bird"], by=by)
        assert got.dtype == np.float32 and got.shape == (3, 2)
        score = result["calibration"][by]
        cosine = (embeds @ model.encode_text(text)).max(axis=1)
        expected = special.expit(score["logit_scale"] * cosine + score["logit_bias"])
        np.testing.assert_allclose(got[:, 0], expected, atol=1e-5)
        np.testing.assert_allclose(model.present(images[0], [text], by=by), expected[:1], atol=1e-5)
        np.testing.assert_allclose(model.present(images, text, by=by), expected, atol=1e-5)
    with pytest.raises(InputError, match="by: got 'boxes', expected image or regions"):
        model.present(images, [text], by="boxes")
    # Class folders: texts are names of classes, in prompts; there is no score of regions.
    status, result = _run(birds, "--images", str(birds / "images"), "--thresholds", "common")
    assert status == 0 and result["calibration"]["regions"] is None
    name = drawn[0].name
    features = calibration.embed_texts(model.encode_text, [name], model.templates)
    score, cosine = result["calibration"]["image"], model.encode_image(images) @ features[0]
    expected = special.expit(score["logit_scale"] * cosine + score["logit_bias"])
    np.testing.assert_allclose(model.present(images, name), expected, atol=1e-5)
    with pytest.raises(InputError, match="got one without regions, .* --annotations A.jsonl"):
        model.present(images, [name], by="regions")
    # Other parameters, and a damaged file.
    path = birds / "model" / "calibration.json"
    path.write_text(json.dumps(result["calibration"] | {"params": "0"}))
    with pytest.raises(InputError, match="got that of other parameters, expected"):
        model.present(images, [name])
    path.write_text('{"params": 3}')
    with pytest.raises(grain_jax.core.errors.UserError, match="calibration.json: Expected `str`"):
        model.present(images, [name])


def test_the_files_of_the_package_are_not_changed(stub):
    predictor, options = stub
    entry = calibrate.Calibrate(**{k: str(v) for k, v in options.items()})
    result = entry.evaluate(predictor)
    folder = predictor.folder = str(pretrained.folder_of("aviary-tiny"))
    assert "the model comes with the package" in entry.finish(predictor, result)
    predictor.folder = "gs://bucket/run"
    assert "(gs://bucket/run: the folder is remote)" in entry.finish(predictor, result)
    predictor.folder = f"{folder}/none"
    assert "not stored beside the model" in entry.finish(predictor, result)


FAULTS = {
    "--share 1": "share: got 1.0, expected a number between 0 and 1",
    "--share 1e-9": "images to fit and 24 to measure, expected some of each",
    "--annotations nowhere.jsonl": "nowhere.jsonl: no such file",
}


@pytest.mark.parametrize("flags", FAULTS)
def test_faults_are_one_line(birds, capsys, flags):
    assert _run(birds, "--images", str(birds / "images"), *flags.split())[0] == 2
    out, err = capsys.readouterr()
    assert out == "" and FAULTS[flags] in err.splitlines()[-1]  # progress stands above it
