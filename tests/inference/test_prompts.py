import json

import numpy as np
import pytest

from grain_jax.core import errors
from grain_jax.inference import prompts
from tests.paths import GOLDENS

pytestmark = pytest.mark.quick


def test_default_templates():
    templates = prompts.load_templates()
    assert len(templates) == 20 == len(set(templates))
    assert templates[0] == "a photo of a {}"
    assert all(template.count("{}") == 1 and "bird" not in template for template in templates)


def test_template_file_errors_name_the_lines(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("# mine\n\na {} drawn\nno name\n{} and {}\n")
    with pytest.raises(errors.UserError) as error:
        prompts.load_templates(path)
    assert str(error.value).split("\n") == [
        f"{path}:4: got 'no name', expected one {{}} for the class name",
        f"{path}:5: got '{{}} and {{}}', expected one {{}} for the class name",
    ]
    path.write_text("# nothing\n")
    with pytest.raises(errors.UserError, match="holds no template"):
        prompts.load_templates(path)
    with pytest.raises(errors.UserError, match="no such file"):
        prompts.load_templates(tmp_path / "none.txt")
    path.write_text("a {} drawn\n")
    assert prompts.load_templates(str(path)) == ["a {} drawn"]


IS = ["a long tail", "an orange beak", "used for cutting"]
HAS = ["antlers", "all-white plumage", "hasty movement", "mayonnaise colour", "canine teeth"]
HAS += ["useful tool", "four legs", "Red crest"]
AS_IT_IS = ["has wings", "often seen in flocks", "may be striped", "can swim"]
CLAUSES = {text: f"which is {text}" for text in IS} | {text: f"which has {text}" for text in HAS}
CLAUSES |= {text: f"which {text}" for text in AS_IT_IS}
CLAUSES |= {"A long tail": "which is a long tail", " Has  wings.": "which has wings"}


def test_descriptor_clause():
    assert {text: prompts.descriptor_clause(text) for text in CLAUSES} == CLAUSES


def test_class_texts_with_the_references_templates_are_the_references():
    with np.load(GOLDENS / "eval.npz") as arrays:
        meta = json.loads(str(arrays["meta_json"]))
    name = meta["class_names"][0]
    templates = meta["templates"]
    texts = prompts.class_texts(name, templates, meta["class_file"][name])
    assert len(texts) == 46 * len(meta["class_file"][name])
    assert texts[:8] == meta["texts_class0_use_desc_first8"]
    assert prompts.class_texts(name, templates)[:3] == meta["texts_class0_no_desc_first3"]


def test_class_texts_order_and_underscores():
    assert prompts.class_texts("red_fox", ["a {}", "one {}."], ["sharp ears", "can run"]) == [
        "a red fox, which has sharp ears",
        "one red fox, which has sharp ears",
        "a red fox, which can run",
        "one red fox, which can run",
    ]
    assert prompts.class_texts("{odd}", ["a {}"]) == ["a {odd}"]


SLASHES = {
    "dog/poodle": "a poodle, a kind of dog",
    "domestic_dog/toy_poodle": "a toy poodle, a kind of domestic dog",
    "vehicle/car/sedan": "a sedan, a kind of car",
    "x/dog": "a x/dog",  # no parent has one letter (the reference fails there)
    "Ram C/V Cargo Van": "a Ram C/V Cargo Van",
    "packet / packaging": "a packet / packaging",
}


def test_names_with_a_slash():
    for name, expected in SLASHES.items():
        assert prompts.class_texts(name, ["a {}."]) == [expected + "." * (", a kind" not in expected)]
        described = prompts.class_texts(name, ["a {}."], ["curly fur"])
        assert described == [f"{expected}, which has curly fur"]
