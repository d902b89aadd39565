"""An interactive page: drop an image, type classes with descriptions, and see scores, regions and why.

grain-jax demo --checkpoint DIR [--classes D.json] [--examples FOLDER]
"""

import dataclasses
import importlib.util
import os
import signal
import socket
import tempfile
from collections.abc import Sequence
from typing import Any

from etils import epath

from grain_jax.cli import process
from grain_jax.core import errors
from grain_jax.data.aviary import generate, settings  # pyright: ignore[reportMissingImports]
from grain_jax.demo import class_lists
from grain_jax.demo.arguments import Demo
from grain_jax.runtime import pretrained

_EXAMPLES = 12
_EDGE = 240  # pixels of those that are drawn
_SUFFIXES = frozenset(".jpg .jpeg .png .bmp .gif .webp .tif .tiff".split())
_DRAWN = 3  # species of the embedded data set: the examples and the classes of who gives none


def main(words: Sequence[str] | None = None) -> None:
    """Serves the page until it is stopped."""
    arguments = Demo.parse(words)
    if importlib.util.find_spec("gradio") is None:
        raise errors.UserError(
            'the page needs gradio, which is not installed; run: pip install "grain_jax[demo]"'
        )
    _check_address(arguments.host, arguments.port)
    with tempfile.TemporaryDirectory(prefix="grain_jax_demo_") as folder:
        uploads, examples = (epath.Path(folder) / name for name in ("uploads", "examples"))
        uploads.mkdir()
        examples.mkdir()
        # Gradio reads it at import; uploads are deleted with the folder.
        os.environ["GRADIO_TEMP_DIR"] = str(uploads)
        _serve(arguments, uploads, examples)


def _serve(arguments: Demo, uploads: epath.Path, folder: epath.Path) -> None:
    # JAX and Gradio take seconds to import.
    from grain_jax import inference
    from grain_jax.demo import analysis, page
    from grain_jax.runtime import compiled

    compiled.use()

    classes = class_lists.read(arguments.classes) if arguments.classes else None
    examples = _copies(arguments.examples, folder) if arguments.examples else []
    length = arguments.sequence_length
    predictor = inference.load(arguments.checkpoint, sequence_length=length)
    examples = examples or _examples(predictor.folder or "", folder)
    classes = classes or class_lists.of_run(predictor.folder or "")
    if classes is None and _is_of_birds(predictor.folder):
        classes = {one.name: tuple(one.descriptions) for one in _species()}
    analyst = analysis.Analyst(predictor)
    seen = f"images of {predictor.model.image.image_size} pixels"
    if predictor.sequence_length:
        seen = f"images in their own shape, of at most {predictor.sequence_length} patches"
    about = f"`{arguments.checkpoint}`: {seen},"
    about += f" {analyst.queries or 'no'} regions{', a text decoder' if analyst.writes else ''}."
    blocks = page.build(analyst, about, classes or {}, examples)
    url = page.launch(
        blocks, arguments.host, arguments.port, uploads=str(uploads), examples=str(folder)
    )
    print(f"{url} (Ctrl-C ends it)", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    blocks.block_thread()


def _check_address(host: str, port: int | None) -> None:
    """Raises errors.UserError if a server cannot listen at this address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port or 0), family=family).close()
    except OSError as error:
        reason = error.strerror or error
        address = f"--host {host}" if port is None else f"--host {host} --port {port}"
        raise errors.UserError(f"{address}: {reason}; expected another address") from None


def _is_of_birds(model: epath.PathLike | None) -> bool:
    """Whether the folder of a model is that of aviary-tiny, which knows nothing but drawn birds."""
    return str(model) == str(pretrained.folder_of("aviary-tiny"))


def _examples(model: epath.PathLike, folder: epath.Path) -> list[str]:
    """Writes examples for the model in a folder to `folder`: images that its run is evaluated on, or none."""
    if _is_of_birds(model):
        return [str(path) for path in _draw(folder)]
    images = class_lists.images_of_run(model)
    try:
        return _copies(images, folder) if images else []
    except errors.UserError:  # nobody asked for that folder
        return []


def _copies(source: str, folder: epath.Path) -> list[str]:
    """Copies at most _EXAMPLES images of the folder `source`, evenly spaced, to `folder`; returns their paths."""
    root = epath.Path(source)
    if not root.is_dir():
        raise errors.UserError(f"--examples: {source}: no such folder; expected one of images")
    below = [root, *sorted(p for p in root.iterdir() if p.is_dir())]
    paths = [p for f in below for p in sorted(f.iterdir()) if p.suffix.lower() in _SUFFIXES]
    if not paths:
        raise errors.UserError(f"--examples: {source}: holds no image, nor do its folders")
    count = min(_EXAMPLES, len(paths))
    copies = []
    for i in range(count):
        path = paths[i * len(paths) // count]
        copies.append(folder / f"{i:02}_{path.name}")
        path.copy(copies[-1])
    return [str(path) for path in copies]


def _draw(folder: epath.Path) -> list[epath.Path]:
    """Draws a bird of each of `_species`."""
    larger, paths = dataclasses.replace(settings.DEFAULT, size=_EDGE), []
    for i, species in enumerate(_species()):
        paths.append(folder / f"{species.name}.png")
        generate.drawing_of(larger, "seen", i, species).image.save(str(paths[-1]))
    return paths


def _species() -> Sequence[Any]:
    return generate.species_of(settings.DEFAULT).training[:_DRAWN]


if __name__ == "__main__":
    process.run(main)
