"""Small images as data URIs, each kept once however often a page shows it."""

import PIL.Image

from grain_jax.evaluate import test_sets
from grain_jax.files import images
from grain_jax.report import html


class Thumbnails:
    """A growing list of images; `uris` is what a page needs."""

    def __init__(self) -> None:
        self.uris: list[str] = []
        self._places: dict[tuple[str, int], int] = {}

    def add(self, picture: test_sets.Image, edge: int) -> int:
        """The position of the image in `uris`, with its longer side cut down to `edge` pixels.

        Raises:
          images.ImageError: it cannot be read.
        """
        key = picture.name, edge
        if key not in self._places:
            small = images.to_rgb(picture.load())
            small.thumbnail((edge, edge), PIL.Image.Resampling.LANCZOS)
            self._places[key] = len(self.uris)
            self.uris.append(html.data_uri(small))
        return self._places[key]
