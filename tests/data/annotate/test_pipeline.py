"""The passes and their files: what is done again, workers in processes, models that break down."""

import collections
import json

import PIL.Image
import pytest

from grain_jax.core import errors
from grain_jax.data import sources
from grain_jax.data.annotate import passes, pipeline
from grain_jax.data.annotate.arguments import Annotate
from grain_jax.data.job import Output
from tests import record_sets
from tests.data.annotate import endpoint


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
    return Annotate(images="", output=str(tmp_path / "out"), **flags)


def lines_of(job, kind, shard):
    output = Output(job.output)
    if kind == "results":
        return output.read_record(*passes.record_of(shard.name))["images"]
    lines = output.path(kind, f"{shard.name}.jsonl").read_text().split("\n")
    return [json.loads(line) for line in lines if line]


def test_workers_in_processes_and_a_shard_that_is_done(tmp_path, shards):
    with endpoint.serve() as server:
        options = ["--direct_num_workers=2", "--direct_running_mode=multi_processing"]
        pipeline.run(make_job(tmp_path, server.url, beam=options), shards)
        job = make_job(tmp_path, server.url)
        pipeline.run(job, shards)  # the runner may give a shard again
        assert len(server.asked) == 18
    assert Output(job.output).done(*passes.marks(job)) == {shard.name for shard in shards}
    records = [Output(job.output).read_record(*passes.record_of(shard.name)) for shard in shards]
    count = sum((collections.Counter(record["counts"]) for record in records), collections.Counter())
    assert count["images"] == count["caption"] == count["describe"] == 9
    (line, *_) = lines_of(job, "results", shards[1])
    assert line["image"] == "00003.png"
    assert line["results"]["describe"] == [text.strip() for text in endpoint.DESCRIPTIONS]
    (line, *_) = lines_of(job, "annotations", shards[1])
    assert line["synthetic_caption"] == endpoint.CAPTION.removeprefix("Caption: ")
    assert [r["description"] for r in line["regions"]] == [f"the upper part {i} of 3" for i in range(3)]
    assert lines_of(job, "failed", shards[1]) == []


def test_rules_add_negatives_to_the_regions_of_the_source(tmp_path, shards):
    job = make_job(tmp_path, names=("negatives",), negatives=2)
    annotator, lines = passes.Passes(job), []
    for shard in shards:
        annotator.annotate(shard)
        lines += lines_of(job, "annotations", shard)
    assert annotator.chat is None and annotator.detector is None
    described = [region for line in lines for region in line["regions"]]
    assert len(described) == 12
    for region in described:  # "the upper part 0 of 1"
        side = region["description"].replace("upper", "lower")
        assert region["negatives"] == [side]
    # A later job keeps them.
    again = make_job(tmp_path, names=())
    passes.Passes(again).annotate(shards[1])
    assert lines_of(again, "annotations", shards[1]) == lines[3:6]


def test_what_an_earlier_pass_failed_stays_listed(tmp_path, shards):
    with endpoint.serve() as server:
        for name, reply in (
            ("caption", lambda asked: endpoint.Reply("I'm sorry.")),
            ("describe", endpoint.annotator),
        ):
            server.reply, job = reply, make_job(tmp_path, server.url, [name])
            pipeline.run(job, shards[:1])
        assert len(server.asked) == 3  # without a subject there is nothing to ask
    letters = lines_of(job, "failed", shards[0])
    assert [letter["stage"] for letter in letters] == ["caption"] * 3
    assert all(letter["kept"] and letter["cause"] == "refusal" for letter in letters)
    lines = lines_of(job, "annotations", shards[0])
    assert [line["synthetic_caption"] for line in lines] == [f"synthetic text of {i}" for i in range(3)]


def test_a_server_that_is_down_ends_the_job_before_it_fails_millions(tmp_path, shards, monkeypatch):
    monkeypatch.setattr(passes, "FAILURES_IN_A_ROW", 4)
    job = make_job(tmp_path, names=["caption"])
    with pytest.raises(errors.UserError, match="4 images in a row failed, the last by no conn"):
        pipeline.run(job, shards)
    assert Output(job.output).done(*passes.marks(job)) <= {shards[0].name}


def test_batches_of_large_pictures_are_smaller(monkeypatch):
    monkeypatch.setattr(passes, "BATCH_PIXELS", 1000)
    sides = [10, 10, 10, 10, 40, 20, 20, 20, None, 10]
    works = [passes.Work(None, side and PIL.Image.new("RGB", (side, side))) for side in sides]
    result = list(passes.batches(works, 4))
    assert [len(batch) for batch in result] == [4, 1, 3, 2]
    assert [work for batch in result for work in batch] == works
