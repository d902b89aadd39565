"""The page about a run, read as text."""

import html.parser
import json
import re
import shutil
import unicodedata

import numpy as np
import pytest

from grain_jax.core import errors
from grain_jax.evaluate.report import charts, look, page
from tests.evaluate.report import workdirs
from tests.evaluate.stub import measure


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run, with its page, and its model."""
    root, predictor = tmp_path_factory.mktemp("report"), workdirs.predictor()
    workdirs.data(root / "data")
    folder = workdirs.workdir(root / "run", root / "data")
    page.write(folder, predictor)
    return folder, predictor


class _Parsed(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.loaded, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loaded += [x for key, x in attributes if key in ("src", "href", "data", "action")]

    def handle_data(self, text):
        if self.tags[-1] not in ("style", "script"):
            self.texts.append(text)


def _text(file):
    return re.sub(r"\s+", " ", " ".join(_Parsed(file.read_text()).texts))


def _evals(folder):
    return json.loads((folder / "config.json").read_text())["evals"]


def test_it_holds_the_numbers(run):
    shown = _text(run[0] / "report.html")
    for phrase in (
        "birds: alpha_1.0/top1 77.5% 70.0 - 83.0%; chance 33.3%; of 12 images",
        "boxes: box_iou 0.464 chance 0.200",
        "cifar10: alpha_1.0/top1 60.0% chance 10.0%; of 40 images",
        "cifar10: by_name/alpha_1.0/top1 50.0% chance 10.0%; of 40 images",
        "cifar10, alpha 1.0 (suite.json) cat 25.0% ship 95.0%",
        "birds, alpha 1.0 (12 of 12 images)",
        "total 0.225",
        "dtd (suite.json): skipped: no data: tfds build dtd",
    ):
        assert phrase in shown, phrase


def test_what_the_model_does_is_what_the_evaluations_measure(run):
    folder, predictor = run
    data = folder.parent / "data"
    looked = look.look(folder, predictor, _evals(folder), 300)
    assert looked.unmeasured == []
    options = dict(images=data / "classes", descriptions=data / "D.json", names=False)
    measured = measure("zeroshot", predictor, **options, alphas=(1.0, 0.5, 0.0))
    assert {name: pytest.approx(shares) for name, shares in looked.classes.items()} == {
        f"birds, alpha {alpha} (12 of 12 images)": measured[f"alpha_{alpha}"]["per_class"]
        for alpha in (1.0, 0.5, 0.0)
    }
    measured = measure("grounding", predictor, images=data, annotations=data / "A.jsonl")
    judged = [box.right for card in looked.cards for box in card.boxes if box.right is not None]
    assert len(looked.cards) == workdirs.ANNOTATED
    assert len(judged) == measured["regions_matched"] == 2 * workdirs.ANNOTATED
    assert np.mean(judged) == pytest.approx(measured["region_to_description_r1"])
    for card in looked.cards:
        regions = [box for box in card.boxes if box.cosine is not None]
        annotated = [box for box in card.boxes if box.cosine is None]
        assert [box.colour for box in regions] == list(range(5)) and len(annotated) == 2
        matched = {box.colour for box in regions if box.right is not None}
        assert {box.colour for box in annotated} == matched


def test_it_loads_nothing_and_texts_of_a_run_are_no_html(run):
    text = (run[0] / "report.html").read_text()
    parsed = _Parsed(text)
    links = [value for value in parsed.loaded if not value.startswith("data:image/jpeg;base64,")]
    assert {value[0] for value in links} == {"#"}  # within the page
    assert not {"link", "iframe", "object", "embed", "base"} & set(parsed.tags)
    assert "script" not in parsed.tags and parsed.tags.count("img") == workdirs.ANNOTATED
    assert "default-src 'none'" in text and len(text) < 3_000_000
    assert workdirs.BAD in parsed.texts and workdirs.BAD not in text
    assert workdirs.CLASSES[2] in parsed.texts and workdirs.CLASSES[2] not in text


def test_files_alone(run, tmp_path, capsys):
    output = tmp_path / "new" / "page.html"
    page.main([str(run[0]), "--no-model", "--output", str(output)])
    assert capsys.readouterr().out == f"{output}\n"
    shown = _text(output)
    assert "no model was loaded" in shown and "Regions" not in shown and "cat 25.0%" in shown


def test_results_in_other_folders(run, tmp_path):
    output = tmp_path / "page.html"
    ran = json.loads((run[0] / "suite.json").read_text())["ran"]
    (tmp_path / "zero.json").write_text(json.dumps(next(iter(ran.values()))))
    page.main([str(run[0]), str(tmp_path / "zero.json"), "--no-model", "--output", str(output)])
    assert " zero: " in _text(output) and " zero.json " in _text(output)
    (tmp_path / "A.json").write_text("{}")
    for name, expected in {"A.json": "a file that grain-jax evaluate", "B.json": "a file that"}.items():
        with pytest.raises(errors.UserError, match=expected):
            page.main([str(run[0]), str(tmp_path / name), "--no-model"])


def test_what_is_missing_is_a_line(run, tmp_path):
    folder, predictor = run
    config = json.loads((folder / "config.json").read_text())
    config["evals"]["birds"]["images"] = str(tmp_path / "gone")
    config["evals"]["boxes"]["annotations"] = str(tmp_path / "gone.jsonl")
    (tmp_path / "config.json").write_text(json.dumps(config))
    shown = _text(page.write(tmp_path))  # there is no checkpoint either
    assert f"model: {tmp_path}" in shown and "metrics.jsonl: missing or empty" in shown
    shown = _text(page.write(tmp_path, predictor))
    for name in ("gone", "gone.jsonl"):
        assert str(tmp_path / name) in shown


def test_a_damaged_file_is_a_line(run, tmp_path, capsys):
    folder = shutil.copytree(run[0], tmp_path / "run")
    for name in ("config.json", "results.json", "suite.json"):
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    page.main([str(folder), "--no-model"])
    shown, lines = _text(folder / "report.html"), capsys.readouterr().err.splitlines()
    for name, line in zip(("config.json", "results.json", "suite.json"), lines, strict=True):
        assert line.startswith(f"{folder / name}: damaged (") and line in shown
    assert "birds: alpha_1.0/top1 0.775" in shown  # metrics.jsonl has it, too
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(errors.UserError, match="has neither config.json nor"):
        page.main([str(folder)])
    assert capsys.readouterr().err.startswith(f"{folder}/config.json: damaged (")


def test_no_text_of_a_run_moves_its_neighbours(run, tmp_path):
    nasty = "\x1b[2J\0\N{RIGHT-TO-LEFT OVERRIDE}\N{PARROT}"
    folder = shutil.copytree(run[0], tmp_path / nasty[-2:])
    values = {f"{key}{nasty}": 0.5 for key in ("loss_", "mfu", "eval/birds/", "eval/")}
    lines = [json.dumps({"step": step} | dict.fromkeys(values, step)) for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "results.json").write_text(json.dumps(values))
    config = json.loads((folder / "config.json").read_text()) | {nasty: nasty}
    (folder / "config.json").write_text(json.dumps(config))
    text = page.write(folder, model=False).read_text()
    assert {x for x in text if unicodedata.category(x) in ("Cc", "Cf")} <= {"\n"}
    assert text.count("\\x1b[2J\\x00\\u202e\N{PARROT}") >= 6


@pytest.mark.parametrize("name, said", [("none", "no such folder"), ("", "has neither config.json")])
def test_wrong_use(tmp_path, name, said):
    with pytest.raises(errors.UserError, match=said):
        page.main([str(tmp_path / name)])


@pytest.mark.quick
def test_which_curves_share_a_chart():
    keys = "mfu eval/d/query/0/cx eval/s/miou eval/s/by_name/alpha_0.5/top1 query_share/1"
    keys += " input_wait_fraction matched_iou50 loss_x loss grad_norm grad_norm/image"
    curve = ([1.0, 2.0], [3.0, 4.0])
    made = {chart.title: chart.labels for chart in charts.charts(dict.fromkeys(keys.split(), curve))}
    assert made == {
        "Losses": {"loss": "total", "loss_x": "loss_x"},
        "Evaluations": {
            "eval/s/miou": "s: mIoU",
            "eval/s/by_name/alpha_0.5/top1": "s: top-1, by name alpha 0.5",
        },
        "Share of the matched regions, by query": {"query_share/1": "query_share/1"},
        "Regions": {"matched_iou50": "matched_iou50"},
        "Gradient norms": {"grad_norm": "grad_norm", "grad_norm/image": "grad_norm/image"},
        "Waiting for input": {"input_wait_fraction": "input_wait_fraction"},
        "mfu": {"mfu": "mfu"},
    }


@pytest.mark.quick
def test_the_line_of_a_curve():
    chart = charts.Chart("a < b", {"x": "curve"})
    drawn = charts.svg(chart, {"x": ([0.0, 10.0], [1.0, 3.0])})
    assert '<polyline points="64.0,170.0 412.0,10.0"' in drawn and "a &lt; b" in drawn
    assert ">1</text>" in drawn and ">3</text>" in drawn and "curve 3</span>" in drawn
    many = charts.svg(chart, {"x": (list(range(2000)), [0.0] * 1999 + [1.0])})
    assert many.count(",170.0") == 399 and many.count(",10.0") == 1  # the last point stays


@pytest.mark.quick
def test_flat_and_bookkeeping_curves_are_left_out():
    lines = dict.fromkeys(["loss", "mfu", "time/unix", "texts_dropped"], ([1, 2], [0.5, 2.5e10]))
    lines |= {"logit_scale": ([1, 2], [3, 3])}
    assert re.findall("<h3>(.*?)<", charts.figures(lines)) == ["Losses", "mfu"]
    numbers = [0, 0.000863, -0.000863, 999, 178715, 2.279e10, -8.63e-5]
    short = ["0", "0.000863", "-0.000863", "999", "178,715", "2.28e10", "-8.63e-5"]
    assert list(map(charts._short, numbers)) == short
