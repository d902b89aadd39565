"""Sweeps: points and names, the check before the start, the runner (skip, restart, requeue, resume), clusters, the table."""

import csv
import dataclasses
import json
import signal
import subprocess
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
from tests.paths import ROOT

RATES = (1e-3, 2e-3)


def test_helpers_make_points():
    grid = list(points.grid({"a": (1, 2), "b": "xy"}))
    assert grid == [dict(a=1, b="x"), dict(a=1, b="y"), dict(a=2, b="x"), dict(a=2, b="y")]
    zipped = list(points.zipped({"a": (1, 2), "b": (3, 4)}))
    assert zipped == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
    assert list(points.seeds(2, zipped[:1])) == [{"a": 1, "b": 3, "seed": s} for s in (0, 1)]
    assert list(points.product(zipped, [{"b": 9}])) == [{"a": 1, "b": 9}, {"a": 2, "b": 9}]
    with pytest.raises(ValueError, match="a has 2, b has 1"):
        list(points.zipped({"a": (1, 2), "b": (3,)}))


def test_names_are_of_what_differs():
    shipped = sweep_runs.load_points(ROOT / "configs" / "sweeps" / "learning_rate.py")
    assert sweep_runs.name_points(shipped) == [
        f"learning_rate={rate},seed={seed}" for rate in (0.0005, 0.001, 0.002) for seed in (0, 1)
    ]
    grid = list(points.grid({"batch_size": (8,), "optim.learning_rate": (1e-3, 3e-5)}))
    assert sweep_runs.name_points(grid) == ["learning_rate=0.001", "learning_rate=3e-05"]
    towers = list(points.grid({"model.image.depth": (1, 2), "model.text.depth": (1,)}))
    assert sweep_runs.name_points(towers) == ["depth=1", "depth=2"]
    both = list(points.zipped({"model.image.depth": (1, 2), "model.text.depth": (1, 2)}))
    assert sweep_runs.name_points(both)[0] == "model.image.depth=1,model.text.depth=1"
    assert sweep_runs.name_points([{}, {"input.name": "a/b c"}]) == ["base", "name=a-b-c"]
    with pytest.raises(errors.UserError, match="points 1 and 3 are both seed=0"):
        sweep_runs.name_points([{"seed": 0}, {"seed": 1}, {"seed": 0}])
    with pytest.raises(errors.UserError, match="its name has"):
        sweep_runs.name_points([{"input.name": "x" * 300}, {"input.name": "y"}])


@pytest.mark.parametrize(
    "text,message",
    [
        ("def sweep():\n    yield {}\n    oops\n", r"Y.py:3: NameError: name 'oops'"),
        ("def sweep(:\n", r"Y.py:1: SyntaxError"),
        ("x = 1\n", "has no function sweep"),
        ("def sweep():\n    return []\n", "yields no point"),
        ("def sweep():\n    yield 'seed'\n", "point 1 is 'seed', expected a dict"),
    ],
)
def test_faults_of_a_sweep_file_are_one_line(tmp_path, text, message):
    (tmp_path / "Y.py").write_text(text)
    with pytest.raises(errors.UserError, match=message):
        sweep_runs.load_points(tmp_path / "Y.py")


def test_every_point_is_checked_as_the_trainer_reads_it(tmp_path):
    faults = {
        "optim.learning_rte": (1.0, "no such key; did you mean optim.learning_rate?"),
        "optim": (3, "optim: is a group of keys; set them one by one, such as optim."),
        "batch_size": (16.5, "--config.batch_size"),
        "input.lanes": (3, "input.lanes: got 3, must divide batch_size 16"),
        "total_steps": (None, "total_steps: got None, expected a number"),
        "log_every": (2, "log_every: the sweep and the command line both set it"),
    }
    points = [{key: value, "seed": i} for i, (key, (value, _)) in enumerate(faults.items())]
    with pytest.raises(errors.UserError) as caught:
        make(tmp_path, [*points, {"optim.learning_rte": 1.0}], ["--config.log_every=1"])
    lines = str(caught.value).splitlines()
    assert len(lines) == len(faults)
    for _, message in faults.values():
        assert sum(message in line for line in lines) == 1
    assert sum(line.endswith(" and 1 more)") for line in lines) == 1


