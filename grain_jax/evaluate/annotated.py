"""Images with annotations (`A.jsonl`): those that an evaluation can use, and what is said of the others."""

import sys
from typing import NamedTuple

from etils import epath

from grain_jax.core import annotations as annotations_lib
from grain_jax.core import printable
from grain_jax.evaluate import test_sets
from grain_jax.inference.inputs import InputError
from grain_jax.runtime import processes


class Annotated(NamedTuple):
    """Annotations, and those of them that an evaluation can use."""

    read: annotations_lib.Annotations
    records: list[annotations_lib.Annotation]
    folder: epath.Path  # the paths of the records start from it
    orientation: str = "exif"  # of the images, as of `files.images`

    @property
    def images(self) -> list[test_sets.Image]:
        """The records' images."""
        return [test_sets.of_path(path, orientation=self.orientation) for path in self.paths]

    @property
    def paths(self) -> list[epath.Path]:
        """The files of the records' images."""
        return [self.folder / record.image for record in self.records]


def image_folder(path: epath.PathLike) -> epath.Path:
    """The folder that the paths of annotations start from. Raises InputError if there is none."""
    path = epath.Path(path)
    if not path.is_dir():
        raise InputError(
            f"{path}: no such folder; expected the one that the annotations' paths start from"
        )
    return path


def report_left_out(path: epath.PathLike, read: annotations_lib.Annotations) -> None:
    """Prints on stderr the faulty lines and the unknown keys of the file; on the first process only."""
    if processes.process_info()[0]:
        return
    lines = list(read.faults)
    if read.faults:  # too many of them are an AnnotationError
        lines.append(f"{path}: faulty lines left out: {read.faulty_lines}")
    if read.unknown_keys:
        named = ", ".join(
            f"{printable.plain(key, 60)} ({n})" for key, n in read.unknown_keys.items()
        )
        lines.append(f"{path}: unknown keys kept out: {named}")
    if lines:
        print(*(printable.plain(line) for line in lines), sep="\n", file=sys.stderr)


def check_some_image(path: epath.PathLike, annotated: Annotated) -> None:
    """Raises InputError if none of the images exists, as with a wrong folder."""
    places = annotated.paths
    if not any(place.exists() for place in places):  # usually the first exists
        raise InputError(
            f"{annotated.folder}: none of the {len(places)} images of {path} is there; the first:"
            f" {places[0]}; expected the folder that the annotations' paths start from"
        )
