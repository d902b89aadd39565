"""The flags of `grain-jax inspect`."""

from grain_jax.cli.flags import flag
from grain_jax.cli.parser import Command


class Inspect(Command, name="inspect"):
    """Shows numbers, problems and a sheet of images of a dataset.

    Example:
      grain-jax inspect records/mine
      grain-jax inspect A.jsonl --images images
      grain-jax inspect A.jsonl --images images --checkpoint runs/own

    what is inspected:
      SET                      record set of grain-jax build, DIR/NAME or DIR/NAME/1.0.0; or an A.jsonl
      --images DIR             folder of the images of an A.jsonl (default: the folder of the file)
      --output DIR             folder to write (default: inspect-NAME beside the set)
      --num-images N           number of images on the sheet, at most 200
      --checkpoint DIR         a model with a box head ranks all regions by how far it disagrees with them, in
                               audit.tsv and on the page; as for grain-jax embed
    """

    set: str
    images: str | None = None
    output: str | None = None
    checkpoint: str | None = None
    num_images: int = flag(24, low=0, high=200)
