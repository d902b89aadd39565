"""Small good samples of every public format, for tests that damage them."""

import pathlib

from grain_jax.data import sources
from tests.data import test_sources

COUNT = 2  # images of a sample


def write(folder: pathlib.Path, *names: str) -> dict[str, sources.Options]:
    """A sample of each source, or of those, in a folder of its own; TFDS's is a set that data.build wrote."""
    before, test_sources.COUNT = test_sources.COUNT, COUNT
    try:
        return {
            name: test_sources.SAMPLES[name](folder / name) for name in names or sources.SOURCES
        }
    finally:
        test_sources.COUNT = before


def annotation_files(folder: pathlib.Path, options: sources.Options) -> list[pathlib.Path]:
    """The files of a sample that say something about its images: those that a hostile hand would change."""
    found = (path for path in folder.rglob("*") if path.is_file())
    lists = pathlib.Path(options.scratch)
    return sorted(x for x in found if x.suffix != ".jpg" and lists not in x.parents)
