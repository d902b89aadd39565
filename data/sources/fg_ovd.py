"""FG-OVD (Bianchi et al., CVPR 2024): one file of its benchmarks, 1_attributes.json ... transparency.json (several are joined).

A region is an object: its description is the name of its category, a sentence, and its negatives are the names of
`neg_category_ids`. The images are COCO's, below train2017/ and val2017/. Source of these names: lorebianchi98/FG-OVD,
gt/transparency.json and evaluation/ranks.py.
"""

from grain_jax.data.sources import base, coco


class _Object(coco.Object):
    neg_category_ids: list[base.Id] = []


class FgOvd(coco.Coco):
    """The images of the files."""

    needs = "a benchmark of FG-OVD"
    has_labels = False
    file = coco.ObjectFile[coco.ImageItem]
    item = _Object

    def add(self, entry: base.Entry, found: _Object, names: dict[base.Id, str]) -> None:
        negatives = [names[i] for i in found.neg_category_ids if i in names]
        box, description = base.xywh(found.bbox), names.get(found.category_id)
        entry.regions.append((box, description, base.WHOLE, negatives))
