"""The fourth design of `benchmarks.claim` on made-up results: arms, the plan, the pair, the bars, its data."""

import argparse
import json
import re
import statistics
import sys

import pytest

from benchmarks.claim import __main__ as claim
from benchmarks.claim import (
    compared,
    data,
    dense,
    dense_data,
    dense_plan,
    dense_report,
    dense_study,
    design,
    results,
    schedule,
)
from grain_jax import config as config_lib
from grain_jax.data.aviary import generate
from grain_jax.data.aviary.arguments import Aviary
from grain_jax.data.aviary.species import species_of
from grain_jax.losses import total as losses
from tests import paths

PAIR = ("masked_patches", "crop_distillation")
BEST_CLIP = "clip+teacher_similarity"  # without the terms of the pair


def row(run, score=0.5, **changes):
    """A row of the table; `score` is every share that the arm measures."""
    base, terms = dense.parts_of(run.arm)
    measured = {}
    for name in dense_study.MEASURED:
        of_regions = name.startswith(("grounding", "parts_regions", "parts_both"))
        of_maps = name.startswith(("parts", "looks"))
        if base == dense.CONTROL or not (of_regions or (base == dense.CLIP and of_maps)):
            if run.data == dense.MAIN or not (of_maps or name.startswith("retrieval_validation")):
                measured[name] = score
    return {
        "design": dense.DESIGN,
        **run._asdict(),
        "settings": dense.settings_of(run),
        "batch_size": 64,
        "seconds": 120.0,
        "flops_per_step": 1e10 + 2e9 * len(terms),
        "device": "cpu",
        "jax": "0",
        "loss_image_caption": 1.0,
        **measured,
        **changes,
    }


def everything(steps=100, clothes=True):
    """Results of the whole plan: the terms of PAIR have the highest part mIoU and retrieval of validation."""
    found = {}
    for _ in range(4):  # each round adds the runs that depend on the last
        for runs in dense_plan.plan(found, steps=steps, clothes=clothes).values():
            for run in runs:
                base, terms = dense.parts_of(run.arm)
                score = 0.3 if base != dense.CONTROL else 0.4 + 0.1 * len(terms)
                made = row(run, score + 0.01 * run.seed)
                if run.data == dense.MAIN:
                    best = PAIR[1] in terms or run.arm == BEST_CLIP
                    for way in ("image_to_text", "text_to_image"):
                        made[f"retrieval_validation/{way}/r1"] = 0.6 if best else 0.2
                    if dense_plan.VALIDATION_MIOU in made:
                        made[dense_plan.VALIDATION_MIOU] = 0.7 if PAIR[0] in terms else 0.3
                found[run.name] = made
    return found


def test_arms_are_recipes_with_terms():
    assert len(dense.SINGLES) == 3 + 5 + 4  # CLIP has no boxes to distil
    assert dense.arm_of("clip", PAIR) == "clip+masked_patches"
    assert dense.arm_of("grain", PAIR[::-1]) == "grain+masked_patches+crop_distillation"
    run = dense.run_of(dense.arm_of("grain", PAIR), 1)
    assert run.name == "main-grain+masked_patches+crop_distillation-lr0.001-steps500-seed1"
    assert dense.changes(run)["model.boxes.kind"] == "roi_align"
    assert dense.changes(run)["teacher.kind"] == "ema"
    assert list(dense.terms_of(run)) == list(PAIR)
    control = dense.changes(dense.run_of("grain", 1))
    assert control == design.changes(design.ClaimRun("grain_boxes", 1e-3, 1, 500), design.CONFIG)
    assert dense.terms_of(dense.run_of("grain", 1)) == {}
    assert dense.changes(dense.run_of("towers", 0))["model.decoder"] is None


def test_all_runs_of_a_seed_differ_in_their_settings():
    arms = [*dense.SINGLES, dense.arm_of("grain", PAIR), dense.arm_of("towers", PAIR)]
    found = {dense.settings_of(dense.run_of(arm, seed)) for arm in arms for seed in dense.SEEDS}
    assert len(found) == 3 * len(arms)
    used = design.AVIARY["seed"], 29, 100, 0  # design 3, regions, pilots, the demo
    assert dense.AVIARY["seed"] not in used


