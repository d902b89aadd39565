"""The fifth design of `benchmarks.claim` on made-up results: arms, tokenizer, the plan, the bars, the second round."""

import argparse
import json
import statistics
import sys

import numpy as np
import pytest

from benchmarks.claim import __main__ as claim
from benchmarks.claim import (
    compared,
    data,
    dense,
    design,
    results,
    words,
    words_data,
    words_plan,
    words_report,
    words_study,
)
from grain_jax import config as config_lib
from grain_jax.core import annotations
from grain_jax.data.annotate import __main__ as annotate_command
from grain_jax.data.annotate.arguments import Annotate
from grain_jax.data.arguments import Build
from grain_jax.data.aviary import generate
from grain_jax.data.aviary.arguments import Aviary
from grain_jax.input_pipeline import tokenizer
from grain_jax.losses import total as losses
from tests import paths

FEW = dict(genera=2, species_per_genus=2, held_out_genera=2, held_out_species_per_genus=2)
FEW |= dict(seen_per_species=2, unseen_per_species=2, test_images=16, parts_changed=8)
BEST = "grain+3"  # of validation


def write_tokenizer(work, *texts):
    """The tokenizer of each data set."""
    library = words_data.make_tokenizer(texts or ["a spiky red crest"])
    for name in (words.MAIN, words.POSES, words.CLOTHES):
        path = work / "views" / name / words.TOKENIZER
        path.parent.mkdir(parents=True)
        path.write_text(library.to_str())
    return path


def row(run, score=0.5, **changes):
    """A row of the table; `score` is every share that the arm measures."""
    entries = words._entries(run, words_study.TABLE, words_study.TABLE)
    return {
        "design": words.DESIGN,
        **run._asdict(),
        "settings": words.settings_of(run),
        "batch_size": 64,
        "seconds": 120.0,
        "flops_per_step": 1.4e10 if words.terms_of(run) else 1e10,
        "device": "cpu",
        "jax": "0",
        "loss_image_caption": 1.0,
        **dict.fromkeys(words_study.measured(run, entries), score),
        **changes,
    }


def everything(steps=100, clothes=True):
    """Results of the whole plan: GRAIN at 0.4 and 0.01 a seed, CLIP at 0.3; BEST is best in validation."""
    found = {}
    for _ in range(3):  # each round adds the runs that depend on the last
        for runs in words_plan.plan(found, steps=steps, clothes=clothes).values():
            for run in runs:
                score = 0.4 if run.arm.startswith("grain") else 0.3
                made = row(run, score + 0.01 * run.seed)
                if run.arm == BEST:
                    made["reranked_validation/text_to_image/r1"] = 0.9
                if run.data == words.TENTH:
                    made["retrieval_test/image_to_text/r1"] = 0.2
                found[run.name] = made
    return found


def test_arms_are_recipes_with_weights():
    assert words.ARMS == (
        *("grain", "grain+1", "grain+3", "grain+10", "grain+stop"),
        *("clip", "clip+1", "clip+stop"),
    )
    for arm in words.ARMS:
        run = words.run_of(arm, 1)
        recipe = {"grain": "grain_boxes", "clip": "clip_pooled"}[arm.partition("+")[0]]
        of_recipe = design.changes(design.ClaimRun(recipe, 1e-3, 1, 500), design.CONFIG)
        assert words.changes(run) == of_recipe
        if "+" not in arm:
            assert words.terms_of(run) == {}
    term = {arm: words.terms_of(words.run_of(arm, 0)).get("words", {}) for arm in words.ARMS}
    assert term["grain+10"] == term["grain+1"] | {"weight": 10.0}
    assert term["grain+stop"] == term["grain+1"] | {"stop_gradient": True}
    assert term["clip+1"] == term["grain+1"] and term["clip+stop"] == term["grain+stop"]


def test_settings_tell_all_runs_of_a_seed_apart(monkeypatch):
    names = (words.MAIN, words.POSES, words.CLOTHES, words.TENTH, words.ANNOTATED)
    runs = [words.run_of(arm, 0, data=name) for arm in words.ARMS for name in names]
    before = {run: words.settings_of(run) for run in runs}
    assert len(set(before.values())) == len(runs)
    assert words.AVIARIES["main"]["seed"] == words.AVIARIES["poses"]["seed"] == 53
    assert 53 not in (design.AVIARY["seed"], 29, dense.AVIARY["seed"], 100, 0)
    monkeypatch.setitem(words.ANNOTATE, "threshold", 0.4)
    changed = {run for run in runs if words.settings_of(run) != before[run]}
    assert changed == {run for run in runs if run.data in names[3:]}


