"""Inference time an image: grain_jax.load, StableHLO export, PyTorch, torch.compile and ONNX Runtime.

    python -m benchmarks.serving [--sizes S/16 B/16] [--batches 1 8] [--turns 7] [--json OUT.json]

Image embedding, regions and boxes of the same images with the same random weights (`random_weights.perturbed`), float32.
Ours take uint8 and normalise it; the others get normalised images, and the normalisation is not timed. Each side
runs in its own process, in turns. Outputs must agree to 1e-5.
"""

import functools
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from benchmarks import harness, stopwatch
from grain_jax.core import schema

TOLERANCE = 1e-5  # of the outputs, max|a-b| / max|b|


def noise(size: int, count: int) -> np.ndarray:
    """Images of noise, uint8 [count, size, size, 3]."""
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def normalised(size: int, count: int) -> np.ndarray:
    """The same in torch's layout, normalised, float32 [count, 3, size, size]."""
    return np.ascontiguousarray(schema.rescale_pixels(noise(size, count)).transpose(0, 3, 1, 2))


def _variants(ways, make: Callable, size: int, batches: list[int]) -> dict[str, Callable[[], Any]]:
    given = {count: make(size, count) for count in batches}
    return {f"{w}|{n}": functools.partial(ways[w], given[n]) for w in ways for n in batches}


def jax_side(folder: str, size: int, batches: list[int]) -> Mapping[str, Callable[[], Any]]:
    """`grain_jax.load(...)`, and the model of `grain_jax.convert.export` with its parameters on the device."""
    import jax
    from jax import export

    import grain_jax

    predictor = grain_jax.load(f"{folder}/ours")
    params = jax.device_put(dict(np.load(f"{folder}/exported/params.npz")))
    file = epath.Path(folder) / "exported" / "regions.stablehlo"
    call = jax.jit(export.deserialize(file.read_bytes()).call)

    def loaded(given):
        image, regions = predictor.encode_image_and_regions(given)
        return image, regions.embed, regions.boxes_xyxy

    def exported(given):
        out = jax.tree.map(np.asarray, call(params, given))
        return tuple(out[name] for name in ("image_embed", "region_embed", "boxes_xyxy"))

    return _variants({"grain_jax.load": loaded, "StableHLO": exported}, noise, size, batches)


def torch_side(folder: str, size: int, batches: list[int]) -> Mapping[str, Callable[[], Any]]:
    """The module of the Hugging Face folder, eager and with torch.compile."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    module = transformers.AutoModel.from_pretrained(f"{folder}/hf", trust_remote_code=True).eval()
    half = sys.modules[type(module).__module__].ImageHalf(module).eval()

    def run(function, given):
        with torch.inference_mode():
            return tuple(output.numpy() for output in function(torch.from_numpy(given)))

    ways = {"PyTorch": half, "torch.compile": torch.compile(half, dynamic=False)}
    ways = {name: functools.partial(run, function) for name, function in ways.items()}
    return _variants(ways, normalised, size, batches)


def onnx_side(folder: str, size: int, batches: list[int]) -> Mapping[str, Callable[[], Any]]:
    """The model of `export_onnx` in ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(f"{folder}/hf/image.onnx")
    run = lambda given: tuple(session.run(None, {"pixel_values": given}))
    return _variants({"ONNX Runtime": run}, normalised, size, batches)


def prepare(size: str, folder: epath.Path) -> int:
    """Writes the model in every format below `folder`; returns the image size."""
    import transformers

    from benchmarks import random_weights
    from grain_jax import inference
    from grain_jax.convert import export, huggingface

    model = random_weights.save(size, folder / "ours")
    huggingface.to_hf(folder / "ours", folder / "hf")
    module = transformers.AutoModel.from_pretrained(str(folder / "hf"), trust_remote_code=True)
    module.eval().export_onnx(str(folder / "hf"))
    predictor = inference.Predictor(model, random_weights.perturbed(model))
    export.export_model(predictor, folder / "exported", ("cpu",))
    return model.image.image_size


def main() -> int:
    """Prints the table; the exit status is 1 if outputs differ."""
    args = harness.arguments(__doc__, sizes=["S/16", "B/16"], batches=[1, 8], turns=7)
    machine = harness.machine("jax", "torch", "onnxruntime", "transformers")
    columns = dict(size="6", way="14", pictures=">8", milliseconds=">24.1f", error=">9.1e")
    table = harness.Table(columns)
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as scratch:
            given = dict(folder=scratch, batches=args.batches)
            given["size"] = prepare(size, epath.Path(scratch))
            sides = {"JAX": jax_side, "torch": torch_side, "onnx": onnx_side}
            sides = {name: (side, given) for name, side in sides.items()}
            timings = stopwatch.measure(sides, args.turns)
        for name, timing in timings.items():
            way, _, count = name.partition(" ")[2].partition("|")
            ours = timings[f"JAX grain_jax.load|{count}"].value
            error = max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(timing.value, ours))
            each = [1e3 * s / int(count) for s in timing.seconds]  # of an image
            row = dict(size=size, way=way, pictures=int(count), milliseconds=each)
            table.add(**row, error=float(error))
    worst = max(row["error"] for row in table.rows)
    harness.write(args.json, dict(machine=machine, rows=table.rows, worst_error=worst))
    return 0 if worst < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
