"""The arguments of `python -m data.annotate`; unknown ones go to Beam."""

import argparse

from etils import epath
from grain_jax.data import arguments, sources
from grain_jax.data.annotate import checks, detector, endpoint_chat, local_chat, prompt
from grain_jax.data.annotate.passes import PASSES


def _passes(text: str) -> tuple[str, ...]:
    if text in ("all", "none"):
        return tuple(PASSES) if text == "all" else ()
    given = text.split(",")
    if not set(given) <= set(PASSES):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected all, none, or some of {','.join(PASSES)}"
        )
    return tuple(name for name in PASSES if name in given)


def _option(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if key and equals:
        return key, value
    raise argparse.ArgumentTypeError(f"got {text!r}, expected KEY=VALUE")


def parser(description: str | None) -> arguments.Parser:
    """The command's own arguments."""
    out = arguments.Parser(
        prog="python -m data.annotate",
        description=description,
    )
    add = out.add_argument_group("images").add_argument
    add("--images", required=True, metavar="DIR", help="folder of images, or of tar shards")
    add("--output", required=True, metavar="DIR", help="all results; the same again to go on")
    add(
        "--source",
        metavar="NAME|module:Class",
        help=f"{', '.join(sorted(sources.SOURCES))}, or a class of your own (data/sources/base.py);"
        " default: webdataset if DIR has .tar files, else folder",
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
    add("--split", default="", help="of sources that have splits")
    add(
        "--shard-size",
        type=arguments.positive,
        default=sources.Options("").shard_size,
        metavar="N",
        help="images that are lost by a kill at most (default %(default)s; tars are shards)",
    )
    limits = checks.Limits()
    add(
        "--min-side",
        type=arguments.positive,
        default=limits.min_side,
        metavar="PIXELS",
        help="default %(default)s",
    )
    add(
        "--max-side",
        type=arguments.positive,
        default=limits.max_side,
        metavar="PIXELS",
        help="default %(default)s",
    )
    add(
        "--max-faults",
        type=arguments.share,
        default=0.01,
        metavar="F",
        help="share of images (default %(default)s)",
    )
    add(
        "--no-images",
        action="store_true",
        help="do not write the images of tars and TFDS sets to OUTPUT/images (nor does --records)",
    )
    add("--retry-failed", action="store_true", help="run what failed in shards that are done again")

    add = out.add_argument_group("models").add_argument
    add(
        "--passes",
        type=_passes,
        default=tuple(PASSES),
        metavar="all|none|caption,describe,ground",
        help="default all; none takes over what the source has",
    )
    local, remote, finder = (
        local_chat.Options(),
        endpoint_chat.Options(url="", model=""),
        detector.Options(),
    )
    add(
        "--chat",
        metavar="MODEL",
        help=f"folder or name of the MLLM (default {local.model}), or its name at the endpoint",
    )
    add("--endpoint", metavar="URL", help="an OpenAI-compatible server's, as http://HOST:8000/v1")
    add(
        "--concurrency",
        type=arguments.positive,
        default=remote.concurrency,
        metavar="N",
        help="requests at a time, of a worker (default %(default)s)",
    )
    add(
        "--requests-per-second",
        type=arguments.number(float, 0.001, 1_000_000),
        default=remote.requests_per_second,
        metavar="R",
        help="at most, of a worker (default: no limit)",
    )
    add(
        "--request-seconds",
        type=arguments.number(float, 0.001, 1_000_000),
        default=remote.seconds,
        metavar="S",
        help="that a request may take in all (default %(default)s)",
    )
    add(
        "--tries",
        type=arguments.positive,
        default=remote.tries,
        metavar="N",
        help="of a request, the first included (default %(default)s)",
    )
    add(
        "--prompts",
        default=str(prompt.FOLDER),
        metavar="DIR",
        help="folder with caption.txt and describe.txt",
    )
    add("--detector", default=finder.model, metavar="MODEL", help="default %(default)s")
    add(
        "--threshold",
        type=arguments.share,
        default=finder.threshold,
        help="least score of a box (default %(default)s)",
    )
    add(
        "--batch-size",
        type=arguments.positive,
        default=local.batch_size,
        metavar="N",
        help="images that a local model sees at once (default %(default)s)",
    )

    add = out.add_argument_group("TFRecords").add_argument
    add(
        "--records", metavar="NAME", help="also build OUTPUT/records/NAME/1.0.0, as data.build does"
    )
    add("--store-size", metavar="S", help="as for data.build")
    add("--encoding", metavar="original|png|jpeg:Q", help="as for data.build")
    add("--num-shards", metavar="N", help="as for data.build")
    return out


def source_name(args: argparse.Namespace) -> str:
    """The source given by --source; otherwise `webdataset` for tar files and `folder` for images."""
    if args.source:
        return args.source
    images = epath.Path(args.images)
    tars = images.suffix == ".tar" or (images.is_dir() and any(images.glob("*.tar")))
    return "webdataset" if tars else "folder"