@pytest.mark.parametrize(
    "arm",
    [*dense.SINGLES, "words", *(dense.arm_of(b, dense.TERMS) for b in ("grain", "clip", "towers"))],
)
def test_every_arm_is_a_config(tmp_path, arm):
    c = dense.make_config(dense.run_of(arm, 1), tmp_path / "main", tmp_path)
    config = config_lib.from_dict(c)
    assert (config.seed, config.total_steps, config.optim.learning_rate) == (1, 500, 1e-3)
    base, terms = dense.parts_of(arm)
    entries = losses.local_entries(config.loss)
    assert {*entries} == {*terms}
    for entry in entries.values():
        assert entry.cls.faults(entry.options, config) == []
    needs = {"self_distillation", "masked_patches", "crop_distillation", "teacher_similarity"}
    assert (config.teacher.kind == "ema") == bool(needs & {*terms})
    assert (config.input.views.local == 2) == ("self_distillation" in terms)
    assert (config.model.decoder is None) == (base == "towers")
    assert (config.model.boxes.kind != "none") == (base == "grain")
    assert base == "words" or (config.loss.box != 0) == (base == "grain")
    assert (config.input.max_regions == 0) == (base == "words")
    assert ("parts" in config.evals) == (base in ("grain", "towers"))


def test_validation_chooses_the_pair_and_the_plan_grows():
    assert dense_plan.best_two({}, 100) is None
    first = dense_plan.plan({}, steps=100, clothes=True)
    assert set(first) == {"equal steps"} and len(first["equal steps"]) == 3 * len(dense.SINGLES)
    found = everything()
    assert dense_plan.best_two(found, 100) == PAIR
    lacking = {
        name: r
        for name, r in found.items()
        if name != "main-grain+text_pooled-lr0.001-steps100-seed2"
    }
    assert dense_plan.best_two(lacking, 100) is None
    studies = dense_plan.plan(found, steps=100, clothes=True)
    arms = {study: list(dict.fromkeys(run.arm for run in runs)) for study, runs in studies.items()}
    ours = dense.arm_of("grain", PAIR)
    assert set(arms["equal steps"]) - set(dense.SINGLES) == {ours, "towers+masked_patches"}
    assert arms["clothes"] == [
        *("grain", "grain+masked_patches", "grain+crop_distillation", ours),
        *("clip", "clip+masked_patches", BEST_CLIP, "words"),
    ]
    assert arms["equal FLOPs"][-1] == BEST_CLIP
    unfinished = {name: r for name, r in found.items() if r["arm"] != "towers+masked_patches"}
    assert set(dense_plan.plan(unfinished, steps=100, clothes=True)) == {"equal steps"}
    steps = {run.arm: run.steps for run in studies["equal FLOPs"]}
    assert steps[ours] == 100 and steps["grain"] == steps["clip"] == 140  # 14 / 10
    assert steps["grain+masked_patches"] == steps["clip+masked_patches"] == 117  # 14 / 12
    assert set(dense_plan.order(studies)) == {results.run_of(r) for r in found.values()}
    assert "clothes" not in dense_plan.plan(found, steps=100, clothes=False)


def test_bars_and_tables(capsys):
    found = everything()
    studies = dense_plan.plan(found, steps=100, clothes=True)
    dense_report.report(studies, found)
    text = capsys.readouterr().out
    for title in ("Validation species", "Equal steps", "Clothes", "Equal FLOPs"):
        assert f"## {title}" in text
    ours = "GRAIN, masked patches, crop distillation"
    met = f"| {ours} | part mIoU at least 10 points over the control | +20.0 | MET |"
    assert met in text
    assert f"| {ours} | 61.0 ± 1.0 |" in text and "| masked_patches | 3 | 70.0 ± 0.0 |" in text
    single = "GRAIN, text pooled"
    assert f"| {single} | part mIoU at least 10 points over the control | +10.0 | MET |" in text
    assert f"| {single} | +10.0 (+10.0 to +10.0) |" in text
    assert (
        "| CLIP | 3 | 100 | 10.0 |" in text and "| CLIP, masked patches | 3 | 117 | 12.0 |" in text
    )


@pytest.mark.parametrize(
    "changes, wanted",
    [
        ({}, [True, True, True, True]),
        ({"parts/miou": 0.49}, [False, True, True, True]),
        ({"retrieval_test/text_to_image/r1": 0.29}, [True, True, False, True]),
        ({"grounding/region_to_description_r1": 0.37}, [True, True, True, False]),
        ({"grounding/box_iou": 0.385}, [True, True, True, True]),
        ({"parts_both/miou": 0.37}, [True, True, True, False]),
        ({"looks/miou": 0.37}, [True, True, True, False]),
    ],
)
def test_each_bar_is_met_or_not(changes, wanted):
    arms = {"grain": 0.4, "clip": 0.3, "grain+text_pooled": 0.55}
    groups = {arm: [row(dense.run_of(arm, 0), score)] for arm, score in arms.items()}
    groups["grain+text_pooled"][0] |= changes
    assert [bar.met for bar in dense_report.bars("grain+text_pooled", groups)] == wanted


