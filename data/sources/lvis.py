"""LVIS: lvis_v1_train.json, lvis_v1_val.json, one or both. The images are COCO's, below train2017/ and val2017/.

A region is an object: its description is the category's name, `bow_(weapon)` as "bow (weapon)". Where a
image has several of a category not all of them need have a box.
"""

from collections.abc import Iterator

import msgspec
from grain_jax.data.sources import base, coco, json_files, staged

_EXPECTED = "lvis_v1_train.json or lvis_v1_val.json"


class _Picture(msgspec.Struct):
    id: base.Id
    coco_url: str
    width: int | float
    height: int | float


class Lvis(staged.ListedSource):
    """The files' images, also those without an object."""

    def entries(self, options: base.Options) -> Iterator[base.Entry | base.Fault]:
        if not options.annotations:
            raise base.SourceError(f"source lvis: got no --annotations, expected {_EXPECTED}")
        return _entries(options.annotations)


def _entries(paths: tuple[str, ...]) -> Iterator[base.Entry | base.Fault]:
    for path in paths:
        content = json_files.read_json(path, coco.File[_Picture], _EXPECTED)
        if not content.categories:
            raise base.SourceError(f"{path}: got no categories, expected {_EXPECTED}")
        names = {c.id: c.name.replace("_", " ") for c in content.categories}
        entries = {
            image.id: base.Entry(
                # Its address ends in the split and the file: .../val2017/000000397133.jpg
                "/".join(image.coco_url.split("/")[-2:]),
                regions=[],
                size=(image.width, image.height),
            )
            for image in content.images
        }
        for found in coco.objects(path, content, coco.Object, entries, _EXPECTED):
            if isinstance(found, base.Fault):
                yield found
                continue
            entry, item = found
            name = names.get(item.category_id)
            entry.regions.append((base.xywh(item.bbox), name, base.WHOLE))
        yield from entries.values()
