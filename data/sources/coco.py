"""COCO: captions_*.json and instances_*.json, one or both, of one split or several.

A region is an object: its description is the category's name. Boxes around crowds are left out.
"""

from collections.abc import Iterator

from grain_jax.data.sources import base, json_files, staged

_EXPECTED = "COCO's captions or instances"


class Coco(staged.ListedSource):
    """Images of one or several of COCO's files, which are joined by the images' file names."""

    def entries(self, options: base.Options) -> Iterator[base.Entry | base.Fault]:
        if not options.annotations:
            raise base.SourceError(f"source coco: got no --annotations, expected {_EXPECTED}")
        return _entries(options.annotations)


def _entries(paths: tuple[str, ...]) -> Iterator[base.Entry | base.Fault]:
    entries: dict[str, base.Entry] = {}
    for path in paths:
        content = json_files.read_json(path, expected=_EXPECTED)
        try:
            names = {item["id"]: item["name"] for item in content.get("categories", ())}
            files = {image["id"]: image["file_name"] for image in content["images"]}
            for image in content["images"]:
                size = (image["width"], image["height"]) if "width" in image else None
                new = base.Entry(image["file_name"], [], regions=[], size=size, left_out=[])
                entries.setdefault(image["file_name"], new)
            annotations = content["annotations"]
        except (KeyError, TypeError, AttributeError) as error:
            raise base.SourceError(
                f"{path}: {type(error).__name__} {error}, expected {_EXPECTED}"
            ) from None
        for number, item in enumerate(annotations):
            entry = entries.get(files.get(item.get("image_id")))
            if entry is None or not ("caption" in item or "bbox" in item):
                where, got = f"{path}:annotations[{number}]", f"image_id {item.get('image_id')}"
                expected = "expected an image of the file, and a caption or a bbox"
                yield base.Fault(where, "bad annotation", f"got {got}, {expected}")
                continue
            if "caption" in item:
                entry.captions.append(item["caption"])
            elif item.get("iscrowd"):
                entry.left_out.append(("crowd", f"box {item['bbox']}"))
            else:
                box, name = base.xywh(item["bbox"]), names.get(item.get("category_id"))
                entry.regions.append((box, name, item.get("score", base.WHOLE)))
    yield from entries.values()
