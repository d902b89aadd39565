"""`grain_jax.verify` on runs that were resumed, also elsewhere, and on workdirs that were tampered with."""

import json
import shutil

import jax
import pytest

from grain_jax import config as config_lib
from grain_jax import train
from grain_jax.core import errors
from grain_jax.input_pipeline import record_files
from grain_jax.runtime import receipt
from grain_jax.verify import command, replay
from grain_jax.verify import workdir as workdir_files
from tests import record_sets, runs, tiny

ALL = jax.devices  # the function: tests replace it


def _config(**overrides):
    return tiny.small(checkpoint_keep=3, **overrides)


@pytest.fixture(autouse=True, scope="module")
def two_devices():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: ALL()[:2])
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """10 steps on 2 devices; checkpoints 4, 8 and 10 are kept."""
    workdir = tmp_path_factory.mktemp("runs") / "a run, größer"
    train.train(_config(), workdir)
    return workdir


@pytest.fixture(scope="module")
def elastic(finished, tmp_path_factory):
    """The same run, killed after step 4 on 2 devices and resumed on 1."""
    workdir = tmp_path_factory.mktemp("elastic") / "run"
    shutil.copytree(finished, workdir)
    for step in ("8", "10"):
        shutil.rmtree(workdir / "checkpoints" / step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: ALL()[:1])
        train.train(_config(), workdir)
    return workdir


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def _records(workdir):
    return [json.loads(line) for line in receipt.read(workdir)]


def _verify(capsys, workdir, *flags):
    status = command.main([str(workdir), *flags])
    return status, *capsys.readouterr()


def _edit_metrics(workdir, step, **values):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines[step - 1] |= values
    texts = [json.dumps(line) for line in lines]
    (workdir / "metrics.jsonl").write_text("\n".join(texts) + "\n")
    return texts


def test_a_run_is_proved_bit_for_bit_where_it_was_made(finished, capsys, monkeypatch):
    monkeypatch.chdir(finished.parent)
    status, out, err = _verify(capsys, finished.name)  # relative, with spaces and other letters
    assert status == 0, out + err
    assert "3, one chain, steps 4 to 10" in out and "10 lines, as recorded" in out
    assert "steps 5-8 again         on mesh 2 x 1 x 1" in out
    assert "equal bit for bit at step 8" in out and "4 lines, equal" in out
    assert out.strip().endswith("Steps 5-8: the same batches, and the same parameters bit for bit.")


def test_no_step_is_claimed_that_the_run_has_not_made():
    lines = {step: {"step": step} for step in (1, 2, 3)}
    run = workdir_files.Told([{"step": 3}], {3: None}, lines, None)
    assert command._first_step(run, None) == 0
    assert command._last_step(run, 0, None) == 3  # and not the 5 of a longer run
    assert command._last_step(run, 0, 2) == 2
    with pytest.raises(errors.UserError, match="--steps: got 9, expected at most 3"):
        command._last_step(run, 0, 9)


def test_a_resumed_run_elsewhere_has_the_same_batches_and_is_proved(finished, elastic, capsys):
    whole, parts = _records(finished), _records(elastic)
    assert [r["step"] for r in parts] == [4, 8, 10]
    assert [r["mesh"]["data"] for r in parts] == [2, 1, 1]
    for key in ("batch_chain", "pixel_chain", "config"):
        assert [r[key] for r in parts] == [r[key] for r in whole], key
    assert parts[0] == whole[0] and parts[1]["previous"] == receipt.sha256(whole[0])
    status, out, err = _verify(capsys, elastic, "--from", "0", "--steps", "10")
    assert status == 0, out + err
    assert "steps 1-4 again         on mesh 2 x 1 x 1" in out
    assert "steps 5-8 again         on mesh 1 x 1 x 1" in out
    assert "equal bit for bit at step 4, 8, 10" in out and "10 lines, equal" in out


