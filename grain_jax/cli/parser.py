"""The commands' declarations and their parser: one spelling of flags, suggestions, faults in one line.

    class Count(Command, name="count"):
        '''Counts images.

        Links are not followed.

        Example:
          grain-jax count images --least 3

        what is counted:
          FOLDER         of images
          --least N      images of a class
          --[no-]again   count what is counted already, too
        '''

        folder: str
        least: int = 1
        again: bool = False

`Count.parse(["images"])` is `Count(folder="images", least=1, again=False)`. The docstring is the help: each field has
a line there, which names its value. `flags.flag` is for fields with bounds or choices.
"""

import argparse
import dataclasses
import functools
import inspect
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NoReturn, Self

from grain_jax.cli import help_text, nearest
from grain_jax.cli.flags import flag, many, number
from grain_jax.cli.help_text import Flag
from grain_jax.core import errors

_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_ENTRY = re.compile(r"^  (\S.*?)  +(.*(?:\n {4,}.*)*)", re.MULTILINE)


@typing.dataclass_transform(kw_only_default=True, field_specifiers=(flag, many))
class Command(argparse.Namespace):
    """Base of the declaration of a command, which is also what its arguments become: a dataclass.

    A field that is itself a dataclass is filled by the flags that its fields declare. `__post_init__` may raise
    ValueError for arguments that do not fit each other.
    """

    prog: ClassVar[str] = ""
    command: ClassVar[str] = ""  # the last word of `prog`
    last: ClassVar[bool] = False  # a base whose flags stand behind those of what derives from it
    # Of `grain-jax evaluate KIND`: the declaration of a kind, or a function that makes it when it is asked for.
    kinds: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls, name: str = "", kinds: Mapping[str, Any] | None = None):
        cls.prog = f"grain-jax {name}"
        cls.kinds = kinds or {}
        cls.command = name.rpartition(" ")[2]
        dataclasses.dataclass(kw_only=True)(cls)

    @classmethod
    def about(cls) -> str:
        """What the command does, in one line."""
        return inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].rstrip(".")

    @classmethod
    def parse(cls, words: Sequence[str] | None = None) -> Self:
        """The arguments (by default those of the process). Raises UserError: a line, status 2."""
        return Parser(cls).parse_args(words)


class Configured(Command):
    """Base of the commands that take a config.

    the config:
      --config FILE|NAME[:ARG]  a Python file with get_config, or a config of the package, such as demo; ARG goes to
        get_config
      --config.KEY VALUE        changes a key; --help-config lists the keys
    """

    config: str
    overrides: list[str] = many(name="config.key")


class Processes(Command):
    """Base of the commands that compile for long, and may run as several processes.

    start:
      --[no-]compilation-cache  keep compiled programs in the user's cache folder, for the next start

    several processes (TPU slices, SLURM and grain-jax local set these):
      --coordinator HOST:PORT   address of the first of several processes
      --processes P             how many processes there are
      --process-id N            which of them this is, from 0
      --heartbeat-seconds S     seconds of silence after which a process counts as dead and the run ends
    """

    last = True
    compilation_cache: bool = True
    coordinator: str | None = None
    processes: int = 1
    process_id: int = flag(0, low=0)
    heartbeat_seconds: int = 100  # JAX's default


_HELP = Flag("-h, --help", "", "show this text")
_HELP_CONFIG = Flag(
    "--help-config",
    "[PREFIX]",
    "list the keys of a config, all or those below PREFIX, with defaults, or with the values of --config",
)


