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

`Count.parse(["images"])` is `Count(folder="images", least=1, again=False)`. The docstring is the help: each
field has a line there, which names its value. `flags.flag` is for fields with bounds or choices.
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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NoReturn, Self

from grain_jax.cli import help_text
from grain_jax.cli.flags import flag, many, number
from grain_jax.cli.help_text import Flag
from grain_jax.core import errors, nearest

_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_ENTRY = re.compile(r"^  (\S.*?)  +(.*(?:\n {4,}.*)*)", re.MULTILINE)


@typing.dataclass_transform(kw_only_default=True, field_specifiers=(flag, many))
class Command(argparse.Namespace):
    """Base of the declaration of a command, which is also what its arguments become: a dataclass.

    A field that is itself a dataclass is filled by the flags that its fields declare. `__post_init__` may
    raise ValueError for arguments that do not fit each other.
    """

    prog: ClassVar[str] = ""
    command: ClassVar[str] = ""  # the last word of `prog`
    last: ClassVar[bool] = False  # whether the flags of this base come after its subclass's flags
    # Kind of `grain-jax evaluate KIND` -> its declaration, or a function that makes it on demand.
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
    def parse(cls, arguments: Sequence[str] | None = None) -> Self:
        """Parses the arguments, by default the process's. Raises UserError: a line, status 2."""
        return Parser(cls).parse_args(arguments)


class Configured(Command):
    """Base of the commands that take a config.

    the config:
      --config FILE|NAME[:ARG]  Python file with get_config, or a config of the package, such as demo;
        get_config receives ARG
      --config.KEY VALUE        change a key; --help-config lists the keys
    """

    config: str
    overrides: list[str] = many(name="config.key")


class Processes(Command):
    """Base of the commands that may run as several processes.

    several processes (TPU slices, SLURM and grain-jax local set these):
      --coordinator HOST:PORT   address of the first process
      --processes P             number of processes
      --process-id N            number of this process, from 0
      --heartbeat-seconds S     seconds without an answer after which a process counts as dead and the run
        ends
    """

    last = True
    coordinator: str | None = None
    processes: int = 1
    process_id: int = flag(0, low=0)
    heartbeat_seconds: int = 100  # JAX's default


