"""Sets are exchanged whole: what is in place is the old set or the new one, or a rerun puts it back."""

import pytest

from grain_jax.data import staging

pytestmark = pytest.mark.quick


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "out" / "x" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "set").write_text("old")
    return staging.epath.Path(folder)


def write_new(folder):
    (folder / "x" / "1.0.0").mkdir(parents=True)
    (folder / "x" / "1.0.0" / "set").write_text("new")


def test_the_old_set_stays_until_the_new_one_is_complete(target):
    others = target.parent / "incomplete.ABC123_2.0.0"  # of another version's build
    others.mkdir()
    (target.parent / "incomplete.new_1.0.0").mkdir()  # of a killed build of this one
    with staging.locked(target), staging.replacing(target) as folder:
        write_new(folder)
        assert (target / "set").read_text() == "old"
    assert (target / "set").read_text() == "new"
    assert sorted(p.name for p in target.parent.iterdir()) == ["1.0.0", others.name]


def test_a_kill_between_the_renames_is_repaired(target):
    with staging.replacing(target) as folder:
        write_new(folder)
    left = target.parent / "incomplete.old_1.0.0"
    target.rename(left)  # as after the first rename
    staging.recover(target)
    assert (target / "set").read_text() == "new" and not left.exists()
    # A kill after both renames leaves the old set beside the new one: it goes with the next build.
    left.mkdir()
    with staging.replacing(target) as folder:
        write_new(folder)
    assert [p.name for p in target.parent.iterdir()] == ["1.0.0"]
