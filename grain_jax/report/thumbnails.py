"""Small images as data URIs; an image that a page shows several times is stored once."""

import PIL.Image

from grain_jax.core import html, images
from grain_jax.evaluate import test_sets


class Thumbnails:
    """Collects thumbnails; `uris` is the list of their data URIs, which the page embeds."""

    def __init__(self) -> None:
        self.uris: list[str] = []
        self._places: dict[tuple[str, int], int] = {}

    def add(self, image: test_sets.Image, edge: int) -> int:
        """Adds an image whose longer side is at most `edge` pixels; returns its position in `uris`.

        Raises:
          images.ImageError: the image cannot be read.
        """
        key = image.name, edge
        if key not in self._places:
            small = images.to_rgb(image.load())
            small.thumbnail((edge, edge), PIL.Image.Resampling.LANCZOS)
            self._places[key] = len(self.uris)
            self.uris.append(html.data_uri(small))
        return self._places[key]
