"""COCO: captions_*.json and instances_*.json, one or both, of one split or several.

A region is an object: its description is the category's name. Boxes around crowds are left out.
"""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Generic, TypeVar

import msgspec

from grain_jax.core import annotations, regular_file
from grain_jax.data.sources import base, json_files, staged


class ImageItem(msgspec.Struct):
    """An item of `images`; `width` and `height` in pixels, where known."""

    id: base.Id
    file_name: str
    width: int | float | None = None
    height: int | float | None = None


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


ImageItems = TypeVar("ImageItems")


class File(msgspec.Struct, Generic[ImageItems]):
    """A file of COCO's form; each item of `annotations` is checked on its own."""

    images: list[ImageItems]
    annotations: list[msgspec.Raw]
    categories: list[Category] = []


class ObjectFile(msgspec.Struct, Generic[ImageItems]):
    """A file of COCO's form whose objects all have a category."""

    images: list[ImageItems]
    annotations: list[msgspec.Raw]
    categories: Annotated[list[Category], msgspec.Meta(min_length=1)]


class Coco(staged.ListedSource):
    """Images of one or several files, which are joined by the images' file names.

    A subclass says what another set's files have.

    Attributes:
      file: the form of a file; an item of its `images` has what ImageItem has.
      item: the form of an item of `annotations`.
    """

    needs = "COCO's captions or instances"
    has_labels: ClassVar[bool] = True
    file: ClassVar[Any] = File[ImageItem]
    item: ClassVar[Any] = Object

    def entries(self, options: base.Options) -> Iterator[base.Entry | base.Fault]:
        of_name: dict[str, base.Entry] = {}
        for path in options.annotations:
            content = regular_file.read_json(path, self.file, self.needs, json_files.MAX_FILE)
            names = {x.id: options.described(self.label(x.name)) for x in content.categories}
            of_id = {}
            for image in content.images:
                size = base.size(image.width, image.height)
                new = base.Entry(image.file_name, [], regions=[], size=size, left_out=[])
                of_id[image.id] = of_name.setdefault(image.file_name, new)
            for number, raw in enumerate(content.annotations):
                where = f"{path}:annotations[{number}]"
                found = json_files.item(raw, self.item, where, self.needs)
                if isinstance(found, base.Fault):
                    yield found
                elif found.image_id in of_id:
                    self.add(of_id[found.image_id], found, names)
                else:
                    got = f"got image_id {annotations.show(found.image_id)}"
                    yield base.Fault(
                        where, "bad annotation", f"{got}, expected an image of the file"
                    )
        yield from of_name.values()

    def label(self, name: str) -> str:
        """The name of a category as people write it."""
        return name

    def add(self, entry: base.Entry, found: Any, names: dict[base.Id, str]) -> None:
        """Adds what an item of `annotations` says to the entry of its image; `names` are the categories'."""
        if found.caption is not None:
            entry.captions.append(found.caption)
        elif found.iscrowd:
            entry.left_out.append(("crowd", f"box {annotations.show(found.bbox)}"))
        else:
            name = names.get(found.category_id)
            entry.regions.append((base.xywh(found.bbox), name, found.score))
