"""Huge pages for commands that run a model on a CPU, where Linux gives them to those who ask (`madvise`)."""

import os
import sys

COMMANDS = ("train", "evaluate", "embed", "annotate")
_TUNABLES = "GLIBC_TUNABLES"
_MODE = "/sys/kernel/mm/transparent_hugepage/enabled"


def ask(command: str) -> None:
    """Starts this process anew with `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`, which glibc reads at the start alone.

    The process keeps its number, arguments and open files. It goes on as it is where the command is none of COMMANDS, where
    the variable is set already, and where the kernel gives huge pages to all processes or to none.
    """
    if command not in COMMANDS or _TUNABLES in os.environ:
        return
    from etils import epath  # not for the help of other commands

    try:
        asked = "[madvise]" in epath.Path(_MODE).read_text()
    except OSError:  # another system, or a container that hides it
        return
    if asked and sys.executable:
        os.environ[_TUNABLES] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
