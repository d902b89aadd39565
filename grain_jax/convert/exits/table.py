"""The command table: starts and exits, each PROVEN or the keys of the model that the exit cannot hold."""

from collections.abc import Callable, Mapping
from typing import Any

from grain_jax import config as config_lib
from grain_jax.config import recipe
from grain_jax.configs import demo, finetune  # pyright: ignore[reportMissingImports]
from grain_jax.convert import parity
from grain_jax.convert.exits import folder, reasons, tokenizers
from grain_jax.convert.faults import ConvertError

EXITS = (
    *("to-hf", "to-hf --part vision", "to-open-clip", "to-big-vision", "to-torch", "to-onnx"),
    "export",
)
_TOWERS = " --part towers"
_WITH_TEXT_DECODER = ("to-hf", "to-onnx", "export", "pack")
_SHOWN = 3  # keys of a reason; --checkpoint shows all


def _two_towers(family: str | None, activation: str | None = None, **image: Any) -> Any:
    """The model of the towers of a family, None: our own; `activation` of both, where it is not the family's."""
    c = recipe.base("B/16")
    if family is not None:
        recipe.towers_of(c, family)
    c.model.decoder = None
    if family == "siglip":
        c.model.embed_dim = c.model.text.width
    c.model.image.update(image)
    if activation is not None:
        c.model.image.activation = c.model.text.activation = activation
    return c.model


# Start -> the keys of its model. Tests make each of them small and run every exit (tests/convert/test_exits.py).
STARTS: dict[str, Callable[[], Any]] = {
    "own, grain_vit*": lambda: recipe.model("B/16"),
    "demo (box head)": lambda: demo.get_config().model,
    "finetune:openai": lambda: finetune.get_config("openai").model,
    "finetune:open_clip": lambda: finetune.get_config("open_clip").model,
    "finetune:siglip": lambda: finetune.get_config("siglip").model,
    "finetune:siglip2": lambda: finetune.get_config("siglip2").model,
    "finetune:pe_core": lambda: finetune.get_config("pe_core").model,
    "finetune:dinov3": lambda: finetune.get_config("dinov3").model,
    "two towers, own": lambda: _two_towers(None, pool="class"),
    "two towers, CLIP": lambda: _two_towers("clip", pool="class"),
    "two towers, SigLIP": lambda: _two_towers("siglip", pool="map", projection="none"),
    "two towers, SigLIP of open_clip": lambda: _two_towers(
        "siglip", "gelu", pool="map", projection="none"
    ),
}


def report(checkpoint: str | None = None) -> parity.Report:
    """The table as Markdown, of the starts or of one checkpoint; it converts nothing.

    Raises:
      checkpoint.CheckpointError: it cannot be read.
    """
    if checkpoint is not None:
        lines, found = [], folder.read(checkpoint)
        try:
            found, _ = tokenizers.with_end(found)
        except ConvertError as error:
            lines.append(str(error))
        lines += of_model(found.model, found.sequence_lengths)
        if found.text_decoder is not None:
            lines.append(
                f"text decoder: in {', '.join(_WITH_TEXT_DECODER)}; the others leave it behind"
            )
    else:
        models = {
            name: config_lib.model_from_dict(keys().to_dict()) for name, keys in STARTS.items()
        }
        lines = of_starts(models)
    return parity.Report("\n".join(lines), True, parity.NOT_PROVEN)


def of_model(model: config_lib.Model, lengths: reasons.Lengths = ()) -> list[str]:
    """A line for each exit of one model, and one for each thing of the model that it cannot hold."""
    lines = []
    for name, faults in reasons.of(model, lengths=lengths).items():
        lines.append(f"{name}: {'no' if faults else 'yes'}")
        lines += [f"  {fault}" for fault in faults]
    return lines


def of_starts(models: Mapping[str, config_lib.Model]) -> list[str]:
    """The lines of the table, and one for each reason in it."""
    notes: dict[str, int] = {}
    rows = [["start", *EXITS]]
    for name, model in models.items():
        found = reasons.of(model)
        rows.append([name, *(_cell(found, each, notes) for each in EXITS)])
    rows.insert(1, ["---"] * len(rows[0]))
    table = [f"| {' | '.join(row)} |" for row in rows]
    return [*table, "", *(f"{number}. {text}" for text, number in notes.items())]


def _cell(found: Mapping[str, list[str]], name: str, notes: dict[str, int]) -> str:
    flag = "" if name in found else _TOWERS
    faults = found[name + flag]
    if not faults:
        return "PROVEN" + ("; towers" if flag else "")
    keys = [fault.partition(":")[0].removeprefix("model.") for fault in faults]
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    absent = [fault for fault in faults if "pip install" in fault]
    text = absent[0] if absent else ", ".join(keys[:_SHOWN]) + more
    return f"{notes.setdefault(text, len(notes) + 1)}"
