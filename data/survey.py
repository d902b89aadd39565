"""What a build does with each image, and what it knows about all of them before it writes the set.

A worker takes a shard, checks and encodes its images, and writes the examples to a file, a part. A record
beside it has what the build needs to know about each image: `Prepared`.
"""

import array
import collections
import dataclasses
import hashlib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
from etils import epath

from grain_jax.core import annotations, atomic, errors, images, printable
from grain_jax.core.annotations import Annotation, Fault
from grain_jax.data import duplicates, example, job, sources
from grain_jax.data.arguments import Encoding
from grain_jax.data.sources import base, join

MOST_PRINTED = 20  # faults


class Prepared(NamedTuple):
    """What a worker knows of an image that it has checked; one is sent between processes for every image."""

    number: int  # of its line in A.jsonl; 0 in other sources
    where: str  # "": the source does not say
    faults: tuple[str, ...] = ()
    turned: bool = False
    unknown_keys: tuple[str, ...] = ()
    # Only if there is no fault:
    image: str = ""
    id: str | None = None
    left_out: tuple[str, ...] = ()  # faults of regions
    counts: dict[str, int] = {}
    fingerprint: duplicates.Fingerprint = (0, 0)
    span: tuple[int, int] = (0, 0)  # first byte in the part, end


def prepare(
    shard: sources.SourceShard, *, output: job.Output, encoding: Encoding
) -> tuple[str, list[Prepared]]:
    """Checks the images of a shard and writes their examples to its part, unless an earlier build has.

    Returns: the file of the part, and its images; those without a fault have examples in it.
    """
    name = atomic.digest(json.dumps([shard, dataclasses.asdict(encoding)]).encode())
    file, record = f"parts/{name}", ("records", f"{name}.record")
    if known := output.whole(*record):
        return file, msgspec.convert(known["images"], list[Prepared])
    out, position, digest = [], 0, hashlib.sha256()
    output.path("parts").mkdir(parents=True, exist_ok=True)
    with output.path(file).open("wb") as part:
        for prepared, item, image in _checked(shard):
            if not prepared.faults:
                content = msgspec.msgpack.encode(example.encode(item, image, encoding))
                part.write(content)
                digest.update(content)
                prepared = prepared._replace(span=(position, position + len(content)))
                position += len(content)
            out.append(prepared)
    output.put_record({"digests": {file: digest.hexdigest()}, "images": out}, *record)
    return file, out


def _checked(shard: sources.SourceShard) -> Iterator[tuple[Prepared, Any, Any]]:
    """What is known of each image, and its annotation and pixels unless it has a fault."""
    if shard.source != "annotations":
        for item in sources.read(shard):
            yield _check(Prepared(0, item.where), item)
        return
    folder = epath.Path(shard.arguments["file"]).parent
    source: Any = sources.make(shard.source, shard.options)
    for where, item, faults, unknown_keys in source.checked(shard):
        # A line with a wrong region is left out whole.
        faults += [f"{fault.cause}: {fault.detail}" for fault in getattr(item, "left_out", ())]
        number, keys = int(where.rpartition(":")[2]), tuple(unknown_keys)
        yield _check(Prepared(number, str(folder / where), tuple(faults), unknown_keys=keys), item)


def _check(prepared: Prepared, item: Annotation | Fault) -> tuple[Prepared, Any, Any]:
    """Checks an image, unless its line names none, and clips its boxes."""
    faults, turned = list(prepared.faults), False
    image = join.decode(item) if item.image else None
    if isinstance(image, Fault):
        detail = image.detail.removeprefix(f"{image.image}: ")
        of_line = f"image: got {annotations.show(image.image)}, {detail}"
        faults.append(of_line if prepared.number else _in_words(image))
    elif image is not None:
        turned = images.header(item.encoded).turned
        if not (faults or item.captions or item.synthetic_caption or item.regions):
            faults = [annotations.NO_TEXT]
    if faults:
        return prepared._replace(faults=tuple(faults), turned=turned), None, None
    clipped = [annotations.clip_box(region.box_xyxy, *image.size)[0] for region in item.regions]
    regions = tuple(x._replace(box_xyxy=box) for x, box in zip(item.regions, clipped))
    prepared = prepared._replace(
        turned=turned,
        image=item.image,
        id=item.id,
        left_out=tuple(map(_in_words, item.left_out)),
        counts={
            "boxes_clipped": sum(x.box_xyxy != box for x, box in zip(item.regions, clipped)),
            "regions": len(regions),
            "pixel_boxes": sum(max(box) > base.LARGEST_SHARE for box in clipped),
            "negatives": sum(len(x.negatives) for x in regions),
            "left_out": len(item.left_out),
            "bad_boxes": sum(fault.cause == "bad box" for fault in item.left_out),
        },
        fingerprint=duplicates.fingerprint(item.encoded, image),
    )
    return prepared, item._replace(regions=regions), image


def _in_words(fault: Fault) -> str:
    image = "" if fault.image == fault.where else f"{fault.image}: "
    return f"{image}{fault.cause}: {fault.detail}"


