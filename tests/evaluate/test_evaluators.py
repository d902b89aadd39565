"""What evaluators share: entries of a config, checks without a model, the loop over images, tables."""

import dataclasses
import functools
import json
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

from grain_jax import config
from grain_jax.config import recipe
from grain_jax.core import errors, named
from grain_jax.evaluate import base, calibrate, encode, kinds, suite, tables, zeroshot
from grain_jax.runtime import processes
from tests import tiny
from tests.evaluate.stub import StubPredictor, annotate, measure, region, write_picture
from tests.paths import ROOT

pytestmark = pytest.mark.quick


def _faults(entry):
    with pytest.raises(config.ConfigError) as found:
        kinds.from_entry(entry)
    return str(found.value).split("\n")


def _check(good, **fields):
    with pytest.raises(errors.UserError) as found:
        dataclasses.replace(good, **fields).check()
    return str(found.value).split("\n")


def test_a_config_is_parsed_without_the_libraries_that_compute():
    code = "import sys\nfrom grain_jax.evaluate import kinds\n"
    code += f"entries = [kinds.from_entry(dict(kind=kind)) for kind in {list(kinds.KINDS)}]\n"
    code += "print(*(type(entry).__name__ for entry in entries))\n"
    code += "print(*{'jax', 'tensorflow', 'numpy', 'etils.epath', 'PIL'} & sys.modules.keys())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    names = "ZeroShot LinearProbe Retrieval Grounding Boxes HardNegatives Segmentation Detection Calibrate"
    assert done.stdout == f"{names}\n\n"


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_every_kind_has_its_options_from_the_recipe_to_the_class(kind):
    entry = recipe.ConfigDict(kinds.evaluator(kind, "FOLDER", get="how")).to_dict()
    parsed = kinds.from_entry(entry)
    assert type(parsed) is kinds.find(kind) and parsed.kind == kind
    assert parsed == type(parsed)(images="FOLDER", get="how")
    assert dataclasses.asdict(parsed).keys() == entry.keys()
    assert kinds.from_entry({"kind": kind, "images": "FOLDER", "get": "how"}) == parsed


