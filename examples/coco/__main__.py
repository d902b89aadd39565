"""Adds regions to a published model on COCO, and measures them on classes that it has not seen:

    python -m examples.coco --start hf://google/siglip2-base-patch16-224 --workdir runs/coco \
        --refcoco refcoco --topology h100:8 --config.batch_size=256

TFDS prepares coco/2017. The run trains on the boxes of the 48 seen classes (seen.txt). Detection is measured
on the 65 classes of open-vocabulary papers, on the images of val2017 that have one. `--refcoco` is a folder
with refs(unc).p and instances.json: grounding is measured on the splits of RefCOCO, whose images are not
trained on. The same command goes on after an interruption; WORKDIR/results.md has the table.
"""

import argparse
import collections
import io
import json
import pathlib
import shlex
import statistics
import subprocess
import sys
from collections.abc import Collection, Mapping
from typing import Any

import PIL.Image

from grain_jax.core import atomic
from grain_jax.data.sources import base, refcoco

NAME, TFDS_SET = "coco_seen", "coco/2017"
SPLITS = ("val", "testA", "testB")  # of RefCOCO
FOLDER = pathlib.Path(__file__).parent
# Bansal et al. 2018, Zareian et al. 2021.
CLASSES = {x: (FOLDER / f"{x}.txt").read_text().split() for x in ("seen", "unseen")}
ROWS = {  # of the table: title -> file, keys of a result
    "AP50 of the 48 seen classes": ("detection.json", "seen", "ap50"),
    "AP50 of the 17 unseen classes": ("detection.json", "unseen", "ap50"),
    "AP50 of all 65": ("detection.json", "ap50"),
} | {f"RefCOCO {x}, Acc@0.5": (f"refcoco_{x}.json", "phrase_acc50") for x in SPLITS}


