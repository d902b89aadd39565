"""The package's evaluators as entries of a config: their options, and what is checked without a model."""

import dataclasses
import functools
import json
import subprocess
import sys
import textwrap

import pytest

from grain_jax import config
from grain_jax.config import recipe
from grain_jax.core import errors, named
from grain_jax.evaluate import base, kinds, zeroshot
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
    code = f"""
        import sys
        from grain_jax.evaluate import kinds
        entries = [kinds.from_entry({{"kind": kind}}) for kind in {list(kinds.KINDS)}]
        print(*(type(entry).__name__ for entry in entries))
        print(*{{"jax", "tensorflow", "numpy", "etils.epath", "PIL"}} & sys.modules.keys())
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
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


FAULTS = [
    (
        {"kind": "zeroshott"},
        "kind: evaluator 'zeroshott': did you mean zeroshot? expected one of: boxes,"
        " calibrate, detection, grounding, hard_negatives, linear_probe, retrieval, segmentation, zeroshot;"
        " or module:Name of your own",
    ),
    (
        {"kind": "zeroshot", "descriptoins": "D.json"},
        "descriptoins: no such key; did you mean evaluator.descriptions?",
    ),
    (
        {"kind": "zeroshot", "names": "yes", "alphas": 1.0, "missing": None},
        "missing: got None, expected one of error, skip",
        "alphas: got 1.0, expected tuple of float",
        "names: got 'yes', expected bool",
    ),
]


def test_faults_of_an_entry():
    for entry, *lines in FAULTS:
        assert _faults(entry) == [f"evaluator.{line}" for line in lines]
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
    (line,) = _faults({"kind": f"{here}:FAULTS"})
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
    broken = faults(descriptions=str(tmp_path / "broken.json"))[0]
    assert "broken.json: Input data was truncated" in broken


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
    no_file = "no.jsonl: no such file, expected one JSON object a line"
    assert _check(good, images="no") == [no_folder]
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
