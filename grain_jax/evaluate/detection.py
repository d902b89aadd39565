"""Detection by COCO's rules: average precision (AP) and recall (AR) on files of COCO, LVIS or Objects365."""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
from etils import epy

from grain_jax.core import errors
from grain_jax.evaluate.base import TEMPLATES, Evaluator, expanduser, option

with epy.lazy_imports():
    import numpy as np
    from etils import epath

    from grain_jax.core import regular_file
    from grain_jax.evaluate import class_names, encode
    from grain_jax.inference import batches, prompts, scores
    from grain_jax.runtime import processes

LIMITS = (1, 10, 100)  # detections per image for each AR; AP has the last one
LVIS_LIMITS = (*LIMITS, 300)
FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}  # of a class in LVIS
_MAX_BYTES = 2 << 30  # of a file; the training set of LVIS has 1.1 GB
_COLUMNS = ("image", "category", "score", "bbox")
_Length = Annotated[float, msgspec.Meta(ge=0)]


class _Image(msgspec.Struct, gc=False):
    id: int
    file_name: str = ""
    coco_url: str = ""  # LVIS: it ends in the folder and the file
    width: float = 0
    height: float = 0
    neg_category_ids: list[int] = []  # LVIS: classes that the image certainly lacks
    not_exhaustive_category_ids: list[int] = []  # LVIS: classes with more objects than boxes


class _Object(msgspec.Struct, gc=False):
    """An annotation, or a proposal, which has no category."""

    image_id: int
    bbox: tuple[float, float, _Length, _Length]  # x, y, width, height in pixels
    category_id: int = -1
    area: float | None = None  # of the mask, if there is one
    iscrowd: bool | int = 0
    score: float = 1.0


class _Category(msgspec.Struct):
    id: int
    name: str
    frequency: Any = None


class _Instances(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Object]
    categories: list[_Category]


class Dataset(NamedTuple):
    """What the files say."""

    images: list[_Image]
    paths: list[epath.Path]  # of the images
    objects: list[_Object]
    categories: list[_Category]  # K, in the order of their ids
    limits: Sequence[int]
    is_seen: np.ndarray | None  # bool [K]; None: no file of seen classes
    proposals: Mapping[int, list[_Object]] | None  # by the id of the image


@dataclasses.dataclass(frozen=True, kw_only=True)
class Detection(Evaluator):
    """Average precision and recall of detected boxes."""

    example = "--annotations instances_val2017.json \\\n    --images val2017 --seen seen.txt"
    shown = ("ap", "ap50", "ap75", "ar1", "ar10", "ar100")
    kind: str = "detection"
    images: str = option("", "Folder of the images.", "DIR", required=True)
    annotations: str | None = option(None, "JSON of COCO, LVIS or Objects365.", "FILE", required=True)
    templates: str | None = option(None, TEMPLATES, "FILE")
    seen: str | None = option(None, "File of seen classes; adds results for seen and unseen ones.", "FILE")
    proposals: str | None = option(None, "COCO's results (JSON); default: the model's own regions.", "FILE")

    @property
    def needs(self) -> Sequence[str]:
        return ("regions",) if self.proposals is None else ()

    def read(self) -> Dataset:
        """The files. Raises errors.UserError: a file or folder is missing, or is not what it should be."""
        if self.annotations is None:
            raise errors.UserError("annotations: got nothing, expected a JSON file for detection")
        path, form = expanduser(self.annotations), "instances in COCO's form"
        content = regular_file.read_json(path, _Instances, form, _MAX_BYTES)
        categories = sorted(content.categories, key=lambda x: x.id)
        images, known = {x.id for x in content.images}, {x.id for x in categories}
        for i, x in enumerate(content.annotations):
            if x.image_id not in images or x.category_id not in known:
                got = f"got image_id {x.image_id} and category_id {x.category_id}"
                expected = "expected an image and a category of the file"
                raise errors.UserError(f"{path}: annotations[{i}]: {got}, {expected}")
        if all(x.iscrowd for x in content.annotations):
            raise errors.UserError(f"{path}: got no annotation, expected boxes to detect")
        return Dataset(
            content.images,
            _paths(epath.Path(expanduser(self.images)), content.images),
            content.annotations,
            categories,
            LVIS_LIMITS if any(x.neg_category_ids for x in content.images) else LIMITS,
            None if self.seen is None else _is_seen(self.seen, [x.name for x in categories]),
            None if self.proposals is None else _proposals(expanduser(self.proposals), images),
        )

    def check(self, model: Any = None) -> int:
        if importlib.util.find_spec("faster_coco_eval") is None:
            raise errors.UserError("detection: needs faster-coco-eval: pip install 'grain_jax[detection]'")
        prompts.load_templates(self.templates)
        return len(self.read().images)

    def evaluate(self, predictor: Any) -> dict[str, Any]:
        """Detects all classes in every image, with at most 100 boxes per image, in LVIS 300.

        Returns: counts and the numbers of `means`, for all classes on top and for `seen` and `unseen`; for
          LVIS also `rare`, `common`, `frequent`; and `per_class`, the AP. A group without boxes is left out.
        """
        dataset, templates = self.read(), prompts.load_templates(self.templates)
        if dataset.proposals is None:
            predictor.need_regions("detection without --proposals")
        # "Cabinet/shelf" is either; a prompt would read it as a class and its parent.
        names = [x.name.replace("/", " or ") for x in dataset.categories]
        encode_all = functools.partial(encode.encode_distinct, predictor)
        features = prompts.embed_classes(encode_all, names, templates)  # [K, D]
        detect = lambda batch: _detect(predictor, batch, dataset, features)
        read: dict[str, Any] = dict(label=self.kind, batch_size=self.batch_size)
        arrays, unreadable = encode.over_images(dataset.paths, encode.resizing(predictor), detect, **read)
        return {
            "images": len(arrays["index"]),
            **encode.report_unreadable(unreadable),
            "most_boxes_per_image": int(arrays["boxes"].max()),
            "classes": len(names),
            **processes.of_first(lambda: _numbers(dataset, arrays)),
        }


