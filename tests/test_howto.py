"""docs/howto: its Python compiles, and its evaluator and its loss term measure what the pages say."""

import importlib
import re
import sys
import types

import numpy as np
import pytest

from grain_jax import config as config_lib
from grain_jax import losses
from grain_jax.evaluate import base, kinds
from tests import tiny
from tests.evaluate.stub import StubPredictor, write_picture
from tests.losses.test_losses import random_outputs
from tests.paths import ROOT
from tests.test_documents import commands_of, documents

pytestmark = pytest.mark.quick

PAGES = sorted((ROOT / "docs/howto").glob("*.md"))


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/howto" / page).read_text(), re.M | re.S)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Imports a block of code as the module that the page calls it."""

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    monkeypatch.syspath_prepend(tmp_path)
    return write


@pytest.mark.parametrize("page", [page.name for page in PAGES])
def test_python_compiles(page):
    for block in blocks(page):
        compile(block, page, "exec")


def test_commands_that_train_on_own_images_name_the_dataset():
    commands = [words for page in documents() for words in commands_of(page)]
    trained = [x for x in commands if re.match(r"train --config (own|finetune|regions)\b", " ".join(x))]
    assert len(trained) > 5
    keys = {"--config.input.data_dir=records", "--config.input.name=mine"}
    assert [x for x in trained if not keys <= {*x}] == []


def test_the_loss_term_keeps_queries_apart(module):
    module("my_loss", blocks("loss.md")[0])
    c = tiny.config(loss__terms__apart={"term": "my_loss:apart", "weight": 0.25, "margin": 0.1})
    ((term, weight),) = [x for x in losses.terms_of(c.loss) if x[0].name == "apart"]
    outputs = random_outputs(c)
    output = term.function(types.SimpleNamespace(outputs=outputs))
    x = np.asarray(outputs.region_embed, np.float64)
    apart = ~np.eye(x.shape[1], dtype=bool)
    expected = [
        (np.maximum(cosine[apart] - 0.1, 0) ** 2).mean() for cosine in np.einsum("bqd,brd->bqr", x, x)
    ]
    assert (weight, output.count) == (0.25, len(x))
    np.testing.assert_allclose(output.sum, np.sum(expected), rtol=1e-5)


def test_the_evaluator_measures_the_lead_of_the_right_class(module, tmp_path):
    module("my_evaluator", blocks("evaluator.md")[0])
    for number, name in enumerate(("cat", "cat", "dog")):
        write_picture(tmp_path / "images" / name / f"{number}.png", number)
    entry = dict(kind="my_evaluator:Margin", images=str(tmp_path / "images"))
    evaluator = kinds.from_entry(entry)
    assert isinstance(evaluator, base.Evaluator) and evaluator.check() == 3
    texts = {"a photo of a cat.": [1, 0], "a photo of a dog.": [0, 1]}
    predictor = StubPredictor({0: [1, 0], 1: [0.6, 0.8], 2: [0, 1]}, texts)
    assert evaluator.evaluate(predictor) == {"images": 3, "margin": pytest.approx(1.8 / 3)}


@pytest.mark.parametrize("block", [1, 2])
def test_the_configs_of_the_evaluator_resolve(block, module):
    module("my_evaluator", blocks("evaluator.md")[0])
    config = module("my_config", blocks("evaluator.md")[block]).get_config()
    run = lambda c: kinds.from_entries(config_lib.from_dict(c).evals)
    resolve = run if block == 1 else kinds.suite_from_dict
    prompt = "a bird: {}" if block == 1 else "a photo of a {}."
    assert resolve(config)["margin"].prompt == prompt
