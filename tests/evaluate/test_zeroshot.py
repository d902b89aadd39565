import json
import unicodedata

import numpy as np
import pytest

from grain_jax import inference
from grain_jax.core import errors
from grain_jax.evaluate import __main__ as command
from grain_jax.evaluate import rates, test_sets, zeroshot
from grain_jax.inference import prompts
from tests.evaluate.stub import StubPredictor, measure, write_picture
from tests.paths import GOLDENS

pytestmark = pytest.mark.quick

BOXES = np.zeros((2, 4))


@pytest.fixture
def folder(tmp_path):
    """Three classes: cat has images 0, 1; dog 2; red fox 3."""
    for i, name in enumerate(("cat", "cat", "dog", "red_fox")):
        write_picture(tmp_path / "classes" / name / f"{i}.png", i)
    (tmp_path / "classes" / ".hidden").mkdir()
    (tmp_path / "templates.txt").write_text("a {}\nthe {}\n")
    return tmp_path


def _evaluate(folder, predictor, **options):
    inputs = dict(images=folder / "classes", templates=folder / "templates.txt")
    return measure("zeroshot", predictor, **inputs, **options)


NAMES = {
    "a cat": [1, 0, 0],
    "the cat": [3, 0, 0],  # texts are normalised before they are averaged
    "a dog": [0, 1, 0],
    "the dog": [0, 1, 0],
    "a red fox": [0, 0, 1],
    "the red fox": [0, 1, 0],  # disagrees: the feature is (0, .5, .5), and is not normalised again
}


def test_names(folder):
    images = {0: [5, 1, 0], 1: [0, 2, 1], 2: [0, 1, 0.9], 3: [0, 1, 1.5]}
    # Scores, unnormalised: 0: (5, 1, .5) cat. 1: (0, 2, 1.5) dog, wrong. 2: (0, 1, .95) dog: a feature of
    # unit length would have made it a red fox (1.34). 3: (0, 1, 1.25) red fox.
    (folder / "classes" / "dog" / "bad.jpg").write_bytes(b"oops")
    result = _evaluate(folder, StubPredictor(images, NAMES))
    assert result["unreadable"] == 1 and "bad.jpg" in result["unreadable_images"][0]
    assert result["kind"] == "zeroshot" and result["classes"] == 3 and result["images"] == 4
    assert result["chance"] == pytest.approx(1 / 3) and result["chance_top5"] == 1.0
    alpha = result["alpha_1.0"]
    assert alpha["top1"] == 0.75 and alpha["top5"] == 1.0
    assert alpha["per_class"] == {"cat": 0.5, "dog": 1.0, "red fox": 1.0}
    assert alpha["mean_per_class"] == pytest.approx(2.5 / 3)
    # With 2, 1 and 1 images: as a share among 9 / (1/2 + 1 + 1).
    interval = alpha["mean_per_class_low"], alpha["mean_per_class_high"]
    assert interval == pytest.approx(rates.interval(2.5 / 3 * 3.6, 3.6))
    assert result["images_per_class"] == {"cat": 2, "dog": 1, "red fox": 1}
    assert (alpha["top1_low"], alpha["top1_high"]) == pytest.approx(rates.interval(3, 4))
    assert "alpha_0.5" not in result


DESCRIPTIONS = {"cat": ["whiskers", "a tail"], "dog": ["a tail"]}
DESCRIPTIONS |= {"red fox": ["red fur"], "cow": ["x"]}
PHRASES = {"whiskers": [1, 0, 0], "a tail": [0, 1, 0], "red fur": [0, 0, 1]}


def _regions(first, second):
    return BOXES, np.array([first, second], np.float32)


def _write_descriptions(folder, value):
    path = folder / "D.json"
    path.write_text(json.dumps(value))
    return path


def test_descriptions_alone(folder):
    path = _write_descriptions(folder, DESCRIPTIONS)
    images = {0: [1, 0.1, 0], 1: [0, 1, 0], 2: [0, 1, 0], 3: [0, 0, 1]}
    regions = {
        0: _regions([1, 0, 0], [0, 1, 0]),  # queries: cat (1+1)/2, dog (0+1)/2, fox 0
        1: _regions([1, 0, 0], [0, 1, 0]),
        2: _regions([0, 1, 0], [0, 1, 0]),  # cat 1, dog 1: a tie
        3: _regions([0, 0, 1], [1, 0, 0]),  # cat .5, dog 0, fox .5: a tie
    }
    predictor = StubPredictor(images, PHRASES, regions)
    result = _evaluate(folder, predictor, descriptions=path, names=False, alphas=(1.0, 0.5, 0.0))
    # Global features: cat (.5, .5, 0), dog (0, 1, 0), fox (0, 0, 1).
    assert result["alpha_1.0"]["per_class"] == {"cat": 0.5, "dog": 1.0, "red fox": 1.0}
    assert result["alpha_0.0"]["per_class"] == {"cat": 1.0, "dog": 0.5, "red fox": 0.5}
    # Image 1 at 0.5: cat .5 * .5 + .5 * 1 = .75; dog .5 * 1 + .5 * .5 = .75: a tie.
    assert result["alpha_0.5"]["per_class"] == {"cat": 0.75, "dog": 1.0, "red fox": 1.0}
    assert sorted(predictor.asked) == sorted(PHRASES)  # no name, no template, each once
    assert result["descriptions"] == 4 and result["names"] is False


