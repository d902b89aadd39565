import sys
import types

import numpy as np
import PIL.Image
import pytest
import torch

from grain_jax import inference
from grain_jax.evaluate import clip_benchmark
from tests import perturbed

TEXTS = ["a wren", "a red kite with a long forked tail", "", "wren"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "model"
    return perturbed.saved(path, text__vocab_size=49408)


@pytest.fixture
def package(monkeypatch):
    """What clip-benchmark 1.6.2 has of model types and of a command line, as far as we use it."""
    root, models, cli = map(
        types.ModuleType, ("clip_benchmark", "clip_benchmark.models", "clip_benchmark.cli")
    )
    models.TYPE2FUNC = {"open_clip": None}
    models.MODEL_TYPES = list(models.TYPE2FUNC)
    root.models, root.cli = models, cli
    cli.main = lambda: models.TYPE2FUNC["grain_jax"](pretrained="nowhere")
    for module in (root, models, cli):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return models


def test_registered_once(package):
    types_ = package.MODEL_TYPES  # its command line has this list already
    for _ in range(2):
        clip_benchmark.register()
    assert types_ == ["open_clip", "grain_jax"]
    assert package.TYPE2FUNC["grain_jax"] is clip_benchmark.load


def test_gives_what_the_predictor_gives(folder):
    model, transform, tokenizer = clip_benchmark.load(
        model_name="GRAIN", pretrained=folder, cache_dir=None, device="cpu"
    )
    assert model.eval() is model and not list(model.parameters())
    predictor = inference.load(folder)
    random = np.random.default_rng(0)
    pictures = [
        PIL.Image.fromarray(random.integers(256, size=(h, w, 3), dtype=np.uint8))
        for h, w in ((40, 30), (7, 90))
    ] + [PIL.Image.new("L", (5, 5), 200)]
    # As its DataLoader and its classifier do.
    batch = torch.utils.data.default_collate([transform(picture) for picture in pictures])
    assert batch.dtype == torch.uint8 and batch.shape == (3, 40, 40, 3)
    with torch.no_grad(), torch.autocast("cpu", enabled=True):
        image, text = model.encode_image(batch), model.encode_text(tokenizer(TEXTS).to("cpu"))
    assert image.dtype == text.dtype == torch.float32
    np.testing.assert_array_equal(image.numpy(), predictor.encode_image(pictures))
    np.testing.assert_array_equal(text.numpy(), predictor.encode_text(TEXTS))
    assert tokenizer("a wren").tolist() == tokenizer(TEXTS).tolist()[:1]


def test_texts_whose_end_is_not_known_are_refused(tmp_path):
    perturbed.saved(tmp_path / "m", text__tokenizer="tokenizer.json")
    with pytest.raises(clip_benchmark.ClipBenchmarkError, match="with tokenizer.json"):
        clip_benchmark.load(pretrained=str(tmp_path / "m"))


def test_faults_are_one_line(package, capsys, monkeypatch):
    assert clip_benchmark.main() == 2
    assert capsys.readouterr().err.count("nowhere: no such folder") == 1
    monkeypatch.setitem(sys.modules, "clip_benchmark", None)
    monkeypatch.delitem(sys.modules, "clip_benchmark.models")
    assert clip_benchmark.main() == 2
    error = capsys.readouterr().err
    assert "pip install clip-benchmark requests" in error and error.count("\n") == 1