@pytest.mark.parametrize("arm", [*words.ARMS, words.CLOTHES_ARM])
@pytest.mark.parametrize("name", [words.POSES, words.CLOTHES, words.ANNOTATED])
def test_every_arm_is_a_config(tmp_path, arm, name):
    write_tokenizer(tmp_path)
    c = words.make_config(words.run_of(arm, 1, data=name), tmp_path / "main", tmp_path)
    config = config_lib.from_dict(c)
    assert (config.seed, config.total_steps, config.optim.learning_rate) == (1, 500, 1e-3)
    text = config.model.text
    assert (text.vocab_size, text.pad_id, text.end_id, text.packable) == (4 + 4, 0, 3, True)
    assert config.text.packing
    entries = losses.local_entries(config.loss)
    assert {*entries} == ({"words"} if "+" in arm else set())
    for entry in entries.values():
        assert entry.cls.faults(entry.options, config) == []
        options = entry.options
        assert (options.row_length, options.bins, options.group) == (72, 64, 1)
    is_grain, has_words = arm.startswith("grain"), "+" in arm
    assert (config.model.boxes.kind != "none") == is_grain
    assert arm == "words" or (config.loss.box != 0) == is_grain
    assert config.input.max_regions == (
        0 if arm == "words" else 8
    )  # CLIP's decoder learns boxes and descriptions, too
    assert ("parts" in config.evals) == (is_grain and name != words.CLOTHES)
    assert ("hard_negatives" in config.evals) == (name != words.CLOTHES)
    assert ("grounding_all" in config.evals) == (is_grain or has_words)
    assert ("descriptions" in config.evals) == ("captions_all" in config.evals) == has_words
    assert config.input.name == ("annotated_1" if name == words.ANNOTATED else name)
    for entry in config.evals.values():
        assert entry.faults() == [] and entry.misses(config.model) == []


def test_the_tokenizer_has_the_words_of_the_set_alone(tmp_path):
    texts = ["A spiky red crest", "IMG_2041, a crest!", "the red tail"]
    path = write_tokenizer(tmp_path, *texts)
    tower = config_lib.TextTower(tokenizer=str(path), vocab_size=100, end_id=3)
    found = tokenizer.of_tower(tower)
    expected = ["!", ",", "0", "1", "2", "4", "a", "crest", "img_", "red", "spiky", "tail", "the"]
    assert found.vocab_size == 4 + len(expected)
    assert (found.leading_specials, found.trailing_specials) == (1, 1)
    assert found.special_ids == (0, 1, 2, 3)
    ids = found(["a red CREST, a blue tail"], 10)[0]
    at = {word: 4 + i for i, word in enumerate(expected)}
    in_text = [at["a"], at["red"], at["crest"], at[","], at["a"], 1, at["tail"]]
    np.testing.assert_array_equal(ids, [2, *in_text, 3, 0])
    assert tower.ends(ids[None])[0] == 8
    assert found.decode(ids) == "a red crest , a tail"
    library = words_data.make_tokenizer(texts)
    assert words_data.unknown(library, ["the Red crest", "a blue bird: 7"]) == [
        *("7", ":", "bird", "blue")
    ]


def test_the_words_of_an_aviary_are_known(tmp_path):
    aviary = words.AVIARIES["poses"] | FEW | dict(images=60)
    flags = [f"--output={tmp_path}", *data.aviary_flags(aviary)]
    generate.write(tmp_path, Aviary.parse(flags).settings)
    library = words_data.make_tokenizer(words_data._texts(tmp_path / "A.jsonl"))
    assert library.get_vocab_size() < 300
    asked = list(words_data._test_texts(tmp_path))
    assert any("spiky" in text or "curled" in text for text in asked)
    missing = words_data.unknown(library, asked)
    tables = "red orange yellow green blue purple pink white black brown beak crest tail wing"
    assert not set(tables.split()) & set(missing)  # of 60 images the table has nearly all
    assert len(missing) <= 5


