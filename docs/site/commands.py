"""A page of every command, made from its parser: what it does, an example, its flags."""

from grain_jax.__main__ import COMMANDS
from grain_jax.cli import commands
from grain_jax.cli.help_text import Flag
from grain_jax.cli.parser import Parser


def index() -> str:
    """The table of all commands."""
    rows = [
        f"| [`grain-jax {name}`]({name}.md) | {parser.about} |"
        for name, parser in commands.parsers(COMMANDS).items()
        if " " not in name
    ]
    return "\n".join(["| command | does |", "|---|---|", *rows])


def pages() -> dict[str, str]:
    """Path on the site -> the text of the page."""
    parsers = commands.parsers(COMMANDS)
    by_path = {}
    for name, parser in parsers.items():
        text = f"# grain-jax {name}\n\n{_about(parser)}"
        if parser.kinds:
            for kind, of_kind in parser.kinds.items():
                text += f"\n\n## grain-jax {name} {kind}\n\n{_about(of_kind)}"
                text += _flags(of_kind, "###", f"{kind}-")
        else:
            text += _flags(parser, "##", "")
        if " " not in name:
            by_path[f"commands/{name}.md"] = text + "\n"
    return by_path


def _about(parser: Parser) -> str:
    about = f"{_plain(parser.about)}.\n\n```bash\n{parser.example}\n```"
    return f"{about}\n\n{_plain(parser.more)}".rstrip()


def _flags(parser: Parser, level: str, prefix: str) -> str:
    parts = []
    for title, flags in parser.groups.items():
        if title == "help":
            continue
        parts.append(f"{level} {title[0].upper()}{title[1:]} {{ #{prefix}{_slug(title)} }}")
        parts += [_flag(flag, prefix) for flag in flags]
    return "\n\n" + "\n\n".join(parts)


def _flag(flag: Flag, prefix: str) -> str:
    facts = ["must be given"] if flag.required else []
    facts += [f"one of {', '.join(flag.choices)}"] if flag.choices else []
    if flag.default is not None and "(default" not in flag.help and flag.metavar:
        facts.append(f"default `{flag.default}`")
    name = f"{flag.name} {flag.metavar}".strip()
    help = flag.help[:1].upper() + flag.help[1:]
    text = f"#### `{name}` {{ #{prefix}{_slug(flag.name)} }}\n\n{_plain(help)}"
    return text + (f"\n\n{' · '.join(facts)}\n{{ .facts }}" if facts else "")


def _plain(text: str) -> str:
    """Text of a terminal, with what Markdown would read as marks escaped."""
    for mark in "\\*_<[{":
        text = text.replace(mark, f"\\{mark}" if mark != "<" else "&lt;")
    return text


def _slug(text: str) -> str:
    parts = "".join(letter if letter.isalnum() else " " for letter in text).split()
    return "-".join(parts).lower()
