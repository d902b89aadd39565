"""One trainer a workdir: who is refused, whose lock is taken over, and who finds out that it lost its own."""

import subprocess
import threading
import time
from concurrent import futures

import msgspec
import pytest

from grain_jax.core import errors
from grain_jax.runtime import lock

ELSEWHERE = lock.Holder("node7", 4242, "2026-01-01 00:00:00+00:00", "another boot", 17, "abc")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "DEAD_SECONDS", 0.5)


def _write(workdir, holder):
    (workdir / lock.FILE).write_bytes(msgspec.json.encode(holder))


def _holder(workdir):
    return lock.parse((workdir / lock.FILE).read_bytes())


def test_the_second_is_refused_at_once_and_told_who_the_first_is(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    workdir = tmp_path / "link" / "new" / "run"
    with lock.held(workdir):
        me = _holder(workdir)
        refusal = f"process {me.pid} on {me.host} trains there, since {me.began[:10]}"
        for same in (workdir, tmp_path / "real" / "new" / "run"):
            with pytest.raises(errors.UserError, match=refusal) as refused:
                lock.Lock(same)
            assert len(str(refused.value).splitlines()) == 1
    assert not list(workdir.iterdir())  # the lock goes with its holder


def _pid_used_again():
    me = lock.this_process()
    return msgspec.structs.replace(me, started=me.started - 1)


def test_a_dead_process_of_this_machine_locks_nobody_out_for_a_moment(tmp_path, capsys):
    process = subprocess.Popen(["sleep", "60"])
    started = lock._started(process.pid)
    holder = msgspec.structs.replace(lock.this_process(), pid=process.pid, started=started)
    assert holder.lives()
    process.kill()
    while holder.lives():  # until it is a zombie
        time.sleep(0.01)
    for left, end in ((holder, process.wait), (holder, int), (_pid_used_again(), int)):
        _write(tmp_path, left)
        lock.Lock(tmp_path).release()
        end()
    assert capsys.readouterr().err == ""  # nobody waited


@pytest.mark.parametrize("content", [msgspec.json.encode(ELSEWHERE), b"", b'{"host":"\xff"}', b"[" * 100_000])
def test_a_lock_that_nobody_renews_is_taken_over_after_a_time(tmp_path, capsys, content):
    (tmp_path / lock.FILE).write_bytes(content)
    lock.Lock(tmp_path).release()
    assert "waiting up to 0.5 s for a sign of life" in capsys.readouterr().err


def test_a_lock_that_another_host_renews_refuses(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "DEAD_SECONDS", 60)
    _write(tmp_path, ELSEWHERE)
    renewed = msgspec.structs.replace(ELSEWHERE, renewed=1)  # its clock may say what it likes
    again = threading.Timer(0.3, _write, [tmp_path, renewed])
    again.start()
    with pytest.raises(errors.UserError, match="process 4242 on node7 trains there"):
        lock.Lock(tmp_path)
    again.join()
    assert _holder(tmp_path).renewed == 1


@pytest.mark.parametrize("left", [None, _pid_used_again], ids=["free", "dead one's"])
def test_of_many_at_once_one_gets_it(tmp_path, left):
    for number in range(4):
        workdir = tmp_path / str(number)
        workdir.mkdir()
        if left:
            _write(workdir, left())
        gate = threading.Barrier(8)

        def start(_, workdir=workdir, gate=gate):
            gate.wait()
            try:
                return lock.Lock(workdir)
            except errors.UserError:
                return None

        with futures.ThreadPoolExecutor(8) as pool:
            (winner,) = filter(None, pool.map(start, range(8)))
        winner.release()
        assert not list(workdir.iterdir())


def test_a_trainer_that_was_taken_for_dead_ends_and_leaves_the_lock_of_the_other(tmp_path):
    mine = lock.Lock(tmp_path)
    mine.renew()
    _write(tmp_path, ELSEWHERE)  # it was suspended
    with pytest.raises(errors.StorageFault, match="lost its lock; .* process 4242 on node7 trains there"):
        mine.renew()
    mine.release()
    assert _holder(tmp_path) == ELSEWHERE
