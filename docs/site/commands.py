"""The table of all commands, and a page with the help of each."""

from grain_jax.__main__ import COMMANDS
from grain_jax.cli import commands


def index() -> str:
    """The table of all commands."""
    rows = [
        f"| [`grain-jax {name}`]({name}.md) | {commands.declared(COMMANDS, name).about()} |"
        for name in COMMANDS
    ]
    return "\n".join(["| command | does |", "|---|---|", *rows])


def pages() -> dict[str, str]:
    """Path on the site -> the text of the page."""
    by_path: dict[str, str] = {}
    for name, parser in commands.parsers(COMMANDS).items():
        path = f"commands/{name.split()[0]}.md"
        level = "##" if path in by_path else "#"
        text = f"{level} grain-jax {name}\n\n```text\n{parser.format_help()}```\n"
        by_path[path] = by_path.get(path, "") + text + "\n"
    return by_path
