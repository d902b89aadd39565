"""The flags of `grain-jax inspect`."""

from grain_jax.cli.flags import flag
from grain_jax.cli.parser import Command
from grain_jax.config.evals import ORIENTATIONS


class Inspect(Command, name="inspect"):
    """Shows statistics, problems and a contact sheet of a data set.

    The set is read once. Memory does not grow with it: beyond 250,000 different texts or images, copies are
    estimated from a share of them.

    Example:
      grain-jax inspect records/mine
      grain-jax inspect A.jsonl --images images

    what is inspected:
      SET                      record set, DIR/NAME or DIR/NAME/1.0.0 of grain-jax build, or an A.jsonl
      --images DIR             folder that the paths of an A.jsonl start from (default: the folder of the file)
      --orientation exif|file  exif turns images as viewers do, and boxes are of those pixels; file takes the pixels as
        they are stored
      --output DIR             folder to write (default: inspect beside the set)

    how:
      --num-images N           images on the contact sheet, at most 200
      --lanes N                input.lanes of the training; shards are checked for it
    """

    set: str
    images: str | None = None
    orientation: str = flag(ORIENTATIONS[0], choices=ORIENTATIONS)
    output: str | None = None
    num_images: int = flag(24, low=0, high=200)  # the PNG is then about 25,000 pixels high
    lanes: int = flag(16, high=10**6)
