"""The layout of `--help`: a short usage line, groups, defaults, and an example at the end."""

import argparse
import shutil
import textwrap
from typing import Any

_WIDEST = 110  # columns
_FLAGS = 30  # columns before the explanations


def metavar_of(action: argparse.Action) -> str:
    """What the value of an argument is called."""
    if action.metavar:
        return str(action.metavar)
    return "|".join(map(str, action.choices)) if action.choices else action.dest.upper()


def is_needed(action: argparse.Action) -> bool:
    """Whether a command needs the argument, be it that the parser can do without."""
    return action.required or getattr(action, "needed", False)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of descriptions, names required flags in the usage, and adds defaults."""

    def __init__(self, prog: str, **options: Any):
        width = min(shutil.get_terminal_size().columns, _WIDEST) - 2
        super().__init__(prog, max_help_position=_FLAGS, width=width, **options)

    def _format_usage(self, usage, actions, groups, prefix) -> str:
        if usage is None:
            words = [f"{self._prog}"]
            for action in actions:
                if not action.option_strings and action.help != argparse.SUPPRESS:
                    words.append(self._format_args(action, metavar_of(action)))
                elif is_needed(action):
                    words.append(f"{action.option_strings[0]} {metavar_of(action)}")
            words.append("[--flags]")
            lines, line = [], "usage:"
            for word in words:
                if len(line) + 1 + len(word) > self._width and line.strip():
                    lines.append(line)
                    line = "      "
                line += f" {word}"
            return "\n".join([*lines, line]) + "\n\n"
        return super()._format_usage(usage, actions, groups, prefix)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Fills paragraphs; those with indented lines keep their lines."""
        paragraphs = text.split("\n\n")
        return "\n\n".join(
            part if "\n  " in f"\n{part}" else textwrap.fill(" ".join(part.split()), width)
            for part in paragraphs
        )

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(
            " ".join(text.split()), width, break_on_hyphens=False, break_long_words=False
        )

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flags = action.option_strings
        if len(flags) == 2 and flags[1] == f"--no-{flags[0].removeprefix('--')}":
            return f"--[no-]{flags[0].removeprefix('--')}"
        if not flags:
            return metavar_of(action)
        shown = ", ".join(flags)
        return shown if action.nargs == 0 else f"{shown} {self._values(action)}"

    def _values(self, action: argparse.Action) -> str:
        return self._format_args(action, metavar_of(action))

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if is_needed(action) and action.option_strings:
            return f"{text} (required)"
        if "default" in text or default in (None, False, "", [], (), argparse.SUPPRESS):
            return text
        if default is True:
            return f"{text} (default: on)"
        shown = f"{default:g}" if isinstance(default, float) else default
        return f"{text} (default: {shown})"
