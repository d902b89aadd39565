"""The flags of `grain-jax inspect`."""

from grain_jax.cli.flags import flag
from grain_jax.cli.parser import Command


class Inspect(Command, name="inspect"):
    """Shows numbers, problems and a sheet of images of a data set.

    The set is read once. Memory does not grow with it: copies are sought among the first 250,000 different texts of
    a kind, and among as many images.

    Example:
      grain-jax inspect records/mine
      grain-jax inspect A.jsonl --images images

    what is inspected:
      SET                      record set, DIR/NAME or DIR/NAME/1.0.0 of grain-jax build, or an A.jsonl
      --images DIR             folder that the paths of an A.jsonl start from (default: the folder of the file)
      --output DIR             folder to write (default: inspect beside the set)

    how:
      --num-images N           images on the sheet, at most 200
    """

    set: str
    images: str | None = None
    output: str | None = None
    num_images: int = flag(24, low=0, high=200)