def write_split(
    builder: Any,
    split: str,
    folder: pathlib.Path,
    classes: Collection[str],
    apart: Mapping[int, str] | None = None,
) -> None:
    """Writes `images` with an object of these classes, and instances.json in COCO's form.

    The images with an id in `apart` are written to its path, and nowhere else.
    """
    import tensorflow_datasets as tfds

    names, apart = builder.info.features["objects"]["label"].names, apart or {}
    content: dict[str, list[Any]] = collections.defaultdict(list)
    content["categories"] = [dict(id=i, name=x) for i, x in enumerate(names) if x in classes]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    examples = builder.as_dataset(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    for example in tfds.as_numpy(examples):
        number, file = int(example["image/id"]), pathlib.Path(example["image/filename"].decode())
        if number in apart:
            pathlib.Path(apart[number]).write_bytes(example["image"])
            continue
        width, height = PIL.Image.open(io.BytesIO(example["image"])).size
        objects = example["objects"]
        columns = (objects[key].tolist() for key in ("label", "bbox", "is_crowd", "area"))
        rows = [row for row in zip(*columns, strict=True) if names[row[0]] in classes]
        if all(is_crowd for _, _, is_crowd, _ in rows):
            continue
        (folder / "images" / file.name).write_bytes(example["image"])
        content["images"].append(dict(id=number, file_name=file.name, width=width, height=height))
        for label, (y1, x1, y2, x2), is_crowd, area in rows:
            box = [x1 * width, y1 * height, (x2 - x1) * width, (y2 - y1) * height]
            content["annotations"].append(
                dict(id=len(content["annotations"]) + 1, image_id=number, category_id=label)
                | dict(bbox=box, iscrowd=int(is_crowd), area=area)
            )
    atomic.write_text(folder / "instances.json", json.dumps(content))


def prepare(data_dir: str | None, workdir: pathlib.Path, refs: list[str]) -> None:
    """Writes `train` and `val`, and the images of the splits of RefCOCO below `refcoco`."""
    import tensorflow_datasets as tfds

    builder = tfds.builder(TFDS_SET, data_dir=data_dir)
    builder.download_and_prepare()
    apart = {}
    for split in SPLITS if refs else ():
        for entry in refcoco.RefCoco().entries(base.Options("", tuple(refs), split)):
            if isinstance(entry, base.Annotation):  # COCO_train2014_000000000009.jpg
                number = int(pathlib.Path(entry.image).stem.rpartition("_")[2])
                apart[number] = str(workdir / "refcoco" / entry.image)
    (workdir / "refcoco").mkdir(parents=True, exist_ok=True)
    write_split(builder, "train", workdir / "train", CLASSES["seen"], apart)
    write_split(builder, "validation", workdir / "val", [*CLASSES["seen"], *CLASSES["unseen"]])


def table(workdir: pathlib.Path) -> str:
    """What was measured, as Markdown; a row without its file is left out."""
    read = lambda name: json.loads((workdir / name).read_text())
    rows = []
    for title, (file, *keys) in ROWS.items():
        if (workdir / file).exists():
            value: Any = read(file)
            for key in keys:
                value = value[key]
            rows.append(f"| {title} | {100 * value:.1f}% |")
    lines = (workdir / "run" / "metrics.jsonl").read_text().splitlines()
    speeds = [json.loads(line).get("images_per_second", 0) for line in lines]
    batch_size = read("run/config.json")["batch_size"]
    step = batch_size / statistics.median([x for x in speeds if x])
    rows.append(f"| step of {batch_size} images, median | {1000 * step:.4g} ms |")
    if (workdir / "plan.json").exists():
        plan = read("plan.json")
        planned = plan["batch_size"] / plan["images_per_second_at_most"]
        rows.append(f"| at best, by the plan for {plan['topology']} | {1000 * planned:.4g} ms |")
    return "\n".join(["| measured | value |", "|---|---:|", *rows, ""])


def command(*words: Any) -> None:
    """Runs `grain-jax WORDS`, which it prints first. Raises SystemExit if it fails."""
    print("grain-jax", shlex.join(map(str, words)), flush=True)
    if status := subprocess.run([sys.executable, "-m", "grain_jax", *map(str, words)]).returncode:
        sys.exit(status)


def main() -> None:
    """Prepares, trains, measures, and prints the table."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m examples.coco", None, __doc__, formatter_class=raw)
    parser.add_argument("--start", required=True, help="a model with two towers")
    parser.add_argument("--workdir", type=pathlib.Path, required=True, metavar="DIR")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of TFDS")
    parser.add_argument("--refcoco", type=pathlib.Path, metavar="DIR", help="refs and instances.json")
    parser.add_argument("--topology", metavar="CHIP:SHAPE", help="also plan the run for these chips")
    parser.add_argument("--size", type=int, default=224, help="pixels that images are stored at")
    args, overrides = parser.parse_known_args()
    workdir, run, val = args.workdir, args.workdir / "run", args.workdir / "val"
    refs = [] if args.refcoco is None else [*map(str, args.refcoco.glob("refs(*).p"))]
    refs += [str(pathlib.Path(refs[0]).with_name("instances.json"))] if refs else []
    if args.refcoco and not refs:
        parser.error(f"{args.refcoco}: got no refs(...).p, expected one beside instances.json")
    if not (val / "instances.json").exists():
        prepare(args.data_dir, workdir, refs)
    if not (workdir / "records" / NAME).exists():
        train = workdir / "train"
        files = ["--annotations", train / "instances.json", "--images", train / "images"]
        files += ["--store-size", args.size, "--encoding", "jpeg:95", "--output", workdir / "records"]
        text = ["--label-text", "a photo of a {}"]
        command("build", "--source", "coco", *files, "--name", NAME, *text)
    data = f"--config.input.data_dir={workdir / 'records'}", f"--config.input.name={NAME}"
    config = ["--config", f"regions:{args.start}", *data, *overrides]
    if args.topology and not (workdir / "plan.json").exists():
        command("plan", *config, "--topology", args.topology, "--output", workdir / "plan.json")
    command("train", *config, "--workdir", run)
    files = ["--annotations", val / "instances.json", "--images", val / "images"]
    files += ["--seen", FOLDER / "seen.txt"]
    result = workdir / "detection.json"
    if not result.exists():
        command("evaluate", "detection", "--checkpoint", run, *files, "--output", result)
    for split in SPLITS if refs else ():
        result, lines = workdir / f"refcoco_{split}.json", workdir / f"refcoco_{split}"
        if result.exists():
            continue
        images = ["--images", workdir / "refcoco"]
        source = ["--source", "refcoco", "--annotations", *refs, "--split", split]
        command("annotate", *source, "--passes", "none", *images, "--output", lines)
        files = ["--annotations", lines / "A.jsonl", *images]
        command("evaluate", "grounding", "--checkpoint", run, *files, "--output", result)
    atomic.write_text(workdir / "results.md", table(workdir))
    print(table(workdir))


if __name__ == "__main__":
    main()