def test_faults_of_an_entry():
    (line,) = _faults({"kind": "zeroshott"})
    begin = "evaluator.kind: evaluator 'zeroshott': did you mean zeroshot? expected one of: boxes, calibrate,"
    assert line.startswith(begin) and line.endswith(", segmentation, zeroshot; or module:Name of your own")
    (line,) = _faults({"kind": "zeroshot", "descriptoins": "D.json"})
    assert line == "evaluator.descriptoins: no such key; did you mean evaluator.descriptions?"
    assert _faults({"kind": "zeroshot", "names": "yes", "alphas": 1.0, "missing": None}) == [
        "evaluator.missing: got None, expected one of error, skip",
        "evaluator.alphas: got 1.0, expected tuple of float",
        "evaluator.names: got 'yes', expected bool",
    ]
    assert "expected a group with kind: one of zeroshot, linear" in _faults({"images": "x"})[0]
    assert "expected a group with kind" in _faults("zeroshot")[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unfinished(base.Evaluator):
    """An evaluator that cannot evaluate."""

    def check(self, model=None):
        return 0


def test_faults_of_a_class_from_outside():
    here = Unfinished.__module__
    assert _faults({"kind": f"{here}:Unfinished"}) == [
        f"evaluator.kind: evaluator '{here}:Unfinished': has no evaluate; expected check and evaluate"
    ]
    (line,) = _faults({"kind": f"{here}:ROOT"})
    assert line.endswith("expected a subclass of grain_jax.evaluate.base.Evaluator")
    assert "has no 'Unfinnished', expected one of: " in _faults({"kind": f"{here}:Unfinnished"})[0]
    with named.importing():
        assert "'no.such' cannot be imported (No module" in _faults({"kind": "no.such:Class"})[0]


def test_a_stored_config_imports_no_code():
    stored = json.loads(config.to_json(tiny.config()))
    entry = {"kind": "no.such:Class", "missing": "error", "get": None, "k": 3}
    stored["evals"]["mine"] = entry
    parsed = config.from_dict(stored)
    assert parsed.evals["mine"]["kind"] == "no.such:Class"
    counted = config.without_defaults(parsed)
    assert {key: counted[f"evals.mine.{key}"] for key in entry} == entry
    with pytest.raises(errors.UserError, match="a stored config imports no code; if you trust it"):
        kinds.from_entry(parsed.evals["mine"])


def test_check_finds_every_fault_before_there_is_a_model(tmp_path):
    write_picture(tmp_path / "classes" / "cat" / "0.png", 0)
    write_picture(tmp_path / "classes" / "dog" / "0.png", 1)
    (tmp_path / "D.json").write_text('{"cat": ["whiskers"]}')
    (tmp_path / "broken.json").write_text("{")
    good = zeroshot.ZeroShot(images=str(tmp_path / "classes"), alphas=(1.0, 0.5))
    good.check()  # alpha 0.5 does not count without descriptions
    assert calibrate.Calibrate(images="i", annotations="A.jsonl").data == ("i", "A.jsonl")

    faults = functools.partial(_check, good)
    no_folder = "no/such: no such folder; expected one with a sub-folder per class"
    assert faults(images="no/such") == [no_folder]
    assert faults(images="b", tfds="a") == ["tfds: got 'a' with images='b', expected one of the two"]
    described = dict(descriptions=str(tmp_path / "D.json"))
    assert faults(**described, alphas=(0.5, 2.0)) == [
        f"{tmp_path}/D.json: no description of the classes dog",
        "alpha: got 2.0, expected a number from 0 to 1",
    ]
    assert "got -1.0" in faults(alphas=(1.0, -1.0))[0]
    assert "expected a file (D.json) for alpha 0.7" in faults(alphas=(0.7,))[0]
    assert "for a test without class names" in faults(names=False)[0]
    assert "no.json: no such file" in faults(descriptions="no.json")[0]
    assert "Input data was truncated" in faults(descriptions=str(tmp_path / "broken.json"))[0]


@pytest.mark.parametrize("kind", ["retrieval", "grounding"])
def test_check_of_annotations(tmp_path, capsys, kind):
    write_picture(tmp_path / "0.png", 0)
    one = region([0, 0, 5, 5], "a beak", mask=0)
    line = {"image": "0.png", "caption": "a", "regions": [one], "licence": "CC0"}
    path = tmp_path / "A.jsonl"
    path.write_text((json.dumps(line) + "\n") * 200 + "{}\n")
    good = kinds.find(kind)(images=str(tmp_path), annotations=str(path))
    good.check()
    assert capsys.readouterr().err.splitlines() == [
        f"{path}:201: image: got none, expected the path of an image",
        f"{path}: faulty lines left out: 1",
        f"{path}: unknown keys kept out: licence (200), regions.mask (200)",
    ]
    no_folder = "no: no such folder; expected the one that the annotations' paths start from"
    assert _check(good, images="no") == [no_folder]
    no_file = "no.jsonl: no such file, expected one JSON object a line"
    assert _check(good, annotations="no.jsonl") == [no_file]
    (tmp_path / "empty").mkdir()
    assert "none of the 200 images of" in _check(good, images=str(tmp_path / "empty"))[0]
    path.write_text('{"image": "0.png"}\n[]\n')
    assert "2 lines are faulty, more than 1%" in _check(good)[-1]
    path.write_text('{"image": "0.png"}\n')
    assert "no line has a " in _check(good)[0]
    assert "annotations: got nothing" in _check(good, annotations=None)[0]


def test_boxes_that_lie_outside_are_no_boxes(tmp_path):
    given = annotate(tmp_path, [{"regions": [region([90, 0, 99, 9], "beak")]}])
    predictor = StubPredictor({0: [1, 0]}, {"beak": [1, 0]}, {0: ([[0, 0, 1, 1]], [[1, 0]])})
    with pytest.raises(errors.UserError, match="every box lies outside"):
        measure("grounding", predictor, **given)


def test_pictures_come_in_order_and_the_unreadable_are_named(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(7)]
    for i in (0, 1, 3, 4, 6):
        write_picture(paths[i], i, size=(10 + i, 5))
    paths[2].write_bytes(b"no picture")  # paths[5] does not exist
    predictor = StubPredictor(images={i: [i, 1.0] for i in range(7)})
    batches, options = [], dict(label="", batch_size=3)
    seen = lambda batch: batches.append(batch.index.tolist()) or {"index": batch.index}
    arrays, unreadable = encode.over_images(paths, encode.resizing(predictor), seen, **options)
    assert batches == [[0, 1, 3], [4, 6]] and arrays["index"].tolist() == [0, 1, 3, 4, 6]
    assert set(unreadable) == {str(paths[2]), str(paths[5])}
    whole = encode.gather_images(predictor, paths, **options)
    assert whole.index.tolist() == [0, 1, 3, 4, 6]
    assert whole.sizes.tolist() == [[10, 5], [11, 5], [13, 5], [14, 5], [16, 5]]
    assert whole.image_embed.tolist() == [[i, 1] for i in (0, 1, 3, 4, 6)]
    assert whole.labels.tolist() == [-1] * 5 and whole.regions.embed.shape == (5, 0, 2)
    report = encode.report_unreadable(whole.unreadable)
    assert report["unreadable"] == 2
    for name, reason in zip(("2.png", "5.png"), report["unreadable_images"], strict=True):
        assert name in reason
    with pytest.raises(errors.UserError, match="none of 1 images can be read.*2.png"):
        encode.gather_images(predictor, paths[2:3], label="")


def test_not_finite_embeddings_are_an_error_of_which_other_processes_learn(tmp_path, monkeypatch):
    write_picture(tmp_path / "0.png", 0)
    predictor, messages, agree = StubPredictor(images={0: [np.nan, 1.0]}), [], processes.agree
    record = lambda *result: messages.append(result[0]) or agree(*result)
    monkeypatch.setattr(processes, "agree", record)
    with pytest.raises(errors.UserError, match="not finite") as error:
        encode.gather_images(predictor, [tmp_path / "0.png"], label="")
    assert messages[-1] is error.value


def test_scalars():
    result = {"kind": "x", "n": 3, "names": True, "alpha_1.0": {"top1": 0.5, "per_class": {"a": 1.0}}}
    assert tables.scalars(result) == {"n": 3.0, "alpha_1.0/top1": 0.5}


def test_rows_of_an_evaluator_of_the_package():
    numbers = {"found": 0.5, "found_low": 0.4, "found_high": 0.6, "images": 9.0, "chance": 0.1}
    numbers |= {"region/top1": 0.25, "groups/rare/region/top1": 0.5, "chance_box_iou": 0.2}
    table = tables.describe({"lvis": ("boxes", numbers | {"box_iou": 0.3, "boxes": 100.0})})
    assert [" ".join(line.split()) for line in table.splitlines()[2:]] == [
        "lvis: found 50.0% 40.0 - 60.0% 9",
        "lvis: region/top1 25.0% 10.0% 9",
        "lvis: box_iou 0.300 0.200 9",
    ]


def test_an_evaluator_from_outside_keeps_all_its_rows(tmp_path, capsys):
    """An evaluator of the package may have the same keys, also `kind`."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(base.Evaluator):
        kind: str = "my.module:Mine"

        def check(self, model=None):
            return 1

        def evaluate(self, predictor):
            return {"kind": "boxes", "miou": 0.5, "sharpness": 2.0, "found": 0.25, "images": 1}

    output = epath.Path(tmp_path / "o.json")
    assert suite.run({"mine": Mine()}, output, checkpoint="RUN", load=StubPredictor) == 0
    assert json.loads(output.read_text())["ran"]["mine"]["kind"] == "my.module:Mine"
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for row in ("mine: miou 0.500", "mine: sharpness 2.000", "mine: found 0.250"):
        assert row in rows
