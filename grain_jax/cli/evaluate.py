"""The flags of `grain-jax evaluate KIND`; those of an evaluator are the options that its class declares."""

import argparse
import dataclasses
import typing
from typing import Any

from grain_jax.cli.config_parser import ConfigParser
from grain_jax.cli.parser import KindsParser, Parser
from grain_jax.cli.train import add_compilation_cache, add_processes
from grain_jax.cli.values import CHECKPOINT, number, positive
from grain_jax.config import evals, listing

CACHE = "~/.cache/grain_jax/text_features"
_MORE = "Prints the result as a table and writes it as JSON."


def parser() -> KindsParser:
    """The parser of `grain-jax evaluate`."""
    kinds = [_of_evaluator(name) for name in evals.NAMED]
    return KindsParser("grain-jax evaluate", [*kinds, _suite()], example=kinds[0].example)


def _of_evaluator(name: str) -> Parser:
    cls, command = evals.find(name), name.replace("_", "-")
    about = (cls.__doc__ or name).splitlines()[0].removesuffix(".")
    prog = f"grain-jax evaluate {command}"
    example = f"{prog} --checkpoint runs/demo {cls.example} \\\n    --output {command}.json"
    out = Parser(prog, about, more=_MORE, example=example)
    group = _add_checkpoint(out)
    said = listing.comments(cls)
    for field in dataclasses.fields(cls):
        if "metavar" in field.metadata:
            _add_option(out, group, cls, field, said.get(field.name, ""))
    if cls.writes_predictions:
        told = "file to write: a line of JSON an image"
        group.add_argument("--predictions", metavar="FILE", help=told)
    _add_rest(out, group)
    return out


def _add_option(out: Parser, group: Any, cls: type, field: dataclasses.Field, comment: str) -> None:
    declared, kind = field.metadata, typing.get_type_hints(cls)[field.name]
    flag = f"--{declared.get('name', field.name).replace('_', '-')}"
    if kind is bool:
        out.switch(flag, default=bool(field.default), to=group, help=comment)
        return
    given: dict[str, Any] = {"dest": field.name, "help": comment}
    given |= {key: declared[key] for key in ("choices", "required") if key in declared}
    if declared["metavar"]:
        given["metavar"] = declared["metavar"]
    if "parse" in declared:
        given |= {"type": declared["parse"], "action": _Several}
    elif not declared.get("required"):
        given["default"] = field.default
    if kind is int:
        given["type"] = number(int, declared["low"], declared.get("high"))
    group.add_argument(flag, **given)


class _Several(argparse.Action):
    """Collects the values of a flag that may be given several times, each once."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest) or ()
        setattr(namespace, self.dest, tuple(dict.fromkeys((*before, *values))))  # type: ignore[misc]


def _suite() -> Parser:
    prog = "grain-jax evaluate suite"
    example = f"{prog} --checkpoint runs/demo --config eval --config.data_dir=DIR \\\n    --output suite.json"
    about = "all entries of a config such as eval; --config.KEY=VALUE changes it"
    out = ConfigParser(prog, about, keys=False, more=_MORE, example=example)
    measured = _add_checkpoint(out)
    group = out.add_argument_group("the suite")
    out.add_config(group, "eval")
    group.add_argument("--only", metavar="NAMES", help="names of entries, with commas between")
    out.needs = ("--config",)
    out.switch("--again", to=group, help="measure what OUT.json has already, too")
    _add_rest(out, measured)
    return out


def _add_checkpoint(out: Parser) -> Any:
    group = out.add_argument_group("what is measured")
    group.add_argument("--checkpoint", metavar="DIR", required=True, help=CHECKPOINT)
    return group


def _add_rest(out: Parser, measured: Any) -> None:
    measured.add_argument("--output", metavar="OUT.json", required=True, help="file to write")
    add = out.add_argument_group("how").add_argument
    size = evals.STANDALONE.batch_size
    add("--batch-size", metavar="N", type=positive, default=size, help="images at a time")
    told = 'folder of text embeddings, computed once; "": none'
    add("--cache", metavar="DIR", default=CACHE, help=told)
    add_compilation_cache(out)
    add_processes(out)
