"""The passes and their files: what is done again and what is not, workers in processes, models that break down."""

import json

import PIL.Image
import pytest

from grain_jax.core import errors
from grain_jax.data import sources
from grain_jax.data.annotate import (
    checks,
    detector,
    endpoint_chat,
    outputs,
    passes,
    pipeline,
    prompt,
)
from tests import record_sets
from tests.data.annotate import endpoint, models


@pytest.fixture
def shards(tmp_path):
    lines = record_sets.write_annotations(tmp_path / "in", 9, size=(40, 30))
    options = sources.Options(
        str(tmp_path / "in"), annotations=(str(tmp_path / "in" / "A.jsonl"),), shard_size=3
    )
    assert len(lines) == 9
    return sources.shards("annotations", options)


def make_job(tmp_path, url="http://127.0.0.1:1/v1", names=("caption", "describe")):
    return passes.Job(
        output=outputs.Output(str(tmp_path / "out")),
        passes=tuple(names),
        limits=checks.Limits(),
        batch_size=2,
        keep_images=False,
        chat=endpoint_chat.Options(url=url, model="tiny", tries=1),
        detector=detector.Options(),
        prompts={
            "caption": prompt.read_prompt(prompt.CAPTION, with_subject=False),
            "describe": prompt.read_prompt(prompt.DESCRIBE, with_subject=True),
        },
    )


def counters(job, shards, *beam_arguments, retry_failed=False):
    return pipeline.run(job, shards, beam_arguments, retry_failed=retry_failed)


def test_counters_files_and_a_shard_that_is_done(tmp_path, shards):
    with endpoint.serve() as server:
        job = make_job(tmp_path, server.url)
        found = counters(job, shards)
        assert len(server.asked) == 18
        assert found["pictures"] == 9 and found["shards"] == 3
        assert found["passes/caption/pictures"] == found["passes/describe/pictures"] == 9
        assert found["passes/caption/prompt tokens"] == 900
        assert found["passes/describe/descriptions"] == 9 * len(models.DESCRIPTIONS)
        # The runner may give a shard again.
        assert counters(job, shards) == {}
        assert len(server.asked) == 18
    name = shards[1].name
    (line, *_) = job.output.read("passes/describe", name)
    assert line["image"] == "00003.png"
    assert line["descriptions"] == [text.strip() for text in models.DESCRIPTIONS]
    (line, *_) = job.output.read("annotations", name)
    assert line["synthetic_caption"] == models.CAPTION.removeprefix("Caption: ")
    assert [r["description"] for r in line["regions"]] == [
        f"the left part {i} of 3" for i in range(3)
    ]
    assert job.output.read("failed", name) == []


def test_passes_apart_give_the_same_as_together(tmp_path, shards):
    with endpoint.serve() as server:
        together = make_job(tmp_path / "a", server.url)
        apart = make_job(tmp_path / "b", server.url)
        counters(together, shards)
        for name in together.passes:
            counters(apart._replace(passes=(name,)), shards)
    for shard in shards:
        for kind in ("annotations", "failed", "passes/caption", "passes/describe"):
            assert apart.output.read(kind, shard.name) == together.output.read(kind, shard.name)


def test_rules_add_negatives_to_the_regions_of_the_source(tmp_path, shards):
    job = make_job(tmp_path, names=("negatives",))._replace(negatives=2)
    models = passes.build(job)
    lines = []
    for shard in shards:
        tally = passes.annotate_shard(shard, job, models)["passes"]["negatives"]
        lines += job.output.read("annotations", shard.name)
        number = sum(
            len(region.get("negatives", ())) for line in lines[-3:] for region in line["regions"]
        )
        assert tally["negatives"] == number
    assert models.chat is None and models.detector is None
    described = [region for line in lines for region in line["regions"]]
    assert len(described) == 12
    for region in described:  # "the left part 0 of 1"
        side = region["description"].replace("left", "right")
        assert region["negatives"] == [side]
    # A later job keeps them, and those of the source stay.
    again = job._replace(passes=())
    passes.annotate_shard(shards[1], again, models)
    assert again.output.read("annotations", shards[1].name) == lines[3:6]


