"""LVIS: lvis_v1_train.json, lvis_v1_val.json, one or both. The images are COCO's, below train2017/ and val2017/.

A region is an object: its description is the category's name, `bow_(weapon)` as "bow (weapon)". Where an
image has several of a category not all of them need have a box.
"""

import msgspec

from grain_jax.data.sources import base, coco


class _ImageItem(msgspec.Struct):
    id: base.Id
    coco_url: str
    width: int | float
    height: int | float

    @property
    def file_name(self) -> str:
        # Its address ends in the split and the file: .../val2017/000000397133.jpg
        return "/".join(self.coco_url.split("/")[-2:])


class Lvis(coco.Coco):
    """The files' images, also those without an object."""

    needs = "lvis_v1_train.json or lvis_v1_val.json"
    file = coco.ObjectFile[_ImageItem]

    def add(self, entry: base.Entry, found: coco.Object, names: dict[base.Id, str]) -> None:
        name = names.get(found.category_id)
        entry.regions.append((base.xywh(found.bbox), name, base.WHOLE))

    def label(self, name: str) -> str:
        return name.replace("_", " ")
