"""Compares `grain-jax embed` with open_clip and transformers: image files to embeddings by the same weights.

    python -m benchmarks.embed [--count 128] [--turns 5] [--patch 16] [--json OUT.json]

Makes N square JPEGs and a random CLIP B/16 of transformers, which our commands convert for `embed` and for
open_clip. A turn embeds all images; the embeddings of all sides must agree. The others read by a DataLoader
of two workers, each with its own preprocessing by Pillow.
"""

import contextlib
import functools
import io
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from benchmarks import harness, made, stopwatch

SIDE = 375  # pixels, of the square images
BATCH = 64  # of the others; ours takes its own
TOLERANCE = 2e-2  # ours stores float16, and the three resize a little differently
PACKAGES = "jax torch transformers open_clip_torch pillow numpy".split()


def our_side(folder: str, checkpoint: str) -> dict[str, Callable]:
    """The command without the loading of the model: lists, reads, encodes and writes files."""
    from grain_jax import inference
    from grain_jax.data import job, sources
    from grain_jax.data.embed import output, pipeline

    predictor = inference.load(checkpoint)
    encode = pipeline.encoder(predictor)

    def turn() -> np.ndarray:
        with tempfile.TemporaryDirectory() as written, contextlib.redirect_stderr(io.StringIO()):
            options = sources.Options(folder, (folder,), "", f"{written}/lists", 4096)
            shards = list(sources.shards("folder", options))
            settings = dict(embed_dim=predictor.model.embed_dim, regions=False, shard_size=4096)
            result = output.Embeddings(job.Output(written), settings, shards, folder)
            pipeline.run(result, range(len(shards)), encode, size=made.SIZE, threads=made.WORKERS)
            return np.load(str(result.path("img_emb", 0))).astype(np.float32)

    return {"": turn}


def torch_side(folder: str, checkpoint: str, kind: str) -> dict[str, Callable]:
    """A model of open_clip or transformers behind a DataLoader."""
    import torch
    import torchvision

    torch.set_num_threads(made.WORKERS)
    if kind == "open_clip":
        import open_clip

        model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{checkpoint}")
        encode = model.eval().encode_image
    else:
        import transformers

        model = transformers.CLIPModel.from_pretrained(checkpoint).eval()
        processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": made.SIZE})
        encode = lambda pixels: model.get_image_features(pixel_values=pixels).pooler_output
        transform = lambda image: processor(image, return_tensors="pt")["pixel_values"][0]
    dataset = torchvision.datasets.ImageFolder(folder, transform)
    loader = torch.utils.data.DataLoader(
        dataset, BATCH, num_workers=made.WORKERS, persistent_workers=True, multiprocessing_context="fork"
    )

    def turn() -> np.ndarray:
        with torch.inference_mode():
            embeds = torch.cat([encode(batch) for batch, _ in loader])
            return torch.nn.functional.normalize(embeds, dim=-1).numpy()

    return {"": turn}


def make(folder: epath.Path, count: int, patch: int) -> dict[str, str]:
    """Makes images and a random CLIP in `folder`, for each side; returns the paths."""
    import torch
    import transformers

    from grain_jax.convert import __main__ as convert

    paths = {name: str(folder / name) for name in ("images", "transformers", "ours", "open_clip")}
    (folder / "images" / "made").mkdir(parents=True)
    for number in range(count):
        square = made.image(number).crop((0, 0, SIDE, SIDE))
        square.save(f"{paths['images']}/made/{number:06d}.jpg", "JPEG", quality=made.QUALITY)
    torch.manual_seed(0)
    config = transformers.CLIPConfig(vision_config={"patch_size": patch})
    transformers.CLIPModel(config).save_pretrained(paths["transformers"])
    ours = ["from-hf", "--input", paths["transformers"], "--output", paths["ours"]]
    exported = ["to-open-clip", "--checkpoint", paths["ours"], "--output", paths["open_clip"]]
    for command in (ours, exported):
        if convert.main(command):
            raise SystemExit(f"convert {command[0]} failed")
    return paths


def main() -> None:
    """Makes images and models, checks the embeddings and prints images per second, medians of turns."""
    args = harness.arguments(__doc__, count=128, turns=5, patch=16)
    machine = harness.machine(*PACKAGES, about=f"CLIP B/{args.patch}, float32")
    with tempfile.TemporaryDirectory() as temporary:
        paths = make(epath.Path(temporary), args.count, args.patch)
        folder = paths["images"]
        sides: dict[str, Any] = {"grain-jax embed": (our_side, dict(folder=folder, checkpoint=paths["ours"]))}
        for kind in ("open_clip", "transformers"):
            sides[kind] = (
                functools.partial(torch_side, kind=kind),
                dict(folder=folder, checkpoint=paths[kind]),
            )
        timings = stopwatch.measure(sides, args.turns)
    worst = stopwatch.agree({n: t.value for n, t in timings.items()}, TOLERANCE, "embeddings")
    print(f"embeddings agree within {worst:.1e}")
    rates = {name.strip(): [args.count / s for s in t.seconds] for name, t in timings.items()}
    ours = statistics.median(next(iter(rates.values())))
    table = harness.Table(dict(side="18", images_per_second=">26.2f", ours_times=">10.2f"))
    for name, values in rates.items():
        table.add(side=name, images_per_second=values, ours_times=ours / statistics.median(values))
    harness.write(args.json, dict(machine=machine, rows=table.rows, worst=worst))


if __name__ == "__main__":
    main()
