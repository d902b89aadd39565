"""Do torch, transformers and ONNX Runtime give our outputs, and how long does a picture take in each?

    python -m benchmarks.interop [--sizes S/16 B/16 L/14] [--pictures 8] [--repeats 5] [--json OUT.json]

For each size a model with random weights, of which every one counts, goes through to-torch and to-hf
(their parity reports are printed), torch.compile and ONNX. Then all of them take turns with the same
pictures in this process, on the same cores, in float32: image embedding, regions and boxes. The last
table has the errors of the conversions, max|a-b| / max|b|.
"""

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from configs import common
from grain_jax import checkpoint, inference
from grain_jax import config as config_lib
from grain_jax.convert import huggingface, parity
from grain_jax.convert import torch as reference
from grain_jax.models import grain


def perturbed(model: config_lib.Model, seed: int = 0) -> Any:
    """Random parameters as numpy arrays: no zeros and ones as fresh weights have, which hide errors.

    They are scaled so that activations stay in bounds while texts and queries differ.
    """
    size, rows = model.image.image_size, np.zeros((1, 1, model.text.context_length), np.int32)

    def everything(module, image):
        embeds = module.encode_image(image), module.encode_text(rows, rows, rows, rows[0, :, :2])
        bias = module.logit_bias if model.logit_bias_init is not None else 0
        return embeds, module.logit_scale, bias

    init = lambda key: grain.GRAIN(model).init(
        key, np.zeros((1, size, size, 3), np.float32), method=everything
    )
    shapes = jax.eval_shape(init, jax.random.key(0))["params"]
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name, shape = jax.tree_util.keystr(path, simple=True, separator="/"), leaf.value.shape
        noise = rng.standard_normal(shape, np.float32)
        if name == "logit_scale":
            return np.float32(2.5)
        if name.endswith("/scale"):
            return 1 + noise / 5
        if name.endswith("/kernel"):
            layer = shape[1:] if "/blocks/" in name else shape
            inputs = np.prod(layer[:-1]) if name.endswith("out/kernel") else layer[0]
            return noise / np.float32(np.sqrt(inputs))
        return noise if name.endswith("query_embed") else noise / 5

    return jax.tree_util.tree_map_with_path(draw, shapes, is_leaf=lambda x: hasattr(x, "value"))


def image_sides(
    folder: epath.Path, predictor: inference.Predictor, pictures: np.ndarray
) -> dict[str, Callable[[], tuple[np.ndarray, ...]]]:
    """Each side as a function that gives image_embed, region_embed and boxes_xyxy of `pictures`."""
    import onnxruntime
    import torch
    import transformers

    module = transformers.AutoModel.from_pretrained(str(folder), trust_remote_code=True).eval()
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # what it does not fold, line by line
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        module.export_onnx(str(folder))
    session = onnxruntime.InferenceSession(str(folder / "image.onnx"))
    nchw = np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))
    pixels = torch.tensor(nchw)
    half = sys.modules[type(module).__module__].ImageHalf(module).eval()
    compiled = torch.compile(half)

    def jax_side():
        image, regions = predictor.encode_image_and_regions(pictures)
        return image, regions.embed, regions.boxes_xyxy

    def torch_side(run):
        with torch.no_grad():
            return tuple(output.numpy() for output in run(pixels))

    return {
        "JAX": jax_side,
        "torch": lambda: torch_side(half),
        "torch.compile": lambda: torch_side(compiled),
        "ONNX Runtime": lambda: tuple(session.run(None, {"pixel_values": nchw})),
    }


def measure(size: str, pictures: int, repeats: int) -> dict[str, Any]:
    """Parity and milliseconds a picture for one size; the reports are printed on the way."""
    model = config_lib.model_from_dict(common.model(size).to_dict())
    params = perturbed(model)
    with tempfile.TemporaryDirectory() as scratch:
        root = epath.Path(scratch)
        checkpoint.save_model(root / "ours", model, params)
        print(f"\n== {size}", flush=True)
        reports = [reference.convert_back(root / "ours", root / "x.pth.tar")]
        (root / "x.pth.tar").unlink()
        reports.append(huggingface.to_hf(root / "ours", root / "hf"))
        print(*(report.text for report in reports), sep="\n\n", flush=True)
        errors = {
            command: {c.name: c.error for c in report.comparisons}
            for command, report in zip(("to-torch", "to-hf"), reports)
        }
        ok = all(report.ok for report in reports)
        if not repeats:
            return dict(size=size, ok=ok, errors=errors)
        given = parity.inputs(model.image.image_size, 100, 10, count=pictures).pictures
        sides = image_sides(root / "hf", inference.Predictor(model, params), given)
        names = ("image_embed", "region_embed", "boxes_xyxy")
        first = {side: dict(zip(names, run())) for side, run in sides.items()}
        times: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(repeats):
            for side, run in sides.items():
                began = time.perf_counter()
                run()
                times[side].append(1000 * (time.perf_counter() - began) / pictures)
    rows = {}
    print(f"\n{'side':15} {'ms/picture':>10} {'fastest':>8} {'worst error':>12}")
    for side, taken in times.items():
        worst = max(parity.compare(first["JAX"], first[side]), key=lambda c: c.error)
        ok = ok and worst.ok
        rows[side] = dict(median=statistics.median(taken), fastest=min(taken), error=worst.error)
        print(
            f"{side:15} {rows[side]['median']:10.1f} {min(taken):8.1f} {worst.error:12.2e}",
            flush=True,
        )
    return dict(size=size, ok=ok, errors=errors, sides=rows)


def main() -> int:
    """Prints the reports and the tables; the exit status is 1 where outputs differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["S/16", "B/16", "L/14"])
    parser.add_argument("--pictures", type=int, default=8, help="pictures a call")
    parser.add_argument("--repeats", type=int, default=5, help="0: the conversions' errors alone")
    parser.add_argument("--json", help="file to write the figures to")
    args = parser.parse_args()
    print(f"device: {jax.devices()[0].device_kind}, jax {jax.__version__}, ", end="")
    print(reference.torch_versions())
    results = [measure(size, args.pictures, args.repeats) for size in args.sizes]
    outputs = ("image_embed", "text_embed", "region_embed", "boxes_xyxy")
    print(f"\n{'size':6}{'command':10}", *(f"{name:>13}" for name in outputs))
    for result in results:
        for command, errors in result["errors"].items():
            print(f"{result['size']:6}{command:10}", *(f"{errors[name]:13.2e}" for name in outputs))
    if args.json:
        epath.Path(args.json).write_text(json.dumps(results, indent=2) + "\n")
    return 0 if all(result["ok"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