class Parser:
    """The parser of a declared command.

    Flags are spelled with hyphens; underscores are accepted. `--flag VALUE` and `--flag=VALUE` are the same.
    Nothing is abbreviated. Wrong usage raises UserError: one line, with the nearest flag or value if any.
    """

    def __init__(self, declared: type[Command]):
        text, sections = _sections(declared)
        self.prog, self.about = declared.prog, declared.about()
        self.more = text.partition("\n\n")[2]  # paragraphs
        self.example = inspect.cleandoc("\n" + sections.pop("Example", ""))  # lines of a command to copy
        self._declared = declared
        # By each spelling that the help shows; None for those that ask for help.
        self._flags: dict[str, Flag | None] = {"--help": None}
        self._also: dict[str, str] = {}
        # The fields for keys of a config, for flags of none of the others, and for the command behind "--".
        self._overrides = self._unknown = self._command = ""
        fields = {x.metadata.get("name", x.name).replace("_", "-"): x for x in _fields(declared)}
        # Title -> the flags and positional arguments, in the order of the help.
        self.groups: dict[str, list[Flag]] = {}
        for title, entries in sections.items():
            for entry in _ENTRY.finditer(entries):
                name = re.sub(r"^--(\[no-\])? ?", "", entry[1]).split()[0].lower()
                shown = self._add(fields.pop(name), *entry.groups())
                self.groups.setdefault(title, []).append(shown)
        if fields:  # the one that the docstring has no line of
            (self._unknown,) = (field.name for field in fields.values())
        self.groups["help"] = [Flag("-h, --help", "", "show this text")]
        if "--help-config" in self._flags:
            about = "list the keys, all or those below PREFIX, with defaults, or with the values of --config"
            self.groups["help"].append(Flag("--help-config", "[PREFIX]", about))

    @functools.cached_property
    def kinds(self) -> dict[str, "Parser"]:
        """The parser of each kind of a command (`evaluate zeroshot`)."""
        return {
            name: Parser(kind if isinstance(kind, type) else kind())
            for name, kind in self._declared.kinds.items()
        }

    def _add(self, field: dataclasses.Field, entry: str, about: str) -> Flag:
        """Takes in a field with its line of the docstring."""
        name, _, metavar = entry.partition(" ")
        about = " ".join(about.split())
        if name == "--config.KEY":
            self._overrides = field.name
            self._flags |= {"--help-config": None} if "--help-config" in about else {}
            return Flag(name, metavar, about)
        options, kind = field.metadata, _kind_of(field)
        if "also" in options:
            self._also[f"--{options['also']}"] = name
        literal = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
        choices = tuple(map(str, options.get("choices") or literal))
        no_default = field.default is field.default_factory is dataclasses.MISSING
        is_flag = name.startswith("--") and name != "--"
        if not is_flag:
            name, metavar = entry, ""
        default = None if field.default in (dataclasses.MISSING, "", ()) else field.default
        needed = no_default or "unless" in options or not (is_flag or entry.startswith("["))
        shown = Flag(name, metavar, about, default, needed, choices, field, "..." in entry)
        if entry.startswith("-- "):
            self._command = field.name
        elif is_flag:
            spellings = ("", "no-") if field.type is bool else ("",)
            self._flags |= {name.replace("[no-]", no): shown for no in spellings}
        return shown

    def flags(self) -> list[str]:
        """Every spelling that the help shows, such as "--overwrite" and "--no-overwrite"."""
        return [*self._flags, *(["--config.KEY"] if self._overrides else [])]

    def format_help(self) -> str:
        """Everything about the command."""
        kinds = {name: kind.about for name, kind in self.kinds.items()}
        return help_text.render(self.prog, self.about, self.more, kinds, self.groups, self.example)

    # Parsing.

    def parse_args(self, arguments: Sequence[str] | None = None) -> Any:
        """The arguments as the dataclass of the command, or of its kind. Raises UserError."""
        rest = list(sys.argv[1:] if arguments is None else map(str, arguments))
        if self._declared.kinds:
            return self._parse_kind(rest)
        parsed: dict[str, Any] = {self._overrides: [], self._unknown: []}
        loose: list[str] = []
        while rest:
            word = rest.pop(0)
            if self._command and (word == "--" or not word.startswith("-")):
                parsed[self._command] = rest[:] if word == "--" else [word, *rest]
                break
            if word == "--":
                (parsed[self._unknown] if self._unknown else loose).extend(rest)
                break
            if word in ("-h", "--help"):
                self._help()
            if not word.startswith("--"):
                (parsed[self._unknown] if self._unknown else loose).append(word)
            elif self._overrides and word.startswith("--config."):
                if "=" not in word and rest and not rest[0].startswith("--"):
                    word += f"={rest.pop(0)}"
                parsed[self._overrides].append(word)
            else:
                self._take(word, rest, parsed)
        if "help_config" in parsed:
            from grain_jax.config import key_help  # ml_collections

            prefix, overrides = parsed["help_config"], parsed[self._overrides]
            print(key_help.show(prefix, parsed.get("config"), overrides), end="")
            sys.exit(0)
        self._take_loose(loose, parsed)
        self._check_needed(parsed)
        try:
            return _filled(self._declared, parsed)
        except ValueError as error:
            self._error(str(error))

    def _parse_kind(self, arguments: list[str]) -> Any:
        kinds = self._declared.kinds
        name, *rest = arguments or [""]
        if {"-h", "--help"} & {*arguments} and name not in kinds:
            self._help()
        if not name or name.startswith("-"):
            self._error(f"expected a kind first: {', '.join(kinds)}")
        if name not in kinds:
            self._error(f"{name}: no such kind; {nearest.did_you_mean(name, kinds)}")
        return self.kinds[name].parse_args(rest)

    def _help(self) -> NoReturn:
        print(self.format_help(), end="")
        sys.exit(0)

    def _take(self, word: str, rest: list[str], parsed: dict[str, Any]) -> None:
        """Puts a flag's values, which stand in the word or in `rest`, into `parsed`."""
        spelled, equals, value = word.partition("=")
        flag = spelled.replace("_", "-")
        flag = self._also.get(flag, flag)
        if flag not in self._flags:
            near = nearest.find(flag, self.flags())
            if self._unknown and (near is None or nearest.likeness(flag, near) < 0.8):
                parsed[self._unknown].append(word)
                return
            hint = f"did you mean {near}?" if near else f"{self.prog} --help lists them"
            self._error(f"{spelled}: no such flag; {hint}")
        shown = self._flags[flag]
        if shown is not None and shown.field.type is bool:  # a switch
            truth = _TRUTH.get(value.lower()) if equals else True
            if truth is None:
                self._error(f"{flag}: got {value!r}, expected true or false, or {flag} alone")
            parsed[shown.field.name] = truth != flag.startswith("--no-")
            return
        values = [value] if equals else []
        several = shown is not None and shown.many
        while rest and not equals and (several or not values) and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        if shown is None:
            parsed["help_config"] = "".join(values)
            return
        if not values:
            after = f", but the flag {rest[0]} after it" if rest else ""
            expected = f"{flag} {shown.metavar}, or {flag}=VALUE if it begins with --"
            self._error(f"{flag}: has no value{after}; expected {expected}")
        self._set(shown, values, parsed)

    def _set(self, shown: Flag, texts: Sequence[str], parsed: dict[str, Any]) -> None:
        field = shown.field
        try:
            values = [_value(shown, text) for text in texts]
        except ValueError as error:
            self._error(f"{shown.name}: {error}")
        before = parsed.get(field.name, ())
        if typing.get_origin(field.type) is list:
            parsed[field.name] = [*before, *values]
        elif field.metadata.get("union"):
            parsed[field.name] = tuple(dict.fromkeys((*before, *values[0])))
        else:
            (parsed[field.name],) = values

    def _take_loose(self, arguments: list[str], parsed: dict[str, Any]) -> None:
        """Takes the words of positional arguments."""
        for shown in self._listed():
            if not shown.name.startswith("--") and arguments:
                taken = len(arguments) if shown.many else 1
                self._set(shown, arguments[:taken], parsed)
                arguments = arguments[taken:]
        if arguments:
            self._error(f"{arguments[0]}: expected a flag; {self.prog} --help lists them")

    def _listed(self) -> list[Flag]:
        return [flag for flags in self.groups.values() for flag in flags if flag.field]

    def _check_needed(self, parsed: Mapping[str, Any]) -> None:
        missing = []
        for shown in self._listed():
            unless = self._flags.get(shown.field.metadata.get("unless", ""))
            if not shown.required or (unless and parsed.get(unless.field.name)):
                continue
            if parsed.get(shown.field.name, []) in ([], ""):
                missing.append(shown)
        if missing:
            names = ", ".join(f"{flag.name} {flag.metavar}".strip() for flag in missing)
            all_of = f"{self.prog} --help says what they are"
            self._error(f"{names}: missing; {missing[0].help if len(missing) == 1 else all_of}")

    def _error(self, message: str) -> NoReturn:
        raise errors.UserError(f"{self.prog}: {message}")


