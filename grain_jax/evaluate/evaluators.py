"""What evaluators of one kind of data share: images with classes, and images with annotations.

A config imports the module of each of its evaluators, so these load JAX, numpy and TensorFlow where they measure.
docs/evaluate.md describes the protocols and the results. Below, N_low and N_high stand for the 95% interval of a
number N.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeVar

from etils import epy

from grain_jax.config.keys import key
from grain_jax.core import errors
from grain_jax.evaluate.base import Context, Evaluator, expanduser, option

with epy.lazy_imports():
    from etils import epath

    from grain_jax.core import annotations as annotations_lib
    from grain_jax.core import printable
    from grain_jax.evaluate import encode, test_sets
    from grain_jax.runtime import processes

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledImages(Evaluator):
    """Base of the evaluators on images with classes.

    Options: `images`, a folder with one sub-folder per class, or `tfds`, a set of TensorFlow Datasets, with `split`
    and `data_dir`; `classes`, the class names.
    """

    images: str = option(
        "", "Folder with one sub-folder of images per class.", "DIR", required=True
    )
    tfds: str | None = key(None, "A TFDS dataset instead of images: name or name/config:version.")
    split: str = key("test", "Split of the TFDS dataset.")
    data_dir: str | None = key(None, "Folder of TFDS; None: its default.")
    classes: str | None = key(
        None,
        "File of class names, or a name in grain_jax/evaluate/classes; None: the dataset's classes.",
    )

    def faults(self) -> list[str]:
        if self.tfds is None or not self.images:
            return []
        return [f"tfds: got {self.tfds!r} with images={self.images!r}, expected one of the two"]

    @property
    def data(self) -> tuple[str | None, ...]:
        return (self.images,)

    @property
    def files(self) -> tuple[str | None, ...]:
        return (self.classes,)

    def find_data(self) -> None:
        if self.tfds is None:
            super().find_data()
        else:
            test_sets.find_tfds(self.tfds, self.data_dir, self.get)

    def open(self) -> test_sets.TestSet:
        """The test set; raises the errors of test_sets.ClassFolders or test_sets.TfdsSet."""
        return self.open_other(self.images, self.split)

    def open_other(self, folder: str, split: str) -> test_sets.TestSet:
        """Class folders, or another split of the TFDS set, with the same options; raises as `open`."""
        if self.tfds is None:
            return test_sets.ClassFolders(folder, self.classes, self.get)
        return test_sets.TfdsSet(self.tfds, split, self.data_dir, self.classes, self.get)

    def check(self) -> int:
        return len(self.open())


class Annotated(NamedTuple):
    """The annotations of a file, and those of them that an evaluation can use."""

    read: Any  # core.annotations.Annotations
    records: list[Any]  # core.annotations.Annotation
    paths: list[epath.Path]  # of the images of `records`
    images: list[test_sets.Image]


class Gathered(NamedTuple):
    """The images of an evaluation."""

    records: list[Any]  # core.annotations.Annotation, of the readable images
    seen: encode.Encoded
    counts: dict[str, Any]  # for the result


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnnotatedImages(Evaluator):
    """Base of the evaluators on images with annotations.

    Options: `images`, a folder, and `annotations`, the file `A.jsonl` (format: docs/annotate.md).
    """

    example: ClassVar[str] = (
        "--annotations runs/aviary/test/A.jsonl \\\n    --images runs/aviary/test"
    )
    left_out: ClassVar[str] = "without_regions"  # key of the number of annotations of no use
    # The end of the message where no annotation is usable; {option} stands for its value.
    none_usable: ClassVar[str] = "no line has a region; expected described boxes"
    images: str = option(
        "", "Folder that the paths of the annotations start from.", "DIR", required=True
    )
    annotations: str | None = option(
        None, "A.jsonl, with one JSON object per line.", "A.jsonl", required=True
    )

    @property
    def data(self) -> tuple[str | None, ...]:
        return self.annotations, self.images

    @property
    def files(self) -> tuple[str | None, ...]:
        return (self.annotations,)

    @property
    def paths(self) -> tuple[str, str]:
        """`images` and `annotations` with `~` expanded. Raises errors.UserError if `annotations` is None."""
        if self.annotations is None:
            raise errors.UserError(
                f"annotations: got nothing, expected a file (A.jsonl) for {self.kind}"
            )
        return expanduser(self.images), expanduser(self.annotations)

    def usable(self, record: Any) -> Any:
        """Whether the evaluation can use an annotation (core.annotations.Annotation); here those with a region."""
        return record.regions

    def read(self) -> Annotated:
        """The annotations that are usable.

        Raises:
          errors.UserError: no such folder, the file cannot be used, or none is usable.
        """
        images, path = self.paths
        found, folder = annotations_lib.read(path), image_folder(images)
        records = [record for record in found.records if self.usable(record)]
        if not records:
            raise errors.UserError(f"{path}: {self.none_usable.format_map(vars(self))}")
        places = [folder / record.image for record in records]
        return Annotated(found, records, places, list(map(test_sets.of_path, places)))

    def gather(
        self,
        predictor: Any,
        context: Context,
        *,
        regions: bool = True,
        boxes_of: Callable[[Any, tuple[int, int]], Any] | None = None,
    ) -> Gathered:
        """The usable annotations whose image can be read, and these images encoded; raises as `read` and `encode`.

        Args:
          predictor, context: as of `evaluate`.
          regions: whether region embeddings are computed too.
          boxes_of: (annotation, (width, height) in pixels) -> its boxes, xyxy [n, 4] in [0, 1], which are embedded too.
        """
        found = self.read()
        unreadable: dict[str, str] = {}
        seen = encode.gather_images(
            predictor,
            found.images,
            label=self.kind,
            unreadable=unreadable,
            regions=regions,
            boxes_of=boxes_of and (lambda i, size: boxes_of(found.records[i], size)),
            batch_size=context.batch_size,
        )
        counts = self.counts(found, len(seen.index), unreadable)
        return Gathered([found.records[i] for i in seen.index], seen, counts)

    def counts(self, found: Annotated, pictures: int, unreadable: dict[str, str]) -> dict[str, Any]:
        """What every result says of its images, so many of which were read."""
        return {
            "kind": self.kind,
            "pictures": pictures,
            self.left_out: len(found.read.records) - len(found.records),
            "faulty_lines": found.read.faulty_lines,
            **encode.report_unreadable(unreadable),
        }

    def check(self, attempt: Faults | None = None) -> int:
        """As `Evaluator.check`; also reports the faults that `attempt` holds already."""
        attempt, (folder, path) = attempt or Faults(), self.paths
        attempt(image_folder, folder)
        if found := attempt(self.read):
            _report_left_out(path, found.read)
            if not any(place.exists() for place in found.paths):  # usually the first exists
                attempt.found.append(
                    errors.UserError(
                        f"{folder}: none of the {len(found.paths)} images of {path} is there; the first:"
                        f" {found.paths[0]}; expected the folder that the annotations' paths start from"
                    )
                )
        attempt.done()
        return len(found.records) if found else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnnotatedRegions(AnnotatedImages):
    """Base of the evaluators on images whose annotations have boxes with descriptions, of a model with regions."""

    @property
    def needs_regions(self) -> bool:
        return True


def image_folder(path: epath.PathLike) -> epath.Path:
    """The folder that the paths of annotations start from. Raises errors.UserError if there is none."""
    path = epath.Path(path)
    if not path.is_dir():
        raise errors.UserError(
            f"{path}: no such folder; expected the one that the annotations' paths start from"
        )
    return path


def _report_left_out(path: str, read: Any) -> None:
    """Prints on stderr, on the first process, the faulty lines and the unknown keys of a file of annotations."""
    if processes.process_info()[0]:
        return
    lines = list(read.faults)
    if read.faults:  # too many of them are an AnnotationError
        lines.append(f"{path}: faulty lines left out: {read.faulty_lines}")
    if read.unknown_keys:
        named = (f"{printable.plain(key, 60)} ({n})" for key, n in read.unknown_keys.items())
        lines.append(f"{path}: unknown keys kept out: {', '.join(named)}")
    for line in lines:
        print(printable.plain(line), file=sys.stderr)


class Faults:
    """Calls functions and collects their faults, so that all of them are reported at once."""

    def __init__(self) -> None:
        self.found: list[Exception] = []

    def __call__(self, function: Callable[..., T], *arguments: Any) -> T | None:
        try:
            return function(*arguments)
        except (errors.UserError, OSError) as error:
            self.found.append(error)
            return None

    def done(self) -> None:
        """Raises the collected faults, if there are any.

        Raises:
          errors.MissingData: the only fault is one.
          errors.UserError: one line per fault; `__cause__` is the original error if there is only one.
        """
        if len(self.found) == 1 and isinstance(self.found[0], errors.MissingData):
            raise self.found[0]
        if self.found:
            lines = dict.fromkeys(line for error in self.found for line in str(error).split("\n"))
            cause = self.found[0] if len(self.found) == 1 else None
            raise errors.UserError("\n".join(lines)) from cause
