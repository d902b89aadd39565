"""The flags of `grain-jax embed`."""

from grain_jax.cli.flags import flag, share
from grain_jax.cli.parser import Processes
from grain_jax.config import DTYPES


class Embed(Processes, name="embed"):
    """Writes embeddings of images and their regions as NumPy arrays, in the layout of clip-retrieval.

    DIR gets float16 arrays with the embedding of each image and of its regions, and Parquet files that say
    which image a row is. The same command again goes on after a kill.

    Example:
      grain-jax embed images --checkpoint runs/demo --output embeddings
      grain-jax embed mine/A.jsonl --images mine --checkpoint runs/own --output embeddings

    what is embedded:
      SOURCE                   folder of images (with sub-folders), .tar or folder of them, dataset, A.jsonl
      --images DIR             folder that the paths in A.jsonl start from (default: the folder of the file)
      --split NAME             split of a record set (default: train)
      --checkpoint DIR         workdir, checkpoint or converted folder; or aviary-tiny, hf://ORG/NAME
      --output DIR             folder for all files; the same folder again to go on

    the files:
      --shard-size N           images per file; a kill loses at most the files in work. A tar makes one file
      --max-faults SHARE       share of the images that may be unreadable, 0 to 1; DIR/faults.jsonl names them

    speed:
      --dtype float32|bfloat16  type of the activations
      --threads N              threads per process that read and decode images (default: one per core)
    """

    source: str
    images: str | None = None
    split: str = ""
    checkpoint: str
    output: str
    shard_size: int = 4096
    max_faults: float = share(0.01)
    dtype: str = flag(DTYPES[0], choices=DTYPES)
    threads: int | None = None
