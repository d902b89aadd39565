"""The folder of a job: settings that agree, files that are written whole, shards that are done, faults."""

import pytest

from grain_jax.data import job


@pytest.fixture
def output(tmp_path):
    return job.Output(str(tmp_path / "out[1]"))  # a pattern, for who lists files by one


def test_files_are_replaced_whole_and_any_text_comes_back_as_it_was(output):
    lines = [{"image": "a\u2028b\x85c\x0bd"}, {"image": "\udcff.jpg", "detail": "\u00e9"}]
    for written in (lines, [{"image": "b"}, {"image": "c"}]):
        output.put_lines(written, "failed", "s.jsonl")
        assert output.read_lines("failed", "s.jsonl") == written
    content = output.path("failed", "s.jsonl").read_text()
    assert content == '{"image": "b"}\n{"image": "c"}\n'
    assert [path.name for path in output.path("failed").iterdir()] == ["s.jsonl"]
    assert output.read_lines("failed", "t.jsonl") == [] and output.read_json("t.json") == {}


def test_a_shard_is_done_when_all_its_files_are_there(output):
    for name in ("a/1", "a/2", "b/2", "b/3"):
        output.put_lines([{"in": name}], f"{name}.jsonl")
    output.put("half a file", "a", "3.jsonl.12ab.new")  # of a kill
    assert output.done("a") == {"1", "2"} and output.done("a", "b") == {"2"}
    assert output.done("c") == set()
    output.join("a", ["2", "1"], "A.jsonl")
    assert output.read_lines("A.jsonl") == [{"in": "a/2"}, {"in": "a/1"}]


def test_settings_agree_with_those_of_earlier_runs(output):
    output.agree({"source": {"name": "coco", "limits": [1, 2]}, "path": "/a"})
    output.agree({"ground": {"model": "m"}})
    output.agree({"source": {"name": "coco", "limits": [1, 2]}})
    assert list(output.read_json(job.SETTINGS)) == ["source", "path", "ground"]
    for changed, line in (
        ({"source": {"name": "coco"}}, r'source {"limits": \[1, 2\]}, got {"limits": null}'),
        ({"path": "/c"}, 'path "/a", got "/c"'),
    ):
        with pytest.raises(job.JobError, match=line):
            output.agree(changed)


def test_faults_are_counted_and_limited(capsys):
    counts = dict(images=100, faulty=3, left=99, most=0.03)
    job.check_faults("failed.jsonl", {"no text": 1, "damaged": 2}, **counts)
    assert capsys.readouterr().err == "failed.jsonl: 2 damaged\nfailed.jsonl: 1 no text\n"
    for change, line in (
        ({"faulty": 4}, "4 of 100 images have a fault, more than --max-faults 0.03"),
        ({"left": 0}, "none of 100 images"),
    ):
        with pytest.raises(job.JobError, match=line):
            job.check_faults("failed.jsonl", {}, **(counts | change))
