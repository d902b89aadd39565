"""The text of `--help`: a usage line, what the command does, its flags with defaults, and an example."""

import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

WIDEST = 110  # columns
_FLAGS = 30  # columns before the explanations
_WHOLE_WORDS: Any = dict(break_on_hyphens=False, break_long_words=False)


class Flag(NamedTuple):
    """A flag or a positional argument of a command, as help and documentation list it."""

    # "--batch-size", "--[no-]overwrite" for a switch, "WORKDIR" for a positional argument
    name: str
    metavar: str  # what its value is called, "" of a switch
    help: str  # with the unit, without the default
    default: Any = None  # None: there is none
    required: bool = False
    choices: tuple[str, ...] = ()
    field: Any = None  # that declares it; None of those for help and of keys of a config
    many: bool = False  # takes words up to the next flag


def render(
    prog: str,
    about: str,
    more: str,
    kinds: Mapping[str, str],
    groups: Mapping[str, Sequence[Flag]],
    example: str,
) -> str:
    """Everything about a command; arguments as the attributes of parser.Parser, `kinds` name -> a line."""
    width = min(shutil.get_terminal_size().columns, WIDEST) - 2
    needed = [_invocation(f) for flags in groups.values() for f in flags if f.required]
    parts = [*(["KIND"] if kinds else []), *needed, "[--flags]"]
    parts = ["usage:", prog, *sorted(parts, key=lambda word: word.startswith("-- "))]
    whole = " ".join(word.replace(" ", "\0") for word in parts)  # no break within one
    usage = textwrap.fill(whole, width, subsequent_indent=" " * 7, **_WHOLE_WORDS)
    lines = [usage.replace("\0", " ")]
    paragraphs = [f"{about}."]
    if kinds:
        longest = max(map(len, kinds)) + 2
        listed = [f"  {name:{longest}}{line}" for name, line in kinds.items()]
        paragraphs += ["\n".join(listed), f"{prog} KIND --help lists the flags of a kind."]
    for part in [*paragraphs, *filter(None, more.split("\n\n"))]:
        indented = part.startswith("  ")
        lines += ["", part if indented else textwrap.fill(" ".join(part.split()), width)]
    for title, flags in groups.items():
        lines += ["", f"{title}:"] if title else [""]
        for flag in flags:
            lines += _entry(flag, width)
    lines += ["", "Example:", textwrap.indent(example, "  "), ""]
    return "\n".join(lines)


def _entry(flag: Flag, width: int) -> Iterator[str]:
    """The flag and its explanation, beside it or below."""
    left = f"  {_invocation(flag)}"
    right = textwrap.wrap(flag.help + _note(flag), max(width - _FLAGS, 20), **_WHOLE_WORDS)
    if len(left) <= _FLAGS - 2:
        left = f"{left:{_FLAGS}}{right.pop(0)}"
    yield left
    for line in right:
        yield " " * _FLAGS + line


def _invocation(flag: Flag) -> str:
    return f"{flag.name} {flag.metavar}".strip()


def _note(flag: Flag) -> str:
    """The default, if the explanation does not have it."""
    default: Any = flag.default
    if flag.required and flag.name.startswith("--"):
        return " (required)"
    if "default" in flag.help or default is None or default is False:
        return ""
    shown = f"{default:g}" if isinstance(default, float) else default
    return f" (default: {'on' if default is True else shown})"