def test_lists_are_values_as_on_the_command_line(tmp_path):
    points = [{"model.image.keep": keep} for keep in (0.5, [[0, 0.5], [0.9, 1]])]
    of = [run.config.model.image.keep for run in make(tmp_path, points)]
    assert of == [0.5, ((0, 0.5), (0.9, 1))]


def test_a_point_unsets_the_other_length(tmp_path):
    point = {"total_epochs": 0.5, "optim.warmup_epochs": 0.1, "input.name": "two words"}
    (run,) = make(tmp_path, [point])  # the file has total_steps
    assert run.config.total_steps is None and run.config.total_epochs == 0.5
    assert run.config.input.name == "two words"


def make(tmp_path, points, overrides=(), evaluator="", **base):
    """Runs of the tiny config with changes and perhaps an evaluator, of arguments in code, which a config file has."""
    tmp_path.mkdir(exist_ok=True)
    file = tmp_path / f"config{len(list(tmp_path.glob('config*.py')))}.py"
    evals = f", evals={{'birds': recipe.evaluator({evaluator})}}" if evaluator else ""
    head = "from grain_jax.config import recipe\nfrom tests import tiny\n\ndef get_config():\n"
    file.write_text(f"{head}    return tiny.dictionary(**{base!r}{evals})\n")
    return sweep_runs.make_runs(str(file), overrides, points, epath.Path(tmp_path))


def pretend(run, step, *, saved=True, reported=("curves.png",), **metrics):
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
    a, b, c, d, e = make(tmp_path, [{"seed": s} for s in range(5)])
    pretend(a, 10)
    pretend(b, 10, saved=False)
    pretend(c, 8)
    pretend(d, 10, reported=())  # killed between its last save and its report
    assert [run.name for run in (a, b, c, d, e) if sweep_runs.finished(run)] == [a.name]
    by_epochs, killed = make(tmp_path, [{"total_epochs": 1.0}, {"total_epochs": 2.0}])
    pretend(by_epochs, 10)
    pretend(killed, 20, reported=())
    assert sweep_runs.finished(by_epochs) and not sweep_runs.finished(killed)
    birds = "'grounding', 'birds', annotations='birds.jsonl'"
    (evaluated,) = make(tmp_path / "e", [{"seed": 0}], evaluator=birds, pictures=8)
    drawn = ("curves.png", "results.json", "regions.png")
    for count in range(4):
        pretend(evaluated, 10, saved=count == 0, reported=drawn[:count])
        assert sweep_runs.finished(evaluated) == (count == 3)


def test_a_folder_of_another_config_is_refused(tmp_path):
    skip, error = (f"'zeroshot', 'birds', missing={missing!r}" for missing in ("skip", "error"))
    (run,) = make(tmp_path, [{"seed": 0}], evaluator=skip)
    pretend(run, 10)
    same = dict(evaluator=error, log_every=5, checkpoint_every=2)
    sweep_runs.check_folders(make(tmp_path, [{"seed": 0}], **same))
    other = make(tmp_path, [{"seed": 0}], evaluator=skip, batch_size=32)
    with pytest.raises(errors.UserError, match=r"was trained with batch_size = 16, now it is 32"):
        sweep_runs.check_folders(other)
    stored = run.folder / "config.json"
    for cut_off in ("", stored.read_text()[:100]):  # by a kill: as if it were not there
        stored.write_text(cut_off)
        sweep_runs.check_folders(other)


class Scripts:
    """Jobs that are short Python programs; one is finished once its file is there."""

    def __init__(self, folder, **programs):
        self.folder = epath.Path(folder)
        self.said = []
        says = self.said.append
        self.screen = types.SimpleNamespace(say=says, show=says, close=lambda stays: None)
        self.all = [self.job(name, program) for name, program in programs.items()]

    def job(self, name, program):
        head = f"import pathlib, sys, time\nme = pathlib.Path({str(self.folder / name)!r})\n"
        command = (sys.executable, "-c", head + program)
        return jobs.Job(name, command, self.folder / name / "log.txt")

    def finished(self, job):
        return (self.folder / job.name / "done").exists()

    def run(self, parallel=1, **options):
        known = options.pop("jobs", lambda: self.all)
        runner = jobs.Runner(known, self.finished, [jobs.Slot()] * parallel, self.screen, **options)
        return runner.run()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(jobs, "POLL", 0.02)
    monkeypatch.setattr(jobs, "SLOW_POLL", 0.1)


