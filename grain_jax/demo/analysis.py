"""Computes the numbers of the page: an image and classes -> scores, regions, and the terms of each score; what a box
that the user drew is; where texts lie; the class of each pixel.

Embeddings come from a `Predictor` and are cached; the scores are those of `Predictor.classify`. This module needs
no Gradio.
"""

import collections
import contextlib
import hashlib
import re
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from etils import epath

from grain_jax import inference
from grain_jax.core import annotations, images
from grain_jax.core import patches as patches_lib
from grain_jax.demo.class_lists import (
    ELSEWHERE,
    MANY_DESCRIPTIONS,
    Classes,
    DemoError,
    check_lengths,
)
from grain_jax.evaluate import box_classes
from grain_jax.inference import scores, segmentation, text_decoder

DIGITS = 4  # decimals of the numbers shown
SECONDS = 30.0  # limit for encoding classes, since all other users wait meanwhile
_AT_ONCE = 16  # classes encoded between two checks of that limit
_SLIM = 8  # longer by shorter side of an image that windows segment, at most: each is a pass
_LABELS_EDGE = 480  # longer side of a segmentation in pixels, at most
_KEPT = 16  # cached images, and cached lists of classes


class Result(NamedTuple):
    """The scores of an image for C classes, with n_c descriptions of class c, and its Q regions."""

    classes: Classes
    alpha: float  # weight of the global scores; 1 if there are no region scores
    whole: np.ndarray  # float32 [C], global scores
    regions: np.ndarray | None  # float32 [C], region scores
    combined: np.ndarray  # float32 [C], alpha * whole + (1 - alpha) * regions
    logit_scale: float
    boxes_xyxy: np.ndarray  # float32 [Q, 4] in [0, 1]; Q is 0 without a region decoder
    cosines: tuple[np.ndarray, ...]  # for each class float32 [Q, n_c]; empty without descriptions
    note: str  # why there are only global scores, else ""

    @property
    def names(self) -> list[str]:
        """The names of the classes, in the order of the arrays."""
        return list(self.classes)

    def ranked(self) -> list[int]:
        """Positions of the classes from the best combined score to the worst; ties keep their order."""
        return np.argsort(-self.combined, kind="stable").tolist()

    def probabilities(self) -> np.ndarray:
        """Softmax of the combined scores times the model's logit scale, float64 [C]."""
        logits = self.logit_scale * self.combined.astype(np.float64)
        odds = np.exp(logits - logits.max())
        return odds / odds.sum()


class Part(NamedTuple):
    """One term of the score of a class."""

    region: int | None  # None: the whole image
    text: str  # the description that the region fits best; empty for the whole image
    value: float  # global score, or the cosine of region and description
    weight: float
    units: int  # contribution to the score, in 10 ** -DIGITS; the units of all parts sum to the score shown


class Ranked(NamedTuple):
    """A class or a description, and its cosine with a box or a region."""

    text: str  # "" if no class has descriptions
    name: str  # the class; of a description the first one that has it
    cosine: float
    region: Any = None  # int, of a region; and
    box_xyxy: Any = None  # its box, float32 [4]


class Boxed(NamedTuple):
    """What is in a box that the user drew; no class is ranked where the model has neither a box head nor regions."""

    box_xyxy: np.ndarray  # float32 [4] in [0, 1]
    region: int | None  # which stands for the box; None: the box head embeds the box itself
    iou: float  # of the box and that region's; 1 with a box head
    classes: list[Ranked]  # by the scores of `Predictor.classify_boxes`, best first
    descriptions: list[Ranked]  # the distinct descriptions of all classes, best first
    said: text_decoder.Written | None = None  # by the text decoder; None: the model has none


class Lying(NamedTuple):
    """Where a text lies in an image."""

    text: str
    region: inference.Grounding | None  # None: the model has no regions
    cosines: np.ndarray | None  # float32 [h, w], its similarity map; None: the model has none
    pointed: text_decoder.Pointed | None = None  # by the text decoder; None: the model has none


def read_box(text: str) -> np.ndarray:
    """A box as it is typed, `x1 y1 x2 y2` in percent of the image -> float32 [4] in [0, 1].

    Raises:
      DemoError: not four numbers in 0 ... 100, or no box with an area.
    """
    with contextlib.suppress(ValueError):
        x1, y1, x2, y2 = map(float, re.sub("[%,;]", " ", text).split()[:5])
        if 0 <= x1 < x2 <= 100 and 0 <= y1 < y2 <= 100:
            return np.array([x1, y1, x2, y2], np.float32) / 100
    raise DemoError(
        f"box: got {annotations.show(text)}, expected x1 y1 x2 y2 in percent of the image, x1 < x2 and y1 < y2,"
        " e.g. 10 20 50 60"
    )


