"""Images -> captions, descriptions and boxes of an MLLM and a detector, on Apache Beam (docs/annotate.md).

  python -m data.annotate --images FOLDER_OR_SHARDS --output DIR [--passes caption,describe] ...

The same command again goes on where it was cut off. Further arguments, from --runner on, are Beam's.
"""

import argparse
import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from data import build, example, sources
from data.annotate import checks, detector, endpoint_chat, local_chat, outputs, prompt
from data.annotate.passes import PASSES, Job
from grain_jax import errors

BATCHES_AHEAD = (
    4  # requests to an endpoint for each that it answers at a time: none waits for a slow one
)


class AnnotateError(errors.UserError):
    """The job cannot run, or its faults are too many; the message is one line."""


def _passes(text: str) -> tuple[str, ...]:
    if text in ("all", "none"):
        return tuple(PASSES) if text == "all" else ()
    given = text.split(",")
    if not set(given) <= set(PASSES):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected all, none, or some of {','.join(PASSES)}"
        )
    return tuple(name for name in PASSES if name in given)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if 1e-3 <= value <= 1e6:
        return value
    raise argparse.ArgumentTypeError(f"got {text!r}, expected a number from 0.001 to 1000000")


def parser() -> build.Parser:
    """The command's own arguments."""
    out = build.Parser(
        prog="python -m data.annotate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = out.add_argument_group("pictures").add_argument
    add("--images", required=True, metavar="DIR", help="folder of images, or of tar shards")
    add("--output", required=True, metavar="DIR", help="all results; the same again to go on")
    add(
        "--source",
        choices=sorted(sources.SOURCES),
        help="default: webdataset if DIR has .tar files, else folder",
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
        type=build.positive,
        default=sources.Options("").shard_size,
        metavar="N",
        help="pictures that are lost by a kill at most (default %(default)s; tars are shards)",
    )
    limits = checks.Limits()
    add(
        "--min-side",
        type=build.positive,
        default=limits.min_side,
        metavar="PIXELS",
        help="default %(default)s",
    )
    add(
        "--max-side",
        type=build.positive,
        default=limits.max_side,
        metavar="PIXELS",
        help="default %(default)s",
    )
    add(
        "--max-faults",
        type=build.share,
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
        type=build.positive,
        default=remote.concurrency,
        metavar="N",
        help="requests at a time, of a worker (default %(default)s)",
    )
    add(
        "--requests-per-second",
        type=_number,
        default=remote.requests_per_second,
        metavar="R",
        help="at most, of a worker (default: no limit)",
    )
    add(
        "--request-seconds",
        type=_number,
        default=remote.seconds,
        metavar="S",
        help="that a request may take in all (default %(default)s)",
    )
    add(
        "--tries",
        type=build.positive,
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
        type=build.share,
        default=finder.threshold,
        help="least score of a box (default %(default)s)",
    )
    add(
        "--batch-size",
        type=build.positive,
        default=local.batch_size,
        metavar="N",
        help="pictures that a local model sees at once (default %(default)s)",
    )

    add = out.add_argument_group("TFRecords").add_argument
    add(
        "--records", metavar="NAME", help="also build OUTPUT/records/NAME/1.0.0, as data.build does"
    )
    add("--store-size", metavar="S", help="as for data.build")
    add("--encoding", metavar="original|png|jpeg:Q", help="as for data.build")
    add("--num-shards", metavar="N", help="as for data.build")
    return out


def annotate(args: argparse.Namespace, beam_arguments: Sequence[str]) -> str:
    """Runs the job; returns a line about its results. Raises UserError."""
    # Beam complains where Google's packages are missing, which only its Google runners need.
    logging.getLogger().addFilter(lambda record: "apitools not found" not in record.getMessage())
    try:
        from data.annotate import pipeline
    except ModuleNotFoundError as error:
        raise AnnotateError(
            f"{error}; install what annotation needs: pip install -c constraints.txt -e '.[annotate]'"
        ) from None
    start = time.monotonic()
    pipeline.check(beam_arguments)
    output = outputs.Output(args.output)
    job = _job(args, output)
    records = _records_arguments(args) if args.records else None
    output.agree(_settings(args, job))
    options = sources.Options(
        images=args.images,
        annotations=tuple(args.annotations),
        split=args.split,
        scratch=str(output.path("lists")),
        shard_size=args.shard_size,
    )
    shards = sources.shards(_source(args), options)
    todo = _todo(job, shards, args.retry_failed)
    counters = {}
    if todo:
        counters = pipeline.run(job, todo, beam_arguments, retry_failed=args.retry_failed)
        missing = {shard.name for shard in todo} - output.finished(job.passes)
        if missing:  # runners return from a job that somebody cancelled
            raise AnnotateError(
                f"--output {args.output}: the job ended with {len(missing)} of {len(shards)} shards not"
                " done; give the same command again"
            )
    seconds = time.monotonic() - start
    names = [shard.name for shard in shards]
    output.join(names)
    total = output.summary(names)
    summary = _summary(total, counters, seconds) | {"settings": _settings(args, job)}
    output.put(json.dumps(summary, indent=1) + "\n", "summary.json")
    output.clear()
    for cause, count in sorted(total["failures"].items()):
        print(f"{output.path('failed.jsonl')}: {count} {cause}", file=sys.stderr)
    if not total["annotated"]:
        raise AnnotateError(f"{args.output}: none of {total['pictures']} images could be annotated")
    if total["faulty"] > args.max_faults * total["pictures"]:
        raise AnnotateError(
            f"{args.output}: {total['faulty']} of {total['pictures']} images have a fault, more than"
            f" --max-faults {args.max_faults:g} allows; A.jsonl has what is left"
        )
    if records:
        print(build.build(records, _read_lines(args, output, shards)))
    return (
        f"{output.path('A.jsonl')}: {total['annotated']} of {total['pictures']} images,"
        f" {total['regions']} regions, {len(todo)} of {len(shards)} shards in this run,"
        f" {counters.get('pictures', 0)} images in {seconds:.1f} s"
    )


def _source(args: argparse.Namespace) -> str:
    if args.source:
        return args.source
    images = epath.Path(args.images)
    tars = images.suffix == ".tar" or (images.is_dir() and any(images.glob("*.tar")))
    return "webdataset" if tars else "folder"


def _job(args: argparse.Namespace, output: outputs.Output) -> Job:
    chat = local_chat.Options(
        model=args.chat or local_chat.Options().model, batch_size=args.batch_size
    )
    batch_size = args.batch_size
    if args.endpoint:
        if not args.chat:
            raise AnnotateError(
                "--endpoint: got no --chat, expected the model's name at the endpoint"
            )
        chat = endpoint_chat.Options(
            url=args.endpoint,
            model=args.chat,
            concurrency=args.concurrency,
            requests_per_second=args.requests_per_second,
            seconds=args.request_seconds,
            tries=args.tries,
        )
        batch_size = max(batch_size, BATCHES_AHEAD * args.concurrency)
    prompts = epath.Path(args.prompts)
    return Job(
        output=output,
        passes=args.passes,
        limits=checks.Limits(args.min_side, args.max_side),
        batch_size=batch_size,
        keep_pictures=not (sources.are_files(_source(args)) or args.records or args.no_images),
        chat=chat,
        detector=detector.Options(
            model=args.detector, threshold=args.threshold, batch_size=args.batch_size
        ),
        prompts={
            name: prompt.read_prompt(prompts / f"{name}.txt", with_subject=name == "describe")
            for name in ("caption", "describe")
        },
    )


def _settings(args: argparse.Namespace, job: Job) -> dict[str, dict[str, Any]]:
    """What the results depend on, by the part of the job that it belongs to."""
    out: dict[str, dict[str, Any]] = {
        "source": {
            "name": _source(args),
            "images": args.images,
            "annotations": args.annotations,
            "split": args.split,
            "shard size": args.shard_size,
            "limits": list(job.limits),
        }
    }
    for name in job.passes:
        if name == "ground":
            out[name] = {"model": job.detector.model, "threshold": job.detector.threshold}
        else:
            asked = job.prompts[name]
            digest = hashlib.sha256(asked.text.encode()).hexdigest()
            out[name] = {
                "model": job.chat.model,
                "prompt version": asked.version,
                "prompt sha256": digest[:16],
            }
    return out


def _todo(job: Job, shards: Sequence[sources.Shard], retry_failed: bool) -> list[sources.Shard]:
    """The shards that the passes have not done. Raises AnnotateError where an earlier pass is missing."""
    finished = job.output.finished(job.passes)
    todo = [
        shard
        for shard in shards
        if shard.name not in finished or (retry_failed and _has_gaps(job.output.tally(shard.name)))
    ]
    needs = PASSES[job.passes[0]].needs if job.passes else None
    if needs:
        missing = {shard.name for shard in todo} - job.output.finished([needs])
        if missing:
            raise AnnotateError(
                f"--passes {','.join(job.passes)}: {len(missing)} of {len(shards)} shards have no"
                f" results of the pass {needs} yet; run --passes {needs} first"
            )
    return todo


def _has_gaps(tally: dict[str, Any]) -> bool:
    """Whether a shard has failures, or a pass has not yet run for what an earlier one found on a retry."""
    return bool(tally.get("failures")) or len(set(tally.get("results", {}).values())) > 1


def _summary(total: dict[str, Any], counters: dict[str, int], seconds: float) -> dict[str, Any]:
    """The counters of all runs and of this one, with what people ask for."""
    rates = {
        name: {"images/s": round(found["pictures"] / found["seconds"], 3)}
        for name, found in total["passes"].items()
        if found.get("seconds")
    }
    pictures = counters.get("pictures", 0)
    return {
        "total": total,
        "regions per picture": round(total["regions"] / max(1, total["annotated"]), 3),
        "model rates": rates,  # of one worker: while its model ran
        "this run": {
            "pictures": pictures,
            "seconds": round(seconds, 3),
            "images/s": round(pictures / seconds, 3),
        },
    }


def _records_arguments(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments of data.build; wrong ones end the command before any work."""
    files = sources.are_files(_source(args))
    given = {
        "--annotations": str(epath.Path(args.output) / "A.jsonl"),
        "--images": args.images if files else args.output,
        "--output": str(epath.Path(args.output) / "records"),
        "--name": args.records,
        "--store-size": args.store_size,
        "--encoding": args.encoding,
        "--num-shards": args.num_shards,
        "--max-faults": args.max_faults,
    }
    pairs = [f"{name}={value}" for name, value in given.items() if value is not None]
    return build.parser().parse_args([*pairs, "--overwrite"])


def _read_lines(
    args: argparse.Namespace, output: outputs.Output, shards: Sequence[sources.Shard]
) -> build.ReadLines:
    """How data.build comes by the lines of A.jsonl, with images that are no files."""
    if sources.are_files(_source(args)):
        return example.read_lines
    return lambda annotations: _lines_with_pictures(output, shards)


def _lines_with_pictures(
    output: outputs.Output, shards: Sequence[sources.Shard]
) -> Iterator[example.Line]:
    number = 0
    for shard in shards:
        lines = iter(output.read("annotations", shard.name))
        line = next(lines, None)
        for item in sources.read(shard):
            if line and isinstance(item, sources.Picture) and item.image == line["image"]:
                number += 1
                yield example.Line(number, json.dumps(line).encode(), item.encoded)
                line = next(lines, None)
        if line:
            raise AnnotateError(
                f"source {shard.source}: got no image {line['image']}, which was there when it was"
                " annotated, expected the same source; give another --output"
            )


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    args, beam_arguments = parser().parse_known_args(argv)
    try:
        print(annotate(args, beam_arguments))
    except errors.UserError as error:
        print(error, file=sys.stderr)
        return error.status
    except OSError as error:
        print(build.of_system(error, args.output), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