DONE = "(me / 'done').touch()\n"
ONCE = "first = not (me / 'tried').exists(); (me / 'tried').touch()\n"


def test_skips_restarts_and_requeues(tmp_path):
    scripts = Scripts(
        tmp_path,
        before="raise SystemExit('must not run')",
        fails_once=ONCE + "assert not first, 'bad luck'\n" + DONE,
        preempted=ONCE + "if first: sys.exit(75)\n" + DONE,
        good=DONE,
        bad="print('ValueError: why\\nJAX has removed frames'); sys.exit(3)",
        wrong="print('--x: no such flag'); sys.exit(2)",
    )
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "done").touch()
    outcome = scripts.run()
    assert set(outcome.done) == {"before", "fails_once", "preempted", "good"}
    assert outcome.failed == {"bad": "3", "wrong": "2"} and outcome.stopped_by is None
    text = "\n".join(scripts.said)
    assert text.count("bad: started") == 2 and text.count("wrong: started") == 1
    assert "1 of 6 runs finished before" in text and "before: started" not in text
    assert "AssertionError: bad luck" in text and "(3): ValueError: why [" in text
    assert "preempted: preempted and saved" in text and "preempted: started again" in text
    order = [line for line in scripts.said if "started" in line]
    assert order[-2:] == ["fails_once: started again", "bad: started again"]  # after the others
    log = (tmp_path / "bad" / "log.txt").read_text()
    assert log.splitlines().count("ValueError: why") == 2 and log.startswith("$ ")


def test_runs_n_at_a_time_and_plans_anew(tmp_path):
    """Each notes how many others run beside it; what is done makes a new job known."""
    program = (
        "(me / 'on').touch(); time.sleep(0.3)\n"
        "(me / 'done').write_text(str(len(list(me.parent.glob('*/on'))))); (me / 'on').unlink()\n"
    )
    scripts = Scripts(tmp_path, **{f"j{i}": program for i in range(4)})
    later = scripts.job("later", DONE)
    known = lambda: scripts.all + [later] * scripts.finished(scripts.all[0])
    assert len(scripts.run(parallel=2, jobs=known).done) == 5
    beside = [int((tmp_path / f"j{i}" / "done").read_text()) for i in range(4)]
    assert max(beside) == 2


def test_runs_of_a_runner_that_was_killed_take_slots(tmp_path):
    """`a` outlives its runner, and keeps the lock: the next call starts no second one, and nothing beside it.

    Two at a time, it starts one job beside it.
    """
    beside = "(me / 'done').write_text(str((me.parent / 'a' / 'on').exists()))\n"
    until_all_done = "while not (me.parent / 'c' / 'done').exists(): time.sleep(0.02)\n"
    for parallel, wait, expected in (
        (1, "time.sleep(1.5)\n", {"False"}),
        (2, until_all_done, {"True"}),
    ):
        a = f"(me / 'on').touch()\n{wait}(me / 'on').unlink()\n{DONE}"
        scripts = Scripts(tmp_path / str(parallel), b=beside, c=beside, a=a)
        a = scripts.all[-1]  # the last to be started
        a.log.parent.mkdir(parents=True)
        with a.log.open("a") as log:
            jobs.fcntl.flock(log, jobs.fcntl.LOCK_EX)
            left = subprocess.Popen(a.command, stdout=log)
        while not (scripts.folder / "a" / "on").exists():
            time.sleep(0.02)
        assert set(scripts.run(parallel=parallel).done) == {"a", "b", "c"}
        assert left.wait() == 0
        assert {(scripts.folder / name / "done").read_text() for name in "bc"} == expected
        assert "a: runs already, started by another call; waiting" in scripts.said
        assert "a: started" not in scripts.said


