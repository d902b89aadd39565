"""Time to the first batch at step 0 and near the end of an epoch of 100,000 tiny records.

  python -m benchmarks.first_batch [--records 100000] [--json OUT.json]

A resumed run reads no record before its current block, so both times should be equal. Each is the median over new
iterators in one process, after TensorFlow has warmed up.
"""

import argparse
import io
import statistics
import tempfile
import time

import PIL.Image
from etils import epath
from grain_jax.data import example, tfds_writer

from benchmarks import side_by_side
from grain_jax import config as config_lib
from grain_jax import recipe
from grain_jax.input_pipeline import records


def make_records(output: epath.Path, count: int, num_shards: int) -> None:
    """Writes `count` records of one 16 x 16 image each, without intermediate files."""
    file = io.BytesIO()
    PIL.Image.linear_gradient("L").resize((16, 16)).convert("RGB").save(file, "JPEG")
    region = {"bbox": (0.1, 0.1, 0.6, 0.7), "description": "a long orange beak", "score": 0.9}
    tfds_writer.write(
        output / "tiny_records" / example.VERSION,
        examples=(
            {
                "id": f"{number:08d}",
                "image": file.getvalue(),
                "captions": [f"a bird, number {number}, on a branch in the morning"],
                "synthetic_caption": "a small bird with a long orange beak",
                "regions": [region] * (number % 6),
            }
            for number in range(count)
        ),
        encoding_format=example.Encoding("original").tfds_format,
        metadata={},
        num_shards=num_shards,
    )


def config(output: epath.Path, batch_size: int) -> config_lib.Config:
    """A config that reads these records."""
    values = recipe.base("tiny")
    values.total_epochs = 1.0
    values.optim.warmup_steps = 1
    values.batch_size = batch_size
    values.model.image.image_size = 16
    values.input.update(dict(data_dir=str(output), name="tiny_records"))
    values.text.update(dict(pack_group=16, pack_rows=12))
    return config_lib.from_dict(values)


def first_batch_seconds(run: config_lib.Config, step: int) -> float:
    """Seconds from the creation of the iterator to its first batch."""
    start = time.monotonic()
    batches = records.batches(run, start_step=step)
    next(batches)
    seconds = time.monotonic() - start
    batches.close()
    return seconds


def main() -> None:
    """Prints the table; writes it as JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--shards", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=epath.Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        output = epath.Path(folder)
        start = time.monotonic()
        make_records(output, args.records, args.shards)
        print(f"made {args.records} records in {time.monotonic() - start:.0f} s", flush=True)
        run = config(output, args.batch_size)
        first_batch_seconds(run, 0)  # TensorFlow warms up
        steps = {"step 0": 0, "near the end of the epoch": args.records // args.batch_size - 2}
        seconds = {name: [] for name in steps}
        for _ in range(args.repeats):  # in turns: both see the same load of the machine
            for name, step in steps.items():
                seconds[name].append(first_batch_seconds(run, step))
    rows = [
        dict(what=name, step=steps[name], median=statistics.median(s), least=min(s), most=max(s))
        for name, s in seconds.items()
    ]
    print(f"{'first batch at':28} {'step':>6} {'median s':>9} {'least':>7} {'most':>7}")
    for row in rows:
        print(
            f"{row['what']:28} {row['step']:6} {row['median']:9.2f} {row['least']:7.2f} {row['most']:7.2f}"
        )
    side_by_side.write(args.json, dict(vars(args) | {"json": None}, rows=rows))


if __name__ == "__main__":
    main()
