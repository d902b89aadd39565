"""An interactive page: drop an image, type classes with descriptions, and see scores, regions and why.

grain-jax demo --checkpoint DIR [--classes D.json] [--examples FOLDER]
"""

import importlib.util
import os
import signal
import socket
import tempfile
from collections.abc import Sequence

import PIL.Image
import PIL.ImageDraw
from etils import epath

from grain_jax.cli import process
from grain_jax.core import errors
from grain_jax.demo.arguments import Demo

_EXAMPLES = 12
_SUFFIXES = frozenset(".jpg .jpeg .png .bmp .gif .webp .tif .tiff".split())
_CLASSES = {  # of the example images that are drawn by default, where the run has none of its own
    "house": ("a red triangular roof", "a brown door", "a square wall"),
    "boat": ("a white sail", "a brown hull", "blue water"),
    "tree": ("a round green top", "a brown trunk", "green grass"),
}


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
    from grain_jax.demo import analysis, class_lists, page
    from grain_jax.runtime import compiled

    compiled.use()

    classes = class_lists.read(arguments.classes) if arguments.classes else None
    examples = _examples(arguments.examples, folder)
    predictor = inference.load(arguments.checkpoint)
    classes = classes or class_lists.of_run(predictor.folder or "") or _CLASSES
    analyst = analysis.Analyst(predictor)
    about = f"`{arguments.checkpoint}`: images of {predictor.model.image.image_size} pixels,"
    about += f" {analyst.queries or 'no'} regions."
    blocks = page.build(analyst, about, classes, examples)
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
        raise errors.UserError(f"--host {host} --port {port}: {reason}; give others") from None


def _examples(source: str | None, folder: epath.Path) -> list[str]:
    """Writes the example images to `folder`; returns their paths.

    They are copies of at most _EXAMPLES images of the folder `source`, evenly spaced, or drawn if it is None.
    """
    if source is None:
        return [str(path) for path in _draw(folder)]
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
    """Draws a house, a boat and a tree."""
    paths = []
    for name in _CLASSES:
        image = PIL.Image.new("RGB", (320, 240), "#bfe3f5")
        pen = PIL.ImageDraw.Draw(image)
        pen.rectangle((0, 180, 320, 240), fill="#2f7fc1" if name == "boat" else "#6aa84f")
        if name == "house":
            pen.rectangle((90, 100, 230, 210), fill="#f3e1b5")
            pen.polygon([(75, 100), (245, 100), (160, 35)], fill="#c0392b")
            pen.rectangle((142, 150, 178, 210), fill="#7a4b2a")
        elif name == "boat":
            pen.polygon([(160, 30), (160, 155), (250, 155)], fill="white")
            pen.polygon([(70, 160), (260, 160), (225, 205), (105, 205)], fill="#7a4b2a")
        else:
            pen.rectangle((147, 130, 173, 210), fill="#7a4b2a")
            pen.ellipse((95, 30, 225, 150), fill="#2e7d32")
        paths.append(folder / f"{name}.png")
        image.save(str(paths[-1]))
    return paths


if __name__ == "__main__":
    process.run(main)
