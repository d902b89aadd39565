"""Visual Genome: region_descriptions.json, and image_data.json for the sizes that boxes were drawn on.

The images' folder holds VG_100K and VG_100K_2, or all images at once; names are their ids.
"""

from collections.abc import Iterator
from typing import Any

import msgspec
from etils import epath

from grain_jax.data.sources import base, staged


class _Region(msgspec.Struct):
    x: base.Scalar = None
    y: base.Scalar = None
    width: base.Scalar = None
    height: base.Scalar = None
    phrase: base.Scalar = None

    def region(self) -> base.Region:
        phrase: Any = self.phrase
        box = base.xywh([self.x, self.y, self.width, self.height])
        return base.Region(box, phrase, base.WHOLE)


class _Item(msgspec.Struct):
    """In region_descriptions.json: `id` or `image_id`, `regions`; in image_data.json the rest."""

    id: base.Id | None = None
    image_id: base.Id | None = None
    width: int | float | None = None
    height: int | float | None = None
    regions: list[_Region] | None = None


class VisualGenome(staged.ListedSource):
    """The images of region_descriptions.json."""

    needs = "Visual Genome's region_descriptions.json or image_data.json"

    def entries(self, options: base.Options) -> Iterator[base.Annotation | base.Fault]:
        described, sizes = [], {}
        for path in options.annotations:
            listed = base.read_json(path, list[msgspec.Raw], self.needs)
            for (where, item), raw in zip(base.items(listed, _Item, str(path)), listed):
                if isinstance(item, base.Fault):
                    yield item
                elif item.regions is not None:
                    described.append(raw)  # ten times smaller than the item
                elif None not in (item.image_id, item.width, item.height):
                    sizes[item.image_id] = base.size(item.width, item.height)
                else:
                    got = "has neither regions nor an image_id with width and height"
                    detail = f"{got}, expected {self.needs}"
                    yield base.Fault(where, "bad annotation", detail, where)
        if not described:
            files_given = ", ".join(options.annotations)
            raise base.SourceError(f"{files_given}: expected region_descriptions.json among them")
        root = epath.Path(options.images)
        files = {
            path.stem: path.relative_to(root).as_posix()
            for folder in (root, root / "VG_100K", root / "VG_100K_2")
            if folder.is_dir()
            for path in folder.iterdir()
            if path.suffix.lower() in base.IMAGE_ENDINGS
        }
        for raw in described:
            item = msgspec.json.decode(raw, type=_Item)
            identity = item.image_id if item.id is None else item.id
            image = files.get(str(identity), f"{identity}.jpg")
            regions = [region.region() for region in item.regions]
            yield base.Annotation(image, regions=regions, drawn_on=sizes.get(identity))
