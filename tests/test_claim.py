"""`benchmarks.claim` on made-up results: the plan, the choice of learning rates, tables."""

import argparse
import json
import math

import pytest

from benchmarks.claim import __main__ as claim
from benchmarks.claim import data, design, measures, report, schedule
from benchmarks.claim import results as claim_results
from grain_jax import config as config_lib
from tests import paths, record_sets


def result(run, score=0.5, **changes):
    """A row of the table of results; `score` is every accuracy."""
    trains_regions = run.arm not in design.CLIP_ARMS
    measured = {}
    for name in claim_results.MEASURED:
        if trains_regions or not name.startswith("grounding"):
            chance = {"seen_test/chance": 0.01, "unseen_test/chance": 0.025}.get(name, 0.0025)
            measured[name] = chance if "chance" in name else score
    return {
        "design": design.DESIGN,
        **run._asdict(),
        "settings": design.settings_of(run, design.CONFIG),
        "batch_size": 64,
        "seconds": 120.0,
        "flops_per_step": 10e9 if trains_regions else 8e9,
        "device": "cpu",
        "jax": "0",
        "loss_image_caption": 1.0,
        "logit_scale": 14.0,
        **measured,
        **changes,
    }


def everything(steps=100):
    """Results of the whole plan: OURS 0.8, others 0.3; 1e-3 is the better rate of GRAIN's arms, 5e-4 of others."""
    results = {}
    for _ in range(3):  # each round adds the runs that depend on the last
        for runs in schedule.plan(results, steps=steps, aviaries=True).values():
            for run in runs:
                score = 0.8 if run.arm == design.OURS else 0.3
                worse = (run.rate == 5e-4) == run.arm.startswith("grain")
                results[run.name] = result(run, score - 0.1 * worse + 0.01 * run.seed)
    return results


def test_the_plan_follows_from_the_finished_runs():
    first = schedule.plan({}, steps=100, aviaries=True)
    assert len(first["grid"]) == len(design.ARMS) * len(design.RATES)
    assert first["equal steps"] == []
    studies = schedule.plan(everything(), steps=100, aviaries=True)
    for main in studies["equal steps"], studies["poses"]:
        assert len(main) == len(design.ARMS) * len(design.SEEDS)
        assert {run.rate for run in main if run.arm in design.CLIP_ARMS} == {5e-4}
        assert {run.rate for run in main if run.arm not in design.CLIP_ARMS} == {1e-3}
    steps = {run.arm: run.steps for run in studies["equal FLOPs"]}
    assert steps == dict.fromkeys(design.CLIP_ARMS, 125)  # 10 / 8 of 100
    own = schedule.plan(everything(), steps=100, aviaries=False)
    assert "poses" not in own


def test_the_validation_classes_choose_how_an_arm_is_asked():
    made = result(design.ClaimRun("clip_descriptions", 1e-3, 0, 100))
    made["sentence_validation/alpha_1.0/top1"] = 0.7
    made["sentence_test/alpha_1.0/top1"] = 0.4
    made["unit_test/alpha_1.0/top1"] = 0.6
    assert schedule.validation_score(made) == 0.7
    assert measures.headline(made) == 0.4


def test_an_arm_that_never_trained_is_named():
    made = result(design.ClaimRun("clip", 1e-3, 0, 100))
    assert measures.faults(made) == []
    made["loss_image_caption"] = 0.95 * math.log(64)
    made["seen_test/alpha_1.0/top1"] = 0.05
    assert measures.faults(made) == [
        "L_ic is 0.95 of its chance value",
        "seen names are at 5.0%, less than 10 times chance",
    ]
    few = result(design.ClaimRun("clip", 1e-3, 0, 100)) | {"seen_test/chance": 0.125}
    assert measures.faults(few | {"seen_test/alpha_1.0/top1": 0.6}) == []
    assert measures.faults(few | {"seen_test/alpha_1.0/top1": 0.5}) == [
        "seen names are at 50.0%, less than half way from chance to all"
    ]


def test_report_prints_every_study_and_draws(tmp_path, capsys):
    results = everything()
    studies = schedule.plan(results, steps=100, aviaries=True)
    report.report(studies, results, tmp_path)
    text = capsys.readouterr().out
    # Seeds give 0.80, 0.81, 0.82 and 0.30, 0.31, 0.32.
    assert f"| {measures.LABELS[design.OURS]} | 80.0, 81.0, 82.0 | 81.0 ± 1.0 |" in text
    lead = "30.0, 31.0, 32.0 | 31.0 ± 1.0 | +50.0, +50.0, +50.0 | +50.0 to +50.0 |"
    assert f"| {measures.LABELS['clip_descriptions']} | {lead}" in text
    for title in ("Learning rates", "Equal steps", "Equal FLOPs", "Harder poses"):
        assert f"## {title}" in text
    for name in ("claim_arms.png", "claim_poses.png"):
        assert (tmp_path / name).stat().st_size > 10_000


def test_results_of_other_settings_are_refused():
    run = design.ClaimRun("grain", 1e-3, 0, 100)
    claim.check_results({run.name: result(run)}, design.CONFIG)
    with pytest.raises(claim_results.ClaimError, match="its result has other settings"):
        claim.check_results({run.name: result(run, settings="x")}, design.CONFIG)


