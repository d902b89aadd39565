"""Extensions by name and as module:Name, and what an unknown one is told."""

import pytest

from grain_jax import errors, named

TABLE = {"coco": 1, "folder": 2}


@pytest.mark.parametrize(
    "name, found",
    [("coco", 1), ("grain_jax.named:find", named.find), ("tests.test_named:TABLE", TABLE)],
)
def test_what_is_found(name, found):
    assert named.find("data source", name, TABLE) == found


@pytest.mark.parametrize(
    "name, message",
    [
        ("imagenet", "'imagenet': expected one of: coco, folder; or module:Name of your own"),
        ("foldr", "'foldr': did you mean folder? expected one of: coco, folder; or module:Name"),
        (
            "no_such:Source",
            "'no_such' cannot be imported (No module named 'no_such'); expected module",
        ),
        (":Source", "'' cannot be imported (Empty module name); expected module:Name"),
        ("grain_jax.named:Find", "grain_jax.named has no 'Find', expected one of: find"),
        ("grain_jax.printable:x", "grain_jax.printable has no 'x', expected one of: plain"),
    ],
)
def test_what_is_not_found(name, message):
    with pytest.raises(errors.UserError) as error:
        named.find("data source", name, TABLE)
    assert str(error.value).startswith("data source ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
