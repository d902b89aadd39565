"""Extensions by name and as module:Name, and what an unknown one is told."""

import sys

import pytest

from grain_jax.core import errors, named

pytestmark = pytest.mark.quick

TABLE = {"coco": 1, "folder": 2}


@pytest.mark.parametrize(
    "name, found", [("coco", 1), ("grain_jax.core.named:find", named.find), ("tests.test_named:TABLE", TABLE)]
)
def test_what_is_found(name, found):
    assert named.find("data source", name, TABLE) == found


@pytest.mark.parametrize(
    "name, message",
    [
        ("imagenet", "'imagenet': expected one of: coco, folder; or module:Name of your own"),
        ("foldr", "'foldr': did you mean folder? expected one of: coco, folder; or module:Name"),
        ("no_such:Source", "'no_such' cannot be imported (No module named 'no_such'); expected"),
        (":Source", "'' cannot be imported (Empty module name); expected module:Name"),
        ("grain_jax.core.printable:x", "printable has no 'x', expected one of: plain"),
    ],
)
def test_what_is_not_found(name, message):
    with named.importing(), pytest.raises(errors.UserError) as error:
        named.find("data source", name, TABLE)
    assert str(error.value).startswith("data source ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_module_is_imported_where_the_user_allows_it(monkeypatch, tmp_path):
    (tmp_path / "of_a_stranger.py").write_text("class Source: pass")
    monkeypatch.syspath_prepend(tmp_path)
    name = "of_a_stranger:Source"
    with pytest.raises(errors.UserError, match="import of_a_stranger first, or set GRAIN_JAX_IMPORT"):
        named.find("data source", name, TABLE)
    assert "of_a_stranger" not in sys.modules
    monkeypatch.setenv(named.VARIABLE, "another, of_a_stranger")
    assert named.find("data source", name, TABLE).__name__ == "Source"
    monkeypatch.delenv(named.VARIABLE)
    assert named.find("data source", name, TABLE).__name__ == "Source"  # it is imported already
    monkeypatch.delitem(sys.modules, "of_a_stranger")
    with named.importing():
        assert named.find("data source", name, TABLE).__name__ == "Source"
    monkeypatch.delitem(sys.modules, "of_a_stranger")


@pytest.mark.parametrize("name", ["os:abort", "sys:exit", "numpy:save", "builtins:exit"])
def test_a_stored_config_finds_nothing_in_python_and_in_installed_packages(name):
    with pytest.raises(errors.UserError, match="a stored config imports no code"):
        named.find("data source", name, TABLE)


def test_what_lies_beside_the_package_is_no_part_of_it():
    """In a checkout its path has the whole folder, where a downloaded run may lie."""
    for module in ("evaluate.retrieval", "data.annotate.chat", "core.schema"):
        assert named.may_import(f"grain_jax.{module}:X")
    for module in (".downloads.run.evil", ".setup", ".tests.tiny", "es.evil"):
        assert not named.may_import(f"grain_jax{module}:X")