def test_what_an_earlier_pass_failed_stays_listed(tmp_path, shards):
    with endpoint.serve() as server:
        job = make_job(tmp_path, server.url, ["caption"])
        models_ = passes.build(job)
        server.reply = lambda asked: endpoint.Reply("I'm sorry.")
        passes.annotate_shard(shards[0], job, models_)
        server.reply = endpoint.annotator
        passes.annotate_shard(shards[0], job._replace(passes=("describe",)), models_)
        assert len(server.asked) == 3  # without a subject there is nothing to ask
    letters = job.output.read("failed", shards[0].name)
    assert [letter["stage"] for letter in letters] == ["caption"] * 3
    assert all(letter["kept"] and letter["cause"] == "refusal" for letter in letters)
    lines = job.output.read("annotations", shards[0].name)
    assert [line["synthetic_caption"] for line in lines] == [
        f"synthetic text of {i}" for i in range(3)
    ]


def test_workers_in_processes(tmp_path, shards):
    with endpoint.serve() as server:
        job = make_job(tmp_path, server.url)
        options = ("--direct_num_workers=2", "--direct_running_mode=multi_processing")
        assert counters(job, shards, *options)["pictures"] == 9
        assert len(server.asked) == 18
    assert job.output.finished(job.passes) == {shard.name for shard in shards}


def test_a_folder_whose_name_is_a_pattern_is_itself(tmp_path):
    for name in ("out1", "out[1]"):
        outputs.Output(str(tmp_path / name)).path("annotations").mkdir(parents=True)
    (tmp_path / "out1" / "annotations" / "neighbour.jsonl").touch()
    (tmp_path / "out[1]" / "annotations" / ".own.jsonl").touch()
    assert outputs.Output(str(tmp_path / "out[1]")).finished([]) == {".own"}


def test_a_server_that_is_down_ends_the_job_before_it_fails_millions(tmp_path, shards, monkeypatch):
    monkeypatch.setattr(passes, "FAILURES_IN_A_ROW", 4)
    job = make_job(tmp_path, names=["caption"])
    with pytest.raises(errors.UserError, match="4 images in a row failed, the last by no conn"):
        counters(job, shards)
    done = job.output.finished(job.passes)
    assert done == {shards[0].name} or done == set()
    with endpoint.serve() as server:
        up = job._replace(chat=job.chat._replace(url=server.url))
        counters(up, [shard for shard in shards if shard.name not in done])
    assert up.output.finished(up.passes) == {shard.name for shard in shards}


def test_files_are_replaced_whole_and_any_text_comes_back_as_it_was(tmp_path):
    output = outputs.Output(str(tmp_path))
    lines = [{"image": "a\u2028b\x85c\x0bd"}, {"image": "\udcff.jpg", "detail": "\u00e9"}]
    for written in (lines, [{"image": "b"}, {"image": "c"}]):
        output.write("failed", "s", written)
        assert output.read("failed", "s") == written
    assert (tmp_path / "failed" / "s.jsonl").read_text() == '{"image": "b"}\n{"image": "c"}\n'
    assert list((tmp_path / "incomplete").iterdir()) == []
    assert output.read("failed", "another") == [] and output.tally("s") == {}


def test_batches_of_large_pictures_are_smaller(monkeypatch):
    monkeypatch.setattr(passes, "BATCH_PIXELS", 1000)
    sides = [10, 10, 10, 10, 40, 20, 20, 20, None, 10]
    works = [passes._Work(None, side and PIL.Image.new("RGB", (side, side))) for side in sides]
    found = list(passes._batches(works, 4))
    assert [len(batch) for batch in found] == [4, 1, 3, 2]
    assert [work for batch in found for work in batch] == works


def test_sums_of_counters():
    a = {"n": 1, "passes": {"caption": {"s": 0.5}}}
    b = {"n": 2, "m": 3, "passes": {"caption": {"s": 1.0}, "ground": {"s": 2.0}}}
    expected = {"n": 3, "m": 3, "passes": {"caption": {"s": 1.5}, "ground": {"s": 2.0}}}
    assert outputs.add(a, b) == expected
    assert outputs.add({}, json.loads(json.dumps(a))) == a
