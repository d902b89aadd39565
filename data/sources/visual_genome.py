"""Visual Genome: region_descriptions.json, and image_data.json for the sizes that boxes were drawn on.

The images' folder holds VG_100K and VG_100K_2, or all images at once; names are their ids.
"""

from collections.abc import Iterator

import msgspec
from etils import epath
from grain_jax.data.sources import base, json_files, staged

from grain_jax.files import annotations

_EXPECTED = "a list: Visual Genome's region_descriptions.json or image_data.json"


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

    def entries(self, options: base.Options) -> Iterator[base.Entry | base.Fault]:
        sizes, descriptions = {}, []
        for path in options.annotations:
            for number, item in enumerate(json_files.read_json_list(path, expected=_EXPECTED)):
                if "regions" in item:
                    descriptions.append(path)
                    break
                found = json_files.item(item, _Item, f"{path}[{number}]", _EXPECTED)
                if isinstance(found, base.Fault):
                    yield found
                elif None not in (found.image_id, found.width, found.height):
                    sizes[found.image_id] = (found.width, found.height)
        if not descriptions:
            raise base.SourceError(
                "source visual_genome: expected --annotations region_descriptions.json"
            )
        yield from _entries(descriptions, sizes, options.images)


def _entries(
    paths: list[str], sizes: dict[base.Id, tuple[float, float]], images: str
) -> Iterator[base.Entry | base.Fault]:
    root = epath.Path(images)
    folders = [root, *(root / name for name in ("VG_100K", "VG_100K_2"))]
    files = {
        path.stem: path.relative_to(root).as_posix()
        for folder in folders
        if folder.is_dir()
        for path in folder.iterdir()
        if path.suffix.lower() in base.IMAGE_ENDINGS
    }
    for path in paths:
        for number, item in enumerate(json_files.read_json_list(path, expected=_EXPECTED)):
            where = f"{path}[{number}]"
            found = json_files.item(item, _Item, where, _EXPECTED)
            if isinstance(found, base.Fault):
                yield found
                continue
            identity = found.image_id if found.id is None else found.id
            if identity is None or found.regions is None:
                got = f"got {annotations.show(item)}, expected id and regions"
                yield base.Fault(where, "bad annotation", got)
                continue
            yield base.Entry(
                files.get(str(identity), f"{identity}.jpg"),
                regions=[_region(region) for region in found.regions],
                size=sizes.get(identity),
            )


def _region(region: _Region) -> tuple[base.Box, base.Scalar, float]:
    box = base.xywh([region.x, region.y, region.width, region.height])
    return box, region.phrase, base.WHOLE