def _sections(declared: type) -> tuple[str, dict[str, str]]:
    """The text of a docstring, and title -> lines of its sections, also of bases and groups."""
    text, sections = "", {}
    bases = [base for base in declared.__mro__ if dataclasses.is_dataclass(base)]
    for base in sorted(reversed(bases), key=lambda base: bool(vars(base).get("last"))):
        parts = inspect.cleandoc(base.__doc__ or "").split("\n\n")
        paragraphs = [part for part in parts if not re.match(r"\S.*:\n  ", part)]
        if base is declared:
            text = "\n\n".join(paragraphs)
        for part in parts:
            if part not in paragraphs:
                title, _, lines = part.partition(":\n")
                sections[title] = "\n".join(filter(None, [sections.get(title), lines]))
        for field in dataclasses.fields(base) if base is declared else ():
            if _is_group(field):
                sections |= _sections(_kind_of(field))[1]
    return text, sections


def _fields(declared: type) -> Iterator[dataclasses.Field]:
    """The fields that declare flags, with the fields of groups."""
    for field in dataclasses.fields(declared):
        yield from _fields(_kind_of(field)) if _is_group(field) else [field]


def _is_group(field: dataclasses.Field) -> bool:
    return dataclasses.is_dataclass(_kind_of(field)) and "parse" not in field.metadata


def _kind_of(field: dataclasses.Field) -> Any:
    """The type of a value of the field: T of `T | None` and of a list of T."""
    kind: Any = field.type
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(arg for arg in typing.get_args(kind) if arg is not type(None))
    return typing.get_args(kind)[0] if typing.get_origin(kind) is list else kind


def _value(shown: Flag, text: str) -> Any:
    """What a text means, of that flag. Raises ValueError: got, expected."""
    kind, options = _kind_of(shown.field), shown.field.metadata
    parse = options.get("parse", str)
    if kind in (int, float) and "parse" not in options:
        parse = number(kind, options.get("low", 1 if kind is int else -math.inf), options.get("high"))
    value = parse(text)
    if shown.choices and value not in shown.choices:
        raise ValueError(nearest.choice(str(value), shown.choices))
    return value


def _filled(declared: type, values: Mapping[str, Any]) -> Any:
    """The dataclass with the values of its flags."""
    parsed = {}
    for field in dataclasses.fields(declared):
        if _is_group(field):
            parsed[field.name] = _filled(_kind_of(field), values)
        elif field.name in values:
            parsed[field.name] = values[field.name]
    return declared(**parsed)