def test_the_table_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    table, found = tmp_path / "r.tsv", everything()
    for made in found.values():
        results.append(table, made, dense_study.COLUMNS)
    assert dense_study.read(table) == found
    words = ["claim", "report", "--design=4", f"--results={table}", "--steps=100"]
    monkeypatch.setattr(sys, "argv", words)
    assert claim.main() == 0 and "## Clothes" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*words, f"--data={tmp_path}"])
    with pytest.raises(SystemExit):
        claim.main()
    assert "--data: got it with --design 4" in capsys.readouterr().err
    results.append(table, row(dense.run_of("grain", 5), settings="x"), dense_study.COLUMNS)
    with pytest.raises(
        results.ClaimError, match="of other settings than benchmarks/claim/dense.py"
    ):
        dense_study.read(table)
    dense_study.read(results.TABLES / "dense.tsv")


@pytest.mark.parametrize("arm", ["grain+text_pooled", "clip+masked_patches", "towers"])
@pytest.mark.parametrize("name", ["main", "clothes"])
def test_a_row_without_a_measure_of_its_arm_is_refused(tmp_path, arm, name):
    run = dense.run_of(arm, 0, data=name)
    evals = dense.make_config(run, tmp_path, tmp_path).evals
    terms = dense.parts_of(arm)[1]
    made = row(run) | {f"loss_{term}": 1.0 for term in terms}
    assert dense_study.lacking(run, made, evals) == []
    assert all(one.patch_sides == (1,) for one in evals.values() if one.kind == "segmentation")
    wanted = ["retrieval_test/image_to_text/r1", *(f"loss_{term}" for term in terms)]
    if name == "main" and not arm.startswith("clip"):
        wanted.append(dense_plan.VALIDATION_MIOU)
    for column in wanted:
        without = {key: value for key, value in made.items() if key != column}
        assert dense_study.lacking(run, without, evals) == [column]


def test_the_evaluations_are_part_of_the_settings(monkeypatch):
    run = dense.run_of("grain", 0)
    before = dense.settings_of(run)
    entries = dense._entries
    changed = lambda *given: entries(*given) | {"parts": ("segmentation", {"by": "regions"})}
    monkeypatch.setattr(dense, "_entries", changed)
    assert dense.settings_of(run) != before


def test_halves_share_no_species_and_no_image(tmp_path, monkeypatch):
    few = dict(genera=2, species_per_genus=2, held_out_genera=2, held_out_species_per_genus=2)
    few |= dict(images=2, seen_per_species=2, unseen_per_species=1, test_images=17, parts_changed=8)
    monkeypatch.setattr(dense, "AVIARY", dense.AVIARY | few)
    main, views = tmp_path / "main", tmp_path / "views"
    settings = Aviary.parse([f"--output={main}", *data.aviary_flags(dense.AVIARY)]).settings
    generate.write(main, settings)
    data.make_views(main, views)
    dense_data.divide_tests(main, views, dense.AVIARY)
    species = {t.image: t.species.name for t in generate.tasks_of(settings) if t.split == "test"}
    held_out = [one.name for one in species_of(settings).held_out]
    found = {}
    for split in dense.SPLITS:
        read = lambda name: [
            json.loads(line)["image"]
            for line in (views / f"{name}_{split}.jsonl").read_text().splitlines()
        ]
        unseen, both = read("unseen"), read("both")
        seen = [image for image in both if image not in unseen]
        half = {path.name for path in (views / f"unseen_{split}").iterdir()}
        assert {species[image] for image in unseen} == half <= set(held_out)
        assert not {species[image] for image in seen} & set(held_out)
        for group, images in (("seen", seen), ("unseen", unseen)):
            folder = views / f"{group}_{split}_masks"
            names = {image.rpartition("/")[2] for image in images}
            for kind in ("images", "masks", "looks"):
                assert {path.name for path in (folder / kind).iterdir()} == names
                assert all(path.exists() for path in (folder / kind).iterdir())
            assert (folder / "classes.txt").exists() and (folder / "looks.txt").exists()
        found[split] = set(both)
    assert not found["validation"] & found["test"]
    assert found["validation"] | found["test"] == set(species) and len(species) == 17


