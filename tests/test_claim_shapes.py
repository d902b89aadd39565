"""The sixth design of `benchmarks.claim` on made-up results: arms, the plan, its tables; and one tiny run."""

import argparse
import statistics
import sys

import pytest

from benchmarks.claim import __main__ as claim
from benchmarks.claim import compared, dense, design, results, schedule, shapes
from grain_jax import config as config_lib
from tests import paths

FEW = dict(genera=2, species_per_genus=2, held_out_genera=2, held_out_species_per_genus=2)
FEW |= dict(images=128, seen_per_species=2, unseen_per_species=2, test_images=16, parts_changed=8)


def row(run, score):
    """A row of the table; `score` is every share."""
    flops = {shapes.KEEP: 7e9}.get(run.arm, 1e10)
    about = dict(design=shapes.DESIGN, settings=shapes.settings_of(run), device="cpu", jax="0")
    about |= dict(batch_size=64, seconds=120.0, flops_per_step=flops, loss_image_caption=1.0)
    return {**about, **run._asdict(), **dict.fromkeys(shapes.MEASURED, score)}


def everything(steps=100):
    """Results of the whole plan: 0.4, in own shape 0.5, at equal FLOPs 0.6, and 0.01 a seed."""
    found = {}
    for _ in range(2):
        for runs in shapes.plan(found, steps).values():
            for run in runs:
                score = 0.6 if run.steps > steps else 0.4 if run.arm == shapes.SQUARES else 0.5
                found[run.name] = row(run, score + 0.01 * run.seed)
    return found


@pytest.mark.parametrize("arm", shapes.ARMS)
def test_the_arms_differ_in_a_few_keys(arm, tmp_path):
    run = shapes.run_of(arm, 1)
    made = config_lib.from_dict(shapes.make_config(run, tmp_path, tmp_path))
    assert made.input.sequence_lengths == (() if arm == shapes.SQUARES else (64,))
    assert (made.model.image.keep == 1.0) == (arm != shapes.KEEP)
    assert made.total_steps == 500 and made.model.boxes.kind == "roi_align"
    control = design.changes(run._replace(arm="grain_boxes"), design.CONFIG)
    assert shapes.changes(run).items() >= control.items()


def test_the_plan_grows_with_the_results():
    assert {s: len(runs) for s, runs in shapes.plan({}, 100).items()} == {"equal steps": 9}
    studies = shapes.plan(everything(), 100)
    steps = {run.arm: run.steps for run in studies["equal FLOPs"]}
    assert steps == {shapes.OWN: 100, shapes.KEEP: 143}
    assert len({run.name for runs in studies.values() for run in runs}) == 12


def test_the_table_and_the_report(tmp_path, monkeypatch, capsys):
    table = tmp_path / "r.tsv"
    for made in everything().values():
        results.append(table, made, shapes.COLUMNS)
    given = ["claim", "report", "--design=6", f"--results={table}", "--steps=100"]
    monkeypatch.setattr(sys, "argv", given)
    assert claim.main() == 0
    text = capsys.readouterr().out
    assert "| squashed to squares | 41.0 ± 1.0 | " in text
    assert "| own shape | +10.0 (+10.0 to +10.0) |" in text
    assert "| own shape, half of the patches until 80% | 3 | 143 | 7.0 |" in text
    monkeypatch.setattr(sys, "argv", [*given, f"--clothes={tmp_path}"])
    with pytest.raises(SystemExit):
        claim.main()
    assert "--clothes: got it with --design 6" in capsys.readouterr().err


def test_figures_of_the_page_are_those_of_the_stored_results():
    """The rows of the sixth design in docs/claim.md: means of three seeds."""
    found = shapes.read(shapes.TABLE)
    studies = shapes.plan(found, shapes.STEPS)
    groups = {
        (study, arm): rows
        for study, runs in studies.items()
        for arm, rows in compared.grouped(runs, found).items()
    }
    page = (paths.ROOT / "docs/claim.md").read_text().split("## The sixth design")[1]
    lines = [line for line in page.splitlines() if line.startswith("| ")][1:]
    arms = [("equal steps", arm) for arm in shapes.ARMS] + [("equal FLOPs", shapes.KEEP)]
    for (study, arm), line in zip(arms, lines, strict=True):
        rows = groups[study, arm]
        assert len(rows) == 3
        mean = lambda key, rows=rows: statistics.fmean(100 * row[key] for row in rows)
        both = ("retrieval_test/image_to_text/r1", "retrieval_test/text_to_image/r1")
        unseen = statistics.fmean(100 * schedule.by_description(row, "test") for row in rows)
        expected = [f"{mean(key):.1f}" for key in ("parts/miou", "parts_both/miou")]
        expected += [f"{unseen:.1f}", f"{mean('seen_test/alpha_1.0/top1'):.1f}"]
        expected += [" / ".join(f"{mean(key):.1f}" for key in both)]
        expected += [f"{mean('grounding/box_iou') / 100:.3f}"]
        expected += [f"{mean('grounding/region_to_description_r1'):.1f}"]
        assert [cell.strip() for cell in line.strip("|").split("|")][1:] == expected, arm


@pytest.mark.slow
def test_a_run_appends_its_row(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "AVIARY", shapes.AVIARY | FEW)
    monkeypatch.setitem(design.SETTING, "text.pack_group", 8)  # 8 devices
    for tower in ("image", "text", "decoder"):
        monkeypatch.setitem(design.SETTING, f"model.{tower}.depth", 1)
    args = argparse.Namespace(workdir=tmp_path, results=tmp_path / "results.tsv", steps=2)
    args.run = shapes.run_of(shapes.KEEP, 0, 2).name
    shapes.train(args)
    made = shapes.read(args.results)[args.run]
    assert all(0 <= made[name] <= 1 for name in shapes.MEASURED)
    assert (tmp_path / "views" / dense.MAIN / "both_test.jsonl").exists()
