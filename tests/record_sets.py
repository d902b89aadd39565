"""Makes small annotation files, images and record sets for tests, and reads batches of them."""

import contextlib
import itertools
import json

import jax
import numpy as np
import PIL.Image

from grain_jax import config as config_lib
from grain_jax.config import recipe
from grain_jax.data import build


def picture(number, size=(16, 12)):
    """An image with a smooth, unique pattern; its first pixel tells its number."""
    y, x = np.mgrid[: size[1], : size[0]]
    pixels = np.stack([x * 9 + number, y * 7 + number, (x + y) * 3], axis=-1) % 256
    pixels[0, 0] = (number % 256, number // 256, 7)
    return PIL.Image.fromarray(pixels.astype(np.uint8))


def annotation(number, size=(16, 12)):
    """A line with two web captions, a synthetic one and 0 to 3 regions."""
    width, height = size
    boxes = [[0, 0, width / 2, height], [width / 2, 1, width, height - 1], [1, 1, 5, 5]]
    return {
        "image": f"{number:05d}.png",
        "caption": f"first web text of {number}",
        "captions": [f"second web text of {number}"],
        "synthetic_caption": f"synthetic text of {number}",
        "regions": [
            {"box": box, "description": f"the upper part {i} of {number}", "score": 0.5 + 0.1 * i}
            for i, box in enumerate(boxes[: number % 4])
        ],
        "id": f"id{number}",
    }


def write_annotations(folder, count, size=(16, 12)):
    """`count` images and their A.jsonl in `folder`; returns the lines as dicts."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [annotation(number, size) for number in range(count)]
    for number, line in enumerate(lines):
        picture(number, size).save(folder / line["image"])
    (folder / "A.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def build_set(folder, output, *arguments, name="tiny_set", lines="A.jsonl"):
    """Runs data.build of a file of lines in the folder; returns its exit status."""
    inputs = [f"--annotations={folder / lines}", f"--images={folder}"]
    return build.main([*inputs, f"--output={output}", f"--name={name}", *arguments])


def config(
    output, *, seed=0, batch_size=8, lanes=4, pack_group=2, pack_rows=4, size=16, name="tiny_set", **inputs
):
    """A tiny config that reads the set."""
    values = recipe.base("tiny")
    values.seed = seed
    values.total_steps = 10
    values.optim.warmup_steps = 1
    values.batch_size = batch_size
    values.model.image.image_size = size
    values.input.update(dict(data_dir=str(output), name=name, lanes=lanes) | inputs)
    values.text.update(dict(pack_group=pack_group, pack_rows=pack_rows))
    return config_lib.from_dict(values)


def join(parts):
    """The batch of the images of several, one after the other."""
    return jax.tree.map(lambda *fields: np.concatenate(fields), *parts)


def assert_batches_equal(got, expected):
    """Every field, exactly."""
    for name, a, b in zip(expected._fields, got, expected, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def take(config, count, **arguments):
    """The first `count` batches of the records of a config."""
    from grain_jax.input_pipeline import records

    return list(itertools.islice(records.batches(config, **arguments), count))


def numbers(batch):
    """Which image each row is: its first pixel tells."""
    return batch.image[:, 0, 0].astype(int) @ [1, 256, 0]


@contextlib.contextmanager
def opened_shards(monkeypatch):
    """Inside, a list of the shards that are opened, in order."""
    import tensorflow as tf

    opened, real = [], tf.data.TFRecordDataset

    def watched(paths, **arguments):
        def note(x):
            opened.extend(p.decode() for p in x)
            return x

        return real(tf.numpy_function(note, [paths], tf.string), **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(tf.data, "TFRecordDataset", watched)
        yield opened


def write_shard(path, records):
    """A shard of these serialized records."""
    import tensorflow as tf

    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            writer.write(record)
