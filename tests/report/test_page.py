"""The page as text; tests/report/test_in_browser.py opens it."""

import html.parser
import json
import re

import numpy as np
import PIL.Image
import pytest

from grain_jax import config as config_lib
from grain_jax import inference
from grain_jax.config import recipe
from grain_jax.inference import predictor as predictor_lib
from grain_jax.report import __main__ as command
from grain_jax.report import charts, collect, page, regions, run_files, thumbnails
from tests import tiny
from tests.evaluate.stub import measure
from tests.report import workdirs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two workdirs and the page of each, which is written with the model at hand."""
    folders, predictor = workdirs.two(tmp_path_factory.mktemp("report"))
    for folder in folders:
        page.write(folder, predictor)
        (folder / "checkpoints" / "40").mkdir(parents=True)  # as if that step was saved
    return folders, predictor


class _Parsed(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.loaded, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loaded += [x for key, x in attributes if key in ("src", "href", "data", "action")]

    def handle_data(self, text):
        self.texts.append(text)


def _payload(text):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(found.group(1))


def _page(folder):
    return (folder / "report.html").read_text()


def test_it_holds_the_numbers(runs):
    (folder, _), _ = runs
    text = _page(folder)
    shown = " ".join(_Parsed(text.split('<script type="application/json"')[0]).texts)
    for said in (
        "birds: top-1, alpha 1 77.5% 70.0 - 83.0%; chance 33.3%; of 12 pictures",
        "boxes: matched box IoU 0.464 chance 0.200",
        "cifar10: top-1, alpha 1 60.0% chance 10.0%; of 40 pictures",
        "cifar10, by name: top-1, alpha 1 50.0% chance 10.0%; of 40 pictures",
        "optim.learning_rate 0.001",
        "jax 9.8.7",
        "2 records, an unbroken chain",
        "python -m grain_jax.train --workdir x",
        "dtd (suite.json): skipped: no data: tfds build dtd",
    ):
        assert said in re.sub(r"\s+", " ", shown), said
    (run,) = _payload(text)["runs"]
    assert run["series"]["loss"] == [
        list(range(2, 42, 2)),
        [float(f"{9 / s:.5g}") for s in range(2, 42, 2)],
    ]
    for name, cat in (("cifar10", 0.25), ("cifar10, by name", 0.05)):
        assert run["perClass"][f"{name} (suite.json)"]["alphas"] == {
            "1": {"cat": [cat, 20], "ship": [0.95, 20]}
        }
    charts = {chart["title"]: dict(chart["series"]) for chart in _payload(text)["charts"]}
    assert charts["Losses"] == {"loss": "total", "loss_box": "boxes"}
    assert charts["Gradient norms"] == {"grad_norm": "all", "grad_norm/image": "image"}
    assert charts["Evaluations"]["eval/birds/alpha_1.0/top1"] == "birds: top-1, alpha 1"


def test_a_box_head_says_what_is_in_annotated_boxes(runs):
    folder = runs[0][0].parent.parent / "data"
    predictor = workdirs.predictor(model__boxes__kind="roi_align", loss__box_description=1.0)
    evals = json.loads((runs[0][0] / "config.json").read_text())["evals"]
    found = regions.collect(predictor, evals, thumbnails.Thumbnails(), limit=20)
    run = found["regions"]
    lines = map(json.loads, (folder / "A.jsonl").read_text().splitlines())
    texts = sorted({region["description"] for line in lines for region in line["regions"]})
    for image in run["pictures"]:
        boxes = np.array([[2, 2, 12, 12], [6, 10, 22, 20]]) / 24
        scores = predictor.classify_boxes(
            [PIL.Image.open(folder / image["name"])],
            [boxes],
            predictor_lib.ClassFeatures(tuple(texts), predictor.encode_text(texts), None),
        )[0]
        for box in image["true"]:
            row = scores[[2 / 24, 6 / 24].index(pytest.approx(box["box"][0], abs=1e-3))]
            nearest = [texts[i] for i in np.argsort(-row)[:3]]
            assert [run["texts"][t] for t, _ in box["best"]] == nearest
            assert [x for _, x in box["best"]] == pytest.approx(np.sort(row)[::-1][:3], abs=2e-3)
    assert "best" not in _payload(_page(runs[0][0]))["runs"][0]["regions"]["pictures"][0]["true"][0]


def test_what_the_model_does_is_what_the_evaluations_measure(runs):
    (folder, _), predictor = runs
    (run,) = _payload(_page(folder))["runs"]
    data = folder.parent.parent / "data"
    measured = measure(
        "zeroshot",
        predictor,
        images=data / "classes",
        descriptions=data / "D.json",
        alphas=(1.0, 0.5),
        names=False,
    )
    for alpha in ("1.0", "0.5"):
        alphas = run["perClass"]["birds"]["alphas"][f"{float(alpha):g}"]
        shares = {name: share for name, (share, _) in alphas.items()}
        assert shares == pytest.approx(measured[f"alpha_{alpha}"]["per_class"])
        assert {n for _, n in alphas.values()} == {workdirs.PER_CLASS}
        pairs = run["zeroshot"]["birds"]["alphas"][f"{float(alpha):g}"]["confusions"]
        wrong = sum(pair["count"] for pair in pairs)
        assert wrong == pytest.approx(12 * (1 - measured[f"alpha_{alpha}"]["top1"]))
        assert [p["count"] for p in pairs] == sorted((p["count"] for p in pairs), reverse=True)
        assert all(len(p["pictures"]) == min(p["count"], 3) for p in pairs)
    measured = measure("grounding", predictor, images=data, annotations=data / "A.jsonl")
    regions = [
        r for p in run["regions"]["pictures"] for r in p["predicted"] if r["own"] is not None
    ]
    assert len(regions) == measured["regions_matched"] == 2 * workdirs.ANNOTATED
    assert np.mean([r["iou"] for r in regions]) == pytest.approx(measured["box_iou"], abs=1e-3)
    right = np.mean([r["best"][0][0] == r["own"] for r in regions])
    assert right == pytest.approx(measured["region_to_description_r1"])
    queries = run["queries"]["queries"]
    assert sum(q["matched"] for q in queries) == len(regions)
    assert all(sum(n for _, n in q["says"]) == workdirs.ANNOTATED for q in queries)
    mean = np.mean([p["predicted"][1]["box"] for p in run["regions"]["pictures"]], axis=0)
    assert queries[1]["mean_box"] == pytest.approx(mean, abs=2e-4)
    attention = run["attention"]
    assert (attention["layers"], attention["heads"], attention["side"]) == (2, 2, 2)


def test_it_loads_nothing(runs):
    for folder in runs[0]:
        text = _page(folder)
        parsed = _Parsed(text)
        assert {value[:1] for value in parsed.loaded} == {"#"}  # links within the page
        assert not {"link", "iframe", "object", "embed", "base"} & set(parsed.tags)
        assert "@import" not in text and "url(" not in text
        uris = [uri for r in _payload(text)["runs"] for uri in r["thumbs"]]
        assert all(uri.startswith("data:image/jpeg;base64,") for uri in uris)
        assert "default-src 'none'" in text and len(text) < 3_000_000


def test_texts_of_a_run_are_no_html(runs):
    (folder, _), _ = runs
    text = _page(folder)
    parsed = _Parsed(text)
    assert parsed.tags.count("script") == 2 and "img" not in parsed.tags and "b" in parsed.tags
    (run,) = _payload(text)["runs"]
    assert (
        workdirs.BAD in run["regions"]["texts"]
        and workdirs.CLASSES[2] in run["perClass"]["birds"]["alphas"]["1"]
    )
    assert workdirs.BAD not in text and workdirs.CLASSES[2] not in text


def test_two_runs_side_by_side_need_no_model_again(runs, monkeypatch, capsys):
    def load(path):
        raise AssertionError(f"{path} was loaded")

    monkeypatch.setattr(inference, "load", load)
    folders, _ = runs
    output = folders[0].parent / "two.html"
    assert command.main([*map(str, folders), "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    text = output.read_text()
    first, second = _payload(text)["runs"]
    assert (first["label"], second["label"]) == ("first", "second")
    assert first["queries"]["pictures"] == second["queries"]["pictures"] == workdirs.ANNOTATED
    assert (
        '<tr class=differs><th scope="row"><code>optim.learning_rate</code></th>'
        '<td class="long"><code>0.001</code></td><td class="long"><code>0.002</code></td></tr>'
    ) in text
    assert '<tr><th scope="row"><code>batch_size</code>' in text
    assert text.count("<b>77.5%</b>") == 2


def test_files_alone(runs, tmp_path):
    (folder, _), _ = runs
    output = tmp_path / "new" / "page.html"
    assert command.main([str(folder), "--no-model", "--output", str(output)]) == 0
    (run,) = _payload(output.read_text())["runs"]
    assert run["lines"] == {"model": "no model was loaded (--no-model)"}
    assert run["regions"] is None and run["series"]["loss"][0][-1] == 40


def test_what_is_missing_is_a_line(runs, tmp_path):
    (folder, _), predictor = runs
    bare = tmp_path / "bare"
    bare.mkdir()
    config = json.loads((folder / "config.json").read_text())
    config["evals"]["birds"]["images"] = str(tmp_path / "gone")
    config["evals"]["boxes"]["annotations"] = str(tmp_path / "gone.jsonl")
    (bare / "config.json").write_text(json.dumps(config))
    text = page.write(bare).read_text()  # there is no checkpoint either
    (run,) = _payload(text)["runs"]
    assert list(run["lines"]) == ["model"] and str(bare) in run["lines"]["model"]
    for line in ("metrics.jsonl: missing or empty", "the run has not evaluated yet"):
        assert line in text
    text = page.write(bare, predictor).read_text()
    lines = _payload(text)["runs"][0]["lines"]
    assert f"{tmp_path / 'gone'}: no such folder" in lines["birds"]
    assert str(tmp_path / "gone.jsonl") in lines["regions"]
    # It is looked for again when the data is back.
    assert not json.loads((bare / collect.FILE).read_text())["whole"]
    (bare / "config.json").write_text((folder / "config.json").read_text())
    (run,) = _payload(page.write(bare, predictor, num_images=9).read_text())["runs"]
    assert "birds" not in run["lines"] and run["zeroshot"]["birds"]["pictures"] == 9


def test_a_set_with_other_names(runs, tmp_path):
    _, predictor = runs
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(3):
            pixels = random.integers(0, 256, (24, 24, 3)).astype(np.uint8)
            PIL.Image.fromarray(pixels).save(tmp_path / "set" / name / f"{i}.png")
    (tmp_path / "names.txt").write_text("dotted\nwoven\n")
    c = tiny.dictionary()
    names = str(tmp_path / "names.txt")
    c.evals.dtd = recipe.evaluator("zeroshot", str(tmp_path / "set"), classes=names)
    config = json.loads(config_lib.to_json(config_lib.from_dict(c)))
    found = collect.collect(tmp_path, config, predictor, step=1)
    assert found["lines"] == {
        "regions": "no entry of config.evals has annotated boxes (kind grounding)"
    }
    alpha = found["zeroshot"]["dtd"]["alphas"]["1"]
    hits = {name: hits for name, (hits, n) in alpha["per_class"].items() if n == 3}
    assert hits.keys() == {"dotted", "woven"}
    assert sum(p["count"] for p in alpha["confusions"]) == 6 - sum(hits.values()) > 0
    (pair, *_) = alpha["confusions"]
    assert {pair["true"], pair["predicted"]} == {"dotted", "woven"}
    # The images themselves, and one of the other class, whatever it was taken for.
    assert len({*pair["pictures"], pair["example"]}) == pair["count"] + 1
    assert found["whole"] and len(found["thumbs"]) > pair["count"]


def test_wrong_use(tmp_path, capsys):
    assert command.main([str(tmp_path / "none")]) == 2
    assert command.main([str(tmp_path)]) == 2
    assert command.main([str(tmp_path), "--num-images", "0"]) == 2
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}')
    assert command.main([str(tmp_path), "--results", str(tmp_path / "gone.json")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"{tmp_path / 'none'}: no such folder; expected the workdir of a run"
    assert "has neither config.json nor metrics.jsonl" in lines[1]
    assert "--num-images: got '0', expected a whole number in 1.." in lines[2]
    assert f"{tmp_path / 'gone.json'}: cannot be read" in lines[3]
    assert len(lines) == 4


def test_labels_and_thinning():
    named = charts.headline("eval/un_seen/by_name/alpha_0.50/top1")
    assert named == "un seen, by name: top-1, alpha 0.5"
    assert run_files.labels(["/a/x/1", "/b/y/1"]) == ["x/1", "y/1"]
    assert run_files.labels(["/a/x", "/a/x"]) == ["//a/x (1)", "//a/x (2)"]
    steps, values = run_files.thinned(list(range(2000)), [s / 3 for s in range(2000)])
    assert len(steps) == 667 and steps[-1] == 1999 and values[-1] == 666.33


def test_which_curves_share_a_chart():
    keys = "mfu eval/d/query/0/share eval/d/query/0/cx eval/d/matched_iou eval/d/pictures query_share/1"
    keys += " input_wait_fraction input_wait_steps matched_iou50 loss_x loss self/entropy self/entropy_of_one"
    keys += " eval/s/miou eval/s/pixels eval/s/classes_seen eval/s/pixel_accuracy"
    keys = keys.split()
    made = {chart.title: chart.series for chart in charts.charts(keys, 2)}
    assert made == {
        "Losses": {"loss": "total", "loss_x": "loss_x"},
        "Evaluations": {"eval/s/miou": "s: mIoU"},
        "Entropy of the prototypes: self": {
            "self/entropy": "of the mean",
            "self/entropy_of_one": "of single ones",
        },
        "Share of the matched regions, by query": {"query_share/1": "query 2"},
        "Regions while training": {"matched_iou50": "share with IoU of 0.5 or more"},
        "Share spent waiting for input": {
            "input_wait_fraction": "of the time",
            "input_wait_steps": "of the steps",
        },
        "Evaluation d: other numbers": {
            "eval/d/query/0/share": "query/0/share",
            "eval/d/matched_iou": "matched iou",
        },
        "Evaluation s: other numbers": {"eval/s/pixel_accuracy": "pixel accuracy"},
        "mfu": {"mfu": "mfu"},
    }
    assert len(charts.charts(keys, 1)) == len(made) - 3  # of one evaluation there is no course