def test_with_fewer_devices_losses_are_compared_and_far_from_a_checkpoint_not_judged(
    finished, capsys, monkeypatch
):
    monkeypatch.setattr(jax, "devices", lambda: ALL()[:1])
    status, out, err = _verify(capsys, finished, "--from", "4", "--steps", "3")
    assert status == 0, out + err
    assert "on mesh 1 x 1 x 1" in out and "differ by at most" in out
    assert "the same batches, and the same losses to" in out and "bit for bit" not in out
    monkeypatch.setitem(replay.TOLERANCE, "float32", 0.0)
    monkeypatch.setattr(replay, "HORIZON", 0)
    status, out, err = _verify(capsys, finished, "--from", "4", "--steps", "3")
    assert status == 0 and "not judged: after 0 steps, rounding has grown" in out, out + err


def test_a_save_that_was_cut_off_is_no_contradiction(copy, capsys):
    shutil.rmtree(copy / "checkpoints" / "10")
    run = workdir_files.read(copy)
    assert sorted(run.kept) == [4, 8]
    assert "that of step 10 is of a save that was cut off" in capsys.readouterr().out


def test_a_copied_checkpoint_is_enough_to_go_on_from(finished, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    shutil.copytree(finished / "checkpoints" / "8", tmp_path / "checkpoints" / "8")
    train.train(_config(), tmp_path)
    run = workdir_files.read(tmp_path)
    workdir_files.check_metrics(run)
    mine, theirs = run.records[-1], _records(finished)[-1]
    assert [r["step"] for r in run.records] == [8, 10]
    for key in ("batch_chain", "pixel_chain", "state", "previous"):
        assert mine[key] == theirs[key]


def _edited(name, change):
    """Changes the lines of that file."""

    def tamper(workdir):
        changed = change((workdir / name).read_text().splitlines())
        (workdir / name).write_text("\n".join(changed) + "\n")

    return tamper


def _swapped_checkpoint(workdir):
    shutil.rmtree(workdir / "checkpoints" / "10")
    shutil.copytree(workdir / "checkpoints" / "8", workdir / "checkpoints" / "10")


def _lost_checkpoints(workdir):
    for step in ("8", "10"):
        shutil.rmtree(workdir / "checkpoints" / step)


def _another_seed(workdir):
    (workdir / "config.json").write_text(config_lib.to_json(_config(seed=1)))


def _another_seed_in_the_checkpoint(workdir):
    stored = workdir / "checkpoints" / "8" / "config" / "metadata"
    stored.write_text(json.dumps(json.loads(stored.read_text()) | {"seed": 1}))


_first_on_four = lambda lines: [lines[0].replace('"processes": 1', '"processes": 4'), *lines[1:]]


_LOST = "metrics.jsonl: the lines of steps 5-8 are not those"
TAMPERED = [
    (_edited(receipt.FILE, _first_on_four), "jsonl:2: the chain is broken: the record of step 8"),
    (_edited(receipt.FILE, lambda x: x[::2]), "2: the chain is broken: the record of step 10"),
    (_edited(receipt.FILE, lambda _: ["hello"]), "jsonl:1: got 'hello': JSON is malformed"),
    (lambda workdir: _edit_metrics(workdir, 6, loss=0.5), _LOST),
    (_edited("metrics.jsonl", lambda x: x[:5] + x[6:]), _LOST),
    (_swapped_checkpoint, "checkpoint 10: the record in it is another one"),
    (_lost_checkpoints, "goes on to step 10, but the newest checkpoint is 4"),
    (_another_seed, "config.json: seed: got 1; checkpoint 10 was made with 0"),
    (_another_seed_in_the_checkpoint, "checkpoint 8: its config is not the recorded one"),
]


@pytest.mark.parametrize("tamper,cause", TAMPERED, ids=range(9))
def test_tampering_is_found_without_training(copy, capsys, tamper, cause):
    tamper(copy)
    status, out, err = _verify(capsys, copy)
    assert status == 1 and cause in err
    assert "is NOT the run that its receipt describes" in out and "Traceback" not in err


def test_a_checkpoint_with_another_state_is_found(copy, elastic, capsys):
    """Of the same run, the same step and the same batches, but rounded as on 1 device."""
    shutil.rmtree(copy / "checkpoints" / "8" / "state")
    shutil.copytree(elastic / "checkpoints" / "8" / "state", copy / "checkpoints" / "8" / "state")
    status, _, err = _verify(capsys, copy)
    assert status == 1 and "checkpoint 8: holds another state than was saved (state)" in err

    there = _records(elastic)[1]["state"]  # and with records to match
    runs.forge(copy, lambda r: r["step"] == 8 and r.update(state=there))
    status, _, err = _verify(capsys, copy)
    assert status == 1
    assert "step 8: training again gives other params and opt_state than recorded" in err


def test_metrics_with_records_to_match_are_found_by_training_again(copy, capsys):
    texts = _edit_metrics(copy, 6, loss=0.5)
    hashes = {8: receipt.metrics_sha256(texts, 4, 8)}
    runs.forge(copy, lambda r: r.update(metrics=hashes.get(r["step"], r["metrics"])))
    status, _, err = _verify(capsys, copy)
    assert status == 1 and "step 6: metrics.jsonl has other losses than this run" in err


@pytest.mark.slow
def test_another_seed_with_records_to_match_is_found_by_training_again(copy, capsys):
    runs.forge_config(copy, _config(seed=1))
    status, _, err = _verify(capsys, copy)
    assert status == 1 and "step 5: the run has seen other batches by then: another seed" in err


def test_edited_records_of_the_data_set_are_found(tmp_path, capsys, monkeypatch):
    folder, data, workdir = (tmp_path / name for name in ("pictures", "data", "run"))
    lines = record_sets.write_annotations(folder, 16)
    digests = data / "tiny_set/1.0.0" / record_files.DIGEST_FILE

    def build():
        shutil.rmtree(data, ignore_errors=True)
        assert record_sets.build_set(folder, data, "--num-shards=4", "--encoding=png") == 0

    def verify_rebuilt():
        """With the digests of the new shards, the digest of the set is forged."""
        build()
        shards = {split: x["shard_digests"] for split, x in json.loads(digests.read_text()).items()}
        forged = {split: {**x, "shard_digests": shards[split]} for split, x in written.items()}
        digests.write_text(json.dumps(forged))
        capsys.readouterr()
        return _verify(capsys, workdir, "--from", "1")

    monkeypatch.setattr(jax, "devices", lambda: ALL()[:1])
    build()
    written = json.loads(digests.read_text())
    source = dict(input__source="records", input__data_dir=str(data), input__name="tiny_set")
    steps = dict(total_steps=2, checkpoint_every=1)  # as in test_data_identity.py
    train.train(tiny.config(**tiny.SHALLOW, **source, **steps), workdir)
    status, out, err = verify_rebuilt()  # other bytes, the same records
    assert status == 0 and "bit for bit" in out, out + err

    picture = (folder / lines[5]["image"]).read_bytes()
    record_sets.picture(200).save(folder / lines[5]["image"])
    status, _, err = verify_rebuilt()
    assert status == 1 and "step 2: the run has seen other images by then" in err

    (folder / lines[5]["image"]).write_bytes(picture)
    lines[5] |= {"caption": "another text", "captions": [], "synthetic_caption": "and another"}
    (folder / "A.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, _, err = verify_rebuilt()
    assert status == 1 and "step 2: the run has seen other batches by then" in err


def test_the_command_takes_as_many_virtual_devices_as_the_run_had(finished, monkeypatch):
    told = {}
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(command.jax.config, "update", told.__setitem__)
    monkeypatch.setattr(command, "verify", lambda *_, **__: None)
    assert command.main([str(finished)]) == 0 and told["jax_num_cpu_devices"] == 2


USAGE = [
    (["nothing_here"], "nothing_here: no such folder; expected the --workdir of a run"),
    (["."], ".: no receipts.jsonl; expected the workdir of a run that has saved"),
    (["RUN", "--from=5"], "--from: got 5, expected 0 or one of the kept checkpoints, 4, 8, 10"),
    (["RUN", "--from=10"], "steps 11-15: nothing is recorded of them"),
    (["RUN", "--steps=0"], "--steps: got '0', expected a whole number in 1.."),
    ([], "WORKDIR: missing"),
]


@pytest.mark.parametrize("arguments,message", USAGE)
def test_wrong_usage_is_one_line(finished, arguments, message):
    arguments = [str(finished) if a == "RUN" else a for a in arguments]
    with pytest.raises(ValueError, match=".") as caught:
        command.main([*arguments])
    assert message in str(caught.value) and "\n" not in str(caught.value)
