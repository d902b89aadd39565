"""The flags of `grain-jax report`."""

from grain_jax.cli.parser import Parser
from grain_jax.cli.values import positive

NUM_IMAGES = 300  # of an evaluation that the model runs on


def parser() -> Parser:
    """The parser of `grain-jax report`."""
    out = Parser(
        "grain-jax report",
        more="The model of each run runs on images of the evaluations in its config; the results are saved as\n"
        "report_data.json in the workdir.",
        example="grain-jax report runs/demo\ngrain-jax report runs/rates/* --output rates.html",
    )
    group = out.add_argument_group("the page")
    group.add_argument(
        "workdir", metavar="WORKDIR", nargs="+", help="of a run; several are shown side by side"
    )
    group.add_argument(
        "--output",
        metavar="FILE.html",
        help="the page to write (default: report.html in the first workdir)",
    )
    group.add_argument(
        "--results",
        metavar="OUT.json",
        action="append",
        default=[],
        help="of grain-jax evaluate, for the first run; may be given several times; those in a workdir are found",
    )
    group.add_argument(
        "--num-images",
        metavar="N",
        type=positive,
        default=NUM_IMAGES,
        help="images of each evaluation that the model runs on",
    )
    out.switch(
        "--model",
        default=True,
        to=group,
        help="load the model; --no-model shows only what the files hold",
    )
    out.older(pictures="--num-images", workdir="")
    return out