class Parser(argparse.ArgumentParser):
    """The parser of a declared command.

    Flags are spelled with hyphens; underscores are accepted, and one hyphen before a word. `--flag VALUE` and
    `--flag=VALUE` are the same. Nothing is abbreviated. Wrong usage raises UserError, in one line, with the nearest
    flag or value where one is near.

    Attributes:
      about: one line about the command.
      more: paragraphs about it.
      example: lines of a command to copy.
      groups: title -> the flags and positional arguments, in the order of the help.
    """

    def __init__(self, declared: type[Command]):
        super().__init__(
            declared.prog, allow_abbrev=False, add_help=False, argument_default=argparse.SUPPRESS
        )
        text, sections = _sections(declared)
        self.about, self.more = declared.about(), text.partition("\n\n")[2]
        self.example = inspect.cleandoc("\n" + sections.pop("Example", ""))
        self._declared = declared
        self._also: dict[str, str] = {}
        self._needed: dict[str, str] = {}  # field -> the switch with which it need not be given
        self._overrides = self._unknown = ""  # the field for keys of a config, and for what is left
        self._lists_keys = False
        fields = {_name_of(field): field for field in _fields(declared)}
        self.groups: dict[str, list[Flag]] = {}
        for title, entries in sections.items():
            for entry in _ENTRY.finditer(entries):
                name = re.sub(r"^--(\[no-\])? ?", "", entry[1]).split()[0].lower()
                shown = self._add(fields.pop(name), *entry.groups())
                self.groups.setdefault(title, []).append(shown)
        if fields:  # the one that the docstring has no line of
            (self._unknown,) = (field.name for field in fields.values())
        self.add_argument("-h", "--help", action="help")
        self.groups["help"] = [_HELP]
        if self._lists_keys:
            self.add_argument("--help-config", nargs="?", const="", dest="help_config")
            self.groups["help"].append(_HELP_CONFIG)

    @functools.cached_property
    def kinds(self) -> dict[str, "Parser"]:
        """Of a command that has kinds (`evaluate zeroshot`), the parser of each."""
        return {name: self._kind(name) for name in self._declared.kinds}

    def _kind(self, name: str) -> "Parser":
        kind = self._declared.kinds[name]
        return Parser(kind if isinstance(kind, type) else kind())

    def _add(self, field: dataclasses.Field, entry: str, about: str) -> Flag:
        """Declares a field to argparse; returns what its line in the docstring says."""
        name, _, metavar = entry.partition(" ")
        about = " ".join(about.split())
        if name == "--config.KEY":
            self._overrides, self._lists_keys = field.name, "--help-config" in about
            return Flag(name, metavar, about)
        options = dict(field.metadata)
        if "also" in options:
            self._also[f"--{options['also']}"] = name
        kind, parse = _kind_of(field), _parse_of(field)
        literal = typing.get_origin(kind) is typing.Literal
        choices = options.get("choices") or (typing.get_args(kind) if literal else ())
        given: dict[str, Any] = {"choices": choices or None, "metavar": metavar}
        given |= {key: options[key] for key in ("nargs", "action") if key in options}
        if typing.get_origin(field.type) is list and not given.keys() & {"nargs", "action"}:
            given |= {"nargs": "+"} if "..." in entry else {"action": "append"}
        no_default = field.default is field.default_factory is dataclasses.MISSING
        needed = bool(no_default or "unless" in options)
        given |= {"type": parse} if parse else {}
        if needed:
            self._needed[field.name] = options.get("unless", "")
        if field.type is bool:
            flag = name.replace("[no-]", "")
            self.add_argument(flag, dest=field.name, action=argparse.BooleanOptionalAction)
        elif name.startswith("--") and name != "--":
            self.add_argument(name, dest=field.name, required=needed, **given)
        else:
            name, metavar, needed = entry, "", True
            given["metavar"] = entry
            self.add_argument(field.name, **given)
        default = None if field.default in (dataclasses.MISSING, "", ()) else field.default
        return Flag(name, metavar, about, default, needed, tuple(map(str, choices)))

    def flags(self) -> list[str]:
        """Every spelling that the help shows, such as "--overwrite" and "--no-overwrite"."""
        known = [*self._option_string_actions, *(["--config.KEY"] if self._overrides else [])]
        return [flag for flag in known if flag != "-h"]

    def format_help(self) -> str:
        """Everything about the command."""
        kinds = {name: kind.about for name, kind in self.kinds.items()}
        return help_text.of(self.prog, self.about, self.more, kinds, self.groups, self.example)

    # Parsing.

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The arguments, as the declared dataclass; of a command with kinds that of the kind. Raises UserError."""
        words = list(sys.argv[1:] if args is None else map(str, args))
        if self._declared.kinds:
            return self._parse_kind(words)
        words, overrides = self._spelled(words)
        lists_keys = self._lists_keys and any(
            word.split("=")[0] == "--help-config" for word in words
        )
        for action in self._actions:
            if action.option_strings and action.dest in self._needed:
                unless = self._needed[action.dest]
                action.required = not lists_keys and not (unless and unless in words)
        found, rest = super().parse_known_args(words)
        if lists_keys:
            from grain_jax.cli import config_keys  # reads source code: not for every command

            config = getattr(found, "config", None)
            print(config_keys.show(found.help_config, config, overrides), end="")
            self.exit(0)
        for action in self._actions:
            if action.required and action.option_strings and getattr(found, action.dest) == "":
                self.error(
                    f"{action.option_strings[0]}: got an empty text, expected {action.metavar}"
                )
        if rest and not self._unknown:
            self.error(f"{rest[0]}: expected a flag; {self.prog} --help lists them")
        try:
            given = vars(found) | {self._overrides: overrides, self._unknown: rest}
            return _filled(self._declared, given)
        except ValueError as error:
            self.error(str(error))

    def _parse_kind(self, words: list[str]) -> Any:
        kinds = self._declared.kinds
        place = next((i for i, word in enumerate(words) if word in kinds), None)
        if words and not words[0].startswith("-"):
            place = 0
        if place is None:
            if {"-h", "--help"} & set(words):
                return super().parse_args(["--help"])
            self.error(f"expected a kind first: {', '.join(kinds)}")
        name = words.pop(place)
        if name not in kinds:
            self.error(f"{name}: no such kind; {nearest.did_you_mean(name, kinds)}")
        return self._kind(name).parse_args(words)

    def _spelled(self, words: list[str]) -> tuple[list[str], list[str]]:
        """The words with every flag as it is declared, and `--flag=VALUE` in one word; and `--config.KEY=VALUE`."""
        out, overrides, rest = [], [], list(words)
        takes_all = any(action.nargs == argparse.REMAINDER for action in self._actions)
        while rest:
            word = rest.pop(0)
            if word == "--" or (takes_all and not word.startswith("-")):
                return [*out, word, *rest], overrides
            key = re.sub(r"^--noconfig(\..*)", r"--config\1=false", f"--{word.lstrip('-')}")
            if not re.match(r"--?[A-Za-z]", word) or word == "-h":
                out.append(word)
            elif self._overrides and key.startswith("--config."):
                if "=" not in key and rest and not rest[0].startswith("--"):
                    key += f"={rest.pop(0)}"
                overrides.append(key)
            else:
                out += self._spelled_flag(word, rest)
        return out, overrides

    def _spelled_flag(self, word: str, rest: list[str]) -> list[str]:
        """The word of a flag, with its value, which is taken from `rest`."""
        given, equals, value = word.partition("=")
        flag = self._declared_as(given)
        action = self._option_string_actions.get(flag)
        if action is None:
            near = self._near(flag)
            if self._unknown and (near is None or nearest.likeness(flag, near) < 0.8):
                return [word]
            hint = f"did you mean {near}?" if near else f"{self.prog} --help lists them"
            self.error(f"{given}: no such flag; {hint}")
        if isinstance(action, argparse.BooleanOptionalAction) and equals:
            truth = _TRUTH.get(value.lower())
            if truth is None:
                self.error(f"{flag}: got {value!r}, expected true or false, or {flag} alone")
            yes, no = action.option_strings
            return [yes if truth == (flag == yes) else no]
        if equals or action.nargs is not None:
            return [flag + equals + value]
        if not rest or rest[0] == "--" or self._is_flag(rest[0]):
            after = f", but the flag --{rest[0].lstrip('-')} after it" if rest else ""
            expected = f"{flag} {action.metavar}, or {flag}=VALUE where that begins with --"
            self.error(f"{flag}: has no value{after}; expected {expected}")
        return [f"{flag}={rest.pop(0)}"]

    def _declared_as(self, given: str) -> str:
        """The flag as it is declared; one that is not, with hyphens."""
        flag = "--" + given.lstrip("-").replace("_", "-")
        flag = self._also.get(flag, flag)
        without = "--no-" + flag.removeprefix("--no")
        known = self._option_string_actions
        return without if flag not in known and without in known else flag

    def _is_flag(self, word: str) -> bool:
        if word.startswith("--") or (self._overrides and word.startswith("-config.")):
            return True
        declared = self._declared_as(word.split("=")[0])
        return word.startswith("-") and len(word) > 2 and declared in self._option_string_actions

    def _near(self, flag: str) -> str | None:
        head, dot, key = flag.partition(".")
        if dot and self._overrides and nearest.of(head, ["--config"]):
            return f"--config.{key}"
        return nearest.of(flag, self.flags())

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Called by argparse for arguments with choices."""
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, nearest.choice(str(value), action.choices))

    def error(self, message: str) -> NoReturn:
        """Called by argparse where the arguments are wrong."""
        message = re.sub(r"^argument (-h/)?(\S+?)(/--no-\S+)?: ", r"\2: ", message)
        missing = re.fullmatch(r"the following arguments are required: (.*)", message)
        if missing:
            names = missing[1].split(", ")
            shown = [f for flags in self.groups.values() for f in flags if f.name in names]
            what = shown[0].help if len(shown) == 1 else f"{self.prog} --help says what they are"
            message = (
                f"{', '.join(f'{f.name} {f.metavar}'.strip() for f in shown)}: missing; {what}"
            )
        raise errors.UserError(f"{self.prog}: {message}")