def test_the_plan_grows_with_the_results():
    first = words_plan.plan({}, steps=100, clothes=False)
    assert set(first) == {"harder poses", "second round"}
    assert len(first["harder poses"]) == 3 * 8
    assert [run.data for run in first["second round"]] == ["poses", "tenth"] * 3
    tenth = words.run_of(words.OURS, 1, 100, words.TENTH)
    grown = words_plan.plan({tenth.name: row(tenth)}, steps=100, clothes=False)
    own = [run for run in grown["second round"] if run.data == words.ANNOTATED]
    assert own == [words.run_of(words.OURS, 1, 100, words.ANNOTATED)]
    found = everything()
    studies = words_plan.plan(found, steps=100, clothes=True)
    assert {run for runs in studies.values() for run in runs} == {
        results.run_of(made) for made in found.values()
    }
    assert len(studies["second round"]) == 9 and len(studies["equal FLOPs"]) == 3 * 4
    steps = {run.arm: run.steps for run in studies["equal FLOPs"]}
    assert steps == {"grain": 140, "clip": 140, BEST: 100, "clip+1": 100}
    assert {run.data for run in studies["equal FLOPs"]} == {words.POSES}
    assert {run.arm for run in studies["eased poses"]} == {*steps}
    assert {run.arm for run in studies["clothes"]} == {*steps, "words"}


def test_validation_chooses_the_arm_that_is_asked():
    found = everything()
    assert words_plan.chosen({}, 100) is None
    assert words_plan.chosen(found, 100) == BEST
    lacks = words.run_of("grain+stop", 2, 100, words.POSES).name
    assert words_plan.chosen({k: r for k, r in found.items() if k != lacks}, 100) is None


@pytest.mark.parametrize(
    "changes, wanted",
    [
        ({}, [True, True, True, True, False]),
        ({"grounding_all/point/phrase_acc50": 0.85}, [True] * 5),
        ({"reranked_test/image_to_text/r1": 0.3}, [False, True, False, True, False]),
        ({"reranked_test/text_to_image/r1": 0.33}, [True, True, True, False, False]),
        ({"retrieval_test/text_to_image/r1": 0.0}, [True, True, True, True, False]),
    ],
)
def test_each_bar_is_met_or_not(changes, wanted):
    of = {"grain+1": 0.4, "clip": 0.3, "clip+1": 0.3, "clip+stop": 0.2}
    groups = {arm: [row(words.run_of(arm, 0), score)] for arm, score in of.items()}
    groups["clip+1"][0]["reranked_test/text_to_image/r1"] = 0.35
    groups["grain+1"][0] |= changes
    assert [bar.met for bar in words_report.bars("grain+1", groups)] == wanted
    assert words_report.bars("clip+1", groups) == []


def test_every_seed_must_be_ahead():
    groups = {
        arm: [row(words.run_of(arm, seed), score + 0.01 * seed) for seed in words.SEEDS]
        for arm, score in {"grain+1": 0.4, "clip": 0.3, "clip+stop": 0.2}.items()
    }
    groups["clip+stop"][1]["retrieval_test/image_to_text/r1"] = 0.415
    bar = words_report.bars("grain+1", groups)[0]
    assert (bar.got, bar.met) == ("+10.0, -0.5, +10.0", False)


def test_the_table_and_the_report(tmp_path, monkeypatch, capsys):
    table, found = tmp_path / "r.tsv", everything()
    for made in found.values():
        results.append(table, made, words_study.COLUMNS)
    assert words_study.read(table) == found
    given = ["claim", "report", "--design=5", f"--results={table}", "--steps=100"]
    monkeypatch.setattr(sys, "argv", given)
    assert claim.main() == 0
    text = capsys.readouterr().out
    for title in ("Harder poses", "Eased poses", "Second round", "Equal FLOPs", "Clothes"):
        assert f"## {title}" in text
    assert "The bars are asked of GRAIN, weight 3;" in text
    bar = "R@1 to text, reranked, above the best CLIP without in every seed"
    assert f"| GRAIN, weight 1 | {bar} | +10.0, +10.0, +10.0 | MET |" in text
    bar = "R@1 to image, reranked, above the best CLIP with it on the mean"
    assert f"| GRAIN, its gradient stopped | {bar} | 41.0 against 31.0 | MET |" in text
    bar = "pointing Acc@0.5 at least 85%"
    assert f"| GRAIN, weight 10 | {bar} | 41.0 | NOT MET |" in text
    assert "| 10%, and 90% by its model | +21.0 (" in text
    assert "| CLIP | 3 | 140 | 10.0 |" in text
    monkeypatch.setattr(sys, "argv", [*given, f"--data={tmp_path}"])
    with pytest.raises(SystemExit):
        claim.main()
    assert "--data: got it with --design 5" in capsys.readouterr().err
    results.append(table, row(words.run_of("grain", 5), settings="x"), words_study.COLUMNS)
    with pytest.raises(results.ClaimError, match="of other settings than benchmarks/claim/words"):
        words_study.read(table)


