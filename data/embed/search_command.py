"""Which images fit a text, or are like an image or its region, of a folder of embeddings (docs/embed.md).

grain-jax search DIR --text "a long orange beak" [--output found.html]
"""

import argparse
import functools
import html as html_lib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import PIL.Image
from etils import epath

from grain_jax import inference
from grain_jax.core import atomic, errors, html, printable
from grain_jax.core import images as images_lib
from grain_jax.data import sources
from grain_jax.data.embed import arguments, parts, search
from grain_jax.data.embed.search import Hit, SearchError
from grain_jax.inference import inputs, rerank
from grain_jax.losses import boxes as boxes_lib
from grain_jax.runtime import compiled

_EDGE = 480  # pixels of the longer side of an image on the page
_MOST = 400  # characters of a name that are shown


class Question(NamedTuple):
    """What was asked."""

    text: str  # as it was typed, or the name of the image
    image: PIL.Image.Image | None = None
    box_xyxy: np.ndarray | None = None  # in [0, 1]: the region of `image` that was asked for


def run(args: argparse.Namespace) -> str:
    """Searches, and writes the page; returns the tables. Raises UserError."""
    if not args.text and not args.image:
        raise SearchError("grain-jax search: expected --text TEXT or --image FILE")
    if args.box and (args.text or len(args.image) != 1):
        raise SearchError("--box: expected it with one --image, and no --text")
    if args.rerank and args.image:
        raise SearchError("--rerank: got --image, expected --text alone: texts have a likelihood")
    if args.rerank_weight is not None and not args.rerank:
        raise SearchError("--rerank-weight: got it without --rerank, expected --rerank 10, too")
    output = epath.Path(args.output or "").expanduser()
    if args.output:
        if output.is_dir():
            raise SearchError(f"--output: {output} is a folder, expected a file to write")
        output.parent.mkdir(parents=True, exist_ok=True)
    index = search.Index(args.folder)
    if index.missing:
        files = f"{index.missing} of {index.missing + len(index.parts)} files"
        print(f"{args.folder}: {files} are not there yet", file=sys.stderr)
    if args.sequence_length is not None:
        index.check_length(args.sequence_length)
    if args.checkpoint:
        dtype, length = index.settings.dtype, index.settings.sequence_length
        model = inference.load(args.checkpoint, dtype, sequence_length=length)
        index.check(model)
    else:
        model = index.model
    weight, said = _weight(args, index, model) if args.rerank else (0.0, "")
    top = max(args.top, args.rerank)
    answers = functools.partial(
        search.search, index, top=top, by=args.by, model=model, faiss=args.faiss
    )
    questions = [Question(text) for text in args.text]
    found = answers(args.text) if args.text else []
    if args.rerank:
        found = [  # the images of one text at a time
            search.reranked(
                model, text, hits, _images_of(hits[: args.rerank], args.images), weight
            )[: args.top]
            for text, hits in zip(args.text, found)
        ]
        print(f"--rerank: {args.rerank} by {said}", file=sys.stderr)
    if args.image:
        load = functools.partial(images_lib.load_image, orientation=index.settings.orientation)
        asked = [Question(path, load(path)) for path in args.image]
        queries: search.Queries = [question.image for question in asked]
        if args.box:
            box_xyxy, vector = _region(model, asked[0].image, args.box)
            asked, queries = [asked[0]._replace(box_xyxy=box_xyxy)], vector[None]
        questions += asked
        found += answers(queries)
    if args.output:
        loaded = parts.read_again([(h.source, h.path) for hits in found for h in hits], args.images)
        told = set()

        def show(hit: Hit) -> PIL.Image.Image | str:
            image = _decoded(hit.path, loaded[hit.source["name"], hit.path])
            if isinstance(image, str) and image not in told:
                print(f"not shown: {printable.plain(image, 400)}", file=sys.stderr)
                told.add(image)
            return image

        about = f"{len(index):,} images, model {index.settings.checkpoint}"
        atomic.write_text(output, render(args.folder, questions, found, show, about))
        print(f"{output}: {sum(map(len, found))} images", file=sys.stderr)
    return "\n\n".join(_table(question, hits) for question, hits in zip(questions, found))


def _weight(
    args: argparse.Namespace, index: search.Index, model: inference.Predictor
) -> tuple[float, str]:
    """The weight of the likelihood, and where it is from. Raises InputError."""
    inputs.need_text_decoder(model, f"--rerank, --checkpoint {args.checkpoint or model.folder}")
    by_regions = args.by == "regions" or (args.by is None and index.has_regions)
    if by_regions and args.rerank_weight is None:
        raise SearchError(
            "--rerank: the stored weight is of captions of whole images, and the search is by regions; expected"
            " --rerank-weight W, or --by images"
        )
    return rerank.weight_of(model, args.rerank_weight)


def _images_of(hits: Sequence[Hit], folder: str | None) -> list[PIL.Image.Image]:
    """The images of hits. Raises SearchError where one cannot be read."""
    loaded = parts.read_again([(hit.source, hit.path) for hit in hits], folder)
    images, faults = [], []
    for hit in hits:
        image = _decoded(hit.path, loaded[hit.source["name"], hit.path])
        (faults if isinstance(image, str) else images).append(image)
    if faults:
        raise SearchError(
            f"--rerank: {len(faults)} of the {len(hits)} images that come first cannot be read:"
            f" {printable.plain(faults[0], 400)}; give --images where they lie now, or search without --rerank"
        )
    return images


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


