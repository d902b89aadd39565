"""Jobs of data.annotate, one killed in the middle and started again: every image once, every fault by its cause."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

from grain_jax.data.annotate import __main__ as command
from grain_jax.data.aviary import __main__ as aviary
from tests.data.annotate import endpoint, faults, models
from tests.paths import ROOT

SLOWLY = 0.05  # seconds an answer takes while a kill is waited for


def plant(folder: pathlib.Path, pictures: int) -> tuple[list[str], dict[str, str]]:
    """Draws images and plants all faults among them; returns all names and the causes of the files'."""
    drawn = ["--images", str(pictures), "--output", str(folder), "--processes", "1"]
    nothing = ("--seen-per-species", "--unseen-per-species", "--test-images")
    assert aviary.main([*drawn, *(part for name in nothing for part in (name, "0"))]) == 0
    planted = faults.plant_files(folder / "images")
    faults.plant_pictures_for_server(folder / "images")
    names = [path.name for path in (folder / "images").iterdir() if path.suffix != ".txt"]
    return names, {name: cause for name, cause in planted.items() if cause}


def kill_in_the_middle(arguments: list[str], output: pathlib.Path) -> dict:
    """Starts the command, kills it when a third of its shards are done; returns these, with their times."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "grain_jax.data.annotate", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    done = output / "passes/describe"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        shards = len(list((output / "lists").glob("*.jsonl")))
        if shards and len(list(done.glob("*.done"))) >= max(2, shards // 3):
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    assert not (output / "A.jsonl").exists()
    return {path: path.stat().st_mtime_ns for path in done.glob("*.done")}


def resume(arguments: list[str], output: pathlib.Path, killed: dict) -> None:
    """Starts the command again: the shards that are done stay as they are."""
    assert command.main(arguments) == 0
    times = {path: path.stat().st_mtime_ns for path in killed}
    assert times == killed, "a shard was done again"
    shards = len(list((output / "passes/describe").glob("*.done")))
    assert 0 < len(killed) < shards


def run(folder: pathlib.Path, names: list[str], causes: dict[str, str], troubles: bool) -> None:
    """Caption and describe by an endpoint, ground apart; with troubles a kill and a bad server, which is then mended."""
    output = folder / "out"
    pictures = [f"--images={folder / 'images'}", f"--output={output}", "--shard-size=10"]
    pictures.append("--max-faults=1")
    detector = models.owlv2(folder / "owlv2")
    ground = [*pictures, "--passes=ground", f"--detector={detector}", "--threshold=0.5"]
    slowly = lambda asked: endpoint.annotator(asked)._replace(seconds=SLOWLY)
    with endpoint.serve(slowly if troubles else endpoint.annotator) as server:
        ask = [*pictures, "--passes=caption,describe", f"--endpoint={server.url}", "--chat=tiny"]
        ask += ["--tries=2", f"--request-seconds={faults.TIME_OUT}"]
        if troubles:
            killed = kill_in_the_middle([*ask, "--concurrency=2"], output)
            server.reply = faults.reply
            resume(ask, output, killed)
            assert command.main(ground) == 0
            expected = causes | {name: cause for name, (cause, _) in faults.SERVER.items()}
            kept = {name for name, (_, kept) in faults.SERVER.items() if kept}
            faults.check(output, names, expected, kept)
            server.reply = endpoint.annotator
            asked = len(server.asked)
            shutil.rmtree(output / "passes")  # what failed runs again, and nothing else
        assert command.main(ask) == 0
        if troubles:
            # The second prompt alone for the two that were refused it; both for the others.
            assert len(server.asked) - asked == 2 * len(faults.SERVER) - len(kept)
        assert command.main(ground) == 0
        faults.check(output, names, causes, set())
