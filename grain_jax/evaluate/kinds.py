"""The evaluators by name, and how an entry of `evals` in a config becomes an evaluator.

An entry is `dict(kind="zeroshot", ...)`: the kind is one of `KINDS` or `module:Class`, and the other keys are
the options of that class.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from grain_jax import config as config_lib
from grain_jax.config.keys import OpenGroup, key
from grain_jax.core import errors, named
from grain_jax.evaluate.base import Evaluator

# A config imports the class, so it imports the libraries that compute only when it measures.
KINDS = {
    "zeroshot": "grain_jax.evaluate.zeroshot:ZeroShot",
    "linear_probe": "grain_jax.evaluate.linear_probe:LinearProbe",
    "retrieval": "grain_jax.evaluate.retrieval:Retrieval",
    "grounding": "grain_jax.evaluate.grounding:Grounding",
    "boxes": "grain_jax.evaluate.box_classes:Boxes",
    "hard_negatives": "grain_jax.evaluate.box_classes:HardNegatives",
    "segmentation": "grain_jax.evaluate.segmentation:Segmentation",
    "detection": "grain_jax.evaluate.detection:Detection",
    "calibrate": "grain_jax.evaluate.calibrate:Calibrate",
}


@dataclasses.dataclass(frozen=True)
class SuiteConfig:
    """A suite of evaluations (configs/eval.py); the entries use the other keys."""

    evals: dict[str, OpenGroup] = key(help="Evaluators by name.")
    data_dir: str = key("", "Folder of TFDS.")
    folders: str = key("", "Folder of the datasets that TFDS does not have.")
    descriptions: str | None = key(None, "Folder of NAME.json.")
    templates: str | None = key(None, "File of prompts.")
    alphas: tuple[float, ...] = key((), "Shares of the global score.")


def find(kind: str) -> type[Evaluator]:
    """The class of that kind: one of KINDS, or `module:Class`. Raises errors.UserError."""
    target = named.find("evaluator", kind, KINDS)
    cls = named.find("evaluator", target, {}) if isinstance(target, str) else target
    if not (isinstance(cls, type) and issubclass(cls, Evaluator)):
        raise errors.UserError(f"evaluator {kind!r}: expected a subclass of {Evaluator.__module__}.Evaluator")
    if inspect.isabstract(cls):
        lacks = ", ".join(sorted(cls.__abstractmethods__))
        raise errors.UserError(f"evaluator {kind!r}: has no {lacks}; expected check and evaluate")
    return cls


def from_entry(entry: Any, path: str = "evaluator") -> Evaluator:
    """The evaluator of an entry, checked. Raises UserError with a line for each fault; `path` is its key."""
    entry = entry.to_dict() if hasattr(entry, "to_dict") else entry
    kind = entry.get("kind") if isinstance(entry, Mapping) else None
    if not isinstance(kind, str):
        expected = f"a group with kind: one of {', '.join(KINDS)}, or module:Class"
        raise config_lib.ConfigError(f"{path}: got {kind or entry!r}, expected {expected}")
    try:
        cls = find(kind)
    except errors.UserError as error:
        raise config_lib.ConfigError(f"{path}.kind: {error}") from None
    return config_lib.build(cls, entry, path)


def from_entries(entries: Mapping[str, Any], model: config_lib.Model | None = None) -> dict[str, Evaluator]:
    """The evaluators of `evals`, by name; their modules are imported.

    `model` is the one that they will measure, if it is known. Raises ConfigError, with a line for each entry
    that is wrong or needs what the model lacks.
    """
    evaluators, faults, has = {}, [], []
    if model is not None:
        has = ["regions"] * bool(model.decoder or model.boxes.proposals)
        has += ["boxes"] * (model.boxes.kind != "none")
    for name, entry in entries.items():
        path = f"evals.{name}"
        try:
            with named.importing():
                evaluators[name] = from_entry(entry, path)
        except errors.UserError as error:
            faults += str(error).splitlines()
            continue
        needs = evaluators[name].needs
        if model is not None and needs and not set(has).intersection(needs):
            faults.append(
                f"{path}.kind: got {evaluators[name].kind}, which needs regions, but the model finds none;"
                " take out the entry, or set alphas=(1.0,) in one of kind=zeroshot"
            )
    config_lib.raise_faults(faults)
    return evaluators


def suite_from_dict(value: Any) -> dict[str, Evaluator]:
    """The evaluators of a suite, a plain dict or a ConfigDict, by name. Raises ConfigError."""
    return from_entries(config_lib.build(SuiteConfig, value).evals)


def evaluator(kind: str, images: Any = "", **options: Any) -> dict[str, Any]:
    """An entry for `evals` of a config file, with all options, so that the command line can set them.

    Args:
      kind: one of KINDS, or `module:Class`; another one is an errors.UserError.
      images: class folders, or the folder that the paths of the annotations start from.
      **options: the other options of that class; None leaves the default.
    """
    from grain_jax.config import recipe  # ml_collections, which only config files need

    with named.importing():  # a config file is code of the user
        cls = find(kind)
    entry = dict(recipe.defaults(cls).items(preserve_field_references=True))
    set_here = {name: value for name, value in options.items() if value is not None}
    return entry | dict(kind=kind, images=images) | set_here