def test_a_signal_is_passed_on_and_the_next_call_resumes(tmp_path):
    handler = "import signal; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
    program = f"{ONCE}{handler}(me / 'ready').touch()\nif first: time.sleep(30)\n{DONE}"
    scripts = Scripts(tmp_path, a=program, b=program, c=DONE)

    def kill():
        while not all((tmp_path / name / "ready").exists() for name in "ab"):
            time.sleep(0.02)
        signal.raise_signal(signal.SIGTERM)

    threading.Thread(target=kill).start()
    outcome = scripts.run(parallel=2)
    assert outcome.stopped_by == signal.SIGTERM and outcome.done == [] and not outcome.failed
    assert "c: started" not in scripts.said
    assert set(scripts.run(parallel=2).done) == {"a", "b", "c"}


def test_a_signal_while_the_jobs_are_listed_reaches_those_that_run(tmp_path):
    """They are listed again after each that ends, here after `b`; `a` saves and ends when it is told to."""
    handler = "import signal; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
    program = f"{handler}(me / 'ready').touch()\ntime.sleep(30)\n"
    wait = "while not (me.parent / 'a' / 'ready').exists(): time.sleep(0.02)\n"
    scripts = Scripts(tmp_path, a=program, b=wait + DONE)

    def known():
        if any(line.startswith("b: finished") for line in scripts.said):
            signal.raise_signal(signal.SIGTERM)
        yield from scripts.all

    outcome = scripts.run(parallel=2, jobs=known)
    assert outcome.stopped_by == signal.SIGTERM and outcome.done == ["b"] and not outcome.failed
    assert any(line.startswith("a: preempted and saved") for line in scripts.said)


def test_eta_counts_what_running_jobs_have_done(tmp_path):
    scripts = Scripts(tmp_path, a="time.sleep(0.5)\n" + DONE, b=DONE)
    scripts.run(share_done=lambda job: 0.25)
    assert any(
        line.startswith("0 of 2 runs finished") and line.endswith("; running: a (25%)")
        for line in scripts.said
    )