def _sections(declared: type) -> tuple[str, dict[str, str]]:
    """The text of a docstring, and title -> lines of its sections, those of bases and groups of fields included."""
    text, found = "", {}
    bases = [base for base in declared.__mro__ if dataclasses.is_dataclass(base)]
    for base in sorted(reversed(bases), key=lambda base: bool(vars(base).get("last"))):
        parts = inspect.cleandoc(base.__doc__ or "").split("\n\n")
        paragraphs = [part for part in parts if not re.match(r"\S.*:\n  ", part)]
        if base is declared:
            text = "\n\n".join(paragraphs)
        for part in parts:
            if part not in paragraphs:
                title, _, lines = part.partition(":\n")
                found[title] = "\n".join(filter(None, [found.get(title), lines]))
        for field in dataclasses.fields(base) if base is declared else ():
            if _is_group(field):
                found |= _sections(_kind_of(field))[1]
    return text, found


def _fields(declared: type) -> Iterator[dataclasses.Field]:
    """The fields that declare flags, those of groups included."""
    for field in dataclasses.fields(declared):
        yield from _fields(_kind_of(field)) if _is_group(field) else [field]


def _is_group(field: dataclasses.Field) -> bool:
    return dataclasses.is_dataclass(_kind_of(field)) and "parse" not in field.metadata