class Survey:
    """All images without a fault, in order, and the faults of the others."""

    def __init__(self, name: str):
        self.name = name  # of the source, or its file
        self.ids: list[str] = []
        self.faults: list[tuple[str, str]] = []  # (where, what)
        self.lines = self.turned = 0  # of all images
        self.regions_written = 0
        self.counts: collections.Counter[str] = collections.Counter()  # as Prepared.counts
        self.pixel_boxes: collections.Counter[str] = collections.Counter()  # of each file with boxes
        self.unknown_keys: collections.Counter[str] = collections.Counter()
        self.fingerprints = array.array("Q")  # exact and near
        self.spans = array.array("Q")  # number of the part, and as Prepared.span
        self._parts: list[str] = []  # their files
        self._number_of_id: dict[str, int] = {}

    @property
    def faulty_lines(self) -> int:
        """Images with at least one fault."""
        return self.lines - len(self.ids)

    @property
    def bad_boxes(self) -> float:
        """The fraction of all boxes that do not fit their images."""
        bad = self.counts["bad_boxes"]
        return bad / max(bad + self.counts["regions"], 1)

    def add(self, part: tuple[str, list[Prepared]]) -> Iterator[Prepared]:
        """Counts the images of the next part and yields them; the first faults go to stderr at once."""
        self._parts.append(part[0])
        for image in part[1]:
            self._add(image)
            yield image

    def _add(self, image: Prepared) -> None:
        self.lines += 1
        self.turned += image.turned
        self.unknown_keys.update(image.unknown_keys)
        number = image.number or self.lines
        where = image.where or f"source {self.name}, image {number}"
        faults, identity = list(image.faults), image.id
        if not faults:
            if identity is None:  # its image's path, unless another line has that image too
                identity = image.image
                if identity in self._number_of_id:
                    identity = f"{image.image}#{number}"
            if identity in self._number_of_id:
                other = f"which line {self._number_of_id[identity]} has already"
                faults = [f"id: got {json.dumps(identity)}, {other}, expected one of its own"]
        for fault in (*faults, *image.left_out):
            self.faults.append((where, fault))
            if len(self.faults) <= MOST_PRINTED:
                print(printable.plain(f"{where}: {fault}"), file=sys.stderr)
        if faults:
            return
        self._number_of_id[identity] = number
        self.ids.append(identity)
        self.counts.update(image.counts)
        if image.counts["regions"]:
            self.pixel_boxes[image.where.rpartition(":")[0]] += image.counts["pixel_boxes"]
        self.fingerprints.extend(image.fingerprint)
        self.spans.extend((len(self._parts) - 1, *image.span))

    def examples(self, indices: Iterable[int], output: job.Output) -> Iterator[dict[str, Any]]:
        """The examples of these images from their parts."""
        entries = ((self.spans[3 * i : 3 * i + 3], self.ids[i]) for i in indices)
        for number, of_part in itertools.groupby(entries, key=lambda pair: pair[0][0]):
            with output.path(self._parts[number]).open("rb") as file:
                for (_, start, stop), identity in of_part:
                    file.seek(start)
                    content = msgspec.msgpack.decode(file.read(stop - start))
                    self.regions_written += len(content["regions"])
                    yield content | {"id": identity}

    def summary(self) -> str:
        """One line about all that was left out or changed."""
        more = len(self.faults) - MOST_PRINTED
        shown = f", {more} of them not shown" if more > 0 else ""
        keys = ", ".join(f"{printable.plain(key, 60)} ({n})" for key, n in self.unknown_keys.most_common())
        count = self.counts
        clipped = f"{count['boxes_clipped']} of {count['regions']} boxes clipped to their image"
        parts = [
            f"{self.faulty_lines} of {self.lines} lines faulty ({len(self.faults)} faults{shown})",
            count["left_out"] and f"{count['left_out']} regions left out",
            count["boxes_clipped"] and clipped,
            keys and f"unknown keys kept out: {keys}",
        ]
        return f"{self.name}: " + "; ".join(filter(None, parts))

    def write_faults(self, path: epath.Path) -> None:
        """One JSON object per fault: where, fault."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps({"where": where, "fault": fault}) + "\n" for where, fault in self.faults)
        atomic.write_text(path, "".join(lines))


class Splits(NamedTuple):
    """The images of each split, as indices."""

    train: np.ndarray
    validation: np.ndarray
    fingerprints: np.ndarray  # uint64 [N, 2] of both
    duplicates: list[dict[str, str]]  # that were left out: a line of duplicates.jsonl each


def divide(surveyed: Survey, *, holdout: float, exclude_duplicates_of: Sequence[str]) -> Splits:
    """Leaves out images that other sets have, and holds out a share of the rest; prints how many.

    The split of an image depends on its file only, so it is the same in each run and in each set. A near copy
    of a held-out image is held out too.

    Raises UserError: nothing is left for one of the splits, or one of the other sets is not there.
    """
    ids, prints = surveyed.ids, np.asarray(surveyed.fingerprints, np.uint64).reshape(-1, 2)
    kept, listed = np.ones(len(ids), bool), []
    for other in exclude_duplicates_of:
        exact, near = duplicates.matches(prints, duplicates.of_set(other))
        for index in np.nonzero(near & kept)[0]:
            kind = "exact" if exact[index] else "near"
            listed.append({"id": ids[index], "kind": kind, "of": str(other)})
        kept &= ~near
    aside = kept & (prints[:, 0] < holdout * 2.0**64)
    while (more := duplicates.matches(prints, prints[aside])[1] & kept & ~aside).any():
        aside |= more
    train, validation = (np.nonzero(chosen)[0] for chosen in (kept & ~aside, aside))
    if not len(train) or (holdout and not len(validation)):
        raise errors.UserError(
            f"--holdout {holdout:g}, {len(exclude_duplicates_of)} sets excluded: of"
            f" {len(ids)} images {len(train)} are left for train and {len(validation)} for"
            " validation, expected at least one; no records were written"
        )
    if listed:
        what = f"{len(listed)} of {len(ids)} images are of other sets and left out"
        print(f"{surveyed.name}: {what}", file=sys.stderr)
    return Splits(train, validation, prints[kept], listed)
