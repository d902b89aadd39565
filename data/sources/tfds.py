"""A TFDS set in a folder, also one of grain-jax build; a shard is a range of its examples.

Captions are the features `caption`, `captions` and `text`; regions are read as data/SCHEMA.md has them.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, ClassVar

from etils import epath, epy

from grain_jax.core import regular_file
from grain_jax.data.sources import base, join

with epy.lazy_imports():  # slow to start
    import tensorflow as tf
    import tensorflow_datasets as tfds


class Tfds:
    """A `base.Source` of a TFDS set; a shard is a range of its examples."""

    images_are_files: ClassVar[bool] = False

    def shards(self, options: base.Options) -> list[base.SourceShard]:
        """Ranges of `options.shard_size` examples of the split."""
        builder = _builder(options.images)
        split = options.split or "train"
        base.check_split(options.images, split, builder.info.splits)
        features = builder.info.features
        known = features if isinstance(features, tfds.features.FeaturesDict) else {}
        if not ("image" in known and isinstance(known["image"], tfds.features.Image)):
            raise base.SourceError(f"{options.images}: has {features}, expected a feature image")
        total, size = builder.info.splits[split].num_examples, options.shard_size
        shared = {"directory": str(builder.data_dir), "split": split}
        return [
            base.SourceShard(f"{split}-{start:09d}-{stop:09d}", shared | {"start": start, "stop": stop})
            for start in range(0, total, size)
            for stop in [min(start + size, total)]
        ]

    def read(self, shard: base.SourceShard) -> Iterator[base.Annotation | base.Fault]:
        """The range's images, as they are stored. Raises SourceError: its features cannot be read."""
        split, start, stop = (shard.arguments[name] for name in ("split", "start", "stop"))
        folder = shard.arguments["directory"]
        try:
            examples = _builder(folder).as_dataset(
                split=tfds.core.ReadInstruction(split, from_=start, to=stop, unit="abs"),
                decoders={"image": tfds.decode.SkipDecoding()},
                # One file after another, so that an index has the same example whatever the range.
                read_config=tfds.ReadConfig(interleave_cycle_length=1),
            )
        except Exception as error:  # TFDS raises all kinds if its features do not fit each other
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            expected = "expected the features of its records"
            raise base.SourceError(f"{folder}/features.json: {reason}, {expected}") from None
        index = start
        try:
            for index, example in enumerate(tfds.as_numpy(examples), start):
                ending = "png" if example["image"].startswith(b"\x89PNG") else "jpg"
                yield join.join(_annotation(f"{split}/{index:09d}.{ending}", example))
        except tf.errors.OpError as error:
            reason = error.message.splitlines()[0][:200]
            detail = f"{reason}; what follows it in this part is lost"
            yield base.Fault(f"{split}/{index:09d}", "damaged shard", detail)


def directory(folder: epath.PathLike) -> epath.Path:
    """The set's own folder: `folder`, or the newest version in it. Raises SourceError."""
    root = epath.Path(folder)
    inside = root.iterdir() if root.is_dir() else ()
    versions = [path for path in inside if re.fullmatch(r"\d+\.\d+\.\d+", path.name)]
    versions.sort(key=lambda path: [int(x) for x in path.name.split(".")], reverse=True)
    for path in (root, *versions):
        if (path / "dataset_info.json").exists():
            return path
    expected = "expected a TFDS set: NAME or NAME/1.0.0"
    raise base.SourceError(f"{folder}: got no dataset_info.json there, {expected}")


def _builder(folder: epath.PathLike) -> Any:
    """TFDS's builder of a set. Raises SourceError: damaged, or classes of other modules, which it imports."""
    where = directory(folder)
    for path in (where / "dataset_info.json", where / "features.json"):
        content = regular_file.read_json(path, dict[str, Any], "a description of a TFDS set")
        for name in re.findall(r'"pythonClassName": "?([^",}]*)', json.dumps(content)):
            if not name.startswith("tensorflow_datasets."):
                raise base.SourceError(f"{path}: names the class {name!r:.60}, expected TFDS's own")
    try:
        builder = tfds.builder_from_directory(where)
        _ = [split.filepaths for split in builder.info.splits.values()]  # TFDS checks them now
        return builder
    except Exception as error:  # wrong types in either file raise errors of all kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise base.SourceError(f"{where}: dataset_info.json or features.json is damaged ({reason})") from None


def _annotation(image: str, example: dict[str, Any]) -> base.Annotation:
    captions = []
    for name in ("caption", "captions", "text"):
        value = example.get(name, ())
        value = value.get("text", ()) if isinstance(value, dict) else value
        captions += [value] if isinstance(value, bytes) else list(value)
    columns, regions = example.get("regions", {}), []
    if isinstance(columns, dict) and columns.keys() >= {"bbox", "description", "score"}:
        boxes, scores = columns["bbox"].tolist(), columns["score"].tolist()
        negatives = columns.get("negatives")  # ragged: a row for each region
        rows = negatives.to_list() if negatives is not None else [()] * len(boxes)
        for values in zip(boxes, columns["description"], scores, rows, strict=True):
            (y1, x1, y2, x2), description, score, texts = values
            texts = tuple(map(_decoded, texts))
            regions.append(base.Region((x1, y1, x2, y2), _decoded(description), score, texts))
    return base.Annotation(
        image,
        [_decoded(caption) for caption in captions],
        _decoded(example.get("synthetic_caption", b"")),
        regions,
        id=_decoded(example["id"]) if isinstance(example.get("id"), bytes) else None,
        encoded=example["image"],
        drawn_on=base.SHARES,
    )


def _decoded(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else ""
