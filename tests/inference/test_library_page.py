"""docs/library.md: the first snippet runs, and what it makes has the shapes in its comments."""

import re

import numpy as np

from tests.paths import ROOT


def test_the_snippet_runs(capsys):
    page = (ROOT / "docs/library.md").read_text()
    snippet = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)[0]
    names: dict = {}
    exec(compile(snippet, "docs/library.md", "exec"), names)
    assert capsys.readouterr().out.startswith("<Predictor of ")
    dim = names["model"].model.embed_dim
    queries = names["model"].model.decoder.queries
    assert names["embed"].shape == (4, dim) and names["text"].shape == (1, dim)
    assert names["regions"].boxes_xyxy.shape == (4, queries, 4)
    assert names["logits"].shape == (4, 1) and names["scores"].shape == (4, 4)
    np.testing.assert_allclose(
        names["model"].encode_image(names["pixels"], normalized=True), names["embed"][0], atol=1e-5
    )
    right = names["scores"].argmax(axis=1) == np.arange(4)
    assert right.sum() >= 3  # it knows 79% of such birds
    assert names["present"].shape == (4, 1) and 0 < names["present"].min() < 1
    assert len(names["answers"]) == 1 and names["maps"].ndim == 3
    counts = [len(boxes) for boxes in names["boxes_xyxy"]]
    assert [x.shape for x in names["boxes"]] == [(n, dim) for n in counts]
    assert [x.shape for x in names["boxed"]] == [(n, 4) for n in counts]
    assert [x.shape for x in names["labels"]] == [(64, 64)] * 4