def test_runs_that_share_a_data_set_wait_for_the_first_to_make_it(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(jobs.Runner, "run", lambda self: seen.update(ready=self.ready))
    prepared = dict(input__source="records", input__prepare="data.aviary")
    runs = make(tmp_path, [{"seed": 0}, {"seed": 1}], **prepared)
    sweep.train_here(runs, epath.Path(tmp_path), None, 1, 0)
    second = types.SimpleNamespace(name="seed=1")
    assert not seen["ready"](second, frozenset({"seed=0"}))
    assert seen["ready"](second, frozenset())
    pretend(runs[0], 1)
    assert seen["ready"](second, frozenset({"seed=0"}))


def test_slots_share_gpus_or_cores(monkeypatch):
    monkeypatch.setattr(jobs.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert [slot.prefix[-1] for slot in jobs.slots(2)] == ["0,2", "1,3"]
    assert [slot.prefix[-1] for slot in jobs.slots(8)] == list("01230123")
    assert jobs.slots(1) == [jobs.Slot()]
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    visible = [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in jobs.slots(2)]
    assert visible == ["4,6", "5,7"]
    with pytest.raises(errors.UserError, match="at most the 4 GPU"):
        jobs.slots(5)


def command(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_slurm_gets_one_array_and_no_second_one(tmp_path, monkeypatch):
    runs = make(tmp_path / "w", [{"seed": s} for s in range(3)])
    pretend(runs[0], 10)
    workdir = runs[0].folder.parent
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    told = sweep_clusters.submit_slurm(runs, workdir, None)
    assert "no sbatch here; where there is one: GRAIN_ARGS_FILE=" in told
    log = tmp_path / "sent"
    command(tmp_path, "sbatch", f'echo "$GRAIN_ARGS_FILE $*" > {log}; echo "17;cluster"')
    command(tmp_path, "squeue", "echo '17_1 PENDING'")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "submitted 2 runs as job 17" in sweep_clusters.submit_slurm(runs, workdir, 4)
    file, *arguments = log.read_text().split()
    assert arguments[1] == "--array=1-2%4" and arguments[-1].endswith("launch/slurm.sbatch")
    lines = epath.Path(file).read_text().splitlines()
    assert lines == [" ".join(run.arguments) for run in runs[1:]]
    with pytest.raises(errors.UserError, match="job 17 of this sweep is still in the queue"):
        sweep_clusters.submit_slurm(runs, workdir, 4)
    command(tmp_path, "squeue", "echo 'Invalid job id' >&2; exit 1")
    command(tmp_path, "sbatch", "echo 'invalid partition' >&2; exit 1")
    with pytest.raises(errors.UserError, match="sbatch: invalid partition"):
        sweep_clusters.submit_slurm(runs, workdir, 4)
    with pytest.raises(errors.UserError, match="takes arguments without blanks"):
        sweep_clusters.submit_slurm(make(tmp_path, [{"input.name": "a b"}]), workdir, 4)


def test_gke_gets_a_jobset_for_each_run(tmp_path, monkeypatch):
    runs = make(tmp_path / "My_Sweep", [{"seed": s} for s in range(3)])
    pretend(runs[0], 10)
    template = tmp_path / "gke.yaml"
    template.write_text("name: ${NAME}\nimage: ${IMAGE}\nargs: ${ARGS}\nshell: $$HOME\n")
    monkeypatch.setattr(sweep_clusters, "HERE", epath.Path(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    workdir = runs[0].folder.parent
    monkeypatch.delenv("IMAGE", raising=False)
    with pytest.raises(errors.UserError, match="set IMAGE in the environment"):
        sweep_clusters.apply_gke(runs, workdir)
    monkeypatch.setenv("IMAGE", "grain:1")
    assert "rendered 2 JobSets" in sweep_clusters.apply_gke(runs, workdir)
    text = (workdir / "gke" / "seed=1.yaml").read_text()
    name = sweep_clusters.jobset_name(runs[1])
    assert name.startswith("my-sweep-") and len(name) < 40
    assert name != sweep_clusters.jobset_name(runs[2])
    arguments = " ".join(runs[1].arguments)
    assert text == f"name: {name}\nimage: grain:1\nargs: {arguments}\nshell: $HOME\n"
    log = tmp_path / "sent"
    state = f'case "$*" in *{name}*terminalState*) echo Failed;; esac'
    command(tmp_path, "kubectl", f'echo "$*" >> {log}; {state}')
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "applied 2 JobSets" in sweep_clusters.apply_gke(runs, workdir)
    verbs = [line.split()[0] for line in log.read_text().splitlines()]
    assert verbs == ["get", "delete", "apply", "get", "apply"]  # the failed one is made anew


def test_clusters_do_not_make_a_data_set_many_times(tmp_path):
    prepared = dict(input__source="records", input__prepare="data.aviary --name {name}")
    where = dict(input__data_dir=str(tmp_path), input__name="birds")
    runs = make(tmp_path, [{"seed": 0}], **prepared, **where)
    with pytest.raises(errors.UserError, match="python -m data.aviary --name birds"):
        sweep_clusters.submit_slurm(runs, epath.Path(tmp_path), None)


def table_of(tmp_path):
    runs = make(tmp_path, list(points.seeds(2, points.grid({"optim.learning_rate": RATES}))))
    for run, top1 in zip(runs, (0.5, 0.7, 0.8, 0.9)):
        pretend(run, 10, **{"eval/seen/chance": 0.1, "eval/seen/alpha_1.0/top1": top1})
    pretend(runs[3], 4, saved=False, **{"eval/seen/alpha_1.0/top1": 0.9})
    rows = sweep_table.read(runs, [sweep_runs.finished(run) for run in runs])
    return runs, rows


def test_the_table_is_sorted_and_averages_over_seeds(tmp_path):
    _, rows = table_of(tmp_path)
    metric = sweep_table.default_metric(rows)
    assert metric == "eval/seen/alpha_1.0/top1"
    lines = sweep_table.text(rows, metric).splitlines()
    cells = [line.split() for line in lines]
    assert cells[0] == ["run", "learning_rate", "seed", metric, "loss", "state"]
    assert cells[2] == ["learning_rate=0.002,seed=0", "0.002", "0", "0.8000", "1.0000", "finished"]
    order = "0.002,seed=0 0.001,seed=1 0.001,seed=0 0.002,seed=1"
    assert " ".join(row[0][-12:] for row in cells[2:6]) == order
    assert lines[5].endswith("step 4 of 10")
    assert cells[9] == ["learning_rate=0.002", "0.8000", "0.8000", "0.8000", "1"]
    assert cells[10] == ["learning_rate=0.001", "0.6000", "0.5000", "0.7000", "2"]
    by_loss = sweep_table.ranked(rows, "loss")  # the mean of the last five; smaller is better
    assert [row.values["loss"] for row in by_loss] == [1.0, 1.0, 1.0, 6.5]
    with pytest.raises(errors.UserError, match="did you mean eval/seen/chance"):
        sweep_table.check(rows, "eval/seen/chanse")


def test_the_values_of_a_run(tmp_path):
    """The mean of the last lines; a metric that these lack keeps its last value."""
    (run,) = make(tmp_path, [{"seed": 0}])
    pretend(run, 10)
    path = run.folder / "metrics.jsonl"
    first = json.dumps({"step": 1, "loss": 8.0, "images_per_second": 70.0})
    path.write_text("\n".join([first, *path.read_text().splitlines()[1:]]) + "\n")
    (row,) = sweep_table.read([run], [True])
    assert row.values == {"loss": 1.0, "images_per_second": 70.0}


def test_csv_and_picture(tmp_path):
    _, rows = table_of(tmp_path)
    metric = sweep_table.default_metric(rows)
    table = list(csv.DictReader(sweep_table.csv_text(rows, metric).splitlines()))
    assert table[0]["run"] == "learning_rate=0.002,seed=0"
    assert float(table[0]["optim.learning_rate"]) == 2e-3 and float(table[0][metric]) == 0.8
    assert [row["step"] for row in table] == ["10", "10", "10", "4"]
    assert float(table[1]["eval/seen/chance"]) == 0.1
    assert sweep_table.draw(rows, metric, epath.Path(tmp_path / "sweep.png"))
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
    mixed = [
        dataclasses.replace(row, swept={**row.swept, "dtype": kind, "text.packing": True})
        for row in rows
        for kind in ("float32", "bfloat16")
    ]
    assert sweep_table.draw(mixed, metric, epath.Path(tmp_path / "mixed.png"))
    assert not sweep_table.draw([], metric, epath.Path(tmp_path / "none.png"))


@pytest.mark.slow
def test_a_sweep_from_the_command_line(tmp_path, capsys):
    """A real run; the second call starts nothing and prints the same table."""
    file = tmp_path / "seeds.py"
    file.write_text("from grain_jax.config import points\nsweep = lambda: points.seeds(1)\n")
    usual = ["--config", "tests/run_config.py", "--sweep", str(file)]
    usual += ["--workdir", str(tmp_path / "w"), "--config.total_steps=3"]

    def launch(*more):
        status = sweep.main([*usual, *more])
        return status, *capsys.readouterr()

    status, told, _ = launch("--dry-run")
    assert status == 0 and not (tmp_path / "w").exists()
    assert "1 points, all valid; nothing was started" in told
    assert f"--config.seed=0 --workdir={tmp_path}/w/seed=0" in told
    status, first, said = launch()
    assert status == 0, said
    assert "seed=0: finished after" in said
    table = list(csv.DictReader((tmp_path / "w" / "sweep.csv").read_text().splitlines()))
    for row in table:
        lines = (tmp_path / "w" / row["run"] / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in lines]
        assert float(row["loss"]) == pytest.approx(sum(losses) / 3)
    assert (tmp_path / "w" / "sweep.png").exists()
    status, again, said = launch()
    assert status == 0 and again == first
    assert "1 of 1 runs finished before" in said and "started" not in said
    with pytest.raises(errors.UserError, match="did you mean loss"):
        launch("--metric", "los")


def test_the_command_loads_no_jax():
    code = "import sys, grain_jax.launch.sweep; print(sorted({'jax', 'tensorflow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_shipped_jobset_takes_a_run(tmp_path, monkeypatch):
    """Rendered, not run."""
    (run,) = make(tmp_path, [{"seed": 1}])
    for name in ("HOSTS", "CHIPS", "SLICES"):
        monkeypatch.setenv(name, "2")
    for name in ("IMAGE", "ACCELERATOR", "TOPOLOGY"):
        monkeypatch.setenv(name, "x")
    template = (sweep_clusters.HERE / "gke.yaml").read_text()
    jobset = yaml.safe_load(sweep_clusters.render_gke(run, template))
    assert jobset["metadata"]["name"] == sweep_clusters.jobset_name(run)
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["args"][0].endswith(" ".join(run.arguments))
