"""The flags of `grain-jax embed`."""

from typing import Literal

from grain_jax.cli.flags import flag, share
from grain_jax.cli.parser import Processes
from grain_jax.config import DTYPES


class Embed(Processes, name="embed"):
    """Writes embeddings of images and their regions as NumPy arrays, in the layout of clip-retrieval.

    SOURCE is a folder of images (sub-folders included), a .tar or a folder of them (webdataset), a record set, or an
    A.jsonl. DIR gets float16 arrays with the embedding of each image and of its regions, and Parquet files that say
    which image a row is. The same command again goes on after a kill.

    Example:
      grain-jax embed images --checkpoint runs/demo --output embeddings
      grain-jax embed mine/A.jsonl --images mine --checkpoint runs/own --output embeddings

    what is embedded:
      SOURCE                   a folder of images, tars, a record set, or an A.jsonl
      --images DIR             of an A.jsonl, the folder that its paths start from (default: the folder of the file)
      --split NAME             of a record set (default: train)
      --boxes queries|given    regions: those that the model finds, or those of the A.jsonl or record set, by a model
        with a box head
      --checkpoint DIR         workdir, checkpoint or converted folder; or aviary-tiny, hf://ORG/NAME
      --output DIR             all files; the same again to go on

    the files:
      --shard-size N           images a file, which a kill loses at most; a tar makes one file
      --max-faults SHARE       of the images that may have a fault, 0 to 1; they are left out and named in
        DIR/faults.jsonl

    speed:
      --dtype float32|bfloat16  of the activations
      --threads N              that read and decode images, of a process (default: one a core)
    """

    source: str
    images: str | None = None
    split: str = ""
    boxes: Literal["queries", "given"] = "queries"
    checkpoint: str
    output: str
    shard_size: int = 4096
    max_faults: float = share(0.01)
    dtype: str = flag(DTYPES[0], choices=DTYPES)
    threads: int | None = None