def _paths(folder: epath.Path, images: Sequence[_Image]) -> list[epath.Path]:
    """The images' files; their names lose as many leading folders as it takes until one is there."""
    names = [x.file_name or "/".join(x.coco_url.split("/")[-2:]) for x in images]
    parts = [regular_file.inside(name).split("/") for name in names]
    for first in range(max(map(len, parts), default=0)):
        paths = [folder / "/".join(x[min(first, len(x) - 1) :]) for x in parts]
        if any(path.is_file() for path in paths):  # usually the first
            return paths
    got = f"none of the {len(names)} images of the annotations is there, the first: {names[:1]}"
    raise errors.UserError(f"{folder}: {got}; expected the folder that these names start from")


def _is_seen(path: str, names: Sequence[str]) -> np.ndarray:
    """Whether the file has each name, bool [K]. Raises errors.UserError at a name that no class has."""
    normal = lambda name: encode.as_read(name).replace("_", " ")
    classes, seen = [*map(normal, names)], {normal(x.name) for x in class_names.read(path)}
    if other := sorted(seen.difference(classes)):
        got = f"got {len(other)} names that no class has, the first: {other[0]!r}"
        raise errors.UserError(f"{path}: {got}; expected names of the annotations, such as {names[0]!r}")
    return np.array([name in seen for name in classes], bool)


def _proposals(path: str, images: set[int]) -> Mapping[int, list[_Object]]:
    """The proposals of each image. Raises errors.UserError if there are some, and none is of an image."""
    of_image = collections.defaultdict(list)
    for item in regular_file.read_json(path, list[_Object], "COCO's results", _MAX_BYTES):
        of_image[item.image_id].append(item)
    if of_image and not images & of_image.keys():
        got = f"got image_id {next(iter(of_image))}"
        raise errors.UserError(f"{path}: {got}, expected images of the annotations")
    return of_image


def _detect(predictor: Any, batch: encode.Batch, dataset: Dataset, features: np.ndarray) -> dict[str, Any]:
    """The best pairs of box and class: image and category (positions), score, bbox; boxes per image."""
    images = [dataset.images[i] for i in batch.index]
    sizes = [(x.width or w, x.height or h) * 2 for x, (w, h) in zip(images, batch.sizes.tolist())]
    if dataset.proposals is None:
        shares, embeds, priors = predictor.encode_regions(batch.pixels)
        weights = np.ones(shares.shape[:2])
    else:
        items = [dataset.proposals.get(x.id, []) for x in images]
        xywh = [np.array([x.bbox for x in each]).reshape(-1, 4) for each in items]
        shares = [np.c_[x[:, :2], x[:, :2] + x[:, 2:]] / size for x, size in zip(xywh, sizes)]
        embeds = predictor.encode_boxes(batch.pixels, [np.clip(x, 0, 1) for x in shares])
        weights = [np.array([x.score for x in each]) for each in items]
        priors = [0.0] * len(items)
    batches.check_finite(*embeds)
    parts, most = [], dataset.limits[-1]
    for i, embed, prior, share, weight, size in zip(batch.index, embeds, priors, shares, weights, sizes):
        score = np.reshape(weight, (-1, 1)) * predictor.text_scores(embed, features, prior)  # [n, K]
        suppressing = share if dataset.proposals is None else None
        box, category = scores.best_pairs(score, suppressing, most)
        bbox = np.take(share, box, axis=0) * np.array(size, np.float64)
        bbox[:, 2:] -= bbox[:, :2]
        parts.append((np.full(len(box), i), category, score[box, category], bbox))
    out = dict(zip(_COLUMNS, map(np.concatenate, zip(*parts))))
    return out | {"index": batch.index, "boxes": np.array([*map(len, shares)])}


