"""A folder of images, sub-folders included; a text file beside an image is its web caption.

So are the files that img2dataset writes by default: 00000/000000012.jpg and 000000012.txt.
"""

from collections.abc import Iterator

from etils import epath

from grain_jax.core import regular_file
from grain_jax.data.sources import base, staged
from grain_jax.data.sources.base import Annotation, Fault


class Folder(staged.ListedSource):
    """The folder's images, in the order of their names."""

    def entries(self, options: base.Options) -> Iterator[Annotation | Fault]:
        return _entries(epath.Path(options.images), "")


def _entries(folder: epath.Path, below: str) -> Iterator[Annotation | Fault]:
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
            yield from _entries(path, image + "/")
