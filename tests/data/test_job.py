"""The folder of a job: settings that agree, files that are written whole, shards that are done, faults."""

import json

import pytest

from grain_jax.data import job


def lines_of(output, *names):
    return [json.loads(line) for line in output.path(*names).read_bytes().splitlines()]


@pytest.fixture
def output(tmp_path):
    return job.Output(str(tmp_path / "out[1]"))  # a pattern, for who lists files by one


def test_files_are_replaced_whole_and_any_text_comes_back_as_it_was(output):
    lines = [{"image": "a\u2028b\x85c\x0bd"}, {"image": "\udcff.jpg", "detail": "\u00e9"}]
    for written in (lines, [{"image": "b"}, {"image": "c"}]):
        output.put_lines(written, "failed", "s.jsonl")
        assert lines_of(output, "failed", "s.jsonl") == written
    content = output.path("failed", "s.jsonl").read_text()
    assert content == '{"image": "b"}\n{"image": "c"}\n'
    assert [path.name for path in output.path("failed").iterdir()] == ["s.jsonl"]


def test_a_shard_is_done_when_all_its_files_are_there(output):
    for name in ("a/1", "a/2", "b/2", "b/3"):
        output.put_lines([{"in": name}], f"{name}.jsonl")
    output.put("half a file", "a", "3.jsonl.12ab.new")  # of a kill
    assert output.done("a") == {"1", "2"} and output.done("a", "b") == {"2"}
    assert output.done("c") == set()
    output.join("a", ["2", "1"], "A.jsonl")
    assert lines_of(output, "A.jsonl") == [{"in": "a/2"}, {"in": "a/1"}]
