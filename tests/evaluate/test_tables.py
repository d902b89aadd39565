"""Results as numbers and as tables of text."""

import dataclasses
import json

from etils import epath

from grain_jax.evaluate import base, suite, tables
from tests.evaluate.stub import StubPredictor


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