def _numbers(dataset: Dataset, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The numbers of a result: of all classes, of groups of them, and the AP of each."""
    images = [dataset.images[i] for i in arrays["index"]]
    readable, ids = {x.id for x in images}, [x.id for x in dataset.categories]
    objects = [x for x in dataset.objects if x.image_id in readable]
    truth = _Instances(images, objects, dataset.categories)
    rows = zip(*(arrays[key].tolist() for key in _COLUMNS))
    detections = [
        {"image_id": dataset.images[i].id, "category_id": ids[k], "score": score, "bbox": bbox}
        for i, k, score, bbox in rows
    ]
    precision, recall = curves(msgspec.to_builtins(truth), detections, dataset.limits)
    count = collections.Counter(x.category_id for x in objects if not x.iscrowd)
    boxes = np.array([count[i] for i in ids])
    if not boxes.any():
        raise errors.UserError("got no image that can be read with an annotation, expected one")
    groups = {"": np.full(len(ids), True)}
    if dataset.is_seen is not None:
        groups |= {"seen": dataset.is_seen, "unseen": ~dataset.is_seen}
    if dataset.limits == LVIS_LIMITS:
        frequency = np.array([x.frequency for x in dataset.categories])
        groups |= {name: frequency == key for key, name in FREQUENCIES.items()}
    numbers = {}
    for name, which in groups.items():
        if boxes[which].any():
            of_group = means(precision[:, :, which], recall[:, which], dataset.limits)
            numbers[name] = {"boxes": int(boxes[which].sum()), **of_group}
    ap = precision[..., 0, -1].mean(axis=(0, 1)).tolist()
    per_class = {x.name: each for x, each, n in zip(dataset.categories, ap, boxes) if n}
    return {**numbers.pop(""), **numbers, "per_class": per_class}


def curves(
    truth: Mapping[str, Any], detections: Sequence[Any], limits: Sequence[int] = LIMITS
) -> tuple[np.ndarray, np.ndarray]:
    """Compares detections with the truth; with LVIS_LIMITS as LVIS: some images alone have a class's boxes.

    Args:
      truth: `images`, `annotations` and `categories` in COCO's or LVIS's form.
      detections: `image_id`, `category_id`, `bbox` (x, y, width, height in pixels) and `score`; may be none.
      limits: of detections per image and class, M numbers: LIMITS or LVIS_LIMITS.

    Returns: precision [10 IoUs from 0.5 to 0.95, 101 recalls, K, 4 sizes, M] and recall [10, K, 4, M]; -1 for
      classes without boxes. The K classes have the order of their ids.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    quiet = lambda *_, **__: None
    known = lambda frequency: frequency if frequency in FREQUENCIES else "f"
    categories = [{**x, "frequency": known(x.get("frequency"))} for x in truth["categories"]]
    sets = []
    for items in (truth["annotations"], detections):
        annotations = []
        for i, x in enumerate(items, 1):
            bbox, area = list(x["bbox"]), x.get("area")  # the library takes no tuple
            area = bbox[2] * bbox[3] if area is None else area
            annotations.append({"iscrowd": 0, **x, "id": i, "bbox": bbox, "area": area})
        content = {**truth, "categories": categories, "annotations": annotations}
        sets.append(COCO(content, print_function=quiet))
    is_lvis = limits == LVIS_LIMITS
    counter = COCOeval_faster(*sets, iouType="bbox", print_function=quiet, lvis_style=is_lvis)
    counter.params.maxDets = list(limits)
    counter.evaluate()
    counter.accumulate()
    return counter.eval["precision"], counter.eval["recall"]


def means(precision: np.ndarray, recall: np.ndarray, limits: Sequence[int] = LIMITS) -> dict[str, float]:
    """The means of `curves` of classes, one of them with a box: `ap`, `ap50`, `ap75`, `ar1` and so on."""
    ap = precision[:, :, :, 0, -1]
    parts = {"ap": ap, "ap50": ap[0], "ap75": ap[5]}
    parts |= {f"ar{k}": recall[:, :, 0, i] for i, k in enumerate(limits)}
    return {key: float(x[x > -1].mean()) for key, x in parts.items()}
