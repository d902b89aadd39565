"""The flags of `grain-jax report`."""

from grain_jax.cli.flags import many
from grain_jax.cli.parser import Command

NUM_IMAGES = 300  # of an evaluation that the model runs on


class Report(Command, name="report"):
    """Writes a page about a run, or about several side by side.

    The model of each run runs on images of the evaluations in its config; the results are saved as
    report_data.json in the workdir.

    Example:
      grain-jax report runs/demo
      grain-jax report runs/rates/* --output rates.html

    the page:
      WORKDIR [WORKDIR ...]  of a run; several are shown side by side
      --output FILE.html     the page to write (default: report.html in the first workdir)
      --results OUT.json     of grain-jax evaluate, for the first run; may be given several times; those in a workdir
        are found
      --num-images N         images of each evaluation that the model runs on
      --[no-]model           load the model; --no-model shows only what the files hold
    """

    workdir: list[str]
    output: str | None = None
    results: list[str] = many()
    num_images: int = NUM_IMAGES
    model: bool = True
