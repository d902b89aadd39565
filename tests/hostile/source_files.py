"""Small good samples of every public format, for tests that damage them."""

import pathlib

from grain_jax.data import sources
from tests.data import test_sources

COUNT = 2  # images of a sample


def _benchmarks(folder: pathlib.Path) -> dict[str, sources.Options]:
    """The three formats that `test_sources` has no sample of."""
    width, height = test_sources.SIZE
    size = {"width": width, "height": height}
    names = [f"val2017/{n}.jpg" for n in range(COUNT)]
    categories = [{"id": n, "name": f"cup_{n}"} for n in range(3)]
    objects = [{"image_id": n, "category_id": n, "bbox": [1, 2, 10, 9]} for n in range(COUNT)]
    sentences = [{"raw": "A cup.", "tokens": ["a", "cup"]}] * 2
    contents = {
        "karpathy": {
            "images": [
                {"filename": f"{n}.jpg", "filepath": "val2017", "split": "test", "sentences": sentences}
                for n in range(COUNT)
            ]
        },
        "lvis": {
            "images": [{"id": n, "coco_url": f"http://x/{x}"} | size for n, x in enumerate(names)],
            "categories": categories,
            "annotations": objects,
        },
        "fg_ovd": {
            "images": [{"id": n, "file_name": x} | size for n, x in enumerate(names)],
            "categories": categories,
            "annotations": [one | {"neg_category_ids": [2]} for one in objects],
        },
    }  # fmt: skip
    out = {}
    for name, content in contents.items():
        test_sources.write_pictures(folder / name / "images", "val2017/{}.jpg")
        path = test_sources.write_json(folder / name / f"{name}.json", content)
        out[name] = test_sources.options(folder / name, path)
    return out


def write(folder: pathlib.Path) -> dict[str, sources.Options]:
    """A sample of each source in a folder of its own; TFDS's is a set that data.build wrote."""
    before, test_sources.COUNT = test_sources.COUNT, COUNT
    try:
        samples = {name: make(folder / name) for name, make in test_sources.SAMPLES.items()}
        return samples | _benchmarks(folder)
    finally:
        test_sources.COUNT = before


def annotation_files(folder: pathlib.Path, options: sources.Options) -> list[pathlib.Path]:
    """The files of a sample that say something about its images: those that a hostile hand would change."""
    found = (path for path in folder.rglob("*") if path.is_file())
    lists = pathlib.Path(options.scratch)
    return sorted(x for x in found if x.suffix != ".jpg" and lists not in x.parents)
