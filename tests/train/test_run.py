"""The trainer as a whole: metrics, checkpoints, preemption, NaN, other processes, a finished run."""

import json
import shutil
import signal
import subprocess

import numpy as np
import pytest

import grain_jax
from grain_jax import config
from grain_jax.checkpoint import states
from grain_jax.core import errors, progress
from grain_jax.evaluate import kinds
from grain_jax.input_pipeline import synthetic
from grain_jax.runtime import ending
from grain_jax.train import faults, goodput, metrics_writer, run, set_up
from tests import runs, tiny
from tests.paths import ROOT

pytestmark = pytest.mark.long

TIMINGS = runs.TIMINGS[:-1]  # the peak of this machine is not known
# One image a packing group, so that 16 devices have one each.
RUN = {"text.pack_group": 1, "text.pack_rows": 6, "checkpoint_every": 2, "checkpoint_keep": 4}
TOKENIZER = {"model__text__vocab_size": 49408}


def _config(**changes):
    return tiny.small(**{k.replace(".", "__"): v for k, v in RUN.items()} | changes)


def raw_lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _change_batches(monkeypatch, change):
    """The synthetic source gives `change(step, batch)`."""
    real = synthetic.Synthetic.batches
    changed = lambda *args, **options: (change(*x) for x in enumerate(real(*args, **options), 1))
    monkeypatch.setattr(synthetic.Synthetic, "batches", changed)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 10 steps on a (8, 1, 1) mesh."""
    workdir = tmp_path_factory.mktemp("run")
    run.train(_config(), workdir)
    return workdir


@pytest.mark.parametrize(
    "flags, line",
    [
        ((), "input.data_dir: got '', expected what .*: --config.input.data_dir=..."),
        (("data_dir=DIR",), "input.name: got '', expected what .*: --config.input.name=..."),
        (("data_dir=DIR", "name=bird"), "no record set 'bird' in 'DIR' .looked for"),
    ],
)
def test_a_dataset_that_is_missing_is_said_before_anything_is_made(flags, line, tmp_path, monkeypatch):
    monkeypatch.setattr(run.lock, "held", None)  # neither the workdir nor TensorFlow comes first
    flags = [f"--config.input.{flag}" for flag in flags]
    with pytest.raises(errors.MissingData, match=line):
        run.main(["--config=own", f"--workdir={tmp_path / 'run'}", *flags])
    assert not (tmp_path / "run").exists()


def test_the_type_of_activations_follows_the_devices(tmp_path):
    assert set_up.set_up(_config(dtype="auto"), tmp_path).config == _config(dtype="float32")


def test_workdir_holds_what_the_contract_says(finished):
    names = ("config.json", "metrics.jsonl", "checkpoints/10", "checkpoints/4", "tensorboard", "report.html")
    for name in names:
        assert (finished / name).exists(), name
    assert not (finished / "checkpoints" / "2").exists()  # checkpoint_keep = 4
    assert config.from_dict(json.loads((finished / "config.json").read_text())) == _config()
    lines = raw_lines(finished)
    assert [line["step"] for line in lines] == list(range(1, 11))
    terms = [f"loss_{term}" for term in ("image_caption", "region_description", "box")]
    texts = ("texts_dropped", "texts_dropped_share", "texts_too_long_share")
    for key in ("loss", *terms, "logit_scale", "learning_rate", *texts, *TIMINGS):
        assert all(np.isfinite(line[key]) for line in lines), key
    np.testing.assert_allclose(lines[0]["logit_scale"], 1 / 0.07, rtol=1e-5)
    sums = [sum(line[term] for term in terms) for line in lines]
    np.testing.assert_allclose([line["loss"] for line in lines], sums, rtol=1e-5)
    assert lines[0]["learning_rate"] == pytest.approx(1e-6) and lines[-1]["loss"] < lines[0]["loss"]


def test_a_run_whose_texts_do_not_fit_ends_and_saves_nothing(tmp_path, monkeypatch):
    """The counts are those of batches with fewer rows: the step is that of the other runs."""
    few = synthetic.batches(_config(text__pack_group=2, text__pack_rows=2))

    def with_lost_texts(step, batch):
        lost = next(few)
        counts = {name: getattr(batch, name) * 0 for name in ("texts_dropped", "text_counts")}
        for name, x in counts.items():
            x[: len(getattr(lost, name))] = getattr(lost, name)
        return batch._replace(**counts)

    _change_batches(monkeypatch, with_lost_texts)
    with pytest.raises(faults.TextsLost, match=r"^step 2: 25\.\d% of the texts .* ends the run"):
        run.train(_config(log_every=2), tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_the_finished_run_loads_and_runs_again_to_no_effect(finished):
    before = runs.lines(finished)
    run.train(_config(), finished)
    assert runs.lines(finished) == before
    model = grain_jax.load(finished)
    images = np.zeros((3, 16, 16, 3), np.uint8)
    np.testing.assert_allclose(np.linalg.norm(model.encode_image(images), axis=-1), 1, rtol=1e-5)


def test_steps_that_are_done_and_a_batch_beyond_the_dataset_are_a_line(
    finished, tmp_path, monkeypatch, capfd
):
    with pytest.raises(errors.UserError, match="total_steps: got 5, but .* has a checkpoint of step 10; set"):
        set_up.set_up(_config(total_steps=5), finished)
    monkeypatch.setattr(synthetic.Synthetic, "num_examples", lambda *_: 3)
    set_up.set_up(_config(), tmp_path)
    assert "is more than the 3 examples of the dataset, so a batch has some" in capfd.readouterr().err


def test_nan_stops_the_run_and_names_the_term(tmp_path, monkeypatch):
    def with_endless_boxes(step, batch):
        boxes = batch.region_boxes_cxcywh * np.float32(1e30 if step == 4 else 1)
        return batch._replace(region_boxes_cxcywh=boxes)

    _change_batches(monkeypatch, with_endless_boxes)
    said = r"loss_box is (nan|inf) at step 4; it was finite at step 3"
    with pytest.raises(faults.NotFinite, match=said):
        run.train(_config(), tmp_path)
    assert [line["step"] for line in runs.lines(tmp_path)] == [1, 2, 3]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["2"]  # none half written


@pytest.mark.parametrize(
    "changes,line",
    [
        (
            {"model__decoder__queries": 3},
            r"^model.decoder.queries: the run has 5, got 3\nThis makes another model; use another --workdir",
        ),
        ({"seed": 1}, "seed: the run .* got 1"),  # which would see other data
        ({"input__lanes": 8}, "input.lanes: the run .* got 8"),
        ({"mesh__data": 3}, "mesh"),
        ({"evals__birds": kinds.evaluator("zeroshot", "nothing"), **TOKENIZER}, "nothing"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else value,
)
def test_what_does_not_fit_is_refused_before_anything_is_written(finished, tmp_path, changes, line):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "8").symlink_to(finished / "checkpoints" / "8")
    with pytest.raises(errors.UserError, match=line):
        run.train(_config(**changes), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_told_to_end_it_saves_and_goes_on_as_if_nothing_had_happened(finished, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(progress, "COMPILING_SECONDS", 0.0)
    handler = ending.PreemptionHandler()
    for number in (signal.SIGINT, signal.SIGTERM):  # the first one counts
        handler.tell(number)
    with pytest.raises(SystemExit) as end:
        run.train(_config(), tmp_path, handler)
    assert end.value.code == ending.INTERRUPTED == 130
    said = capfd.readouterr().err
    assert "compiling the training step, usually under a minute for a small model" in said
    assert "saved at step 1 of 10" in said
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]
    (first,) = raw_lines(tmp_path)
    handler = ending.PreemptionHandler()
    handler.tell(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        run.train(_config(), tmp_path, handler)
    assert end.value.code == ending.PREEMPTED == 75
    run.train(_config(), tmp_path)
    assert runs.lines(tmp_path) == runs.lines(finished)
    lines = raw_lines(tmp_path)  # with the time of all three
    for line in lines:
        assert sum(line[f"time/{kind}"] for kind in goodput.KINDS) == pytest.approx(1, abs=1e-6)
    last = lines[-1]
    assert first["time/restore"] == 0 < last["time/restore"]
    assert last[goodput.SECONDS] > first[goodput.SECONDS] and last["time/compile"] > 0
    assert last[goodput.REPEATED] == 0


def test_an_object_store_has_the_lines_of_a_checkpoint_before_it(tmp_path, monkeypatch):
    """A run that is killed in between would lose them; a folder is treated as the store."""
    monkeypatch.setattr(metrics_writer, "is_object_store", lambda path: True)
    (tmp_path / "tensorboard").mkdir()
    save, there = states.Checkpoints.save, []

    def with_a_look(checkpoints, *args):
        there.append(runs.lines(tmp_path)[-1]["step"])
        save(checkpoints, *args)

    monkeypatch.setattr(states.Checkpoints, "save", with_a_look)
    run.train(_config(), tmp_path)
    assert there == [2, 4, 6, 8, 10]


def _assert_goes_on(finished, workdir):
    before, after = runs.lines(finished), runs.lines(workdir)
    assert [line["step"] for line in after] == list(range(1, 11))
    for a, b in zip(before[4:], after[4:], strict=True):
        np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-4)
        np.testing.assert_allclose(b["grad_norm"], a["grad_norm"], rtol=1e-3)


def test_two_processes_go_on_to_the_end_and_one_from_what_they_saved(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    for step in (6, 8, 10):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    command = runs.command(workdir, RUN | runs.SMALL, processes=2, devices=4)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    _assert_goes_on(finished, workdir)
    shutil.rmtree(workdir / "checkpoints/10")
    run.train(_config(), workdir)
    _assert_goes_on(finished, workdir)
