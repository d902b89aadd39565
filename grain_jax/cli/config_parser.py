"""The flags of a command that takes a config: `--config FILE[:ARG]`, `--config.KEY=VALUE`, and `--help-config`."""

from typing import Any

from grain_jax.cli import nearest
from grain_jax.cli.parser import Parser


class ConfigParser(Parser):
    """A Parser whose result has `config` (as it was given, or None) and `overrides`, a list of `--config.KEY=VALUE`."""

    def __init__(self, prog: str, about: str = "", *, keys: bool = True, **texts: str):
        """As Parser; `keys` adds --help-config, which lists the keys of a run."""
        super().__init__(prog, about, **texts)
        self._lists_keys = keys
        self._overrides: list[str] = []

    def add_config(self, group: Any, example: str = "demo") -> None:
        """Declares --config and its keys in the group."""
        group.add_argument(
            "--config",
            metavar="FILE|NAME[:ARG]",
            help=f"a Python file with get_config, or a config of the package, such as {example}; ARG goes to get_config",
        )
        where = "--help-config lists the keys" if self._lists_keys else "the file has the keys"
        group.add_argument(
            "--config.KEY", metavar="VALUE", dest="unused", help=f"changes a key; {where}"
        )

    def add_flags_of_help(self, group: Any) -> None:
        """Declares --help-config."""
        if self._lists_keys:
            group.add_argument(
                "--help-config",
                nargs="?",
                const="",
                metavar="PREFIX",
                help="list the keys of a config, all or those below PREFIX, with defaults, or with the values of --config",
            )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As Parser; lists the keys where that is asked for, and exits."""
        self._overrides = []
        found, rest = super().parse_known_args(args, namespace)
        found.overrides = self._overrides
        del found.unused
        if self._lists_keys and found.help_config is not None:
            from grain_jax.cli import config_keys  # reads source code: not for every command

            print(config_keys.show(found.help_config, found.config, found.overrides), end="")
            self.exit(0)
        for flag in self.needed(found):
            what = self._option_string_actions[flag].help
            self.error(f"{flag}: missing; {what}")
        return found, rest

    def needed(self, found: Any) -> list[str]:
        """The flags of `needs` that are missing."""
        return [f for f in self.needs if not getattr(found, f.removeprefix("--").replace("-", "_"))]

    def spelled_flag(self, word: str, rest: list[str]) -> list[str]:
        """As Parser; takes the keys of the config out."""
        plain = "--" + word.lstrip("-")
        off = plain.startswith("--noconfig.")
        if off:
            plain = "--" + plain.removeprefix("--no") + "=false"
        if not plain.startswith("--config."):
            return super().spelled_flag(word, rest)
        if "=" not in plain and rest and not rest[0].startswith("--"):
            plain += f"={rest.pop(0)}"
        self._overrides.append(plain)
        return []

    def _is_flag(self, word: str) -> bool:
        return word.startswith("-config.") or super()._is_flag(word)

    def _near(self, flag: str) -> str | None:
        head, dot, key = flag.partition(".")
        if dot and nearest.of(head, ["--config"]):
            return f"--config.{key}"
        return super()._near(flag)
