"""The command, killed and started again, with models that run here and with an endpoint; wrong usage."""

import io
import json
import signal
import subprocess
import sys
import time

import pytest

from grain_jax.data.annotate import __main__ as command
from tests import record_sets
from tests.data import test_sources
from tests.data.annotate import endpoint, models
from tests.paths import ROOT


def plant(folder):
    """Writes 12 good images and what goes wrong in a crawl; returns the causes of the faulty ones by name."""
    record_sets.write_annotations(folder, 12, size=(40, 30))
    (folder / "A.jsonl").unlink()
    out = io.BytesIO()
    record_sets.picture(0, (96, 96)).save(out, "JPEG")
    jpeg = out.getvalue()
    causes = {"truncated.jpg": "unreadable", "empty.jpg": "empty file", "text.jpg": "unreadable"}
    causes |= {"1x1.png": "too small", "wide.jpg": "too large", "caption.jpg": "bad annotation"}
    for name, content in (
        ("truncated.jpg", jpeg[: len(jpeg) // 2]),
        ("empty.jpg", b""),
        ("text.jpg", b"404 Not Found\n" * 9),
        ("caption.jpg", jpeg),
    ):
        (folder / name).write_bytes(content)
    (folder / "caption.txt").write_bytes(b"caf\xe9")
    record_sets.picture(0, (1, 1)).save(folder / "1x1.png")
    record_sets.picture(0, (20_000, 40)).save(folder / "wide.jpg")
    record_sets.picture(0, (40, 30)).convert("CMYK").save(folder / "cmyk.jpg")  # is no fault
    (folder / "folder.jpg").mkdir()
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    return causes | {"folder.jpg": "unreadable", "gone.jpg": "no such file"}


@pytest.mark.parametrize("kill", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_each_picture_is_there_once_after_faults_and_a_kill(tmp_path, kill):
    causes, output, killed = plant(tmp_path / "images"), tmp_path / "out", {}
    flags = [f"--images={tmp_path / 'images'}", f"--output={output}", "--shard-size=4"]
    slowly = lambda asked: endpoint.annotator(asked)._replace(seconds=0.05)
    with endpoint.serve(slowly if kill else endpoint.annotator) as server:
        ask = ["--passes=caption,describe", f"--endpoint={server.url}", "--chat=tiny"]
        flags.append("--max-faults=1")
        if kill:
            annotate = [sys.executable, "-m", "grain_jax.data.annotate", *flags, *ask, "--concurrency=1"]
            done = output / "passes/describe"
            with subprocess.Popen(annotate, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
                while process.poll() is None and len(list(done.glob("*.done"))) < 2:
                    time.sleep(0.01)
                process.kill()
            assert process.returncode == -signal.SIGKILL and not (output / "A.jsonl").exists()
            killed = {path: path.stat().st_mtime_ns for path in done.glob("*.done")}
        assert command.main([*flags, *ask]) == 0
        assert {path: path.stat().st_mtime_ns for path in killed} == killed  # not done again
    detector = models.owlv2(tmp_path / "owlv2")
    ground = ["--passes=ground", f"--detector={detector}", "--threshold=0.5"]
    assert command.main([*flags, *ground]) == 0
    lines, letters = (
        [json.loads(line) for line in (output / name).read_text().splitlines()]
        for name in ("A.jsonl", "failed.jsonl")
    )
    assert {letter["image"]: letter["cause"] for letter in letters} == causes
    assert len(letters) == len(causes) and {letter["stage"] for letter in letters} == {"image"}
    good = ["cmyk.jpg", *(f"{number:05d}.png" for number in range(12))]
    assert sorted(line["image"] for line in lines) == sorted(good)
    total = json.loads((output / "summary.json").read_text())["total"]
    assert (total["images"], total["annotated"]) == (len(good) + len(causes), len(good))
    assert total["faulty"] == len(causes)
    assert total["caption"] == total["describe"] == total["ground"] == len(good)
    assert total["regions"] == sum(len(line["regions"]) for line in lines) > 0


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "in"
    record_sets.write_annotations(folder, 6, size=(40, 30))
    return folder


def arguments(folder, output, *more):
    annotated = ["--source=annotations", f"--annotations={folder / 'A.jsonl'}"]
    return [f"--images={folder}", f"--output={output}", *annotated, *more]


def test_pictures_of_tar_shards_become_files(pictures, tmp_path):
    paths, output = [pictures / f"0000{i}.png" for i in range(2)], tmp_path / "out"
    for number in range(2):
        texts = [(path.with_suffix(".txt").name, b"text of %d" % number) for path in paths]
        members = [(path.name, path.read_bytes()) for path in paths] + texts
        test_sources.write_tar(tmp_path / f"tars/0000{number}.tar", sorted(members))
    flags = [f"--images={tmp_path / 'tars'}", f"--output={output}", "--passes=none"]
    assert command.main([*flags, "--no-keep-images"]) == 0
    assert not (output / "images").exists()
    lines = [json.loads(line) for line in (output / "A.jsonl").read_text().splitlines()]
    names = [f"0000{number}/0000{i}.png" for number in range(2) for i in range(2)]
    assert [line["image"] for line in lines] == names
    assert [line["caption"] for line in lines] == ["text of 0"] * 2 + ["text of 1"] * 2
    (output / "passes/none/00001.done").unlink()
    assert command.main(flags) == 0
    for name in names[2:]:
        written = (output / "images" / name).read_bytes()
        assert written == (pictures / name.split("/")[1]).read_bytes()


def test_a_second_job_waits_until_the_first_ends_so_that_no_results_are_lost(pictures, tmp_path, capsys):
    output = tmp_path / "out"
    flags = arguments(pictures, output)
    jobs = [[*flags, "--passes=caption", "--chat=tiny"], [*flags, "--passes=negatives"]]
    seconds = []

    def reply(asked):
        if not seconds:  # while the first job has a shard in work
            seconds.extend(command.main(job) for job in jobs)
        return endpoint.annotator(asked)

    with endpoint.serve(reply) as server:
        jobs[0].append(f"--endpoint={server.url}")
        assert command.main(jobs[0]) == 0
        assert seconds == [2, 2]
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 2
        assert all("in use by another process; " in line for line in error)
    assert command.main(jobs[1]) == 0
    lines = [json.loads(line) for line in (output / "A.jsonl").read_text().splitlines()]
    assert {line["synthetic_caption"] for line in lines} == {endpoint.CAPTION.partition(": ")[2]}
    regions = [region for line in lines for region in line["regions"]]
    assert regions and all(region["negatives"] for region in regions)


def test_too_many_faults_and_other_settings_end_with_status_2(pictures, tmp_path, capsys, monkeypatch):
    from grain_jax.data.annotate import pipeline

    (pictures / "00002.png").write_bytes(b"")
    output = tmp_path / "out"
    flags = arguments(pictures, output, "--passes=none")
    with monkeypatch.context() as patch:  # somebody cancels the job
        patch.setattr(pipeline, "run", lambda *arguments: None)
        assert command.main(flags) == 2
    assert "ended with 1 of 1 shards not done" in capsys.readouterr().err
    assert command.main(flags) == 2
    assert "1 of 6 images have a fault, more than --max-faults 0.01" in capsys.readouterr().err
    letter = json.loads((output / "failed.jsonl").read_text())
    assert (letter["image"], letter["cause"], letter["kept"]) == ("00002.png", "empty file", False)
    assert len((output / "A.jsonl").read_text().splitlines()) == 5
    assert command.main([*flags, "--max-faults=0.2"]) == 0  # nothing left to do
    assert "0 of 1 shards in this run" in capsys.readouterr().out
    assert command.main([*flags, "--min-side=20"]) == 2
    assert 'was begun with source {"min_side": 16}, got {"min_side": 20}' in capsys.readouterr().err


DAMAGE = [  # a file of a shard -> what it becomes
    ("annotations/*.jsonl", lambda content: b""),
    ("annotations/*.jsonl", lambda content: content[:-9]),
    ("annotations/*.jsonl", lambda content: content.replace(b"text of 3", b"text of 2")),
    ("failed/*.jsonl", lambda content: b"{}\n"),
    ("results/*.record", lambda content: content.replace(b"lower", b"lowEr", 1)),
    ("results/*.record", lambda content: content[: len(content) // 2]),
]


@pytest.mark.parametrize("pattern,damage", DAMAGE)
def test_a_damaged_shard_is_made_again(pictures, tmp_path, capsys, pattern, damage):
    output = tmp_path / "out"
    job = arguments(pictures, output, "--passes=negatives", "--shard-size=4")
    content = lambda: {x: (output / x).read_bytes() for x in ("A.jsonl", "summary.json")}
    assert command.main(job) == 0
    whole = content()
    path = sorted(output.glob(pattern))[0]
    good = path.read_bytes()
    path.write_bytes(damage(good))
    assert path.read_bytes() != good
    capsys.readouterr()
    if path.suffix == ".record":  # a pass cannot go on from it
        assert command.main([*job, "--passes=none"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == (
            f"{path}: damaged, not what was written; it holds results of negatives: give --passes negatives"
            " to make its shard again"
        )
    assert command.main(job) == 0
    said = capsys.readouterr()
    assert "1 of 2 shards in this run" in said.out
    assert f"{path}: damaged, not what was written; its shard is made again\n" in said.err
    assert content() == whole and path.read_bytes() == good


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--passes=captoin", "expected all, none, or some of caption,describe,ground"),
        ("--source=tdfs", "data source 'tdfs': did you mean tfds? expected one of: annotations, coco"),
        ("--option=delimiter", "got 'delimiter', expected KEY=VALUE"),
        ("--passes=describe", "1 shards have no results of the pass caption yet"),
        ("--endpoint=http://127.0.0.1:1/v1", "got no --chat"),
        ("--images=/nowhere  --source=folder", "no such folder, expected images"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line_and_status_2(pictures, tmp_path, capsys, flags, expected):
    assert command.main([*arguments(pictures, tmp_path / "out"), *flags.split("  ")]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and expected in error[0]
