"""The commands of `grain-jax`. `python -m grain_jax` does the same."""

from collections.abc import Sequence

from grain_jax.cli import commands

# Name -> (the class that declares its flags, its main function: (arguments) -> exit status, or None for 0).
COMMANDS = {
    "train": ("train.arguments:Train", "train.run:console"),
    "evaluate": ("evaluate.arguments:Evaluate", "evaluate.__main__:main"),
    "embed": ("data.embed.arguments:Embed", "data.embed.__main__:main"),
    "build": ("data.arguments:Build", "data.build:main"),
    "annotate": ("data.annotate.arguments:Annotate", "data.annotate.__main__:main"),
    "inspect": ("data.inspect.arguments:Inspect", "data.inspect.__main__:main"),
    "convert": ("convert.arguments:Convert", "convert.__main__:main"),
    "export": ("convert.arguments:Export", "convert.export:main"),
    "report": ("evaluate.report.arguments:Report", "evaluate.report.page:main"),
    "demo": ("demo.arguments:Demo", "demo.__main__:main"),
    "plan": ("launch.arguments:Plan", "launch.plan:main"),
    "tune": ("launch.arguments:Tune", "launch.tune:main"),
    "sweep": ("launch.arguments:Sweep", "launch.sweep:main"),
    "local": ("launch.arguments:Local", "launch.local:main"),
    "launch-files": ("launch.arguments:LaunchFiles", "launch.files:main"),
    "aviary": ("data.aviary.arguments:Aviary", "data.aviary.__main__:main"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """`grain-jax COMMAND ...`; exits with the status of the command."""
    commands.run(COMMANDS, arguments)


if __name__ == "__main__":
    main()
