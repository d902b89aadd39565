"""Time to the first batch at step 0 and near the end of an epoch of 100,000 tiny records.

  python -m benchmarks.first_batch [--records 100000] [--shards 128] [--batch-size 256] [--turns 5] [--json OUT.json]

A resumed run reads no record before its current block, so both times should be equal. Each is the median over new
iterators in one process, in turns, after TensorFlow has warmed up.
"""

import functools
import io
import tempfile
import time

import PIL.Image
from etils import epath
from grain_jax.data import example, tfds_writer

from benchmarks import harness
from grain_jax import config as config_lib
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


def first_batch(config: config_lib.Config, step: int) -> None:
    """Makes an iterator at the step and takes its first batch."""
    batches = records.batches(config, start_step=step)
    next(batches)
    batches.close()


def main() -> None:
    """Prints the table; writes it as JSON on request."""
    args = harness.arguments(__doc__, records=100_000, shards=128, batch_size=256, turns=5)
    machine, count = harness.machine("tensorflow-cpu"), args.records
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        make_records(epath.Path(folder), count, args.shards)
        print(f"made {count} records in {time.monotonic() - began:.0f} s", flush=True)
        keys = {"batch_size": args.batch_size, "model.image.image_size": 16, "input.lanes": 16}
        keys |= {"input.data_dir": folder, "input.name": "tiny_records"}
        keys |= {"text.pack_group": 16, "text.pack_rows": 12}
        keys |= {"total_steps": None, "total_epochs": 1.0}
        config = harness.config("tiny", keys)
        steps = {"step 0": 0, "near the end of the epoch": count // args.batch_size - 2}
        runs = {name: functools.partial(first_batch, config, step) for name, step in steps.items()}
        timings = harness.in_turns(runs, turns=args.turns)
    table = harness.Table(dict(what="28", step=">6", seconds=">24.2f"))
    for name, timing in timings.items():
        table.add(what=name, step=steps[name], seconds=timing.seconds)
    harness.write(args.json, vars(args) | dict(machine=machine, rows=table.rows))


if __name__ == "__main__":
    main()