def test_the_table_keeps_every_finished_run(tmp_path):
    """Also after a run was killed while it wrote its row; rows of another design stay and are not read."""
    table = tmp_path / "results.tsv"
    assert claim_results.read(table) == {}
    made = everything()
    for other in made.values():
        claim_results.append(table, other)
    claim_results.append(table, result(design.ClaimRun("clip", 1e-3, 0, 550), design=1))
    assert claim_results.read(table) == made

    whole = table.read_text()
    with table.open("a") as file:
        file.write(whole.splitlines()[1][:40])
    assert claim_results.read(table) == made
    last = design.ClaimRun("grain", 1e-3, 0, 7)
    claim_results.append(table, result(last))
    assert claim_results.read(table) == made | {last.name: result(last)}
    assert table.read_text().startswith(whole)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("jax\t", "version\t", "has other columns"),
        ("\t100\t", "\tmany\t", "line 2: not a result"),
    ],
)
def test_another_table_is_refused(tmp_path, old, new, message):
    table = tmp_path / "results.tsv"
    claim_results.append(table, result(design.ClaimRun("grain", 1e-3, 0, 100)))
    table.write_text(table.read_text().replace(old, new))
    with pytest.raises(claim_results.ClaimError, match=message):
        claim_results.read(table)


def test_validation_and_test_share_no_class_and_no_image(tmp_path):
    for group, count in (("seen", 3), ("unseen", 5)):
        for name in range(count):
            folder = tmp_path / "main" / group / f"{group}{name}"
            folder.mkdir(parents=True)
            for number in range(4):
                record_sets.picture(number).save(folder / f"{number}.png")
    described = {f"unseen{name}": ["red beak", "blue wing"] for name in range(5)}
    (tmp_path / "main" / "unseen.json").write_text(json.dumps(described))
    views = tmp_path / "views"
    data.make_views(tmp_path / "main", views)
    for group, count in (("seen", 12), ("unseen", 20)):
        validation, test = (
            {path.resolve() for path in (views / f"{group}_{split}").glob("*/*.png")}
            for split in ("validation", "test")
        )
        assert not validation & test and len(validation | test) == count
    assert len(list((views / "unseen_validation").iterdir())) == 2
    assert len(list((views / "seen_test").glob("*/*.png"))) == 6
    sentences = json.loads((views / "sentences.json").read_text())
    assert sentences["unseen0"] == ["red beak, blue wing"]


@pytest.mark.parametrize("arm", design.ARMS)
def test_every_arm_is_a_config(tmp_path, arm):
    run = design.ClaimRun(arm, 1e-3, 1, 100)
    c = design.make_config(run, design.CONFIG, tmp_path / "main", tmp_path)
    config = config_lib.from_dict(c)
    assert (config.seed, config.total_steps, config.optim.learning_rate) == (1, 100, 1e-3)
    assert (config.input.max_regions == 0) == (
        arm in ("clip", "clip_descriptions", "clip_captions")
    )
    trains_regions = config.loss.box > 0 and config.input.max_regions > 0
    assert trains_regions == (arm not in design.CLIP_ARMS)


@pytest.mark.slow
def test_a_run_appends_its_row(tmp_path, monkeypatch):
    """Data, training and evaluation end in a row; nothing is learnt at this size."""
    small = dict(images=64, seen_per_species=2, unseen_per_species=2, test_images=16)
    small |= dict(genera=2, species_per_genus=2, held_out_genera=2, held_out_species_per_genus=2)
    monkeypatch.setitem(design.__dict__, "AVIARY", design.AVIARY | small | {"parts_changed": 8})
    args = argparse.Namespace(
        workdir=tmp_path, results=tmp_path / "results.tsv", config=design.CONFIG, data=None
    )
    shallow = {f"model.{tower}.depth": 1 for tower in ("image", "text", "decoder")}
    for key, value in {"text.pack_group": 8, **shallow}.items():  # 8 devices
        monkeypatch.setitem(design.SETTING, key, value)
    data.prepare("main", None, tmp_path)
    run = design.ClaimRun("grain", 1e-3, 0, 2)
    claim.train(run, args)
    made = claim_results.read(args.results)[run.name]
    assert made["steps"] == 2 and made["flops_per_step"] > 1e9 / 4
    assert 0 <= made["unseen_test/alpha_0.5/top1"] <= 1
    assert 0.8 < measures.health(made) < 1.5  # nothing is learnt in 2 steps


def test_figures_of_the_page_are_those_of_the_stored_results():
    """The rows of docs/claim.md that list three seeds: means, deviations and retrieval."""
    spread = ("seen_test/alpha_1.0/top1", "unseen_test/alpha_0.5/top1")
    spread += ("grounding_unseen/region_to_description_r1",)
    known = {}  # the three seeds, as the page shows them -> other figures of the row
    for name in ("claim", "fashion"):
        groups = {}
        for row in claim_results.read(paths.ROOT / f"benchmarks/claim/tables/{name}.tsv").values():
            groups.setdefault((row["data"], row["arm"], row["rate"], row["steps"]), []).append(row)
        for rows in groups.values():
            mean = lambda key: measures.cell(rows, key).split(" ±")[0]
            scores = [measures.headline(row) for row in rows]
            known[", ".join(f"{100 * score:.1f}" for score in scores)] = {
                measures.spread(scores).split(" ±")[0],
                f"{mean('retrieval/image_to_text/r1')} / {mean('retrieval/text_to_image/r1')}",
                *(measures.cell(rows, key) for key in spread),
            }
    checked = 0
    for line in (paths.ROOT / "docs/claim.md").read_text().splitlines():
        cells = [cell.strip(" *") for cell in line.split("|")]
        if len(cells) > 3 and "," in cells[2] and cells[2] in known:
            figures = {cells[3], *(x for x in cells if "/" in x or "±" in x)}
            assert figures <= known[cells[2]], line
            checked += 1
    assert checked == 24
