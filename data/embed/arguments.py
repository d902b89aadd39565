"""The flags of `grain-jax embed` and `grain-jax search`."""

from typing import Literal

from grain_jax.cli.flags import flag, many, share
from grain_jax.cli.parser import Loads, Processes
from grain_jax.config import DTYPES
from grain_jax.config.evals import ORIENTATIONS

_STORES = ("float32", "float16")


def _activations(text: str) -> str:
    if text not in DTYPES:
        of_files = f"; of the files it is --store {text}" if text in _STORES else ""
        raise ValueError(
            f"got {text!r}, expected {' or '.join(DTYPES)} of the activations{of_files}"
        )
    return text


class Embed(Loads, Processes, name="embed"):
    """Writes embeddings of images and their regions as Parquet files or NumPy arrays.

    SOURCE is a folder of images (sub-folders included), a .tar or a folder of them (webdataset), a record set, or an
    A.jsonl. DIR/data gets Parquet files with the embedding of each image and of its regions; grain-jax search answers
    texts and images over them. The same command again goes on after a kill.

    Example:
      grain-jax embed images --checkpoint runs/demo --output embeddings
      grain-jax embed mine/A.jsonl --images mine --checkpoint runs/own --output embeddings \\
          --store float16

    what is embedded:
      SOURCE                   a folder of images, tars, a record set, or an A.jsonl
      --images DIR             of an A.jsonl, the folder that its paths start from (default: the folder of the file)
      --split NAME             of a record set (default: train)
      --boxes queries|given    regions: those that the model finds, or those of the A.jsonl or record set, by a model
        with a box head
      --texts                  captions and descriptions of the source, too: a teacher's (teacher.kind=embeddings)
      --orientation exif|file  exif turns images as viewers do, and boxes are of those pixels; file takes the pixels as
        they are stored
      --checkpoint DIR         workdir, checkpoint or converted folder; or aviary-tiny, hf://ORG/NAME
      --output DIR             all files; the same again to go on

    the files:
      --format parquet|npy     npy: arrays and metadata as clip-retrieval reads them; search reads Parquet alone
      --shard-size N           images a file, which a kill loses at most; a tar makes one file
      --store float32|float16  type of the embeddings in the files (default: float32; with npy float16)
      --max-faults SHARE       of the images that may have a fault, 0 to 1; they are left out and named in
        DIR/faults.jsonl

    speed:
      --dtype float32|bfloat16  of the activations; of the files: --store
      --threads N              that read and decode images, of a process (default: one a core)
    """

    source: str
    images: str | None = None
    split: str = ""
    boxes: Literal["queries", "given"] = "queries"
    texts: bool = False
    orientation: str = flag(ORIENTATIONS[0], choices=ORIENTATIONS)
    checkpoint: str
    output: str
    shard_size: int = 4096
    store: Literal["float32", "float16"] | None = None
    format: Literal["parquet", "npy"] = "parquet"
    max_faults: float = share(0.01)
    dtype: str = flag("float32", parse=_activations)
    threads: int | None = None


def _box(text: str) -> tuple[float, float, float, float]:
    try:
        x1, y1, x2, y2 = map(float, text.split(","))
    except ValueError:
        x1 = y1 = x2 = y2 = 0.0
    if x1 < x2 and y1 < y2:
        return x1, y1, x2, y2
    raise ValueError(f"got {text!r}, expected X1,Y1,X2,Y2 with X1 < X2 and Y1 < Y2")


class Search(Loads, name="search"):
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
      --rerank K           the first K of a text are ordered by its likelihood, too, by a model with a text decoder; their
        images are read
      --rerank-weight W    of the likelihood (default, with --by images: the one that is stored with the model)

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
    rerank: int = flag(0, low=0)
    rerank_weight: float | None = flag(None, low=0)
    output: str | None = None
    images: str | None = None
