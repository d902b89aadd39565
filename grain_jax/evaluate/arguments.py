"""The flags of `grain-jax evaluate KIND`; those of an evaluator are the options that its class declares."""

import dataclasses
import functools
from typing import Any

from grain_jax.cli.flags import flag, many
from grain_jax.cli.parser import Command, Processes
from grain_jax.config.keys import keys_of
from grain_jax.evaluate import base, kinds


class _Kind(Processes):
    """What all kinds have.

    what is measured:
      --checkpoint DIR   workdir, checkpoint or converted folder; or aviary-tiny, hf://ORG/NAME

    how:
      --output OUT.json  file to write; the result is printed as a table, too
      --batch-size N     images at a time
    """

    checkpoint: str
    output: str
    batch_size: int = base.STANDALONE.batch_size


class Suite(_Kind, name="evaluate suite"):
    """All entries of a config such as eval; --config.KEY=VALUE changes it.

    Example:
      grain-jax evaluate suite --checkpoint runs/demo --config eval --config.data_dir=DIR \\
          --output suite.json

    the suite:
      --config FILE|NAME[:ARG]  a Python file with get_config, or a config of the package, such as eval; ARG goes to
        get_config
      --config.KEY VALUE        changes a key; the file has the keys
      --only NAMES              names of entries, with commas between
      --[no-]again              measure what OUT.json has already, too
    """

    config: str
    overrides: list[str] = many(name="config.key")
    only: str | None = None
    again: bool = False


def _of_evaluator(name: str) -> type[Command]:
    """The declaration of a kind, of the options of its evaluator and their comments."""
    cls, command = kinds.find(name), name.replace("_", "-")
    lines, declared = [], {}
    annotations: dict[str, Any] = {}
    for key in keys_of(cls).values():
        options = {
            name: value for name, value in key.declared.items() if value not in (None, (), "")
        }
        if "metavar" not in key.declared:
            continue
        metavar = options.get("metavar") or "|".join(options.get("choices", ()))
        shown = options.pop("name", key.name).replace("_", "-")
        is_switch = key.kind is bool
        lines.append(f"--[no-]{shown}" if is_switch else f"--{shown} {metavar}")
        lines[-1] += f"  {options['help']}"
        annotations[key.name] = key.kind
        options |= {"name": shown} | ({"union": True} if "parse" in options else {})
        default = None if "parse" in options else key.default
        declared[key.name] = flag(
            dataclasses.MISSING if options.get("required") else default, **options
        )
    if cls.writes_predictions:
        lines.append("--predictions FILE  file to write: a line of JSON an image")
        annotations["predictions"], declared["predictions"] = str | None, None
    about = (cls.__doc__ or name).splitlines()[0]
    example = f"grain-jax evaluate {command} --checkpoint runs/demo {cls.example} \\\n    --output {command}.json"
    told = f"{about}\n\nExample:\n{example}\n\nwhat is measured:\n" + "\n".join(lines)
    declared |= {
        "__doc__": told.replace("\n", "\n  ").replace("\n  \n  ", "\n\n"),
        "__annotations__": annotations,
    }
    return type(cls.__name__, (_Kind,), declared, name=f"evaluate {command}")


_KINDS = {n.replace("_", "-"): functools.partial(_of_evaluator, n) for n in kinds.KINDS}


class Evaluate(Command, name="evaluate", kinds={**_KINDS, "suite": Suite}):
    """Measures a checkpoint: classification, retrieval, grounding, segmentation.

    Example:
      grain-jax evaluate zeroshot --checkpoint runs/demo --images runs/aviary/unseen \\
          --descriptions runs/aviary/unseen.json --output zeroshot.json
    """
