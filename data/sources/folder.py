"""A folder of images, sub-folders included; a text file beside an image is its web caption.

So are the files that img2dataset writes by default: 00000/000000012.jpg and 000000012.txt.
"""

import os
from collections.abc import Iterator

from etils import epath

from grain_jax.core import regular_file
from grain_jax.data.sources import base, staged
from grain_jax.data.sources.base import Annotation, Fault


class Folder(staged.ListedSource):
    """The folder's images, in the order of their names."""

    def entries(self, options: base.Options) -> Iterator[Annotation | Fault]:
        return _entries(epath.Path(options.images), "", set())


def _entries(folder: epath.Path, below: str, seen: set[str]) -> Iterator[Annotation | Fault]:
    seen.add(os.path.realpath(folder))
    if not folder.is_dir():
        raise base.SourceError(f"--images {folder}: no such folder, expected images")
    paths = sorted(folder.iterdir(), key=lambda path: path.name)
    paths = [path for path in paths if not path.name.startswith(".")]  # such as ._x.jpg of macOS
    texts = {path.name for path in paths if path.suffix == ".txt"}
    for path in paths:
        image = below + path.name
        if path.suffix.lower() in base.IMAGE_ENDINGS:
            caption = ""
            if f"{path.stem}.txt" in texts:
                try:
                    text = path.with_suffix(".txt")
                    caption = regular_file.read_text(text, "a caption", base.MAX_TEXT)
                except regular_file.FileError as error:
                    yield Fault(image, "bad annotation", str(error))
                    continue
            yield Annotation(image, (caption,))
        elif path.is_dir():
            if os.path.realpath(path) in seen or len(image) > base.MAX_NAME:
                got = "a folder that was read already, or too deep a one"
                yield Fault(image, "unreadable", f"got {got}, expected folders without links")
            else:
                yield from _entries(path, image + "/", seen)
