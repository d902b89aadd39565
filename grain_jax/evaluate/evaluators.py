"""What evaluators of one kind of data share (docs/evaluate.md): images with classes, or with annotations."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from etils import epy

from grain_jax.core import errors
from grain_jax.evaluate.base import TEMPLATES, Evaluator, expanduser, key, option

with epy.lazy_imports():
    from etils import epath

    from grain_jax.core import annotations as annotations_lib
    from grain_jax.core import printable
    from grain_jax.evaluate import encode, test_sets
    from grain_jax.runtime import processes


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledImages(Evaluator):
    """Base of the evaluators on images with classes: class folders, or a TensorFlow Dataset (TFDS)."""

    images: str = option("", "Folder with one sub-folder of images per class.", "DIR", required=True)
    tfds: str | None = key(None, "A TFDS dataset instead of images: name or name/config:version.")
    split: str = key("test", "Split of the TFDS dataset.")
    data_dir: str | None = key(None, "Folder of TFDS; None: its default.")
    classes: str | None = key(
        None, "File of class names, or a name in evaluate/classes; None: the dataset's."
    )

    @property
    def data(self) -> tuple[str | None, ...]:
        return super().data if self.tfds is None else ()

    def open(self) -> test_sets.TestSet:
        """The test set; raises the errors of test_sets.ClassFolders or test_sets.TfdsSet."""
        return self.open_other(self.images, self.split)

    def open_other(self, folder: str, split: str) -> test_sets.TestSet:
        """Class folders, or another split of the TFDS dataset, with the same options; raises as `open`."""
        if self.tfds is None:
            return test_sets.ClassFolders(folder, self.classes, self.get)
        if self.images:
            got = f"{self.tfds!r} with images={self.images!r}"
            raise errors.UserError(f"tfds: got {got}, expected one of the two")
        return test_sets.TfdsSet(self.tfds, split, self.data_dir, self.classes, self.get)

    def check(self, model: Any = None) -> int:
        return len(self.open())


class Annotated(NamedTuple):
    """The annotations of a file, and the ones that an evaluation can use."""

    read: annotations_lib.Annotations
    records: list[annotations_lib.Annotation]
    paths: list[epath.Path]  # of the images of `records`


class Gathered(NamedTuple):
    """The images of an evaluation."""

    records: list[annotations_lib.Annotation]  # of the readable images
    seen: encode.Encoded
    counts: dict[str, Any]  # for the result


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnnotatedImages(Evaluator):
    """Base of the evaluators on images with annotations, an A.jsonl (format: docs/annotate.md)."""

    example: ClassVar[str] = "--annotations runs/aviary/test/A.jsonl \\\n    --images runs/aviary/test"
    left_out: ClassVar[str] = "without_regions"  # key of the number of annotations without use
    none_usable: ClassVar[str] = "no line has a region; expected described boxes"  # {option}: its value
    images: str = option("", "Folder that the paths of the annotations start from.", "DIR", required=True)
    annotations: str | None = option(None, "One JSON object per line.", "A.jsonl", required=True)

    def usable(self, record: Any) -> Any:
        """Whether the evaluation can use a core.annotations.Annotation; here those with a region."""
        return record.regions

    def read(self) -> Annotated:
        """The usable annotations. Raises errors.UserError: no such folder, or the file has none of use."""
        if self.annotations is None:
            raise errors.UserError(f"annotations: got nothing, expected a file (A.jsonl) for {self.kind}")
        folder, path = epath.Path(expanduser(self.images)), expanduser(self.annotations)
        if not folder.is_dir():
            expected = "expected the one that the annotations' paths start from"
            raise errors.UserError(f"{folder}: no such folder; {expected}")
        read = annotations_lib.read(path)
        records = [record for record in read.records if self.usable(record)]
        if not records:
            raise errors.UserError(f"{path}: {self.none_usable.format_map(vars(self))}")
        return Annotated(read, records, [folder / record.image for record in records])

    def gather(
        self, predictor: Any, boxes_of: Callable[[Any, tuple[int, int]], Any] | None = None, **embedded: Any
    ) -> Gathered:
        """The usable annotations whose image can be read, and the images encoded; raises as `read`, `encode`.

        Arguments as for `encode.embed`, but `boxes_of` takes an annotation and the size of its image.
        """
        annotated = self.read()
        seen = encode.gather_images(
            predictor,
            annotated.paths,
            label=self.kind,
            batch_size=self.batch_size,
            boxes_of=boxes_of and (lambda i, size: boxes_of(annotated.records[i], size)),
            **embedded,
        )
        counts = {
            "images": len(seen.index),
            self.left_out: len(annotated.read.records) - len(annotated.records),
            "faulty_lines": annotated.read.faulty_lines,
            **encode.report_unreadable(seen.unreadable),
        }
        return Gathered([annotated.records[i] for i in seen.index], seen, counts)

    def check(self, model: Any = None) -> int:
        annotated = self.read()
        lines, unknown = list(annotated.read.faults), annotated.read.unknown_keys.items()
        if lines:  # too many of them are an AnnotationError
            lines.append(f"{self.annotations}: faulty lines left out: {annotated.read.faulty_lines}")
        if unknown:
            named = ", ".join(f"{printable.plain(name, 60)} ({n})" for name, n in unknown)
            lines.append(f"{self.annotations}: unknown keys kept out: {named}")
        for line in () if processes.process_info()[0] else lines:
            print(printable.plain(line), file=sys.stderr)
        if not any(path.exists() for path in annotated.paths):  # usually the first exists
            got = f"none of the {len(annotated.paths)} images of {self.annotations} is there"
            expected = "expected the folder where the annotations' paths start"
            raise errors.UserError(f"{self.images}: {got}; the first: {annotated.paths[0]}; {expected}")
        return len(annotated.records)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithPrompts(Evaluator):
    """Base of the evaluators whose classes are names in prompts, perhaps with descriptions."""

    descriptions: str | None = option(
        None, "File {class name: [description, ...]}; default: classes by names alone.", "D.json"
    )
    templates: str | None = option(None, TEMPLATES, "FILE")

    @property
    def described_by(self) -> str | None:
        """The file of descriptions; None where it is missing and may be."""
        if self.missing != "skip" or epath.Path(expanduser(self.descriptions or "")).exists():
            return self.descriptions
        return None

    @property
    def note(self) -> str:
        if self.descriptions == self.described_by:
            return ""
        return (
            f"{self.descriptions}: not there, expected descriptions of the classes; evaluated by names alone"
        )


def faults_of(*checks: Callable[[], object]) -> list[str]:
    """The lines of all checks that fail."""
    lines = []
    for check in checks:
        try:
            check()
        except (errors.UserError, OSError) as error:
            lines += str(error).split("\n")
    return list(dict.fromkeys(lines))
