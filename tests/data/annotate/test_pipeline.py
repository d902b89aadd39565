"""The passes and their files: what is done again and what is not, workers in processes, models that break down."""

import io

import PIL.Image
import pytest

from grain_jax.core import errors
from grain_jax.data import sources
from grain_jax.data.annotate import chat, passes, pipeline
from grain_jax.data.annotate.arguments import Annotate
from tests import record_sets
from tests.data.annotate import endpoint, models


@pytest.fixture
def shards(tmp_path):
    record_sets.write_annotations(tmp_path / "in", 9, size=(40, 30))
    options = sources.Options(
        str(tmp_path / "in"), annotations=(str(tmp_path / "in" / "A.jsonl"),), shard_size=3
    )
    return sources.shards("annotations", options)


def make_job(tmp_path, url="http://127.0.0.1:1/v1", names=("caption", "describe"), **flags):
    flags = {"endpoint": url, "chat": "tiny", "tries": 1, "batch_size": 2} | flags
    flags |= {"passes": tuple(names), "keep_images": False}
    prompts = chat.read_prompts(chat.PROMPTS)
    return passes.Task(Annotate(images="", output=str(tmp_path / "out"), **flags), prompts)


def test_counters_files_and_a_shard_that_is_done(tmp_path, shards):
    with endpoint.serve() as server:
        job = make_job(tmp_path, server.url)
        pipeline.run(job, shards)
        assert len(server.asked) == 18
        count = passes.counts(job.output, [shard.name for shard in shards])
        assert count["images"] == count["caption"] == count["describe"] == 9
        pipeline.run(job, shards)  # the runner may give a shard again
        assert len(server.asked) == 18
    name = shards[1].name
    (line, *_) = job.output.read_lines("results", f"{name}.jsonl")
    assert line["image"] == "00003.png"
    assert line["results"]["describe"] == [text.strip() for text in models.DESCRIPTIONS]
    (line, *_) = job.output.read_lines("annotations", f"{name}.jsonl")
    assert line["synthetic_caption"] == models.CAPTION.removeprefix("Caption: ")
    assert [r["description"] for r in line["regions"]] == [
        f"the upper part {i} of 3" for i in range(3)
    ]
    assert job.output.read_lines("failed", f"{name}.jsonl") == []


def test_passes_apart_give_the_same_as_together(tmp_path, shards):
    with endpoint.serve() as server:
        together = make_job(tmp_path / "a", server.url)
        apart = [make_job(tmp_path / "b", server.url, [name]) for name in ("caption", "describe")]
        for job in (together, *apart):
            annotator = passes.Passes(job)
            for shard in shards:
                annotator.annotate(shard)
    for shard in shards:
        for kind in ("annotations", "failed", "results"):
            assert job.output.read_lines(kind, f"{shard.name}.jsonl") == together.output.read_lines(
                kind, f"{shard.name}.jsonl"
            )


def test_rules_add_negatives_to_the_regions_of_the_source(tmp_path, shards):
    job = make_job(tmp_path, names=("negatives",), negatives=2)
    annotator, lines = passes.Passes(job), []
    for shard in shards:
        annotator.annotate(shard)
        lines += job.output.read_lines("annotations", f"{shard.name}.jsonl")
    assert annotator.chat is None and annotator.detector is None
    described = [region for line in lines for region in line["regions"]]
    assert len(described) == 12
    for region in described:  # "the upper part 0 of 1"
        side = region["description"].replace("upper", "lower")
        assert region["negatives"] == [side]
    # A later job keeps them.
    again = make_job(tmp_path, names=())
    passes.Passes(again).annotate(shards[1])
    assert again.output.read_lines("annotations", f"{shards[1].name}.jsonl") == lines[3:6]


def test_what_an_earlier_pass_failed_stays_listed(tmp_path, shards):
    with endpoint.serve() as server:
        for name, reply in (
            ("caption", lambda asked: endpoint.Reply("I'm sorry.")),
            ("describe", endpoint.annotator),
        ):
            server.reply, job = reply, make_job(tmp_path, server.url, [name])
            passes.Passes(job).annotate(shards[0])
        assert len(server.asked) == 3  # without a subject there is nothing to ask
    letters = job.output.read_lines("failed", f"{shards[0].name}.jsonl")
    assert [letter["stage"] for letter in letters] == ["caption"] * 3
    assert all(letter["kept"] and letter["cause"] == "refusal" for letter in letters)
    lines = job.output.read_lines("annotations", f"{shards[0].name}.jsonl")
    assert [line["synthetic_caption"] for line in lines] == [
        f"synthetic text of {i}" for i in range(3)
    ]


def test_workers_in_processes(tmp_path, shards):
    with endpoint.serve() as server:
        options = ["--direct_num_workers=2", "--direct_running_mode=multi_processing"]
        job = make_job(tmp_path, server.url, beam=options)
        pipeline.run(job, shards)
        assert len(server.asked) == 18
    assert job.output.done(*job.marks) == {shard.name for shard in shards}


def test_a_server_that_is_down_ends_the_job_before_it_fails_millions(tmp_path, shards, monkeypatch):
    monkeypatch.setattr(passes, "FAILURES_IN_A_ROW", 4)
    job = make_job(tmp_path, names=["caption"])
    with pytest.raises(errors.UserError, match="4 images in a row failed, the last by no conn"):
        pipeline.run(job, shards)
    done = job.output.done(*job.marks)
    assert done == {shards[0].name} or done == set()
    with endpoint.serve() as server:
        up = make_job(tmp_path, server.url, ["caption"])
        pipeline.run(up, [shard for shard in shards if shard.name not in done])
    assert up.output.done(*up.marks) == {shard.name for shard in shards}


@pytest.mark.parametrize("height, cause", [(20, ""), (31, "too large"), (19, "too small")])
def test_limits_of_sides_are_inclusive(height, cause):
    file = io.BytesIO()
    PIL.Image.new("RGB", (30, height), "red").save(file, "PNG")
    args = Annotate(images="", output="", min_side=20, max_side=30)
    result = passes.check(sources.Image("x", file.getvalue()), args)
    assert getattr(result, "cause", "") == cause


def test_batches_of_large_pictures_are_smaller(monkeypatch):
    monkeypatch.setattr(passes, "BATCH_PIXELS", 1000)
    sides = [10, 10, 10, 10, 40, 20, 20, 20, None, 10]
    works = [passes.Work(None, side and PIL.Image.new("RGB", (side, side))) for side in sides]
    result = list(passes.batches(works, 4))
    assert [len(batch) for batch in result] == [4, 1, 3, 2]
    assert [work for batch in result for work in batch] == works
