"""Public sets with JSON files of their own form: FineHARD, Karpathy's splits, Visual Genome."""

from collections.abc import Iterator
from typing import Any

import msgspec
from etils import epath

from grain_jax.core import regular_file
from grain_jax.data.sources import base, join, staged
from grain_jax.data.sources.base import Annotation, Fault, Region


class _FineHardRegion(msgspec.Struct):
    bbox: list[base.Scalar]
    short_expr: base.Scalar = None
    long_expr: base.Scalar = None
    flag_short_neg: base.Scalar = None
    short_expr_negs: dict[str, base.Scalar] | list[base.Scalar] | base.Scalar = None

    def region(self) -> Region:
        box: Any
        *box, score = [*self.bbox, base.WHOLE][:5]
        description, negatives = join.text(self.short_expr), self.short_expr_negs
        if not description or not isinstance(negatives, dict) or self.flag_short_neg != 1:
            negatives = {}
        texts: Any = description or self.long_expr, score, tuple(negatives.values())
        return Region(box, *texts)


class _FineHardItem(msgspec.Struct):
    f_path: str
    caption: str | None
    bbox_info: list[_FineHardRegion]
    short_caption: str | None = None


class FineHard(staged.ListedSource):
    """FineHARD (qihoo360/FineHARD): jsonfiles/*.json, each a list of images with described boxes.

    `bbox` has x1, y1, x2, y2 as shares of the image, then a score. `short_expr` is the description; with a
    `flag_short_neg` of 1, `short_expr_negs`, a dict of texts, has its negatives. Source of these names:
    360CVGroup/FG-CLIP, fgclip2/train/train_fgclip2.py and data/data.md at b1af1cd.
    """

    needs = "jsonfiles, a folder of FineHARD's .json: f_path, caption, bbox_info"

    def entries(self, options: base.Options) -> Iterator[Annotation | Fault]:
        faults: list[Fault] = []
        for path in map(epath.Path, options.annotations):
            for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
                values = regular_file.read_json(file, list[msgspec.Raw], self.needs, base.MAX_FILE)
                for _, item in base.items(values, _FineHardItem, str(file), faults):
                    yield Annotation(
                        item.f_path.lstrip("/"),
                        [item.short_caption or ""],
                        item.caption or "",
                        [region.region() for region in item.bbox_info],
                        drawn_on=base.SHARES,
                    )
        yield from faults


class _Sentence(msgspec.Struct):
    raw: str


class _KarpathyImage(msgspec.Struct):
    filename: str
    split: str
    sentences: list[_Sentence]
    filepath: str | None = None


class _KarpathyFile(msgspec.Struct):
    images: list[_KarpathyImage]


class Karpathy(staged.ListedSource):
    """Karpathy's splits of Flickr30k and COCO, for retrieval: dataset_flickr30k.json, dataset_coco.json.

    All captions of an image are taken, as people wrote them. `split` is train, restval, val or test. COCO's
    images start in train2014/ and val2014/.
    """

    needs = "dataset_flickr30k.json or dataset_coco.json of Karpathy's splits"

    def entries(self, options: base.Options) -> Iterator[Annotation]:
        path, *_ = options.annotations
        images = regular_file.read_json(path, _KarpathyFile, self.needs, base.MAX_FILE).images
        base.check_split(path, options.split, {image.split for image in images})
        for image in images:
            if options.split in ("", image.split):
                folder = f"{image.filepath}/" if image.filepath else ""
                captions = [sentence.raw for sentence in image.sentences]
                yield Annotation(folder + image.filename, captions)


class _GenomeRegion(msgspec.Struct):
    x: base.Scalar = None
    y: base.Scalar = None
    width: base.Scalar = None
    height: base.Scalar = None
    phrase: base.Scalar = None


class _GenomeItem(msgspec.Struct):
    """In region_descriptions.json: `id` or `image_id`, `regions`; in image_data.json the rest."""

    id: base.Id | None = None
    image_id: base.Id | None = None
    width: int | float | None = None
    height: int | float | None = None
    regions: list[_GenomeRegion] | None = None


class VisualGenome(staged.ListedSource):
    """Visual Genome: region_descriptions.json, and image_data.json for the sizes that boxes were drawn on.

    The images' folder holds VG_100K and VG_100K_2, or all images at once; names are their ids.
    """

    needs = "Visual Genome's region_descriptions.json or image_data.json"

    def entries(self, options: base.Options) -> Iterator[Annotation | Fault]:
        described: list[Any] = []
        sizes, faults = {}, []
        for path in options.annotations:
            values = regular_file.read_json(path, list[msgspec.Raw], self.needs, base.MAX_FILE)
            for _, item in base.items(values, _GenomeItem, path, faults):
                if item.regions is not None:
                    described.append(item)
                else:
                    sizes[item.image_id] = (item.width, item.height)
        if not described:
            named_files = ", ".join(options.annotations)
            raise base.SourceError(f"{named_files}: expected region_descriptions.json among them")
        yield from faults
        root = epath.Path(options.images)
        files = {
            path.stem: path.relative_to(root).as_posix()
            for folder in (root, root / "VG_100K", root / "VG_100K_2")
            if folder.is_dir()
            for path in folder.iterdir()
            if path.suffix.lower() in base.IMAGE_ENDINGS
        }
        for item in described:
            identity = item.image_id if item.id is None else item.id
            image = files.get(str(identity), f"{identity}.jpg")
            boxes = (base.xywh([x.x, x.y, x.width, x.height]) for x in item.regions)
            regions = [Region(box, x.phrase, base.WHOLE) for x, box in zip(item.regions, boxes)]
            yield Annotation(image, regions=regions, drawn_on=sizes.get(identity))