def test_names_with_descriptions(folder):
    path = _write_descriptions(folder, DESCRIPTIONS)
    verb = {"whiskers": "has", "a tail": "is", "red fur": "has"}
    texts = dict(PHRASES)
    for i, name in enumerate(("cat", "dog", "red fox")):
        for article in ("a", "the"):
            texts[f"{article} {name}"] = np.eye(3)[(i + 1) % 3]  # by name all wrong
            for phrase in DESCRIPTIONS[name]:
                texts[f"{article} {name}, which {verb[phrase]} {phrase}"] = np.eye(3)[i]
    images = {i: np.eye(3)[c] for i, c in enumerate((0, 0, 1, 0))}
    regions = {i: _regions([0, 0, 1], [0, 0, 1]) for i in range(4)}
    predictor = StubPredictor(images, texts, regions)
    result = _evaluate(folder, predictor, descriptions=path)
    assert result["alpha_1.0"]["top1"] == 0.75  # the default reports alpha 1 and 0.5
    # 3 at 0.5: cat .5, fox .5; the others: their own class .5, fox .5.
    assert result["alpha_0.5"]["top1"] == pytest.approx(0.5)
    # In the same pass, by names alone: images 0, 1, 3 are a fox's, and 2 a cat's; only 3 is one.
    assert result["by_name"]["alpha_1.0"]["per_class"] == {"cat": 0, "dog": 0, "red fox": 1}
    assert result["by_name"]["alpha_0.5"]["top1"] == 0.25
    assert len(predictor.asked) == len(texts)


def test_descriptions_are_found_by_letters_and_digits(folder):
    path = _write_descriptions(folder, {"Red-Fox": ["b"], "RED FOX": ["a"], "red_fox": ["c"], "x": []})
    names = ["red fox", "Red fox", "RED FOX"]
    assert zeroshot.read_descriptions(path, names) == [["c"], ["c"], ["a"]]
    assert zeroshot.read_descriptions(path, ["vulpes"], ["red.fox"]) == [["c"]]


def test_a_class_with_an_empty_list_is_described_by_its_name(folder):
    path = _write_descriptions(folder, {"cat": ["x"], "dog": [], "red fox": []})
    classes = ["cat", "dog", "red fox"]
    assert zeroshot.read_descriptions(path, classes) == [["x"], [], []]
    texts = NAMES | {"x": [1, 0, 0], "dog": [0, 1, 0], "red fox": [0, 0, 1]}
    texts |= {f"{name}, which has x": [1, 0, 0] for name in ("a cat", "the cat")}
    regions = {i: (BOXES, np.eye(3)[[k, k]]) for i, k in enumerate((0, 0, 1, 2))}
    images = {i: [1, 0, 0] for i in range(4)}
    predictor = StubPredictor(images, texts, regions)
    result = _evaluate(folder, predictor, descriptions=path, alphas=(0.0,))
    assert result["alpha_0.0"]["per_class"] == {"cat": 1.0, "dog": 1.0, "red fox": 1.0}
    with pytest.raises(errors.UserError, match="no description of the classes dog, red fox"):
        zeroshot.read_descriptions(path, classes, names=False)


def test_folders_and_files_that_are_no_classes_and_no_images(folder):
    for name in ("._0.png", ".DS_Store"):
        (folder / "classes" / "cat" / name).write_bytes(b"oops")
    test_set = test_sets.ClassFolders(folder / "classes")
    assert [path.name for path in test_set.paths] == ["0.png", "1.png", "2.png", "3.png"]
    assert test_set.classes == ["cat", "dog", "red fox"]
    assert test_set.labels.tolist() == [0, 0, 1, 2]
    (folder / "classes" / "eel").mkdir()
    write_picture(folder / "classes" / "red fox" / "4.png", 4)
    with pytest.raises(errors.UserError, match="'red fox', 'red_fox', .*\n.*folders eel$"):
        test_sets.ClassFolders(folder / "classes")
    with pytest.raises(errors.UserError, match="got 0 sub-folders"):
        test_sets.ClassFolders(folder / "classes" / "cat")


def test_names_of_folders_and_files_are_compared_composed(tmp_path):
    names = ["Mz", "M\u00f6we", "M\u00e9sange_bleue"]  # sorted otherwise than decomposed
    sets = {}
    for form in ("NFC", "NFD"):
        spelt = [unicodedata.normalize(form, name) for name in names]
        for i, name in enumerate(spelt):
            for k in range(3):
                write_picture(tmp_path / form / name / f"{k}.png", i)
        sets[form] = test_sets.ClassFolders(tmp_path / form)
        lines = (f"{name}\tname {i}\n" for i, name in enumerate(spelt))
        (tmp_path / f"{form}.txt").write_text("".join(lines))
    assert sets["NFD"].classes == sets["NFC"].classes == ["Mz", "M\u00e9sange bleue", "M\u00f6we"]
    for form in sets:
        text = {unicodedata.normalize(form, name).upper(): [name] for name in names}
        path = _write_descriptions(tmp_path, text)
        for test_set in sets.values():
            described = zeroshot.read_descriptions(path, test_set.classes, test_set.stems)
            assert described == [[names[0]], [names[2]], [names[1]]]
        for folder in sets:
            labelled = test_sets.ClassFolders(tmp_path / folder, str(tmp_path / f"{form}.txt"))
            assert labelled.classes == ["name 0", "name 2", "name 1"]


# eval.npz, the reference's own evaluation: class folders and files in, accuracies out.
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
    files = {"images": "classes", "templates": "templates.txt", "descriptions": "D.json"}
    files = {name: str(tmp_path / file) for name, file in files.items()}
    flags = [f"--{name}={file}" for name, file in files.items()]
    flags += [f"--alpha={','.join(map(str, ALPHAS))}", f"--output={tmp_path / 'out.json'}"]
    assert command.main(["zeroshot", "--checkpoint=RUN", "--batch-size=7", *flags]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    entry = zeroshot.ZeroShot(**files, alphas=ALPHAS)
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
