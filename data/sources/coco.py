"""COCO: captions_*.json and instances_*.json, one or both, of one split or several.

A region is an object: its description is the category's name. Boxes around crowds are left out.
"""

import abc
from collections.abc import Iterator
from typing import Any, ClassVar, Generic, TypeVar

import msgspec

from grain_jax.core import annotations
from grain_jax.data.sources import base, json_files, staged


class ImageItem(msgspec.Struct):
    """An item of `images`."""

    id: base.Id
    file_name: str
    width: int | float | None = None
    height: int | float | None = None

    @property
    def name(self) -> str:
        """The image's path below the images' folder."""
        return self.file_name

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


ImageItems = TypeVar("ImageItems")


class File(msgspec.Struct, Generic[ImageItems]):
    """A file of COCO's form; each item of `annotations` is checked on its own."""

    images: list[ImageItems]
    annotations: list[msgspec.Raw]
    categories: list[Category] = []


class Objects(staged.ListedSource):
    """Files of COCO's form whose objects have a category: a subclass says what else there is.

    Attributes:
      image_item: the form of an item of `images`, with `id`, `name` and `size`.
      item: the form of an item of `annotations`.
      of_objects: whether a file without categories is none of this form.
    """

    of_objects: ClassVar[bool] = True
    image_item: ClassVar[Any] = ImageItem
    item: ClassVar[Any] = Object

    @abc.abstractmethod
    def add(self, entry: base.Entry, found: Any, names: dict[base.Id, str]) -> None:
        """Adds what an item of `annotations` says to the entry of its image; `names` are the categories'."""

    def entries(self, options: base.Options) -> Iterator[base.Entry | base.Fault]:
        for path in options.annotations:
            of_name: dict[str, base.Entry] = {}
            yield from self._read(path, of_name)
            yield from of_name.values()

    def _read(self, path: str, of_name: dict[str, base.Entry]) -> Iterator[base.Fault]:
        """Adds what a file says to the entries by the images' names; yields the faults of its items."""
        content = json_files.read(path, File[self.image_item], self.needs)
        if self.of_objects and not content.categories:
            raise base.SourceError(f"{path}: got no categories, expected {self.needs}")
        names = {category.id: category.name for category in content.categories}
        of_id = {}
        for image in content.images:
            new = base.Entry(image.name, [], regions=[], size=image.size, left_out=[])
            of_id[image.id] = of_name.setdefault(image.name, new)
        for number, raw in enumerate(content.annotations):
            where = f"{path}:annotations[{number}]"
            found = json_files.item(raw, self.item, where, self.needs)
            if isinstance(found, base.Fault):
                yield found
            elif found.image_id in of_id:
                self.add(of_id[found.image_id], found, names)
            else:
                got = f"got image_id {annotations.show(found.image_id)}"
                yield base.Fault(where, "bad annotation", f"{got}, expected an image of the file")


class Coco(Objects):
    """Images of one or several of COCO's files, which are joined by the images' file names."""

    needs = "COCO's captions or instances"
    of_objects = False

    def entries(self, options: base.Options) -> Iterator[base.Entry | base.Fault]:
        of_name: dict[str, base.Entry] = {}
        for path in options.annotations:
            yield from self._read(path, of_name)
        yield from of_name.values()

    def add(self, entry: base.Entry, found: Object, names: dict[base.Id, str]) -> None:
        if found.caption is not None:
            entry.captions.append(found.caption)
        elif found.iscrowd:
            entry.left_out.append(("crowd", f"box {annotations.show(found.bbox)}"))
        else:
            name = names.get(found.category_id)
            entry.regions.append((base.xywh(found.bbox), name, found.score))
