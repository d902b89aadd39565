"""Commands that run a model start anew with huge pages, where the kernel leaves that to processes."""

import os
import sys

import pytest

from grain_jax.cli import huge_pages

MADVISE = "always [madvise] never\n"


@pytest.mark.parametrize(
    "command,mode,given,starts",
    [
        ("train", MADVISE, None, True),
        ("embed", MADVISE, None, True),
        ("inspect", MADVISE, None, False),
        ("train", "[always] madvise never\n", None, False),
        ("train", None, None, False),  # no such file
        (
            "train",
            MADVISE,
            "glibc.malloc.hugetlb=0",
            False,
        ),  # the choice of the user, or the second start
    ],
)
def test_when_a_process_starts_anew(tmp_path, monkeypatch, command, mode, given, starts):
    started = []
    monkeypatch.setattr(huge_pages, "_MODE", str(tmp_path / "enabled"))
    monkeypatch.setattr(os, "execv", lambda *call: started.append(call))
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-m", "grain_jax", command])
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # so that it is set back
    monkeypatch.delenv("GLIBC_TUNABLES")
    if mode is not None:
        (tmp_path / "enabled").write_text(mode)
    if given is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", given)
    huge_pages.ask(command)
    again = [(sys.executable, [sys.executable, "-m", "grain_jax", command])]
    assert started == (again if starts else [])
    assert os.environ.get("GLIBC_TUNABLES") == ("glibc.malloc.hugetlb=1" if starts else given)
