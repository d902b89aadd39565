"""The text of `--help`: a short usage line, what the command does, its flags with defaults, and an example."""

import shutil
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grain_jax.cli.parser import Flag, Parser

WIDEST = 110  # columns
_FLAGS = 30  # columns before the explanations


def of(parser: "Parser") -> str:
    """Everything about the command."""
    width = min(shutil.get_terminal_size().columns, WIDEST) - 2
    needed = [_invocation(f) for flags in parser.groups.values() for f in flags if f.required]
    words = [*(["KIND"] if parser.kinds else []), *needed, "[--flags]"]
    words = [parser.prog, *sorted(words, key=lambda word: word.startswith("-- "))]
    lines = _wrapped(words, "usage: ", "       ", width)
    paragraphs = [parser.about[0].upper() + parser.about[1:] + "."]
    if parser.kinds:
        longest = max(map(len, parser.kinds)) + 2
        kinds = [f"  {name:{longest}}{kind.about}" for name, kind in parser.kinds.items()]
        paragraphs += ["\n".join(kinds), f"{parser.prog} KIND --help lists the flags of a kind."]
    for part in [*paragraphs, *filter(None, parser.more.split("\n\n"))]:
        indented = part.startswith("  ")
        lines += ["", part if indented else textwrap.fill(" ".join(part.split()), width)]
    for title, flags in parser.groups.items():
        lines += ["", f"{title}:"] if title else [""]
        for flag in flags:
            lines += _entry(flag, width)
    lines += ["", "Example:", textwrap.indent(parser.example, "  "), ""]
    return "\n".join(lines)


def _entry(flag: "Flag", width: int) -> Iterator[str]:
    """The flag and its explanation, beside it or below."""
    left = f"  {_invocation(flag)}"
    right = textwrap.wrap(
        flag.help + _note(flag),
        width - _FLAGS,
        break_on_hyphens=False,
        break_long_words=False,
    )
    if len(left) <= _FLAGS - 2:
        left = f"{left:{_FLAGS}}{right.pop(0)}"
    yield left
    for line in right:
        yield " " * _FLAGS + line


def _invocation(flag: "Flag") -> str:
    return f"{flag.name} {flag.metavar}".strip()


def _note(flag: "Flag") -> str:
    """The default, where the explanation does not have it."""
    default: Any = flag.default
    if flag.required and flag.name.startswith("--"):
        return " (required)"
    if "default" in flag.help or default is None or default is False or default in ("", ()):
        return ""
    shown = f"{default:g}" if isinstance(default, float) else default
    return f" (default: {'on' if default is True else shown})"


def _wrapped(words: list[str], first: str, then: str, width: int) -> list[str]:
    """Lines of whole words, each of which may have spaces."""
    lines, line = [], first + words[0]
    for word in words[1:]:
        if len(line) + 1 + len(word) > width:
            lines.append(line)
            line = then + word
        else:
            line += f" {word}"
    return [*lines, line]
