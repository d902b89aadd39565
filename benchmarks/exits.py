"""Starts x exits: the worst difference of each conversion from what loads it, of max|b| (docs/interop.md, Exits).

  python -m benchmarks.exits --sizes small     # S/16, B/32 and B/16 without it; "own" is tiny in both

Towers have random weights; those of a fine-tuned start come in as a folder of open_clip or of transformers and are
trained for three steps. A dash: the exit cannot hold the model (`convert table --checkpoint`).
"""

import contextlib
import functools
import io
import tempfile
from collections.abc import Callable
from typing import Any

from etils import epath

from benchmarks import harness
from benchmarks.random_weights import perturbed
from grain_jax import config as config_lib
from grain_jax import inference, train
from grain_jax.config import recipe
from grain_jax.configs import finetune, own
from grain_jax.convert import __main__ as convert
from grain_jax.convert import export, parity
from grain_jax.convert.exits import folder as exits
from grain_jax.convert.exits import reasons, table
from grain_jax.input_pipeline import clip_tokenizer
from grain_jax.runtime import checkpoint

SMALL = dict(depth=2, width=48, heads=4, mlp_dim=96)
COLUMNS = ("to-hf", "towers", "vision", *table.EXITS[2:])
STEPS = {"input.source": "synthetic", "input.prepare": "", "batch_size": 8, "total_steps": 3}
STEPS |= {"total_epochs": None, "optim.warmup_epochs": None, "optim.warmup_steps": 1}
_FILES = {"to-big-vision": ".npz", "to-torch": ".pth.tar"}


def shrink(model: Any, small: bool) -> Any:
    """The keys of a model in small sizes; its vocabulary stays, which tokenizers need."""
    if small:
        model.image.update(SMALL | dict(image_size=40, patch_size=8))
        model.text.update(SMALL | dict(context_length=32))
        model.embed_dim = SMALL["width"]
        if model.decoder is not None:
            model.decoder.update(SMALL | dict(queries=3))
    return model


def saved(keys: Any, path: epath.Path, small: bool) -> epath.Path:
    """A model with random weights."""
    model = config_lib.model_from_dict(shrink(keys, small).to_dict())
    checkpoint.save_model(path, model, perturbed(model), source="benchmarks.exits")
    return path


def trained(
    c: Any, path: epath.Path, small: bool, init: epath.Path | None = None, rank: int = 0
) -> epath.Path:
    """A run of three steps on synthetic records, its towers from `init`; with a rank of LoRA, merged."""
    shrink(c.model, small)
    c.update_from_flattened_dict(STEPS)
    c.evals, c.input.max_regions = {}, min(c.input.max_regions, c.model.decoder.queries)
    if init is not None:
        c.init.image = c.init.text = str(init)
    if rank:
        c.optim.lora.rank, c.optim.layer_decay = rank, 1.0
    with contextlib.redirect_stderr(io.StringIO()):
        train.train(config_lib.from_dict(c), path)
    return converted("merge", path, path.parent / "merged") if rank else path


def converted(command: str, source: epath.Path, target: epath.Path) -> epath.Path:
    """The folder that a command of `grain-jax convert` writes."""
    words = [command, f"--checkpoint={source}", f"--output={target}"]
    convert.COMMANDS[command](convert.Convert.parse(words))
    return target


def of_towers(family: str, rank: int, path: epath.Path, small: bool) -> epath.Path:
    """`finetune` of two random towers, which come in by the format of their own library."""
    is_siglip = family.startswith("siglip")
    c = finetune.get_config(family)
    keys = table.STARTS["two towers, SigLIP" if is_siglip else "two towers, CLIP"]()
    keys.image.patch_size = c.model.image.patch_size
    keys.image.activation = keys.text.activation = c.model.image.activation
    if is_siglip:  # no SentencePiece model is there
        for text in (c.model.text, keys.text):
            text.update(tokenizer="clip", vocab_size=clip_tokenizer.VOCAB_SIZE, cleaning="lower")
    source = saved(keys, path / "towers", small)
    theirs = converted("to-hf" if is_siglip else "to-open-clip", source, path / "theirs")
    theirs = theirs if is_siglip else theirs / "open_clip_model.safetensors"
    return trained(c, path / "run", small, theirs, rank)


def _box_head(path: epath.Path, small: bool) -> epath.Path:
    keys = recipe.model("S/16")
    keys.boxes.kind = "roi_align"
    return saved(keys, path, small)


STARTS: dict[str, Callable[[epath.Path, bool], epath.Path]] = {
    "own tiny, 3 steps": lambda path, _: trained(own.get_config(), path, False),
    "S/16, box head": _box_head,
    "open_clip B/32, 3 steps": functools.partial(of_towers, "open_clip:B/32", 0),
    "SigLIP B/16, 3 steps": functools.partial(of_towers, "siglip:B/16", 0),
    "own tiny, LoRA merged": lambda path, _: trained(own.get_config(), path / "run", False, rank=4),
    "open_clip, LoRA merged": functools.partial(of_towers, "open_clip:B/32", 4),
    "SigLIP, LoRA merged": functools.partial(of_towers, "siglip:B/16", 4),
    **{
        start: lambda path, small, start=start: saved(table.STARTS[start](), path, small)
        for start in ("two towers, CLIP", "two towers, SigLIP")
    },
}


def worst(name: str, source: epath.Path, target: epath.Path) -> float | str:
    """The largest error of an exit; or the verdict, where nothing was compared or a comparison failed."""
    if name == "export":
        found = export.export_model(inference.load(source), target, ("cpu",))
        return max(c.error for c in found) if all(c.ok for c in found) else "FAILED"
    words = [*name.split(), f"--checkpoint={source}", f"--output={target}"]
    report = convert.COMMANDS[words[0]](convert.Convert.parse(words))
    if report.verdict == parity.NOT_PROVEN:
        return "written"
    return max(c.error for c in report.comparisons) if report.ok else report.verdict


def main() -> int:
    """Prints the table; the exit status is 1 where an exit that should work fails."""
    args = harness.arguments(__doc__, sizes=("full", dict(choices=("small", "full"))), only=[""])
    machine = harness.machine("jax", "torch", "transformers", "open_clip_torch", "onnxruntime")
    rows = harness.Table({"start": "24", **dict.fromkeys(COLUMNS, "<13")})
    for start in (x for x in STARTS if any(word in x for word in args.only)):
        cells = dict.fromkeys(COLUMNS, "-")
        with tempfile.TemporaryDirectory() as scratch:
            place = epath.Path(scratch)
            source = STARTS[start](place / "start", args.sizes == "small")
            for i, (name, faults) in enumerate(reasons.of(exits.read(source).model).items()):
                target = place / f"{i}{_FILES.get(name.split()[0], '')}"
                column = name.removeprefix("to-hf --part ").removesuffix(" --part towers")
                if column in COLUMNS and not faults:
                    value = worst(name, source, target)
                    cells[column] = value if isinstance(value, str) else f"{value:.1e}"
        rows.add(start=start, **cells)
    harness.write(args.json, {"machine": machine, "rows": rows.rows})
    return int(any("FAILED" in row.values() for row in rows.rows))


if __name__ == "__main__":
    raise SystemExit(main())
