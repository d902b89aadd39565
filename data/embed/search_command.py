"""Which images fit a text, or are like an image or its region, of a folder of embeddings (docs/embed.md).

grain-jax search DIR --text "a long orange beak" [--output found.html]
"""

import argparse
import functools
import os
import sys
from collections.abc import Sequence

import numpy as np
import PIL.Image
from etils import epath

from grain_jax import inference
from grain_jax.core import atomic, errors, printable
from grain_jax.core import images as images_lib
from grain_jax.data import sources
from grain_jax.data.embed import arguments, parts, search
from grain_jax.data.embed import search_page as page
from grain_jax.losses import boxes as boxes_lib
from grain_jax.runtime import compiled


class UsageError(errors.UserError):
    """The question cannot be answered; the message is one line."""


def run(args: argparse.Namespace) -> str:
    """Searches, and writes the page; returns the tables. Raises UserError."""
    if not args.text and not args.image:
        raise UsageError("grain-jax search: expected --text TEXT or --image FILE")
    if args.box and (args.text or len(args.image) != 1):
        raise UsageError("--box: expected it with one --image, and no --text")
    output = _output(args.output) if args.output else None
    index = search.Index(args.folder)
    if index.missing:
        print(
            f"{args.folder}: {index.missing} of {index.missing + len(index.parts)} files are not there yet",
            file=sys.stderr,
        )
    if args.checkpoint:
        model = inference.load(args.checkpoint, index.settings.dtype)
        index.check(model)
    else:
        model = index.model
    questions = [page.Question(text) for text in args.text]
    answers = functools.partial(
        search.search, index, top=args.top, by=args.by, model=model, faiss=args.faiss
    )
    found = answers(args.text) if args.text else []
    if args.image:
        orientation = index.settings.orientation
        asked = [
            page.Question(path, images_lib.load_image(path, orientation)) for path in args.image
        ]
        queries: search.Queries = [question.image for question in asked]
        if args.box:
            box_xyxy, vector = _region(model, asked[0].image, args.box)
            asked, queries = [asked[0]._replace(box_xyxy=box_xyxy)], vector[None]
        questions += asked
        found += answers(queries)
    if output is not None:
        _write_page(output, args, index, questions, found)
    return "\n\n".join(_table(question, hits) for question, hits in zip(questions, found))


def _region(
    model: inference.Predictor, image: PIL.Image.Image, box_xyxy: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """The box [4] in [0, 1] of an image that a box in pixels stands for, and its embedding [D].

    By the box head it is the box itself; without one the model's region that is nearest to it, by IoU.
    """
    wanted = np.array(box_xyxy, np.float32) / np.array([*image.size, *image.size], np.float32)
    if model.model.boxes.kind != "none":
        return wanted, model.encode_boxes([image], [wanted[None]])[0][0]
    regions = model.encode_regions([image])
    overlaps = np.asarray(boxes_lib.iou_and_union(wanted[None], regions.boxes_xyxy[0])[0])
    best = int(overlaps.argmax())
    print(f"--box: the nearest region has IoU {overlaps[best]:.2f} with it", file=sys.stderr)
    return regions.boxes_xyxy[0, best], regions.embed[0, best]


def _write_page(
    output: epath.Path,
    args: argparse.Namespace,
    index: search.Index,
    questions: Sequence[page.Question],
    found: Sequence[Sequence[search.Hit]],
) -> None:
    wanted = [(hit.source, hit.path) for hits in found for hit in hits]
    loaded = parts.read_again(wanted, args.images)
    told = set()

    def load(hit: search.Hit) -> PIL.Image.Image | str:
        got = loaded[hit.source["name"], hit.path]
        if isinstance(got, sources.Image):
            try:
                return images_lib.decode_image(got.encoded, hit.path, got.orientation)
            except images_lib.ImageError as error:
                why = str(error)
        else:
            why = f"{hit.path}: {got.cause}: {got.detail}"
        if why not in told:
            print(f"not shown: {printable.plain(why, 400)}", file=sys.stderr)
        told.add(why)
        return why

    about = f"{len(index):,} images, model {index.settings.checkpoint}"
    text = page.render(args.folder, questions, found, load, about)
    atomic.write_text(output, text)
    print(f"{output}: {sum(map(len, found))} images", file=sys.stderr)


def _table(question: page.Question, hits: Sequence[search.Hit]) -> str:
    names = [printable.plain(hit.id, 80) for hit in hits]
    width = max(map(len, ["id", *names]))
    lines = [
        printable.plain(question.text, 200),
        f"{'rank':>4}  {'score':>6}  {'id':{width}}  box (pixels)",
    ]
    for rank, (hit, name) in enumerate(zip(hits, names), 1):
        box = "the whole image"
        if hit.box_xyxy is not None:
            pixels = hit.box_xyxy * [hit.width, hit.height, hit.width, hit.height]
            box = " ".join(f"{x:.0f}" for x in pixels)
        lines.append(f"{rank:4}  {hit.score:6.3f}  {name:{width}}  {box}")
    return "\n".join(lines)


def _output(path: str) -> epath.Path:
    output = epath.Path(path).expanduser()
    if output.is_dir():
        raise UsageError(f"--output: {output} is a folder, expected a file to write")
    output.parent.mkdir(parents=True, exist_ok=True)
    return output


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # of record sets and object stores
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        args = arguments.Search.parse(argv)
        compiled.use()
        try:
            with errors.out_of_memory_in_a_line("grain-jax search"):
                print(run(args))
        except OSError as error:
            reason = f"{error.filename or args.folder}: {error.strerror or error}"
            raise UsageError(reason) from None
    except errors.UserError as error:
        print(error, file=sys.stderr)
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
