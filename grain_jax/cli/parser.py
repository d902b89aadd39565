"""The argument parser of every command: one spelling of flags, suggestions, short usage, defaults and an example."""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from grain_jax import errors
from grain_jax.cli import nearest
from grain_jax.cli.about import ABOUT
from grain_jax.cli.help_format import HelpFormatter, is_needed, metavar_of

_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class Flag(NamedTuple):
    """A flag or a positional argument of a command, as the documentation lists it."""

    name: (
        str  # "--batch-size", "--[no-]overwrite" for a switch, "WORKDIR" for a positional argument
    )
    metavar: str  # what its value is called, "" of a switch
    default: Any  # None: there is none
    help: str  # with the unit, without the default
    required: bool
    choices: tuple[str, ...]


class Switch(argparse.Action):
    """`--x` sets it, `--no-x` unsets it. The parser also takes `--nox` and `--x=true|false`."""

    def __init__(self, option_strings: Sequence[str], dest: str, default: bool = False, **options):
        (flag,) = option_strings
        both = [flag, f"--no-{flag.removeprefix('--')}"]
        super().__init__(both, dest, nargs=0, default=default, **options)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, option_string == self.option_strings[0])


class Parser(argparse.ArgumentParser):
    """Parses a command's arguments; `grain_jax.cli.commands.parsers` has that of each command.

    Flags are spelled with hyphens; underscores are accepted, and one hyphen before a word. `--flag VALUE` and
    `--flag=VALUE` are the same. Nothing is abbreviated.

    Attributes:
      about: one line about the command.
      example: lines of a command to copy.
      kinds: of a command that has kinds (`evaluate zeroshot`), the parser of each.
      needs: flags that the command cannot do without, though a parser may take the rest alone.

    Raises:
      UserError: wrong usage, in one line, with the nearest flag or value where one is near; commands exit with its
        status, 2.
    """

    def __init__(self, prog: str, about: str = "", *, more: str = "", example: str = ""):
        """Makes a parser without flags.

        Args:
          prog: "grain-jax build".
          about: one line; about.py has those of the commands.
          more: paragraphs below it.
          example: lines of a command to copy.
        """
        about = about or ABOUT[prog.rpartition(" ")[2]]
        super().__init__(
            prog,
            description=f"{about[0].upper()}{about[1:]}.\n\n{more.strip()}".strip(),
            epilog="Example:\n" + "\n".join(f"  {line}" for line in example.splitlines()),
            allow_abbrev=False,
            add_help=False,
            formatter_class=HelpFormatter,
        )
        self.about, self.example = about, example
        self.kinds: dict[str, Parser] = {}
        self.needs: tuple[str, ...] = ()
        self._older: dict[str, str] = {}
        self._passes_on = False
        self._complete = False

    # Declaring flags.

    def switch(self, flag: str, *, help: str, default: bool = False, to: Any = None) -> None:
        """Declares `flag` and `--no-flag`, in the group `to` or without one."""
        (to or self).add_argument(flag, action=Switch, help=help, default=default)

    def older(self, **names: str) -> None:
        """Accepts further names of flags, that no help shows: `older(records="--name")`; "" is a positional argument."""
        self._older |= {f"--{name.replace('_', '-')}": flag for name, flag in names.items()}

    def pass_on_unknown(self) -> None:
        """Leaves flags that are not near a declared one to `parse_known_args`."""
        self._passes_on = True

    # What is declared.

    def arguments(self) -> list[tuple[str, list[Flag]]]:
        """(title, arguments) of each group, in the order of the help; hidden and empty ones are left out."""
        self._add_help()
        found = []
        for group in self._action_groups:
            shown = [a for a in group._group_actions if a.help != argparse.SUPPRESS]
            if shown:
                found.append((group.title or "", [_flag_of(action) for action in shown]))
        return found

    def flags(self) -> list[str]:
        """Every spelling that the help shows, such as "--overwrite" and "--no-overwrite"."""
        self._add_help()
        return [
            flag
            for action in self._actions
            if action.help != argparse.SUPPRESS
            for flag in action.option_strings
        ]

    def _add_help(self) -> None:
        if not self._complete:
            self._complete = True
            for flag in self.needs:
                self._option_string_actions[flag].needed = True  # type: ignore[attr-defined] for the help
            group = self.add_argument_group("help")
            group.add_argument("-h", "--help", action="help", help="show this text")
            self.add_flags_of_help(group)

    def add_flags_of_help(self, group: Any) -> None:
        """Declares what stands beside --help."""

    # Parsing.

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The arguments. Raises UserError where one is left over."""
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(f"{rest[0]}: expected a flag; {self.prog} --help lists them")
        return found

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse; spelling is put right first."""
        self._add_help()
        words = list(sys.argv[1:] if args is None else map(str, args))
        return super().parse_known_args(self.spelled(words), namespace)

    def spelled(self, words: Sequence[str]) -> list[str]:
        """The words with every flag as it is declared, and `--flag=VALUE` in one word. Raises UserError."""
        out, rest = [], list(words)
        takes_all = any(action.nargs == argparse.REMAINDER for action in self._actions)
        while rest:
            word = rest.pop(0)
            if word == "--" or (takes_all and not word.startswith("-")):
                return [*out, word, *rest]
            if not re.match(r"--?[A-Za-z]", word) or word == "-h":
                out.append(word)
                continue
            out += self.spelled_flag(word, rest)
        return out

    def spelled_flag(self, word: str, rest: list[str]) -> list[str]:
        """The word or words of a flag, with its value, which is taken from `rest`. Raises UserError."""
        given, equals, value = word.partition("=")
        flag = self._declared(given)
        if flag == "":  # a positional argument that has a name
            return [value] if equals else []
        action = self._option_string_actions.get(flag)
        if action is None:
            near = self._near(flag)
            if self._passes_on and (near is None or nearest.likeness(flag, near) < 0.8):
                return [word]
            self.error(
                f"{given}: no such flag"
                + (f"; did you mean {near}?" if near else f"; {self.prog} --help lists them")
            )
        if isinstance(action, Switch):
            return [_switched(self, flag, action, value) if equals else flag]
        if equals or action.nargs is not None:
            return [flag + equals + value] if equals else [flag]
        following = rest[0] if rest else None
        if following is None or following == "--" or self._is_flag(following):
            expected = f"{flag} {metavar_of(action)}"
            self.error(
                f"{flag}: has no value"
                + (f", but the flag --{following.lstrip('-')} after it" if following else "")
                + f"; expected {expected}, or {flag}=VALUE where that begins with --"
            )
        return [f"{flag}={rest.pop(0)}"]

    def _declared(self, given: str) -> str:
        """The flag as it is declared; one that is not, with hyphens."""
        flag = "--" + given.lstrip("-").replace("_", "-")
        flag = self._older.get(flag, flag)
        without = "--no-" + flag.removeprefix("--no")
        if flag not in self._option_string_actions and without in self._option_string_actions:
            return without
        return flag

    def _is_flag(self, word: str) -> bool:
        if word.startswith("--"):
            return True
        known = self._option_string_actions
        return (
            word.startswith("-") and len(word) > 2 and self._declared(word.split("=")[0]) in known
        )

    def _near(self, flag: str) -> str | None:
        return nearest.of(flag, [flag for flag in self.flags() if flag != "-h"])

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Called by argparse for arguments with choices."""
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, nearest.choice(str(value), action.choices))

    def error(self, message: str) -> NoReturn:
        """Called by argparse where the arguments are wrong."""
        message = re.sub(r"^argument (-h/)?(\S+?)(/--no-\S+)?: ", r"\2: ", message)
        missing = re.fullmatch(r"the following arguments are required: (.*)", message)
        if missing:
            needed = [self._named(name) for name in missing[1].split(", ")]
            message = f"{', '.join(needed)}: missing; {self.prog} --help says what it is"
        raise errors.UserError(f"{self.prog}: {message}")

    def _named(self, flag: str) -> str:
        action = self._option_string_actions.get(flag)
        return f"{flag} {metavar_of(action)}" if action else flag

    def format_usage(self) -> str:
        """The arguments that are required, and [flags] for the others."""
        self._add_help()
        return super().format_usage()

    def format_help(self) -> str:
        """Everything about the command."""
        self._add_help()
        return super().format_help()


class KindsParser(Parser):
    """The parser of a command that has kinds; each kind has a parser of its own."""

    def __init__(self, prog: str, kinds: Sequence[Parser], **texts: str):
        """Takes the parsers of the kinds, whose `prog` ends with the kind's name."""
        super().__init__(prog, **texts)
        self.kinds = {kind.prog.rpartition(" ")[2]: kind for kind in kinds}
        self.add_argument(
            "command",
            metavar="KIND",
            choices=list(self.kinds),
            help=f"one of those above; {prog} KIND --help lists its flags",
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The arguments of the kind, and its name as `command`. Raises UserError."""
        self._add_help()
        words = list(sys.argv[1:] if args is None else map(str, args))
        place = next((i for i, word in enumerate(words) if word in self.kinds), None)
        if words and not words[0].startswith("-"):
            place = 0
        if place is None:
            if {"-h", "--help"} & set(words):
                return super().parse_known_args(["--help"], namespace)
            self.error(f"expected a kind first: {', '.join(self.kinds)}")
        name = words.pop(place)
        if name not in self.kinds:
            self.error(f"{name}: no such kind; {nearest.did_you_mean(name, self.kinds)}")
        found, rest = self.kinds[name].parse_known_args(words, namespace)
        if rest:
            self.kinds[name].error(f"{rest[0]}: expected a flag")
        found.command = name
        return found, rest

    def format_help(self) -> str:
        """Every kind with its line, then the rest."""
        width = max(map(len, self.kinds)) + 2
        lines = "\n".join(f"  {name:{width}}{kind.about}" for name, kind in self.kinds.items())
        self.description = f"{self.about[0].upper()}{self.about[1:]}.\n\n{lines}"
        return super().format_help()


def _flag_of(action: argparse.Action) -> Flag:
    flags = action.option_strings
    is_switch = isinstance(action, Switch)
    if is_switch:
        name = f"--[no-]{flags[0].removeprefix('--')}"
    else:
        name = flags[-1] if flags else metavar_of(action)
    default = None if action.default in ([], (), "", argparse.SUPPRESS) else action.default
    return Flag(
        name,
        "" if is_switch or action.nargs == 0 or not flags else metavar_of(action),
        default,
        action.help or "",
        is_needed(action),
        tuple(map(str, action.choices or ())),
    )


def _switched(parser: Parser, flag: str, action: Switch, value: str) -> str:
    """`--x=false` and its kin as `--x` or `--no-x`."""
    truth = _TRUTH.get(value.lower())
    if truth is None:
        parser.error(f"{flag}: got {value!r}, expected true or false, or {flag} alone")
    yes, no = action.option_strings
    return yes if truth == (flag == yes) else no