def test_clothes_are_divided_by_kind_alone(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(data, "prepare", lambda *given: asked.append(given) or tmp_path / "fashion")
    assert dense_data.prepare(dense.CLOTHES, tmp_path / "fashion", tmp_path) == tmp_path / "fashion"
    assert asked == [("clothes", tmp_path / "fashion", tmp_path)]
    links = {path.name: path.resolve().name for path in (tmp_path / "views/clothes").iterdir()}
    assert links == {"both_test.jsonl": "A.jsonl", "unseen_test.jsonl": "unseen.jsonl"}
    run = dense.run_of("grain", 0, data=dense.CLOTHES)
    args = argparse.Namespace(steps=100, clothes=None, command="run")
    found = everything()  # has rows of clothes, which a run without their folder cannot train
    assert "clothes" not in dense_study.planned(found, args)
    args.command = "report"
    assert "clothes" in dense_study.planned(found, args)
    assert "clothes" not in dense_study.planned({}, args)
    assert dense.settings_of(run) != dense.settings_of(dense.run_of("grain", 0))


@pytest.mark.slow
def test_a_run_appends_its_row(tmp_path, monkeypatch):
    """Data, training and evaluation end in a row; nothing is learnt at this size."""
    few = dict(genera=2, species_per_genus=2, held_out_genera=2, held_out_species_per_genus=2)
    few |= dict(images=64, seen_per_species=2, unseen_per_species=2, test_images=16)
    monkeypatch.setattr(dense, "AVIARY", dense.AVIARY | few | {"parts_changed": 8})
    shallow = {f"model.{tower}.depth": 1 for tower in ("image", "text", "decoder")}
    for key, value in {"text.pack_group": 8, **shallow}.items():  # 8 devices
        monkeypatch.setitem(design.SETTING, key, value)
    run = dense.run_of(dense.arm_of("grain", ("self_distillation", "crop_distillation")), 0, 2)
    monkeypatch.setattr(dense_plan, "order", lambda studies: [run])
    args = argparse.Namespace(workdir=tmp_path, results=tmp_path / "results.tsv", steps=2)
    args.clothes, args.run, args.command = None, run.name, "train"
    dense_study.train(args)
    made = dense_study.read(args.results)[run.name]
    assert made["steps"] == 2 and made["flops_per_step"] > 1e9
    assert {name for name in dense_study.COLUMNS if name not in made} == {
        *("loss_masked_patches", "loss_teacher_similarity", "loss_text_pooled"),
    }
    assert all(0 <= made[name] <= 1 for name in dense_study.MEASURED)


def test_figures_of_the_page_are_those_of_the_stored_results():
    """The tables of the fourth design in docs/claim.md, one a study: means of three seeds."""
    found = dense_study.read(dense_study.TABLE)
    studies = dense_plan.plan(found, steps=dense.STEPS, clothes=True)
    page = (paths.ROOT / "docs/claim.md").read_text().split("## The fourth design")[1]
    tables = page.split("* **Data**")[0].split("| | part mIoU |")
    bases = {"GRAIN": dense.CONTROL, "CLIP": dense.CLIP, "CLIP without a decoder": dense.TOWERS}
    bases["CLIP, descriptions in its captions"] = dense.WORDS
    keys = ("parts/miou", "parts_both/miou", "", "", "grounding/region_to_description_r1")
    both = ("retrieval_test/image_to_text/r1", "retrieval_test/text_to_image/r1")
    for before, table, study in zip(tables, tables[1:], ("equal steps", "equal FLOPs", "clothes")):
        assert study in before.split("\n\n")[-2]
        groups, base = compared.grouped(studies[study], found), ""
        for line in table.splitlines()[2:]:
            if not line.startswith("| "):
                break
            name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            if not name.startswith("and"):
                base = bases[name.removesuffix(", the control")]
            rows = groups.pop(dense.arm_of(base, re.findall("`(.*?)`", name)))
            assert len(rows) == 3, name
            mean = lambda key, rows=rows: f"{statistics.fmean(100 * row[key] for row in rows):.1f}"
            expected = [mean(key) if key in rows[0] else "" for key in keys]
            unseen = statistics.fmean(schedule.by_description(row, "test") for row in rows)
            expected[2:4] = f"{100 * unseen:.1f}", " / ".join(map(mean, both))
            assert cells == expected, name
        assert not groups, (study, groups.keys())
