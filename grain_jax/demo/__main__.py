"""An interactive page: drop an image, type classes with descriptions, and see scores and regions."""

import importlib.util
import os
import signal
import socket
import tempfile
from collections.abc import Sequence

from etils import epath

from grain_jax.checkpoint import pretrained
from grain_jax.cli import process
from grain_jax.core import errors
from grain_jax.data.aviary import samples  # pyright: ignore[reportMissingImports]
from grain_jax.demo import class_lists
from grain_jax.demo.arguments import Demo

_SUFFIXES = frozenset(".jpg .jpeg .png .bmp .gif .webp .tif .tiff".split())


def main(argv: Sequence[str] | None = None) -> None:
    """Serves the page until it is stopped."""
    arguments = Demo.parse(argv)
    if importlib.util.find_spec("gradio") is None:
        raise errors.UserError('demo: needs gradio: pip install "grain_jax[demo]"')
    check_address(arguments.host, arguments.port)
    with tempfile.TemporaryDirectory(prefix="grain_jax_demo_") as folder:
        # Gradio reads it at import; uploads are deleted with the folder.
        os.environ["GRADIO_TEMP_DIR"] = f"{folder}/uploads"
        _serve(arguments, epath.Path(folder) / "examples")


def _serve(arguments: Demo, folder: epath.Path) -> None:
    from grain_jax import inference  # with JAX; as Gradio, it takes seconds to import
    from grain_jax.demo import page
    from grain_jax.runtime import distributed

    distributed.keep_compiled_programs()
    folder.mkdir()
    classes = class_lists.read(arguments.classes) if arguments.classes else {}
    examples = copies(arguments.examples, folder) if arguments.examples else []
    predictor = inference.load(arguments.checkpoint)
    start = starting_point(predictor.folder or "", folder)
    views = page.Views(predictor)
    views.warm_up()  # so that the first answer on the page is quick
    blocks = page.build(views, classes or start[0], examples or start[1])
    url = page.launch(blocks, arguments.host, arguments.port, str(folder))
    print(f"{url} (Ctrl-C ends it)", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    blocks.block_thread()


def check_address(host: str, port: int | None) -> None:
    """Raises errors.UserError if a server cannot listen at this address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port or 0), family=family).close()
    except OSError as error:
        flags = f"--host {host}" if port is None else f"--host {host} --port {port}"
        raise errors.UserError(f"{flags}: {error.strerror or error}, expected others") from None


def starting_point(model: epath.PathLike, folder: epath.Path) -> tuple[class_lists.Classes, list[str]]:
    """Classes, and examples that are written to `folder`: those that a model's run is evaluated on, or none.

    For aviary-tiny, which knows nothing else, they are drawn birds.
    """
    if str(model) == str(pretrained.folder_of("aviary-tiny")):
        birds = samples.birds(3, seen=True)
        paths = [str(folder / f"{bird.name}.png") for bird in birds]
        for bird, path in zip(birds, paths):
            bird.image.save(path)
        return {bird.name: bird.descriptions for bird in birds}, paths
    classes, images = class_lists.evaluated(model)
    try:
        return classes, copies(images, folder) if images else []
    except errors.UserError:  # nobody asked for that folder
        return classes, []


def copies(source: str, folder: epath.Path) -> list[str]:
    """Copies at most 12 images of the folder `source`, evenly spaced, to `folder`; returns their paths."""
    below = (x for pattern in ("*", "*/*") for x in sorted(epath.Path(source).glob(pattern)))
    paths = [path for path in below if path.suffix.lower() in _SUFFIXES]
    if not paths:
        raise errors.UserError(f"--examples: {source}: got no image, expected a folder of them")
    count = min(12, len(paths))
    chosen = [paths[i * len(paths) // count] for i in range(count)]
    return [str(path.copy(folder / f"{i:02}_{path.name}")) for i, path in enumerate(chosen)]


if __name__ == "__main__":
    process.run(main)