def _decoded(path: str, found: parts.Found) -> PIL.Image.Image | str:
    """The image, or why there is none."""
    if isinstance(found, sources.Fault):
        return f"{path}: {found.cause}: {found.detail}"
    try:
        return images_lib.decode_image(found.encoded, path)
    except images_lib.ImageError as error:
        return str(error)


def _table(question: Question, hits: Sequence[Hit]) -> str:
    names = [printable.plain(hit.id, 80) for hit in hits]
    width = max(map(len, ["id", *names]))
    has_likelihood = any(hit.log_likelihood is not None for hit in hits)
    likely = lambda shown: f"{shown:>7}  " if has_likelihood else ""
    lines = [
        printable.plain(question.text, 200),
        f"{'rank':>4}  {'score':>6}  {likely('log p')}{'id':{width}}  box (pixels)",
    ]
    for rank, (hit, name) in enumerate(zip(hits, names), 1):
        box = "the whole image"
        if hit.box_xyxy is not None:
            pixels = hit.box_xyxy * [hit.width, hit.height, hit.width, hit.height]
            box = " ".join(f"{x:.0f}" for x in pixels)
        log_p = likely("" if hit.log_likelihood is None else f"{hit.log_likelihood:.2f}")
        lines.append(f"{rank:4}  {hit.score:6.3f}  {log_p}{name:{width}}  {box}")
    return "\n".join(lines)


def render(
    folder: str,
    questions: Sequence[Question],
    found: Sequence[Sequence[Hit]],
    load: Callable[[Hit], PIL.Image.Image | str],
    about: str,
) -> str:
    """The HTML of the page.

    Args:
      folder: of the embeddings.
      questions: in order.
      found: the hits of each.
      load: gives the image of a hit, or why there is none.
      about: a sentence for the head.
    """
    sections = []
    for number, (question, hits) in enumerate(zip(questions, found), 1):
        asked = ""
        if question.image is not None:
            boxes = [] if question.box_xyxy is None else [question.box_xyxy]
            image = _image(question.image, boxes, 0, "the question")
            asked = f'<figure class="card asked">{image}</figure>'
        cards = "".join(_card(rank, hit, load(hit)) for rank, hit in enumerate(hits, 1))
        content = f'{asked}<div class="cards">{cards}</div>'
        sections.append(html.Section(f"question-{number}", escape(question.text), content))
    said = f"<code>{escape(folder)}</code>: {escape(about)}"
    return html.document(
        title=f"{folder}: grain-jax search",
        header=f'<div><h1>Found images</h1><p class="soft">{said}</p></div>',
        sections=sections,
        files=[epath.Path(__file__).parent / "search_page.css"],
    )


def escape(text: str) -> str:
    """HTML that shows a text of anybody's: markup and control characters as characters, cut to _MOST."""
    return html_lib.escape(printable.plain(text, _MOST))


def _card(rank: int, hit: Hit, image: PIL.Image.Image | str) -> str:
    if isinstance(image, str):
        shown = f'<p class="none">{escape(image)}</p>'
    else:
        shown = _image(image, hit.boxes_xyxy, hit.region, hit.path)
    named = escape(hit.path) if hit.id == hit.path else f"{escape(hit.id)}<br>{escape(hit.path)}"
    return (
        f'<figure class="card">{shown}<figcaption><b>{rank}</b>{hit.score:.3f} · '
        f"{hit.width} x {hit.height}<br>{named}</figcaption></figure>"
    )


def _image(
    image: PIL.Image.Image,
    boxes_xyxy: Sequence[np.ndarray] | np.ndarray,
    best: int | None,
    what: str,
) -> str:
    """An image with its boxes over it, in shares of its sides; the one at `best` is drawn last, and stronger."""
    small = images_lib.to_rgb(image)
    small.thumbnail((_EDGE, _EDGE), PIL.Image.Resampling.LANCZOS)
    order = sorted(range(len(boxes_xyxy)), key=lambda i: i == best)
    boxes = "".join(_box(boxes_xyxy[i], strong=i == best) for i in order)
    return (
        f'<div class="image"><img src="{html.data_uri(small)}" width="{small.width}" height="{small.height}"'
        f' alt="{escape(what)}"><svg class="boxes" viewBox="0 0 1 1" preserveAspectRatio="none"'
        f' aria-hidden="true">{boxes}</svg></div>'
    )


def _box(box_xyxy: np.ndarray, *, strong: bool) -> str:
    x1, y1, x2, y2 = (round(float(x), 4) for x in box_xyxy)
    place = f'x="{x1}" y="{y1}" width="{x2 - x1:.4f}" height="{y2 - y1:.4f}"'
    colour = html.REGION_COLOURS[0] if strong else html.REGION_COLOURS[1]
    halo = f'<rect class="halo" {place}/>' if strong else ""
    line = f'<rect class="line" {place} stroke="{colour}"/>'
    return f'<g class="{"best" if strong else "other"}">{halo}{line}</g>'


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
            raise SearchError(reason) from None
    except errors.UserError as error:
        print(error, file=sys.stderr)
        return error.status
    return 0