def _name_of(field: dataclasses.Field) -> str:
    return field.metadata.get("name", field.name).replace("_", "-")


def _kind_of(field: dataclasses.Field) -> Any:
    """The type of a value of the field: of optional ones and of lists that of what is in them."""
    kind: Any = field.type
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(arg for arg in typing.get_args(kind) if arg is not type(None))
    return typing.get_args(kind)[0] if typing.get_origin(kind) is list else kind


def _parse_of(field: dataclasses.Field) -> Callable[[str], Any] | None:
    """The function that makes a value of a text; None: the text is the value."""
    kind, options = _kind_of(field), field.metadata
    if "parse" in options:
        return functools.partial(_parsed, options["parse"])
    if kind not in (int, float):
        return None
    return functools.partial(
        _parsed,
        number(kind, options.get("low", 1 if kind is int else -math.inf), options.get("high")),
    )


def _parsed(parse: Callable[[str], Any], text: str) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _filled(declared: type, values: Mapping[str, Any]) -> Any:
    """The dataclass with those of the values that its flags gave."""
    given = {}
    for field in dataclasses.fields(declared):
        if _is_group(field):
            given[field.name] = _filled(_kind_of(field), values)
        elif field.name in values:
            given[field.name] = values[field.name]
    return declared(**given)
