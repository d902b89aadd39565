"""FG-OVD (Bianchi et al., CVPR 2024): a file of its benchmarks, 1_attributes.json ... transparency.json.

A region is an object: its description is the name of its category, a sentence, and its negatives are the names of
`neg_category_ids`. The images are COCO's, below train2017/ and val2017/. Source of these names: lorebianchi98/FG-OVD,
gt/transparency.json and evaluation/ranks.py.
"""

from collections.abc import Iterator

from grain_jax.data.sources import base, coco, json_files, staged

_EXPECTED = "a benchmark of FG-OVD"


class _Object(coco.Object):
    neg_category_ids: list[base.Id] = []


class FgOvd(staged.ListedSource):
    """The images of the files."""

    def entries(self, options: base.Options) -> Iterator[base.Entry | base.Fault]:
        if not options.annotations:
            raise base.SourceError(f"source fg_ovd: got no --annotations, expected {_EXPECTED}")
        return _entries(options.annotations)


def _entries(paths: tuple[str, ...]) -> Iterator[base.Entry | base.Fault]:
    for path in paths:
        content = json_files.read_json(path, coco.File[coco.Picture], _EXPECTED)
        if not content.categories:
            raise base.SourceError(f"{path}: got no categories, expected {_EXPECTED}")
        names = {category.id: category.name for category in content.categories}
        entries = {
            image.id: base.Entry(image.file_name, regions=[], size=image.size)
            for image in content.images
        }
        for found in coco.objects(path, content, _Object, entries, _EXPECTED):
            if isinstance(found, base.Fault):
                yield found
                continue
            entry, item = found
            negatives = [names[i] for i in item.neg_category_ids if i in names]
            box, description = base.xywh(item.bbox), names.get(item.category_id)
            entry.regions.append((box, description, base.WHOLE, negatives))
        yield from entries.values()