def test_figures_of_the_page_are_those_of_the_stored_results():
    """The two tables of the fifth design in docs/claim.md: means of three seeds."""
    found = words_study.read(words_study.TABLE)
    page = (paths.ROOT / "docs/claim.md").read_text().split("## The fifth design")[1]
    lines = [line for line in page.split("* **Data**")[0].splitlines() if line.startswith("| ")]
    plan, groups = words_plan.plan(found, steps=words.STEPS, clothes=True), []
    for study in ("harder poses", "eased poses", "equal FLOPs", "clothes", words_plan.SECOND):
        arms = {}
        for run in plan[study]:
            arms.setdefault((run.arm, run.data), []).append(found[run.name])
        groups += [((study, *arm), rows) for arm, rows in arms.items()]
    lines = [line for line in lines if "R@1" not in line]  # without heads
    for (what, rows), line in zip(groups, lines, strict=True):
        assert len(rows) == 3
        of = lambda key, rows=rows: compared.values(rows, words_report.MEASURES[key]).values()
        keys = (
            ("retrieval to text", "retrieval to image"),
            ("reranked to text", "reranked to image"),
        )
        keys += tuple((key,) for key in ("point", "exact", "unseen", "miou"))
        expected = [
            " / ".join(f"{statistics.fmean(of(key)):.1f}" for key in group if of(key))
            for group in keys
        ]
        assert [cell.strip() for cell in line.strip("|").split("|")][1:] == expected, what


@pytest.mark.parametrize("arm", ["grain", "grain+3", "clip", "clip+stop"])
@pytest.mark.parametrize("name", [words.POSES, words.CLOTHES])
def test_a_row_without_a_measure_of_its_arm_is_refused(tmp_path, arm, name):
    write_tokenizer(tmp_path)
    run = words.run_of(arm, 0, data=name)
    evals = words.make_config(run, tmp_path, tmp_path).evals
    made = row(run) | ({"loss_words": 1.0} if "+" in arm else {})
    assert words_study.lacking(run, made, evals) == []
    wanted = {"retrieval_validation/image_to_text/r1", "unseen_test/alpha_1.0/top1"}
    of_words = {"reranked_test/weight", "grounding_all/point/phrase_acc50", "loss_words"}
    of_words |= {"captions/caption_parts"}
    if name != words.CLOTHES:
        wanted.add("hard_negatives/image/top1")
        of_words.add("hard_negatives/likelihood/top1")
    of_regions = {"grounding/box_iou", "unseen_test/alpha_0.0/top1"}
    wanted |= of_words if "+" in arm else set()
    wanted |= of_regions if arm.startswith("grain") else set()
    for column in wanted:
        without = {key: value for key, value in made.items() if key != column}
        assert words_study.lacking(run, without, evals) == [column]
    absent = (of_words if "+" not in arm else set()) | (
        of_regions if arm.startswith("clip") else set()
    )
    assert not absent & {*made}


def test_a_tenth_keeps_its_lines_and_the_others_their_images_alone(tmp_path):
    lines = [
        json.dumps({"image": f"{i}.png", "caption": f"a bird {i}", "regions": []}) + "\n"
        for i in range(50)
    ]
    path = tmp_path / "A.jsonl"
    path.write_text("".join(lines))
    true, others = words_data.divide(path)
    assert len(true) == 5 and set(true) < set(lines) and words_data.divide(path)[0] == true
    assert all(json.loads(line).keys() == {"image"} for line in others)
    images = [json.loads(line)["image"] for line in true + others]
    assert sorted(images) == sorted(f"{i}.png" for i in range(50))
    flags = words_data.annotate_flags(path, tmp_path, tmp_path / "own", tmp_path / "runs")
    given = Annotate.parse(flags)
    assert given.passes == ("caption", "describe") and given.boxes == "queries"
    assert given.model == str(tmp_path / "runs") and given.annotations == [str(path)]


