"""The flags of `grain-jax demo`."""

from grain_jax.cli.flags import flag
from grain_jax.cli.parser import Command


class Demo(Command, name="demo"):
    """Serves an interactive page: drop an image, type classes, see regions.

    Example:
      grain-jax demo --checkpoint runs/demo

    the model and what it sees:
      --checkpoint DIR  workdir, checkpoint or converted folder; or aviary-tiny, hf://ORG/NAME
      --classes FILE    {"class name": ["description", ...]} as JSON, or one class per line (default: the
        run's)
      --examples DIR    folder of images, or of folders of images (default: from the run's evaluations)

    the server:
      --port N          (default: the first free one from 7860)
      --host ADDRESS    0.0.0.0: others can use it, without a login
    """

    checkpoint: str
    classes: str | None = None
    examples: str | None = None
    port: int | None = flag(None, high=65535)
    host: str = "127.0.0.1"
