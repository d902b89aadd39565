"""Inference time an image: grain_jax.load, StableHLO export, PyTorch, torch.compile and ONNX Runtime.

    python -m benchmarks.serving [--sizes S/16 B/16] [--batches 1 8] [--turns 7] [--json OUT.json]

Image embedding, regions and boxes of the same images with the same random weights (`interop.perturbed`), float32.
Ours take uint8 and normalise it; the others get normalised images, and the normalisation is not timed. Each side
runs in its own process, in turns. Outputs must agree to 1e-5.
"""

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from benchmarks import side_by_side
from grain_jax import recipe

TOLERANCE = 1e-5  # of the outputs, max|a-b| / max|b|


def noise(size: int, count: int) -> np.ndarray:
    """Images of noise, uint8 [count, size, size, 3]."""
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def jax_side(folder: str, size: int, batches: list[int]) -> Mapping[str, Callable[[], Any]]:
    """`grain_jax.load(...)`, and the model of `grain_jax.export` with its parameters on the device."""
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

    given = {count: noise(size, count) for count in batches}
    return _variants({"grain_jax.load": loaded, "StableHLO": exported}, given)


def torch_side(folder: str, size: int, batches: list[int]) -> Mapping[str, Callable[[], Any]]:
    """The module of the Hugging Face folder, eager and with torch.compile."""
    import os

    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    module = transformers.AutoModel.from_pretrained(f"{folder}/hf", trust_remote_code=True).eval()
    half = sys.modules[type(module).__module__].ImageHalf(module).eval()

    def run(function, given):
        with torch.inference_mode():
            pixels = torch.from_numpy(given)
            return tuple(output.numpy() for output in function(pixels))

    ways = {"PyTorch": half, "torch.compile": torch.compile(half, dynamic=False)}
    ways = {name: functools.partial(run, function) for name, function in ways.items()}
    return _variants(ways, _normalised(size, batches))


def onnx_side(folder: str, size: int, batches: list[int]) -> Mapping[str, Callable[[], Any]]:
    """The model of `export_onnx` in ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(f"{folder}/hf/image.onnx")

    def run(given):
        return tuple(session.run(None, {"pixel_values": given}))

    return _variants({"ONNX Runtime": run}, _normalised(size, batches))


def _normalised(size: int, batches: list[int]) -> dict[int, np.ndarray]:
    """Count -> normalised images in torch's layout, float32 [count, 3, size, size]."""
    image = recipe.model("S/16").image  # the same for all sizes
    mean, std = np.array(image.pixel_mean, np.float32), np.array(image.pixel_std, np.float32)
    normalised = {count: (noise(size, count) / np.float32(255) - mean) / std for count in batches}
    return {n: np.ascontiguousarray(given.transpose(0, 3, 1, 2)) for n, given in normalised.items()}


def _variants(ways, given: dict[int, np.ndarray]) -> dict[str, Callable[[], Any]]:
    return {
        f"{name}|{count}": functools.partial(run, of_count)
        for name, run in ways.items()
        for count, of_count in given.items()
    }


def prepare(size: str, folder: epath.Path) -> int:
    """Writes the model in every format below `folder`; returns the image size."""
    import logging
    import warnings

    import transformers

    from benchmarks import interop
    from grain_jax import config as config_lib
    from grain_jax import export, inference
    from grain_jax.convert import huggingface
    from grain_jax.runtime import checkpoint

    model = config_lib.model_from_dict(recipe.model(size).to_dict())
    params = interop.perturbed(model)
    checkpoint.save_model(folder / "ours", model, params)
    huggingface.to_hf(folder / "ours", folder / "hf")
    module = transformers.AutoModel.from_pretrained(str(folder / "hf"), trust_remote_code=True)
    logging.getLogger("onnxscript").setLevel(
        logging.ERROR
    )  # it logs each expression that it does not fold
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of the exporter itself
        module.eval().export_onnx(str(folder / "hf"))
    export.export_model(inference.Predictor(model, params), folder / "exported", ("cpu",))
    return model.image.image_size


def main() -> int:
    """Prints a table for each size; the exit status is 1 if outputs differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["S/16", "B/16"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--json")
    args = parser.parse_args()
    machine = side_by_side.machine("jax", "torch", "onnxruntime", "transformers")
    print(side_by_side.on(machine))
    rows, worst = [], 0.0
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as scratch:
            given = dict(folder=scratch, batches=args.batches)
            given["size"] = prepare(size, epath.Path(scratch))
            sides = {"JAX": jax_side, "torch": torch_side, "onnx": onnx_side}
            timings = side_by_side.measure(
                {n: (s, given) for n, s in sides.items()}, turns=args.turns
            )
        print(f"\n{size:22} {'images':>8} {'ms an image: median (least - most)':>36} {'error':>9}")
        for name, timing in timings.items():
            way, _, count = name.partition(" ")[2].partition("|")
            ours = timings[f"JAX grain_jax.load|{count}"].value
            error = max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(timing.value, ours))
            worst = max(worst, float(error))
            milliseconds = [1e3 * s / int(count) for s in timing.seconds]
            rows.append(dict(size=size, way=way, pictures=int(count), milliseconds=milliseconds))
            shown = side_by_side.spread(milliseconds, digits=1)
            print(f"{way:22} {count:>8} {shown:>36} {error:9.1e}", flush=True)
    side_by_side.write(args.json, dict(machine=machine, rows=rows, worst_error=worst))
    return 0 if worst < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