def read_image(path: epath.PathLike | None) -> PIL.Image.Image:
    """The image at `path` as RGB. Raises DemoError where there is none or it cannot be read."""
    if not path:
        raise DemoError("no image; drop one, or choose an example")
    path = epath.Path(path)
    try:
        return images.to_rgb(images.load_image(path))
    except images.ImageError as error:
        raise DemoError(str(error).replace(str(path), path.name)) from None


class Analyst:
    """A model with a cache of the embeddings of recent images and classes.

    Args:
      predictor: the model.
    """

    def __init__(self, predictor: inference.Predictor):
        self.predictor = predictor
        decoder = predictor.model.decoder
        self.queries = 0 if decoder is None else decoder.queries
        self.box_head = predictor.model.boxes.kind != "none"
        self.writes = predictor.has_text_decoder
        self.logit_scale = float(np.exp(predictor.params["logit_scale"]))
        try:
            self.grid = predictor.grid  # cells along a side of the map of a square; 0: it has none
        except inference.InputError:
            self.grid = 0
        if decoder is not None and not self.queries and not self.box_head:
            self.grid = 0
        self._kept = collections.defaultdict(collections.OrderedDict)  # kind -> key -> embeddings

    def analyse(self, image: PIL.Image.Image, classes: Classes, alpha: float) -> Result:
        """The scores of the image and their terms.

        Args:
          image: RGB.
          classes: the classes, from `class_lists.parse`.
          alpha: weight of the global score; ignored if there are no region scores.

        Returns: a `Result`, whose `combined` equals `Predictor.classify` with the same classes and alpha.
        """
        described = any(classes.values())
        lacks = "" if described else "The classes have no descriptions"
        lacks = lacks if self.queries else "The model has no regions"
        note = f"{lacks}: scores are those of the whole image." if lacks else ""
        features = self._features(classes)
        image_embed, boxes, region_embed = self._encode(image)
        whole = scores.global_scores(image_embed, features.features)
        regions, cosines = None, ()
        if note:
            alpha = 1.0
        else:
            descriptions = features.descriptions or ()
            regions = scores.region_scores(region_embed, descriptions)
            unit = scores.unit(region_embed[0])
            cosines = tuple(unit @ scores.unit(embeds).T for embeds in descriptions)
        combined = scores.combine(whole, regions, alpha)[0]
        of_regions = None if regions is None else regions[0]
        of_image = (alpha, whole[0], of_regions, combined, self.logit_scale)
        return Result(classes, *of_image, boxes[0], cosines, note)

    def inside(self, image: PIL.Image.Image, classes: Classes, box_xyxy: np.ndarray) -> Boxed:
        """What is in a box, by the box head; without one by the region whose box overlaps it most.

        With a text decoder also what that says, as `Predictor.describe`.

        Args:
          image: RGB.
          classes: the classes, from `class_lists.parse`.
          box_xyxy: float32 [4] in [0, 1].

        Raises:
          DemoError: the model has neither a box head nor regions nor a text decoder.
        """
        said = None
        if self.writes:
            tokens = self._encode_tokens(image)
            ((said,),) = self.predictor.describe(tokens, [box_xyxy[None]])
            if not (self.box_head or self.queries):
                return Boxed(box_xyxy, None, 0.0, [], [], said)
        features = self._features(classes)
        region, iou = None, 1.0
        if self.box_head:
            (embed,) = self.predictor.encode_boxes(self._encode_tokens(image), [box_xyxy[None]])
        elif self.queries:
            _, boxes, regions = self._encode(image)
            found = box_classes.best_query(boxes, box_xyxy[None])
            region, iou = int(found.query[0]), float(found.iou[0])
            embed = regions[:, region]
        else:
            raise DemoError("box: the model has neither a box head nor regions, expected either")
        cosines = scores.global_scores(embed, features.features)[0]
        ranked = [Ranked(name, name, float(x)) for name, x in zip(classes, cosines)]
        described: dict[str, Ranked] = {}
        for (name, texts), embeds in zip(classes.items(), features.descriptions or ()):
            for text, x in zip(texts, scores.global_scores(embed, embeds)[0]):
                described.setdefault(text, Ranked(text, name, float(x)))
        best_first = lambda found: sorted(found, key=lambda each: -each.cosine)
        ranked, best = best_first(ranked), best_first(described.values())
        return Boxed(box_xyxy, region, iou, ranked, best, said)

    def caption(self, image: PIL.Image.Image) -> text_decoder.Written:
        """The caption of an RGB image, as `Predictor.caption` writes it; the model has a text decoder."""
        make = lambda: self.predictor.caption(self._encode_tokens(image))[0]
        return self._remembered("caption", _key(image), make)

    def find(self, image: PIL.Image.Image, phrases: Sequence[str]) -> list[Lying]:
        """Each phrase with the region that fits it best and its similarity map, as the model has them.

        They are those of `Predictor.ground` and `Predictor.similarity_map`; with a text decoder also where that points,
        as `Predictor.point`.

        Raises:
          DemoError: no phrase, too many, or too long ones.
        """
        if not phrases:
            raise DemoError("no phrase; type one, e.g. a long orange beak")
        if len(phrases) > MANY_DESCRIPTIONS:
            got = f"got {len(phrases)} phrases"
            raise DemoError(f"{got}, expected at most {MANY_DESCRIPTIONS}")
        check_lengths(phrases)
        encode_text = self.predictor.encode_text
        text = self._remembered("phrases", tuple(phrases), lambda: encode_text(phrases))
        regions: list[inference.Grounding | None] = [None] * len(phrases)
        maps: Sequence[np.ndarray | None] = [None] * len(phrases)
        of_regions = None
        if self.queries:
            _, boxes, embed = self._encode(image)
            of_regions = boxes[0], embed[0]
            cosines = text @ embed[0].T  # [N, Q]
            regions = [
                inference.Grounding(boxes[0, q], float(row[q]))
                for row, q in zip(cosines, cosines.argmax(axis=1))
            ]
        if self.grid:
            patches = self._encode_patches(image) if self.box_head or not self.queries else None
            maps = list(scores.similarity_map(text, patches, of_regions, self._grid_of(image)))
        pointed: Sequence[text_decoder.Pointed | None] = [None] * len(phrases)
        if self.writes:
            (pointed,) = self.predictor.point(self._encode_tokens(image), [phrases])
        return [Lying(*found) for found in zip(phrases, regions, maps, pointed)]

    def segment(self, image: PIL.Image.Image, classes: Classes) -> np.ndarray:
        """The class of every pixel, as `Predictor.segment`; an image above _LABELS_EDGE is labelled at that size.

        A model that takes images in their own shape sees the whole image, of any shape.

        Args:
          image: RGB.
          classes: the classes, from `class_lists.parse`.

        Returns: int32 [h, w], positions in the classes.

        Raises:
          DemoError: the model has no maps, or the image is too slim.
        """
        if not self.grid:
            raise DemoError(
                "segmentation: the model has no maps, expected an image tower with patches,"
                " and a box head or regions where it has a decoder"
            )
        tower, length = self.predictor.model.image, self.predictor.sequence_length
        if not length and max(image.size) > _SLIM * min(image.size):
            raise DemoError(
                f"segmentation: got an image of {image.width} x {image.height} pixels, expected a longer side of at"
                f" most {_SLIM} times the shorter; cut it"
            )
        make = lambda: self._segmentation_classes(classes)
        known = self._remembered("segmentation_classes", tuple(classes.items()), make)
        if length:
            windows = segmentation.whole_of(0, image, tower.patch_size, length)
        else:
            windows = segmentation.windows_of(0, image, tower.image_size, 0, 0, len(classes))
        share = min(1, _LABELS_EDGE / max(windows.size))
        width, height = (max(1, round(share * edge)) for edge in windows.size)
        maps = self.predictor.class_maps(windows.pixels, known)
        return segmentation.labels(np.asarray(maps), windows._replace(size=(width, height)))

    def _segmentation_classes(self, classes: Classes) -> segmentation.Classes:
        """Embeds the classes, as `Predictor.segmentation_classes`. Raises DemoError as `_encode_classes`."""
        parts = [self.predictor.segmentation_classes(some) for some in _in_time(classes)]
        starts = np.cumsum([0] + [len(part.features) for part in parts])
        return segmentation.Classes(
            tuple(classes),
            np.concatenate([part.features for part in parts]),
            np.concatenate([part.first + start for part, start in zip(parts, starts)]),
        )

    def _features(self, classes: Classes) -> inference.ClassFeatures:
        make = lambda: self._encode_classes(classes)
        return self._remembered("classes", tuple(classes.items()), make)

    def _encode_classes(self, classes: Classes) -> inference.ClassFeatures:
        """Embeds the classes. Raises DemoError if that takes longer than SECONDS."""
        parts = [self.predictor.class_features(some) for some in _in_time(classes)]
        return inference.ClassFeatures(
            tuple(classes),
            np.concatenate([part.features for part in parts]),
            sum((part.descriptions or () for part in parts), ()) if any(classes.values()) else None,
        )

    def _encode(self, image: PIL.Image.Image) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """image_embed [1, D], boxes_xyxy [1, Q, 4], region_embed [1, Q, D]."""

        def encode():
            if self.queries:
                image_embed, regions = self.predictor.encode_image_and_regions([image])
                return image_embed, regions.boxes_xyxy, regions.embed
            image_embed = self.predictor.encode_image([image])
            return image_embed, np.zeros((1, 0, 4)), np.zeros((1, 0, image_embed.shape[1]))

        return self._remembered("image", _key(image), encode)

    def _grid_of(self, image: PIL.Image.Image) -> int | tuple[int, int]:
        """Cells along a side of the maps of an image; in its own shape rows and columns."""
        if not (length := self.predictor.sequence_length):
            return self.grid
        patch = self.predictor.model.image.patch_size
        rows, columns = patches_lib.grid(image.height, image.width, patch, length)
        return int(rows), int(columns)

    def _encode_patches(self, image: PIL.Image.Image) -> np.ndarray:
        """Embeddings of the patches, [h, w, D]."""
        given = lambda: self._encode_tokens(image) if self.box_head else [image]
        make = lambda: self.predictor.encode_patches(given())[0]
        return self._remembered("patches", _key(image), make)

    def _encode_tokens(self, image: PIL.Image.Image) -> inference.Tokens:
        make = lambda: self.predictor.encode_tokens([image])
        return self._remembered("tokens", _key(image), make)

    def _remembered(self, kind: str, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gave for the key; of more than _KEPT of a kind the least recently used is dropped."""
        kept = self._kept[kind]
        if key not in kept:
            kept[key] = make()
        kept.move_to_end(key)
        if len(kept) > _KEPT:
            kept.popitem(last=False)
        return kept[key]


def _in_time(classes: Classes) -> Iterator[Classes | list[str]]:
    """The classes, or their names where none is described, a few at a time.

    Raises:
      DemoError: the caller takes longer than SECONDS for them.
    """
    names, start, described = list(classes), time.monotonic(), any(classes.values())
    for first in range(0, len(names), _AT_ONCE):
        if time.monotonic() - start > SECONDS:
            raise DemoError(
                f"{first} of {len(names)} classes took {SECONDS:g} s; give fewer; {ELSEWHERE}"
            )
        some = names[first : first + _AT_ONCE]
        yield {name: classes[name] for name in some} if described else some


def _key(image: PIL.Image.Image) -> Hashable:
    return image.size, hashlib.sha256(image.tobytes()).digest()


def parts(result: Result, c: int) -> list[Part]:
    """The terms of the score of class c: alpha * global score, and (1 - alpha) / Q * best cosine of each region.

    Their `units` are rounded (largest remainders) so that they sum to the score shown.
    """
    terms: list[tuple[int | None, str, float, float]] = [
        (None, "", float(result.whole[c]), result.alpha)
    ]
    if result.regions is not None:
        texts = result.classes[result.names[c]]
        cosines = result.cosines[c]  # [Q, n_c]
        weight = (1 - result.alpha) / len(cosines)
        for region, best in enumerate(cosines.argmax(axis=1)):
            terms.append((int(region), texts[best], float(cosines[region, best]), weight))
    exact = np.array([value * weight for _, _, value, weight in terms]) * 10**DIGITS
    units = np.floor(exact).astype(int)
    missing = shown_units(result.combined[c]) - units.sum()
    units[np.argsort(units - exact, kind="stable")[:missing]] += 1
    return [Part(*term, int(unit)) for term, unit in zip(terms, units)]


def shown_units(value: float) -> int:
    """`value` as a whole number of 10 ** -DIGITS."""
    return round(float(f"{float(value):.{DIGITS}f}") * 10**DIGITS)


def found(result: Result, c: int) -> list[Ranked]:
    """For each description of class c, the region with the highest cosine to it."""
    if result.regions is None:
        return []
    name, cosines = result.names[c], result.cosines[c]
    texts = result.classes[name]
    return [
        Ranked(text, name, float(cosines[q, i]), int(q), result.boxes_xyxy[q])
        for i, (text, q) in enumerate(zip(texts, cosines.argmax(axis=0)))
    ]


def seen(result: Result) -> list[Ranked]:
    """For each region, the description with the highest cosine of all classes; the highest cosine comes first."""
    if result.regions is None:
        return [Ranked("", "", 0.0, q, box) for q, box in enumerate(result.boxes_xyxy)]
    labels = [(text, name) for name, texts in result.classes.items() for text in texts]
    cosines = np.concatenate(result.cosines, axis=1)  # [Q, sum of n_c]
    best = cosines.argmax(axis=1)
    order = np.argsort(-cosines.max(axis=1), kind="stable").tolist()
    found = []
    for q in order:
        text, name = labels[best[q]]
        found.append(Ranked(text, name, float(cosines[q, best[q]]), q, result.boxes_xyxy[q]))
    return found


def explained(result: Result, chosen: str) -> list[int]:
    """Positions of the class `chosen` (the best class if there is no such name) and of the best other class."""
    ranked = result.ranked()
    first = result.names.index(chosen) if chosen in result.classes else ranked[0]
    return [first, *[c for c in ranked if c != first][:1]]
