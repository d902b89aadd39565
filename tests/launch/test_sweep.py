"""Sweeps: points and names, the check before the start, the local runner, files for clusters, the table."""

import csv
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
import types

import pytest
import yaml
from etils import epath

from grain_jax.config import points
from grain_jax.core import errors
from grain_jax.launch import jobs, sweep, sweep_clusters, sweep_runs, sweep_table
from grain_jax.runtime import lock
from tests.paths import ROOT

pytestmark = pytest.mark.long

RATES = (1e-3, 2e-3)
PREPARED = dict(input__source="records", input__name="birds", input__prepare="data.aviary --name {name}")


def test_helpers_make_points():
    zipped = list(points.zipped({"a": (1, 2), "b": (3, 4)}))
    assert zipped == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
    assert list(points.seeds(2, zipped[:1])) == [{"a": 1, "b": 3, "seed": s} for s in (0, 1)]
    with pytest.raises(ValueError, match="a has 2, b has 1"):
        list(points.zipped({"a": (1, 2), "b": (3,)}))


NAMES = [
    (points.grid({"batch_size": (8,), "optim.learning_rate": (1e-3, 3e-5)}), "learning_rate=3e-05"),
    (points.grid({"model.image.depth": (1, 2), "model.text.depth": (1,)}), "depth=2"),
    (
        points.zipped({"model.image.depth": (1, 2), "model.text.depth": (1, 2)}),
        "model.image.depth=2,model.text.depth=2",
    ),
    ([{}, {"input.name": "a/b c"}], "name=a-b-c"),
]


def test_names_are_of_what_differs():
    for sweep_points, last in NAMES:
        assert sweep_runs.name_points(list(sweep_points))[-1] == last
    shipped = sweep_runs.load_points(ROOT / "configs" / "sweeps" / "learning_rate.py")
    assert sweep_runs.name_points(shipped)[-1] == "learning_rate=0.002,seed=1"
    with pytest.raises(errors.UserError, match="points 1 and 3 are both seed=0"):
        sweep_runs.name_points([{"seed": 0}, {"seed": 1}, {"seed": 0}])


def test_every_point_is_checked_as_the_trainer_reads_it(tmp_path):
    faults = {
        "optim.learning_rte": (1.0, "no such key; did you mean optim.learning_rate?"),
        "optim": (3, "--config.optim=3: Failed to parse '3'"),
        "batch_size": (16.5, "--config.batch_size"),
        "input.lanes": (3, "input.lanes: got 3, expected a divisor of batch_size = 16"),
        "total_steps": (None, "total_steps, total_epochs: exactly one must be set"),
        "log_every": (2, "log_every: the sweep and the command line both set it"),
    }
    points = [{key: value, "seed": i} for i, (key, (value, _)) in enumerate(faults.items())]
    with pytest.raises(errors.UserError) as caught:
        make(tmp_path, [*points, {"optim.learning_rte": 1.0}], ["--config.log_every=1"])
    lines = str(caught.value).splitlines()
    assert len(lines) == len(faults)
    for _, message in faults.values():
        assert sum(message in line for line in lines) == 1


def make(tmp_path, points, overrides=(), evaluator="", name="birds", **base):
    """Runs of the tiny config with changes and perhaps an evaluator; the config file has the arguments."""
    tmp_path.mkdir(exist_ok=True)
    file = tmp_path / f"config{len(list(tmp_path.glob('config*.py')))}.py"
    evals = f", evals={{{name!r}: kinds.evaluator({evaluator})}}" if evaluator else ""
    head = "from grain_jax.evaluate import kinds\nfrom tests import tiny\n\ndef get_config():\n"
    file.write_text(f"{head}    return tiny.dictionary(**{base!r}{evals})\n")
    return sweep_runs.make_runs(str(file), overrides, points, epath.Path(tmp_path))


