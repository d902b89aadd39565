"""The quick selection (`-m quick`): its entries are there, and it has a test of every package."""

import re

from tests.conftest import LONG, QUICK, TOGETHER
from tests.paths import ROOT


def test_entries_are_there():
    for entry in QUICK:
        path, _, name = entry.partition("::")
        assert re.search(rf"^def {name or 'test_'}", (ROOT / path).read_text(), re.M), entry


def test_long_files_are_there():
    assert not [name for name in LONG + TOGETHER if not (ROOT / name).exists()]


def test_every_package_has_an_entry():
    # tests/losses/..., or tests/config/test_config.py
    tested = {re.sub(r"^test_|s?\.py.*", "", entry.split("/")[1]) for entry in QUICK}
    packages = {path.parent.name for path in (ROOT / "grain_jax").glob("*/__init__.py")}
    assert packages | {"data", "launch"} <= tested