def test_the_second_round_is_annotated_by_the_model_of_its_seed(tmp_path, monkeypatch):
    main, asked = tmp_path / "poses", []
    main.mkdir()
    lines = [json.dumps({"image": f"{i}.png", "caption": "a bird"}) + "\n" for i in range(20)]
    (main / "A.jsonl").write_text("".join(lines))

    def annotate(flags):
        given = Annotate.parse(flags)
        asked.append(given)
        source = annotations.read(given.annotations[0]).records
        said = [{"image": one.image, "synthetic_caption": "own"} for one in source]
        folder = tmp_path / "second_round/annotated_2/own"
        folder.mkdir(parents=True)
        (folder / "A.jsonl").write_text("".join(json.dumps(one) + "\n" for one in said))
        return 0

    built = []
    monkeypatch.setattr(annotate_command, "main", annotate)
    monkeypatch.setattr(words_data.build, "main", lambda flags: built.append(flags) or 0)
    run = words.run_of(words.OURS, 2, 100, words.ANNOTATED)
    words_data.prepare_records(run, main, tmp_path)
    (given,) = asked
    assert given.model == str(tmp_path / "runs" / "tenth-grain+1-lr0.001-steps100-seed2")
    union = annotations.read(tmp_path / "second_round/annotated_2/A.jsonl").records
    assert sum(bool(one.captions) for one in union) == 2
    assert sum(one.synthetic_caption == "own" for one in union) == 18
    assert "--name=annotated_2" in built[0] and Build.parse(built[0])
    words_data.prepare_records(words.run_of(words.OURS, 2, 100, words.TENTH), main, tmp_path)
    assert len(annotations.read(tmp_path / "second_round/tenth/A.jsonl").records) == 2
    assert len(asked) == 1 and "--name=tenth" in built[1]
    (tmp_path / "records/tenth/1.0.0").mkdir(parents=True)
    for data_set in (words.TENTH, words.POSES, words.CLOTHES):  # there, or made elsewhere
        words_data.prepare_records(words.run_of(words.OURS, 0, data=data_set), main, tmp_path)
    assert len(built) == 2


def test_clothes_are_divided_in_turn(tmp_path, monkeypatch):
    fashion, views = tmp_path / "fashion", tmp_path / "views/clothes"
    (fashion / "test").mkdir(parents=True)
    views.mkdir(parents=True)
    for group in ("seen", "unseen"):
        lines = [json.dumps({"image": f"{group}-{i}.png"}) + "\n" for i in range(5)]
        (fashion / f"test/{group}.jsonl").write_text("".join(lines))
    words_data.divide_clothes(fashion, views)
    read = lambda name: [
        json.loads(line)["image"] for line in (views / f"{name}.jsonl").read_text().splitlines()
    ]
    assert read("unseen_validation") == [f"unseen-{i}.png" for i in (0, 2, 4)]
    assert read("unseen_test") == ["unseen-1.png", "unseen-3.png"]
    assert not set(read("both_validation")) & set(read("both_test"))
    assert len(read("both_validation")) + len(read("both_test")) == 10
    args = argparse.Namespace(steps=100, clothes=None, command="run")
    found = everything(clothes=False)
    assert "clothes" not in words_study.planned(found, args)
    args.clothes = fashion
    assert "clothes" in words_study.planned(found, args)


@pytest.mark.slow
def test_a_run_appends_its_row(tmp_path, monkeypatch):
    """Data, training, evaluation and reranking end in a row; nothing is learnt at this size."""
    for name in words.AVIARIES:
        monkeypatch.setitem(words.AVIARIES, name, words.AVIARIES[name] | FEW | {"images": 128})
    monkeypatch.setattr(words, "SHARE", 2)
    shallow = {f"model.{tower}.depth": 1 for tower in ("image", "text", "decoder")}
    for key, value in {"text.pack_group": 8, **shallow}.items():  # 8 devices
        monkeypatch.setitem(design.SETTING, key, value)
    args = argparse.Namespace(workdir=tmp_path, results=tmp_path / "results.tsv", steps=2)
    run = words.run_of(words.OURS, 0, 2, words.TENTH)
    args.clothes, args.command, args.run = None, "train", run.name
    words_study.train(args)
    made = words_study.read(args.results)[run.name]
    assert made["steps"] == 2 and made["flops_per_step"] > 1e9
    assert [name for name in words_study.COLUMNS if name not in made] == []
    shares = {name: made[name] for name in words_study.MEASURED if "weight" not in name}
    assert all(0 <= value <= 1 for value in shares.values())
    stored = json.loads((tmp_path / "runs" / run.name / "rerank.json").read_text())
    assert stored["weight"] == made["reranked_test/weight"]
    assert stored["annotations"].endswith("both_validation.jsonl")
    assert len(annotations.read(tmp_path / "second_round/tenth/A.jsonl").records) == 64
