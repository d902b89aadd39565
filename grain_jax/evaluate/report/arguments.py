"""The flags of `grain-jax report`."""

from grain_jax.cli.flags import many
from grain_jax.cli.parser import Command

NUM_IMAGES = 300  # of an evaluation that the model runs on


class Report(Command, name="report"):
    """Writes a page about a run.

    Its model runs on images of the evaluations in its config.

    Example:
      grain-jax report runs/demo

    the page:
      WORKDIR             of a run
      --output FILE.html  the page to write (default: report.html in the workdir)
      --results OUT.json  of grain-jax evaluate; may be given several times; those in the workdir are found
      --num-images N      images of each evaluation that the model runs on
      --[no-]model        load the model; --no-model shows only what the files hold
    """

    workdir: str
    output: str | None = None
    results: list[str] = many()
    num_images: int = NUM_IMAGES
    model: bool = True
