"""The flags of `grain-jax evaluate KIND`: the options that the class of the evaluator declares."""

import dataclasses
import functools
import typing
from typing import Any

from grain_jax.cli.flags import flag, many
from grain_jax.cli.parser import Command, Processes
from grain_jax.evaluate import kinds


class _Kind(Processes):
    """The flags of all kinds.

    what is measured:
      --checkpoint DIR   workdir, checkpoint or converted folder; or aviary-tiny, hf://ORG/NAME

    how:
      --output OUT.json  file for the result, which is also printed as a table
      --batch-size N     images per batch (default: 64)
    """

    checkpoint: str
    output: str
    batch_size: int | None = None


class Suite(_Kind, name="evaluate suite"):
    """All entries of a config such as eval; --config.KEY=VALUE changes it.

    Example:
      grain-jax evaluate suite --checkpoint runs/demo --config eval --config.data_dir=DIR \\
          --output suite.json

    the suite:
      --config FILE|NAME[:ARG]  a file with get_config(ARG), or a config of the package
      --config.KEY VALUE        changes a key of the config
      --only NAMES              names of entries, with commas between them
      --[no-]again              also measure entries that OUT.json has already
    """

    config: str
    overrides: list[str] = many(name="config.key")
    only: str | None = None
    again: bool = False


def _of_evaluator(name: str) -> type[Command]:
    """The declaration of a kind: the options of its evaluator, with their help."""
    cls, command = kinds.find(name), name.replace("_", "-")
    types, lines = typing.get_type_hints(cls), []
    declared: dict[str, Any] = {"__annotations__": {}}
    for field in dataclasses.fields(cls):
        options = {key: x for key, x in field.metadata.items() if x not in (None, (), "")}
        if "metavar" not in field.metadata:
            continue
        metavar = options.get("metavar") or "|".join(options.get("choices", ()))
        flag_name = options.pop("name", field.name).replace("_", "-")
        shown = f"[no-]{flag_name}" if types[field.name] is bool else f"{flag_name} {metavar}"
        about = options["help"].removesuffix(".")
        about = about[0].lower() + about[1:] if about[1].islower() or about[1] == " " else about
        lines.append(f"--{shown}  {about}")
        declared["__annotations__"][field.name] = types[field.name]
        options |= {"name": flag_name} | ({"union": True} if "parse" in options else {})
        default = None if "parse" in options else field.default
        default = dataclasses.MISSING if options.get("required") else default
        declared[field.name] = flag(default, **options)
    about, output = (cls.__doc__ or name).splitlines()[0], f"--output {command}.json"
    example = f"grain-jax evaluate {command} --checkpoint runs/demo {cls.example} \\\n    {output}"
    text = f"{about}\n\nExample:\n{example}\n\nwhat is measured:\n" + "\n".join(lines)
    declared["__doc__"] = text.replace("\n", "\n  ").replace("\n  \n  ", "\n\n")
    return type(cls.__name__, (_Kind,), declared, name=f"evaluate {command}")


_KINDS = {n.replace("_", "-"): functools.partial(_of_evaluator, n) for n in kinds.KINDS}


class Evaluate(Command, name="evaluate", kinds={**_KINDS, "suite": Suite}):
    """Measures a checkpoint: classification, retrieval, grounding, segmentation, detection; calibrates it.

    Example:
      grain-jax evaluate zeroshot --checkpoint runs/demo --images runs/aviary/unseen \\
          --descriptions runs/aviary/unseen.json --output zeroshot.json
    """
