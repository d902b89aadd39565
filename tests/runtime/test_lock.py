"""One trainer a workdir: who is refused, whose mark is taken over, and who finds out that it lost its own."""

import os
import subprocess
import sys
import threading
import time
from concurrent import futures

import msgspec
import pytest

from grain_jax.runtime import lock
from tests import storage_emulator
from tests.paths import ROOT

ELSEWHERE = lock.Holder("node7", 4242, "2026-01-01 00:00:00+00:00", "another boot", 17, "abc")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "DEAD_SECONDS", 1.5)


def _write(workdir, holder):
    (workdir / lock.FILE).write_bytes(msgspec.json.encode(holder))


def _holder(workdir):
    return lock.parse((workdir / lock.FILE).read_bytes())


def take(workdir):
    storage = lock.Storage(workdir)
    return lock.Lock(workdir, storage, lock.take(workdir, storage))


def test_the_second_is_refused_at_once_and_told_who_the_first_is(tmp_path):
    workdir = tmp_path / "new" / "run"
    with lock.held(workdir):
        me = _holder(workdir)
        began = time.monotonic()
        said = f"process {me.pid} on {me.host} trains there, since {me.began[:10]}"
        with pytest.raises(lock.Held, match=said) as refused:
            take(workdir)
        assert time.monotonic() - began < 0.5 and len(str(refused.value).splitlines()) == 1
    assert not workdir.exists()  # the lock goes with its holder, and the folder if it holds no more
    with lock.held(workdir):
        pass


def test_one_folder_by_two_ways_has_one_lock(tmp_path):
    (tmp_path / "real" / "inside").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "inside")
    with lock.held(tmp_path / "link" / ".." / "run"):
        with pytest.raises(lock.Held):
            take(tmp_path / "real" / "run")
    assert not list((tmp_path / "real").glob("*/trainer.lock"))


def _number_given_anew():
    me = lock.this_process()
    return msgspec.structs.replace(me, started=me.started - 1)


def test_a_dead_one_of_this_machine_locks_nobody_out_for_a_moment(tmp_path):
    process = subprocess.Popen(["sleep", "60"])
    me = lock.this_process()
    holder = msgspec.structs.replace(me, pid=process.pid, started=lock._started(process.pid))
    assert holder.lives()
    process.kill()
    while holder.lives():  # until it is a zombie
        time.sleep(0.01)
    began = time.monotonic()
    for left, end in ((holder, process.wait), (holder, int), (_number_given_anew(), int)):
        _write(tmp_path, left)
        take(tmp_path).release()
        end()
    assert time.monotonic() - began < 1.5


MARKS = {
    "another host": msgspec.json.encode(ELSEWHERE),
    "empty": b"",
    "other bytes": b'{"host":"\xff"}',
    "deep": b"[" * 100_000,
    "short": b'{"host": "x"}',
    "path": msgspec.json.encode(msgspec.structs.asdict(ELSEWHERE) | {"pid": "../1"}),
}


def test_a_mark_that_nobody_renews_is_taken_over_after_a_time(tmp_path, capsys):
    for name, content in MARKS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / lock.FILE).write_bytes(content)
    with futures.ThreadPoolExecutor(len(MARKS)) as pool:  # each waits
        list(pool.map(lambda name: take(tmp_path / name).release(), MARKS))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(MARKS)
    for name in MARKS:
        (line,) = (line for line in said if str(tmp_path / name) in line)
        assert "waiting up to 1.5 s for a sign of life" in line


def test_a_mark_that_another_host_renews_refuses(tmp_path):
    _write(tmp_path, ELSEWHERE)
    renewed = msgspec.structs.replace(ELSEWHERE, renewed=1)  # its clock may say what it likes
    again = threading.Timer(0.7, _write, [tmp_path, renewed])
    again.start()
    with pytest.raises(lock.Held, match="process 4242 on node7 trains there"):
        take(tmp_path)
    again.join()
    assert _holder(tmp_path).renewed == 1


@pytest.mark.parametrize("left", [None, _number_given_anew], ids=["free", "dead one's"])
def test_of_many_at_once_one_gets_it(tmp_path, left):
    for round_ in range(4):
        workdir = tmp_path / str(round_)
        workdir.mkdir()
        if left:
            _write(workdir, left())
        got, refused = [], []
        gate = threading.Barrier(8)

        def start(workdir=workdir, gate=gate, got=got, refused=refused):
            gate.wait()
            try:
                got.append(take(workdir))
            except lock.Held as error:
                refused.append(error)

        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(got), len(refused)) == (1, 7)
        got[0].release()
        assert not list(workdir.iterdir())


def test_a_trainer_that_was_taken_for_dead_ends_and_leaves_the_others_mark(tmp_path):
    mark = take(tmp_path)
    mark.check()
    _write(tmp_path, ELSEWHERE)
    mark._renewed_at -= 60  # it was suspended
    with pytest.raises(lock.Lost, match="process 4242 on node7 .* took this one for dead"):
        mark.check()
    mark.release()
    assert _holder(tmp_path) == ELSEWHERE


def test_a_mark_that_was_removed_comes_again_but_for_a_folder_that_was_removed(tmp_path):
    mark = take(tmp_path / "run")
    (tmp_path / "run" / lock.FILE).unlink()
    mark.renew()
    assert _holder(tmp_path / "run").renewed == 1
    (tmp_path / "run" / lock.FILE).unlink()
    (tmp_path / "run").rmdir()
    with pytest.raises(lock.Lost, match="run: the folder was removed"):
        mark.renew()
    mark.release()


_HOSTS = """
import msgspec, threading
from etils import epath
from grain_jax.runtime import lock
lock.RENEW_SECONDS, lock.DEAD_SECONDS = 0.3, 1.5
url = epath.Path("gs://bucket/run")
def start(found):
    storage = lock.Storage(url)
    try:
        found.append(lock.Lock(url, storage, lock.take(url, storage)))
    except lock.Held as error:
        found.append(str(error))
first, second = [], []
start(first)
start(second)
me = first[0]._holder
assert second[0].startswith(f"gs://bucket/run: process {me.pid} on {me.host} trains there"), second
first[0].release()
storage = lock.Storage(url)
dead = msgspec.structs.replace(me, boot="another boot")
assert storage.swap(storage.read()[1], dead)
found = []
threads = [threading.Thread(target=start, args=[found]) for _ in range(5)]
lives = lock.Holder.lives
lock.Holder.lives = lambda holder: None  # as if each were on a host of its own
for thread in threads: thread.start()
for thread in threads: thread.join()
marks = [mark for mark in found if isinstance(mark, lock.Lock)]
assert (len(found), len(marks)) == (5, 1), found
marks[0].release()
assert storage.read()[0] is None
"""


def test_of_many_hosts_one_takes_over_a_dead_mark_in_an_object_store(tmp_path):
    with storage_emulator.serve(tmp_path) as (store, environment):
        environment = {**os.environ, **environment}
        hosts = [sys.executable, "-c", _HOSTS]
        subprocess.run(hosts, cwd=ROOT, env=environment, timeout=120, check=True)
        assert not store.names("bucket")
