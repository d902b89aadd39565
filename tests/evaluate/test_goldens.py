"""eval.npz, the reference's own evaluation, by the command: class folders and files in, accuracies out."""

import json

import numpy as np
import pytest

from grain_jax import inference
from grain_jax.evaluate import __main__ as command
from grain_jax.evaluate import zeroshot
from grain_jax.inference import prompts
from tests.evaluate.stub import StubPredictor, write_picture
from tests.paths import GOLDENS

pytestmark = pytest.mark.quick

ALPHAS = (1.0, 0.75, 0.5, 0.25, 0.0)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDENS / "eval.npz") as arrays:
        return dict(arrays) | {"meta": json.loads(str(arrays["meta_json"]))}


def _texts(golden):
    """Text -> the reference's embedding of it."""
    meta, table = golden["meta"], {}
    for c, name in enumerate(meta["class_names"]):
        descriptions = meta["class_file"][name]
        for tag, texts in (
            ("no_desc", prompts.class_texts(name, meta["templates"])),
            ("use_desc", prompts.class_texts(name, meta["templates"], descriptions)),
            ("desc_only", descriptions),
        ):
            embeds = golden[f"class_text_embed/{tag}/{c:02d}"]
            assert len(texts) == len(embeds)
            table |= dict(zip(texts, embeds))
    return table


def test_the_command_gives_the_references_accuracies_and_logits(golden, tmp_path, monkeypatch):
    meta = golden["meta"]
    for number, target in enumerate(golden["inputs/targets"]):
        folder = tmp_path / "classes" / meta["class_names"][target].replace(" ", "_")
        write_picture(folder / f"{number}.png", number, size=(4, 4))
    (tmp_path / "templates.txt").write_text("\n".join(meta["templates"]))
    (tmp_path / "D.json").write_text(json.dumps(meta["class_file"]))
    regions = {i: (np.zeros((5, 4)), embed) for i, embed in enumerate(golden["inputs/obj_embeds"])}
    predictor = StubPredictor(dict(enumerate(golden["inputs/img_embed"])), _texts(golden), regions)
    monkeypatch.setattr(inference, "load", lambda path, **_: predictor)
    monkeypatch.setattr("grain_jax.checkpoint.saved_model.find", lambda path: path)
    arguments = ["zeroshot", "--checkpoint", "RUN", "--images", str(tmp_path / "classes")]
    arguments += ["--templates", str(tmp_path / "templates.txt"), "--batch-size", "7"]
    arguments += ["--descriptions", str(tmp_path / "D.json"), "--alpha", ",".join(map(str, ALPHAS))]
    arguments += ["--output", str(tmp_path / "out.json")]
    assert command.main(arguments) == 0

    result = json.loads((tmp_path / "out.json").read_text())
    entry = zeroshot.ZeroShot(
        images=f"{tmp_path}/classes",
        templates=f"{tmp_path}/templates.txt",
        descriptions=f"{tmp_path}/D.json",
        alphas=ALPHAS,
    )
    scorer = entry.scorer(predictor, entry.open())
    scores = scorer.of_images(golden["inputs/img_embed"], golden["inputs/obj_embeds"])
    for tag, part, prefix in (("use_desc", result, ""), ("no_desc", result["by_name"], "by_name/")):
        for alpha in ALPHAS:
            rates = part[f"alpha_{alpha}"]
            expected = golden[f"outputs/{tag}/alpha_{alpha}/acc1_acc5"]
            np.testing.assert_allclose([100 * rates["top1"], 100 * rates["top5"]], expected)
            logits = golden[f"outputs/{tag}/alpha_{alpha}/logits"]
            column = [entry.open().classes.index(name) for name in meta["class_names"]]
            np.testing.assert_allclose(scores[f"{prefix}alpha_{alpha}"][:, column], logits, atol=1e-6)


def test_names_with_a_parent_are_the_references_but_for_its_words(golden):
    templates = golden["meta"]["templates"]
    expected = golden["meta"]["evaluate_py_no_desc_slash_classnames_first2"]
    for name in ("dog/poodle", "vehicle/car/sedan", "plain name"):
        of_reference = [text.replace(", of a ", ", a kind of ") for text in expected[name][name]]
        assert prompts.class_texts(name, templates)[:2] == of_reference
