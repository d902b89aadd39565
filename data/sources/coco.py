"""COCO: captions_*.json and instances_*.json, one or both, of one split or several.

A region is an object: its description is the category's name. Boxes around crowds are left out.
"""

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

import msgspec
from grain_jax.data.sources import base, json_files, staged

from grain_jax.files import annotations

_EXPECTED = "COCO's captions or instances"


class Picture(msgspec.Struct):
    """An item of `images`."""

    id: base.Id
    file_name: str
    width: int | float | None = None
    height: int | float | None = None

    @property
    def size(self) -> tuple[float, float] | None:
        """Width, height in pixels, where both are known."""
        return None if None in (self.width, self.height) else (self.width, self.height)


class Category(msgspec.Struct):
    """An item of `categories`."""

    id: base.Id
    name: str


class Object(msgspec.Struct):
    """An item of `annotations`: a caption or a box."""

    image_id: base.Id
    caption: str | None = None
    bbox: base.Box = None
    category_id: base.Id | None = None
    iscrowd: bool | int = 0
    score: base.Scalar = base.WHOLE


Pictures, Objects, E = TypeVar("Pictures"), TypeVar("Objects", bound=Object), TypeVar("E")


class File(msgspec.Struct, Generic[Pictures]):
    """A file of COCO's form; each item of `annotations` is checked on its own."""

    images: list[Pictures]
    annotations: list[msgspec.Raw]
    categories: list[Category] = []


def objects(
    path: str, file: File, kind: type[Objects], entries: Mapping[base.Id, E], expected: str
) -> Iterator[tuple[E, Objects] | base.Fault]:
    """The file's annotations with the entry of their image; a fault for each one without, or of another form."""
    for number, raw in enumerate(file.annotations):
        where = f"{path}:annotations[{number}]"
        found = json_files.item(raw, kind, where, expected)
        if isinstance(found, base.Fault):
            yield found
        elif found.image_id in entries:
            yield entries[found.image_id], found
        else:
            got = f"got image_id {annotations.show(found.image_id)}"
            yield base.Fault(where, "bad annotation", f"{got}, expected an image of the file")


class Coco(staged.ListedSource):
    """Images of one or several of COCO's files, which are joined by the images' file names."""

    def entries(self, options: base.Options) -> Iterator[base.Entry | base.Fault]:
        if not options.annotations:
            raise base.SourceError(f"source coco: got no --annotations, expected {_EXPECTED}")
        return _entries(options.annotations)


def _entries(paths: tuple[str, ...]) -> Iterator[base.Entry | base.Fault]:
    entries: dict[str, base.Entry] = {}
    for path in paths:
        content = json_files.read_json(path, File[Picture], _EXPECTED)
        names = {category.id: category.name for category in content.categories}
        of_id = {}
        for picture in content.images:
            new = base.Entry(picture.file_name, [], regions=[], size=picture.size, left_out=[])
            of_id[picture.id] = entries.setdefault(picture.file_name, new)
        for found in objects(path, content, Object, of_id, _EXPECTED):
            if isinstance(found, base.Fault):
                yield found
                continue
            entry, item = found
            if item.caption is not None:
                entry.captions.append(item.caption)
            elif item.iscrowd:
                entry.left_out.append(("crowd", f"box {annotations.show(item.bbox)}"))
            else:
                name = names.get(item.category_id)
                entry.regions.append((base.xywh(item.bbox), name, item.score))
    yield from entries.values()
