"""The flags of `grain-jax annotate`; further ones go to Beam."""

import argparse

from grain_jax.data.annotate import options

from grain_jax.cli.parser import Parser
from grain_jax.cli.values import add_orientation, number, positive, share

_MOST = 1_000_000


def _passes(text: str) -> tuple[str, ...]:
    if text == "none":
        return ()
    given = text.split(",")
    if "all" in given:
        given = [*options.ALL, *(name for name in given if name != "all")]
    if not set(given) <= set(options.PASSES):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected all, none, or some of {','.join(options.PASSES)}"
        )
    return tuple(name for name in options.PASSES if name in given)


def _option(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if key and equals:
        return key, value
    raise argparse.ArgumentTypeError(f"got {text!r}, expected KEY=VALUE")


def parser() -> Parser:
    """The parser of `grain-jax annotate`."""
    out = Parser(
        "grain-jax annotate",
        more="""
The same command again resumes an interrupted job. Further flags, such as --runner, go to Beam.""",
        example="grain-jax annotate --images images --output annotated --passes caption,describe \\\n"
        "    --endpoint http://HOST:8000/v1 --chat MODEL\n"
        "grain-jax annotate --source coco --images train2017 --output coco --passes none \\\n"
        "    --annotations instances.json captions.json",
    )
    _add_images(out)
    _add_models(out)
    _add_records(out)
    out.pass_on_unknown()
    return out


def _add_images(out: Parser) -> None:
    group = out.add_argument_group("images")
    add = group.add_argument
    add("--images", required=True, metavar="DIR", help="folder of images, or of tar shards")
    add_orientation(group)
    add("--output", required=True, metavar="DIR", help="all results; the same again to go on")
    add(
        "--source",
        metavar="NAME|module:Class",
        help=f"{', '.join(options.SOURCES)}, or a class of your own (data/sources/base.py)"
        " (default: webdataset if DIR has .tar files, else folder)",
    )
    add(
        "--option",
        action="append",
        default=[],
        type=_option,
        metavar="KEY=VALUE",
        help="an option of the source's own; may be given several times",
    )
    add(
        "--annotations",
        nargs="+",
        default=[],
        metavar="FILE",
        help="of sources that have such files",
    )
    add("--split", default="", metavar="NAME", help="of sources that have splits")
    add(
        "--shard-size",
        type=positive,
        default=options.SHARD_SIZE,
        metavar="N",
        help="images that are lost by a kill at most; tars are shards",
    )
    limits = options.Limits()
    for side, pixels in (("min", limits.min_side), ("max", limits.max_side)):
        what = "shortest side of an image, at least" if side == "min" else "longest side, at most"
        add(
            f"--{side}-side",
            type=positive,
            default=pixels,
            metavar="PIXELS",
            help=f"{what}, in pixels",
        )
    add(
        "--max-faults",
        type=share,
        default=0.01,
        metavar="SHARE",
        help="of the images that may have a fault, 0 to 1",
    )
    out.switch(
        "--keep-images",
        default=True,
        to=group,
        help="write the images of tars and TFDS sets to OUTPUT/images; not with --name, whose set has them",
    )
    out.switch("--retry-failed", to=group, help="run what failed in shards that are done again")
    out.older(no_images="--no-keep-images")


def _add_models(out: Parser) -> None:
    add = out.add_argument_group("models").add_argument
    local, remote, finder = options.LocalChat(), options.EndpointChat("", ""), options.Detector()
    add(
        "--passes",
        type=_passes,
        default=options.ALL,
        metavar="PASS,PASS",
        help=f"some of {','.join(options.PASSES)}; all (default) is {','.join(options.ALL)}; none takes over what the"
        " source has",
    )
    add(
        "--negatives",
        type=positive,
        default=options.NEGATIVES,
        metavar="N",
        help="texts that the pass negatives makes of a description, at most",
    )
    add(
        "--chat",
        metavar="MODEL",
        help=f"folder or name of the MLLM (default: {local.model}), or its name at the endpoint",
    )
    add("--endpoint", metavar="URL", help="an OpenAI-compatible server's, as http://HOST:8000/v1")
    add(
        "--concurrency",
        type=positive,
        default=remote.concurrency,
        metavar="N",
        help="requests at a time, of a worker",
    )
    add(
        "--requests-per-second",
        type=number(float, 0.001, _MOST),
        default=remote.requests_per_second,
        metavar="R",
        help="at most, of a worker (default: no limit)",
    )
    add(
        "--request-seconds",
        type=number(float, 0.001, _MOST),
        default=remote.seconds,
        metavar="S",
        help="seconds that a request may take in all",
    )
    add(
        "--tries",
        type=positive,
        default=remote.tries,
        metavar="N",
        help="of a request, the first included",
    )
    add(
        "--prompts",
        metavar="DIR",
        help="folder with caption.txt and describe.txt (default: those of the package)",
    )
    add("--detector", default=finder.model, metavar="MODEL", help="folder or name of the detector")
    add(
        "--threshold",
        type=share,
        default=finder.threshold,
        metavar="SCORE",
        help="least score of a box, 0 to 1",
    )
    add(
        "--batch-size",
        type=positive,
        default=local.batch_size,
        metavar="N",
        help="images that a local model sees at once",
    )


def _add_records(out: Parser) -> None:
    add = out.add_argument_group("TFRecords").add_argument
    add(
        "--name",
        dest="records",
        metavar="NAME",
        help="also build OUTPUT/records/NAME/1.0.0, as grain-jax build does",
    )
    add("--store-size", metavar="S", help="as of grain-jax build")
    add("--encoding", metavar="original|png|jpeg:Q", help="as of grain-jax build")
    add("--num-shards", metavar="N", help="as of grain-jax build")
    out.older(records="--name")


def source_name(args: argparse.Namespace) -> str:
    """The source given by --source; otherwise `webdataset` for tar files and `folder` for images."""
    if args.source:
        return args.source
    from etils import epath  # slow to import, and not needed for --help

    images = epath.Path(args.images)
    tars = images.suffix == ".tar" or (images.is_dir() and any(images.glob("*.tar")))
    return "webdataset" if tars else "folder"
