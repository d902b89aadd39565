"""FG-OVD (Bianchi et al., CVPR 2024): a file of its benchmarks, 1_attributes.json ... transparency.json.

A region is an object: its description is the name of its category, a sentence, and its negatives are the names of
`neg_category_ids`. The images are COCO's, below train2017/ and val2017/. Source of these names: lorebianchi98/FG-OVD,
gt/transparency.json and evaluation/ranks.py.
"""

from collections.abc import Iterator

from grain_jax.data.sources import base, json_files, staged

_EXPECTED = "a benchmark of FG-OVD"


class FgOvd(staged.ListedSource):
    """The images of the files."""

    def entries(self, options: base.Options) -> Iterator[base.Entry | base.Fault]:
        if not options.annotations:
            raise base.SourceError(f"source fg_ovd: got no --annotations, expected {_EXPECTED}")
        return _entries(options.annotations)


def _entries(paths: tuple[str, ...]) -> Iterator[base.Entry | base.Fault]:
    for path in paths:
        content = json_files.read_json(path, expected=_EXPECTED)
        try:
            names = {category["id"]: category["name"] for category in content["categories"]}
            entries = {
                image["id"]: base.Entry(
                    image["file_name"], regions=[], size=(image["width"], image["height"])
                )
                for image in content["images"]
            }
            annotations = enumerate(content["annotations"])
        except (KeyError, TypeError, AttributeError) as error:
            got = f"{type(error).__name__} {error}"
            raise base.SourceError(f"{path}: got {got}, expected {_EXPECTED}") from None
        for number, item in annotations:
            entry = entries.get(item.get("image_id"))
            if entry is None:
                detail = f"got image_id {item.get('image_id')}, expected an image of the file"
                yield base.Fault(f"{path}:annotations[{number}]", "bad annotation", detail)
                continue
            negatives = [names[i] for i in item.get("neg_category_ids", ()) if i in names]
            box, description = base.xywh(item.get("bbox")), names.get(item.get("category_id"))
            entry.regions.append((box, description, base.WHOLE, negatives))
        yield from entries.values()
