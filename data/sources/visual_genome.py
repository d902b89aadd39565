"""Visual Genome: region_descriptions.json, and image_data.json for the sizes that boxes were drawn on.

The images' folder holds VG_100K and VG_100K_2, or all images at once; names are their ids.
"""

from collections.abc import Iterator

import msgspec
from etils import epath

from grain_jax.data.sources import base, json_files, staged


class _Region(msgspec.Struct):
    x: base.Scalar = None
    y: base.Scalar = None
    width: base.Scalar = None
    height: base.Scalar = None
    phrase: base.Scalar = None


class _Item(msgspec.Struct):
    """Of region_descriptions.json: `id` or `image_id`, `regions`; of image_data.json the rest."""

    id: base.Id | None = None
    image_id: base.Id | None = None
    width: int | float | None = None
    height: int | float | None = None
    regions: list[_Region] | None = None


class VisualGenome(staged.ListedSource):
    """The images of region_descriptions.json."""

    needs = "Visual Genome's region_descriptions.json or image_data.json"

    def entries(self, options: base.Options) -> Iterator[base.Entry | base.Fault]:
        sizes: dict[base.Id | None, tuple[float, float] | None] = {}
        described = False
        for path in options.annotations:
            for found in json_files.read_list(path, _Item, self.needs):
                if not isinstance(found, base.Fault):
                    if found.regions is not None:
                        described = True
                        break
                    sizes[found.image_id] = base.size(found.width, found.height)
        if not described:
            given = ", ".join(options.annotations)
            raise base.SourceError(f"{given}: expected region_descriptions.json among them")
        root = epath.Path(options.images)
        files = {
            path.stem: path.relative_to(root).as_posix()
            for folder in (root, root / "VG_100K", root / "VG_100K_2")
            if folder.is_dir()
            for path in folder.iterdir()
            if path.suffix.lower() in base.IMAGE_ENDINGS
        }
        for path in options.annotations:
            for number, found in enumerate(json_files.read_list(path, _Item, self.needs)):
                if isinstance(found, base.Fault):
                    yield found
                    continue
                identity = found.image_id if found.id is None else found.id
                if identity is not None and found.regions is not None:
                    regions = [([x.x, x.y, x.width, x.height], x.phrase) for x in found.regions]
                    yield base.Entry(
                        files.get(str(identity), f"{identity}.jpg"),
                        regions=[(base.xywh(box), said, base.WHOLE) for box, said in regions],
                        size=sizes.get(identity),
                    )
                elif None in (found.image_id, found.width, found.height):
                    got = "has neither regions nor an image_id with width and height"
                    fault = f"{got}, expected {self.needs}"
                    yield base.Fault(f"{path}[{number}]", "bad annotation", fault)