def pretend(run, step, *, saved=True, reported=("report.html",), **metrics):
    """What the trainer leaves at `step`."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "config.json").write_text(sweep.config_lib.to_json(run.config))
    lines = [json.dumps({"step": s, "loss": 9.0 - s, **metrics}) for s in range(1, step + 1)]
    (run.folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if saved:
        (run.folder / "checkpoints" / str(step)).mkdir(parents=True)
    for name in reported:
        (run.folder / name).write_bytes(b"")


def test_finished_is_the_last_step_logged_and_saved_and_the_report_there(tmp_path):
    runs = make(tmp_path, [{"seed": s} for s in range(5)])
    pretend(runs[0], 10)
    pretend(runs[1], 10, saved=False)
    pretend(runs[2], 8)
    pretend(runs[3], 10, reported=())  # killed between its last save and its report
    assert [sweep_runs.finished(run) for run in runs] == [True, False, False, False, False]
    by_epochs, _ = make(tmp_path, [{"total_epochs": 1.0}, {"total_epochs": 2.0}])
    pretend(by_epochs, 10)
    assert sweep_runs.finished(by_epochs)
    skipped = "'grounding', 'birds', annotations='absent.jsonl', missing='skip'"
    (evaluated,) = make(tmp_path / "e", [{"seed": 0}], evaluator=skipped, report_images=8)
    pretend(evaluated, 10)  # as the trainer leaves a run whose evaluation has no data
    assert sweep_runs.finished(evaluated)


def test_a_folder_of_another_config_is_refused(tmp_path):
    skip, error = (f"'zeroshot', 'birds', missing={missing!r}" for missing in ("skip", "error"))
    (run,) = make(tmp_path, [{"seed": 0}], evaluator=skip)
    pretend(run, 10)
    same = dict(evaluator=error, log_every=5, checkpoint_every=2)
    sweep_runs.check_folders(make(tmp_path, [{"seed": 0}], **same))
    open_numbers = dict(input__lanes=None, text__pack_rows=None)  # config.json has the derived ones
    sweep_runs.check_folders(make(tmp_path, [{"seed": 0}], evaluator=skip, **open_numbers))
    other = make(tmp_path, [{"seed": 0}], evaluator=skip, batch_size=32)
    with pytest.raises(errors.UserError, match=r"was trained with batch_size = 16, and is 32 here"):
        sweep_runs.check_folders(other)
    for content in (b"", (run.folder / "config.json").read_bytes()[:-9], b"{}", b'"\xff"', b"[]"):
        (run.folder / "config.json").write_bytes(content)
        with pytest.raises(errors.UserError) as caught:
            sweep_runs.check_folders([run])
        line = rf"{run.folder}/config.json: damaged \(.+\); put back a copy, or remove that folder"
        assert re.fullmatch(line, str(caught.value))


def test_runs_that_another_sweep_trains_are_left_to_it(tmp_path, monkeypatch):
    """A second sweep, and one after a sweep that was killed and whose trainer lives on."""
    monkeypatch.setattr(jobs.Runner, "run", lambda runner: pytest.fail("a run was started"))
    config = ["--config", "tests/run_config.py", "--sweep", "learning_rate"]
    for folder in (tmp_path, tmp_path / "learning_rate=0.002,seed=1"):
        with lock.held(epath.Path(folder)):
            said = f"^{folder}: process {os.getpid()} on .* trains there, since"
            with pytest.raises(errors.UserError, match=said):
                sweep.main([*config, "--workdir", str(tmp_path)])


class Scripts:
    """Jobs that are short Python programs."""

    def __init__(self, folder, **programs):
        self.folder = epath.Path(folder)
        self.said = []
        says = self.said.append
        self.screen = types.SimpleNamespace(say=says, show=says, close=lambda stays: None)
        self.all = [self.job(name, program) for name, program in programs.items()]

    def job(self, name, program):
        head = f"import pathlib, sys, time\nme = pathlib.Path({str(self.folder / name)!r})\n"
        command = (sys.executable, "-c", head + program)
        return jobs.LocalJob(name, command, self.folder / name / "log.txt")

    def run(self, parallel=1):
        runner = jobs.Runner(list(self.all), [jobs.Slot()] * parallel, self.screen)
        runner.run()
        return runner


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(jobs, "SHOW", 0.1)


ONCE = "first = not (me / 'tried').exists(); (me / 'tried').touch()\n"


def test_what_is_preempted_goes_on_and_what_fails_is_named(tmp_path):
    scripts = Scripts(
        tmp_path,
        preempted=ONCE + "if first: sys.exit(75)\n",
        good="",
        bad="print('ValueError: why'); sys.exit(3)",
        killed="import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    )
    runner = scripts.run()
    assert runner.done == ["preempted", "good"] and runner.failed == ["bad", "killed"]
    assert runner.stopped_by is None
    text = "\n".join(scripts.said)
    assert text.count("preempted: started") == 2 and text.count("bad: started") == 1
    assert "preempted: preempted and saved after" in text and "killed: FAILED after" in text
    assert f"(3): ValueError: why [{tmp_path}/bad/log.txt]" in text and "(killed by SIGKILL)" in text
    assert (tmp_path / "bad" / "log.txt").read_text().startswith("$ ")


def test_a_signal_is_passed_on_and_nothing_else_starts(tmp_path):
    handler = "import signal; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
    program = f"{handler}(me / 'ready').touch()\ntime.sleep(30)\n"
    scripts = Scripts(tmp_path, a=program, b=program, c="")

    def kill():
        while not all((tmp_path / name / "ready").exists() for name in "ab"):
            time.sleep(0.02)
        signal.raise_signal(signal.SIGTERM)

    threading.Thread(target=kill).start()
    runner = scripts.run(parallel=2)
    assert runner.stopped_by == signal.SIGTERM and not runner.done and not runner.failed
    assert "c: started" not in scripts.said


def test_the_progress_has_no_eta_before_a_run_has_finished(tmp_path):
    scripts = Scripts(tmp_path, a="time.sleep(0.5)", b="time.sleep(0.5)")
    scripts.run()
    ended = next(i for i, line in enumerate(scripts.said) if line.startswith("a: finished"))
    before = [line for line in scripts.said[:ended] if "runs finished" in line]
    after = [line for line in scripts.said[ended:] if "runs finished" in line]
    assert before and not any("ETA" in line for line in before)
    assert any(line.startswith("1 of 2 runs finished, ETA ") for line in after)


def test_a_missing_dataset_is_made_once_before_the_runs(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(jobs.Runner, "run", lambda self: called.append("runs"))

    def make_it(command):
        called.append(command[2:])
        (tmp_path / "birds").mkdir()
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(sweep.subprocess, "run", make_it)
    runs = make(tmp_path, [{"seed": 0}, {"seed": 1}], **PREPARED, input__data_dir=str(tmp_path))
    sweep.train_here(runs, epath.Path(tmp_path), 1)
    assert called == [["data.aviary", "--name", "birds"], "runs"]


def test_slots_share_gpus_or_cores(monkeypatch):
    monkeypatch.setattr(jobs.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert [slot.prefix[-1] for slot in jobs.slots(2)] == ["0,2", "1,3"]
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    visible = [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in jobs.slots(2)]
    assert visible == ["4,6", "5,7"]
    with pytest.raises(errors.UserError, match="at most the 4 GPU"):
        jobs.slots(5)


def test_slurm_gets_an_array_of_the_unfinished_runs(tmp_path):
    runs = make(tmp_path / "w", [{"seed": s} for s in range(3)])
    pretend(runs[0], 10)
    workdir = runs[0].folder.parent
    variable, sbatch, array, script = sweep_clusters.write("slurm", runs, workdir, 4).split()
    assert (sbatch, array) == ("sbatch", "--array=1-2%4") and script.endswith("launch/slurm.sbatch")
    lines = epath.Path(variable.removeprefix("GRAIN_ARGS_FILE=")).read_text().splitlines()
    assert lines == [" ".join(run.arguments) for run in runs[1:]]
    assert "--array=1-2 " in sweep_clusters.write("slurm", runs, workdir, None)
    with pytest.raises(errors.UserError, match="expected arguments without blanks"):
        sweep_clusters.write("slurm", make(tmp_path, [{"input.name": "a b"}]), workdir, 4)
    # Clusters do not make a dataset many times.
    runs = make(tmp_path, [{"seed": 0}], **PREPARED, input__data_dir=str(tmp_path))
    with pytest.raises(errors.UserError, match="python -m data.aviary --name birds"):
        sweep_clusters.write("slurm", runs, epath.Path(tmp_path), None)


def test_gke_gets_a_jobset_for_each_unfinished_run(tmp_path, monkeypatch):
    runs = make(tmp_path / "My_Sweep", [{"seed": s} for s in range(3)])
    pretend(runs[0], 10)
    workdir = runs[0].folder.parent
    for name in ("HOSTS", "CHIPS", "IMAGE", "SERVICE_ACCOUNT"):
        monkeypatch.setenv(name, "2")
    monkeypatch.delenv("ACCELERATOR", raising=False)
    with pytest.raises(errors.UserError, match="set ACCELERATOR in the environment"):
        sweep_clusters.write("gke-gpu", runs, workdir, None)
    monkeypatch.setenv("ACCELERATOR", "x")
    *command, path = sweep_clusters.write("gke-gpu", runs, workdir, None).split()
    assert command == ["kubectl", "apply", "-f"]
    pages = list(yaml.safe_load_all(epath.Path(path).read_text()))
    names = [page["metadata"]["name"] for page in pages]
    assert names == [sweep_clusters.jobset_name(run) for run in runs[1:]] and len({*names}) == 2
    assert names[0].startswith("my-sweep-") and len(names[0]) < 40
    for page, run in zip(pages, runs[1:], strict=True):
        pod = page["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        assert " ".join(run.arguments) in pod["containers"][0]["args"][0]


def test_the_table_is_sorted_and_averages_over_seeds(tmp_path):
    runs = make(tmp_path, list(points.seeds(2, points.grid({"optim.learning_rate": RATES}))))
    for run, top1 in zip(runs, (0.5, 0.7, 0.8, 0.9)):
        pretend(run, 10, **{"eval/seen/chance": 0.1, "eval/seen/alpha_1.0/top1": top1})
    pretend(runs[3], 4, saved=False, **{"eval/seen/alpha_1.0/top1": 0.9})
    rows = sweep_table.read(runs)
    metric = sweep_table.default_metric(rows)
    assert metric == "eval/seen/alpha_1.0/top1"
    first, *lines = sweep_table.text(rows, metric, False).splitlines()
    cells = [line.split() for line in lines]
    assert cells[0] == ["run", "learning_rate", "seed", metric, "loss", "state"]
    assert cells[2] == ["learning_rate=0.002,seed=0", "0.002", "0", "0.8000", "1.0000", "finished"]
    order = "0.002,seed=0 0.001,seed=1 0.001,seed=0 0.002,seed=1"
    assert " ".join(row[0][-12:] for row in cells[2:6]) == order
    assert lines[5].endswith("step 4 of 10")
    assert cells[9] == ["learning_rate=0.002", "0.8000", "0.8000", "0.8000", "1"]
    assert cells[10] == ["learning_rate=0.001", "0.6000", "0.5000", "0.7000", "2"]
    by_loss = sweep_table.ranked(rows, "loss", True)  # the mean of the last five; smaller is better
    assert [row.values["loss"] for row in by_loss] == [1.0, 1.0, 1.0, 6.5]


@pytest.mark.parametrize(
    "metric, best",
    [
        ("grad_norm", 0),
        ("eval/hard/region/mean_rank", 0),
        ("eval/birds/lossless", 1),
        ("loss_box", 0),
        ("images_per_second", 1),
    ],
)
def test_the_best_run_comes_first(tmp_path, capsys, metric, best):
    hard = "'hard_negatives', 'hard', annotations='a.jsonl'"
    runs = make(tmp_path, [{"seed": 0}, {"seed": 1}], evaluator=hard, name="hard")
    for value, run in enumerate(runs):
        pretend(run, 10, **{metric: float(value)})
    sweep.tabulate(runs, epath.Path(tmp_path), metric)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"by {metric}, {('lower', 'higher')[best]} is better"
    assert printed[3].startswith(f"seed={best} ")
    with (tmp_path / "sweep.csv").open() as file:
        assert next(csv.DictReader(file))["run"] == f"seed={best}"


def test_a_sweep_from_the_command_line(tmp_path, capsys, monkeypatch):
    """The first call trains, the second one starts nothing and prints the same table."""
    file = tmp_path / "seeds.py"
    file.write_text("from grain_jax.config import points\nsweep = lambda: points.seeds(1)\n")
    config = ["--config", "tests/run_config.py", "--config.total_steps=10", "--sweep", str(file)]
    started = []

    def run_jobs(runner):
        for job in runner.jobs:
            started.append(job.name)
            pretend(*sweep_runs.make_runs(config[1], [config[2]], [{"seed": 0}], tmp_path / "w"), 10)

    def launch(*flags):
        status = sweep.main([*config, "--workdir", str(tmp_path / "w"), *flags])
        return status, capsys.readouterr().out

    monkeypatch.setattr(jobs.Runner, "run", lambda runner: runner.failed.append("seed=0"))
    status, printed = launch()
    assert status == 1 and "not started" in printed
    shutil.rmtree(tmp_path / "w")
    monkeypatch.setattr(jobs.Runner, "run", run_jobs)
    status, printed = launch("--dry-run")
    assert status == 0 and not started and not (tmp_path / "w").exists()
    assert f"--config.seed=0 --workdir={tmp_path}/w/seed=0" in printed
    first, again = launch(), launch()
    assert first == again and first[0] == 0 and started == ["seed=0"]
    with pytest.raises(errors.UserError, match="did you mean loss"):
        launch("--metric", "los")
