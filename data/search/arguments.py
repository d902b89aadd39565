"""The flags of `grain-jax search`."""

from typing import Literal

from grain_jax.cli.flags import flag, many
from grain_jax.cli.parser import Command


def _box(text: str) -> tuple[float, float, float, float]:
    try:
        x1, y1, x2, y2 = map(float, text.split(","))
    except ValueError:
        x1 = y1 = x2 = y2 = 0.0
    if x1 < x2 and y1 < y2:
        return x1, y1, x2, y2
    raise ValueError(f"got {text!r}, expected X1,Y1,X2,Y2 with X1 < X2 and Y1 < Y2")


class Search(Command, name="search"):
    """Finds images by texts, images or regions in embeddings of embed.

    FOLDER is one that grain-jax embed wrote. Every vector is compared. Each image is found once, with its best
    region; the table has its box in pixels.

    Example:
      grain-jax search embeddings --text "a long orange beak" --text "a spiky crest" --top 20 \\
          --output found.html
      grain-jax search embeddings --image bird.jpg --box 12,30,80,64

    the question:
      FOLDER               of embeddings
      --text TEXT          what is looked for; may be given several times
      --image FILE         images like this one; may be given several times
      --box X1,Y1,X2,Y2    of one --image, in pixels: what is like it, or without a box head like the model's nearest
        region

    what is searched:
      --by regions|images  compare regions or whole images (default: regions for texts and boxes, images for images)
      --top K              images a question
      --checkpoint DIR     workdir, checkpoint or converted folder; or aviary-tiny, hf://ORG/NAME (default: where it lay
        when the embeddings were made)
      --[no-]faiss         search with FAISS, which holds all vectors in memory

    the page:
      --output PAGE.html   page with the images and their regions, one file
      --images DIR         where the images, the tars or the record set lie now (default: where they lay then)
    """

    folder: str
    text: list[str] = many()
    image: list[str] = many()
    box: tuple[float, ...] | None = flag(None, parse=_box)
    by: Literal["regions", "images"] | None = None
    top: int = 10
    checkpoint: str | None = None
    faiss: bool = False
    output: str | None = None
    images: str | None = None
