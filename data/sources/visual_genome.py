"""Visual Genome: region_descriptions.json, and image_data.json for the sizes that boxes were drawn on.

The images' folder holds VG_100K and VG_100K_2, or all images at once; names are their ids.
"""

from collections.abc import Iterator
from typing import Any

from etils import epath
from grain_jax.data.sources import base, json_files, staged

from grain_jax.files import annotations

_EXPECTED = "a list: Visual Genome's region_descriptions.json or image_data.json"


class VisualGenome(staged.ListedSource):
    """The images of region_descriptions.json."""

    def entries(self, options: base.Options) -> Iterator[base.Entry | base.Fault]:
        sizes, descriptions = {}, []
        for path in options.annotations:
            for item in json_files.read_json_list(path, expected=_EXPECTED):
                if "regions" in item:
                    descriptions.append(path)
                    break
                if item.keys() >= {"image_id", "width", "height"}:
                    sizes[item["image_id"]] = (item["width"], item["height"])
        if not descriptions:
            raise base.SourceError(
                "source visual_genome: expected --annotations region_descriptions.json"
            )
        return _entries(descriptions, sizes, options.images)


def _entries(
    paths: list[str], sizes: dict[int, tuple[int, int]], images: str
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
            identity = item.get("id", item.get("image_id"))
            regions = item.get("regions")
            if identity is None or not isinstance(regions, list):
                got = f"got {annotations.show(item)}, expected id and regions"
                yield base.Fault(f"{path}[{number}]", "bad annotation", got)
                continue
            image = files.get(str(identity), f"{identity}.jpg")
            yield base.Entry(
                image, regions=[_region(region) for region in regions], size=sizes.get(identity)
            )


def _region(region: dict[str, Any]) -> tuple[Any, Any, float]:
    box = base.xywh([region.get(key) for key in ("x", "y", "width", "height")])
    return box, region.get("phrase"), base.WHOLE
