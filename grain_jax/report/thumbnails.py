"""Small images as data URIs, each kept once however often a page shows it."""

import base64
import io

import PIL.Image

from grain_jax.evaluate import test_sets
from grain_jax.files import images

_QUALITY = 82


class Thumbnails:
    """A growing list of images; `uris` is what a page needs."""

    def __init__(self) -> None:
        self.uris: list[str] = []
        self._places: dict[tuple[str, int], int] = {}

    def add(self, picture: test_sets.Picture, edge: int) -> int:
        """The position of the image in `uris`, with its longer side cut down to `edge` pixels.

        Raises:
          images.ImageError: it cannot be read.
        """
        key = picture.name, edge
        if key not in self._places:
            small = images.to_rgb(picture.load())
            small.thumbnail((edge, edge), PIL.Image.Resampling.LANCZOS)
            self._places[key] = len(self.uris)
            self.uris.append(data_uri(small))
        return self._places[key]


def data_uri(picture: PIL.Image.Image) -> str:
    """An image as JPEG in a data URI."""
    buffer = io.BytesIO()
    coarse = (
        2 if min(picture.size) > 64 else 0
    )  # colours at half the resolution; small images need theirs
    picture.save(buffer, "JPEG", quality=_QUALITY, subsampling=coarse, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
