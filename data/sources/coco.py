"""COCO and the sets of its form: captions_*.json and instances_*.json, LVIS, FG-OVD; one file or several.

A region is an object: its description is the category's name. Boxes around crowds are left out.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import msgspec

from grain_jax.core import annotations, regular_file
from grain_jax.data.sources import base, staged
from grain_jax.data.sources.base import Annotation, Fault, Region


class ImageItem(msgspec.Struct):
    """An item of `images`; `width` and `height` in pixels, if known."""

    id: base.Id
    file_name: str = ""
    coco_url: str = ""  # LVIS: it ends in the split and the file, .../val2017/000000397133.jpg
    width: int | float | None = None
    height: int | float | None = None

    def __post_init__(self):
        self.file_name = self.file_name or "/".join(self.coco_url.split("/")[-2:])


class _Category(msgspec.Struct):
    id: base.Id
    name: str


class Object(msgspec.Struct):
    """An item of `annotations`: a caption or a box."""

    image_id: base.Id
    id: base.Id | None = None
    caption: str | None = None
    bbox: base.Box = None
    category_id: base.Id | None = None
    iscrowd: bool | int = 0
    score: base.Scalar = base.WHOLE
    neg_category_ids: list[base.Id] = []  # FG-OVD


class File(msgspec.Struct):
    """A file of COCO's form; each item of `annotations` is checked on its own."""

    images: list[ImageItem]
    annotations: list[msgspec.Raw]
    categories: list[_Category] = []


@dataclasses.dataclass(frozen=True)
class Coco(base.BoxUnit, staged.ListedSource):
    """Images of one or several files, which are joined by the images' file names.

    FG-OVD (Bianchi et al., CVPR 2024; lorebianchi98/FG-OVD, gt/transparency.json, evaluation/ranks.py) names
    a box by a sentence as the name of its category. The names of `neg_category_ids` are its negatives.
    """

    needs = "COCO's captions or instances, or a benchmark of FG-OVD"
    space: ClassVar[str] = " "  # in the names of categories

    def entries(self, options: base.Options) -> Iterator[Annotation | Fault]:
        by_name: dict[str, Annotation] = {}
        faults: list[Fault] = []
        for path in options.annotations:
            content = regular_file.read_json(path, File, self.needs, base.MAX_FILE)
            names = {x.id: options.described(x.name.replace(self.space, " ")) for x in content.categories}
            by_id = {}
            for image in content.images:
                size = self.drawn_on or (image.width, image.height)
                new = Annotation(image.file_name, [], regions=[], left_out=[], drawn_on=size)
                by_id[image.id] = by_name.setdefault(image.file_name, new)
            for where, item in base.items(content.annotations, Object, f"{path}:annotations", faults):
                image: Any = by_id.get(item.image_id)  # its fields are lists
                if image is None:
                    got = f"got image_id {annotations.show(item.image_id)}, expected an image of the file"
                    faults.append(Fault(where, "bad annotation", got, where))
                elif item.caption is not None:
                    image.captions.append(item.caption)
                elif item.iscrowd:
                    image.left_out.append(Fault(image.image, "crowd", f"box {annotations.show(item.bbox)}"))
                else:
                    name: Any = names.get(item.category_id)
                    negatives = tuple(names[i] for i in item.neg_category_ids if i in names)
                    image.regions.append(Region(base.xywh(item.bbox), name, item.score, negatives))
        yield from faults
        yield from by_name.values()


class Lvis(Coco):
    """LVIS: lvis_v1_train.json, lvis_v1_val.json. The images are COCO's, below train2017/ and val2017/.

    An image may have further objects of a category, without a box. `bow_(weapon)` becomes "bow (weapon)".
    """

    needs = "lvis_v1_train.json or lvis_v1_val.json"
    space = "_"
