"""The flags of `grain-jax report`."""

from grain_jax.cli.flags import many
from grain_jax.cli.parser import Command

NUM_IMAGES = 300  # of an evaluation that the model runs on


class Report(Command, name="report"):
    """Writes a page about a run.

    Its model runs on images of the evaluations in its config.

    Example:
      grain-jax report runs/demo
      grain-jax report runs/own z.json

    the page:
      WORKDIR             folder of the run
      [RESULT.json ...]   results of grain-jax evaluate that are in other folders
      --output FILE.html  page to write (default: report.html in the workdir)
      --num-images N      images per evaluation that the model runs on
      --[no-]model        load the model; --no-model shows only what the files hold
    """

    workdir: str
    results: list[str] = many(name="[result.json")
    output: str | None = None
    num_images: int = NUM_IMAGES
    model: bool = True
