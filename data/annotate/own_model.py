"""A model of grain_jax with a text decoder as the annotator: it writes captions, and describes boxes.

The score of a description is the geometric mean of the probabilities of its words and of its end,
exp(log p(description | image, box) / (words + 1)), in [0, 1].
"""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from etils import epath, epy

from grain_jax.core import annotations, errors
from grain_jax.data.annotate import answers, chat, checkpoint, detector
from grain_jax.data.annotate.arguments import OWN, Annotate

with epy.lazy_imports():  # JAX: not needed with other models
    import jax

    from grain_jax import inference
    from grain_jax.inference import inputs
    from grain_jax.inference import predictor as predictor_lib
    from grain_jax.runtime import compiled, pretrained


class ModelError(errors.UserError):
    """The model cannot do what the command asks; the message is one line."""


class Described(NamedTuple):
    """What the pass describe made of an image."""

    regions: list[annotations.Region]  # the source's order, or best first
    left_out: list[
        answers.Refused
    ]  # texts that are not used, with their boxes; boxes outside of the image
    is_kept: bool  # the regions of the source stay as they are, and there are none here


@functools.lru_cache(maxsize=1)
def load(name: str, dtype: str, length: int | None = None) -> "inference.Predictor":
    """The model of --model, once a process. Raises UserError."""
    compiled.use()
    return inference.load(name, dtype, sequence_length=length)


def settings(given: Annotate) -> dict[str, dict[str, Any]]:
    """What the results of the passes caption and describe depend on.

    Raises:
      UserError: the model cannot be loaded, or do what the command asks.
    """
    predictor = _checked(given)
    of_model = {
        "model": _path(given.model or "", predictor),
        "digests": predictor.digests,
        "beams": given.beams,
        "dtype": given.dtype,
    }
    boxes = {"boxes": given.boxes, "regions": given.regions, "threshold": given.threshold}
    return {"caption": of_model, "describe": of_model | boxes}


def _checked(given: Annotate) -> "inference.Predictor":
    """The model. Raises UserError."""
    predictor = load(given.model or "", given.dtype, given.sequence_length)
    if set(OWN) & set(given.passes):
        inputs.need_text_decoder(predictor, f"--model {given.model}")
    if given.boxes in ("queries", "missing") and not predictor.has_regions:
        raise ModelError(
            f"--boxes {given.boxes}: --model {given.model} has no region queries, expected a model with"
            " some, or --boxes given"
        )
    return predictor


def _path(name: str, predictor: "inference.Predictor") -> str:
    """A name as it is; of a run, the checkpoint that was read."""
    named = name in pretrained.NAMES or "://" in name
    return name if named else str(epath.Path(predictor.folder or name).resolve())


def score(text: str, log_probability: float) -> float:
    """The geometric mean of the probabilities of the words of a text and its end, in [0, 1].

    Args:
      text: at least one word.
      log_probability: of all of them together, in nats.
    """
    return min(1.0, math.exp(log_probability / (len(text.split()) + 1)))


class OwnModel:
    """A model that is loaded.

    Attributes:
      at_once: images of a batch, on all devices of this process.

    Raises:
      UserError: it cannot be loaded, or do what the command asks.
    """

    def __init__(self, given: Annotate):
        self._given, self._predictor = given, _checked(given)
        self.at_once = given.batch_size or predictor_lib.MAX_BATCH * jax.local_device_count()
        self._batches = checkpoint.Batches(self.at_once)
        self._last: tuple[list[PIL.Image.Image], Any] = ([], None)  # images and their tokens

    def caption(
        self, images: Sequence[PIL.Image.Image]
    ) -> list[dict[str, Any] | answers.Refused | chat.Failure]:
        """`synthetic_caption` and `log_probability` (nats) of each image (RGB, upright).

        Failures: "out of memory", "model error".
        """
        return self._batches.run(self._caption, images)

    def _caption(self, images: Sequence[PIL.Image.Image]) -> list[dict[str, Any] | answers.Refused]:
        found = []
        for written in self._predictor.caption(self._tokens(images), beams=self._given.beams):
            text = answers.parse_text(written.text, cut_off=not written.is_whole)
            if isinstance(text, str):
                text = {"synthetic_caption": text, "log_probability": written.log_probability}
            found.append(text)
        return found

    def describe(
        self, items: Sequence[tuple[PIL.Image.Image, Sequence[annotations.Region]]]
    ) -> list[Described | chat.Failure]:
        """Describes boxes of images (RGB, upright) with the regions that their source has.

        Which boxes is what `--boxes` says. Of the model's queries, boxes of one description that overlap merge, those
        with a score below `--threshold` are left out, and the best `--regions` stay. Failures as of `caption`.
        """
        return self._batches.run(self._describe, items)

    def _describe(
        self, items: Sequence[tuple[PIL.Image.Image, Sequence[annotations.Region]]]
    ) -> list[Described]:
        kinds = [self._kind(regions) for _, regions in items]
        todo = [item for item, kind in zip(items, kinds) if kind != "kept"]
        own = iter(())
        if todo:
            wants_queries = [kind == "queries" for kind in kinds if kind != "kept"]
            own = iter(self._described(todo, wants_queries))
        return [Described([], [], True) if kind == "kept" else next(own) for kind in kinds]

    def _kind(self, regions: Sequence[annotations.Region]) -> str:
        """What becomes of an image with these regions: "given" or "queries" boxes are described, or it is "kept"."""
        match self._given.boxes:
            case "missing":
                return "kept" if regions else "queries"
            case None:
                return "given" if regions or not self._predictor.has_regions else "queries"
            case boxes:
                return boxes

    def _described(
        self,
        items: Sequence[tuple[PIL.Image.Image, Sequence[annotations.Region]]],
        wants_queries: Sequence[bool],
    ) -> list[Described]:
        """Of each image, whether its boxes are those of the queries."""
        tokens = self._tokens([image for image, _ in items])
        inside = [_inside(regions, image.size) for image, regions in items]
        queries: Any = [None] * len(items)
        if any(wants_queries):
            queries = self._predictor.encode_regions(tokens).boxes_xyxy
        shares = [
            np.clip(found, 0, 1) if wanted else _shares(regions, image.size)
            for (image, _), (regions, _), found, wanted in zip(
                items, inside, queries, wants_queries, strict=True
            )
        ]
        written = self._predictor.describe(tokens, shares, beams=self._given.beams)
        found = []
        for (image, _), (regions, outside), boxes, texts, wanted in zip(
            items, inside, shares, written, wants_queries, strict=True
        ):
            one = self._regions(image, regions, boxes, texts, wanted)
            found.append(one if wanted else one._replace(left_out=outside + one.left_out))
        return found

    def _regions(
        self,
        image: PIL.Image.Image,
        regions: Sequence[annotations.Region],
        boxes_xyxy: np.ndarray,
        written: Sequence[Any],
        of_queries: bool,
    ) -> Described:
        scale = np.array([*image.size, *image.size])
        given = [box * scale for box in boxes_xyxy] if of_queries else [r.box_xyxy for r in regions]
        found, left_out = [], []
        for box, one in zip(given, written, strict=True):
            text = answers.parse_text(one.text, cut_off=not one.is_whole)
            if isinstance(text, str):
                found.append((score(text, one.log_probability), tuple(map(float, box)), text))
            else:
                left_out.append(text)
        if of_queries:
            return Described(self._best(found, image.size), left_out, False)
        return Described(
            [annotations.Region(box, text, value) for value, box, text in found], left_out, False
        )

    def _best(
        self, found: Iterable[tuple[float, Sequence[float], str]], size: tuple[int, int]
    ) -> list[annotations.Region]:
        """The regions of the queries that stay."""
        enough = (one for one in found if one[0] >= self._given.threshold)
        return detector.kept(enough, size)[: self._given.regions]

    def _tokens(self, images: Sequence[PIL.Image.Image]) -> Any:
        """What the image tower gives for the images; of those of the last call it is not computed again."""
        known, tokens = self._last
        same = len(known) == len(images) and all(a is b for a, b in zip(known, images))
        if not same:
            # As arrays: PIL images would be turned by an EXIF orientation that is applied, or to be left alone.
            tokens = self._predictor.encode_tokens([np.asarray(image) for image in images])
            self._last = list(images), tokens
        return tokens


def _inside(
    regions: Sequence[annotations.Region], size: tuple[int, int]
) -> tuple[list[annotations.Region], list[answers.Refused]]:
    """The regions of which enough lies in the image, as everywhere, and a line for each of the others."""
    kept, refused = [], []
    for region in regions:
        if annotations.clip_box(region.box_xyxy, *size).box_xyxy:
            kept.append(region)
        else:
            detail = f"{list(region.box_xyxy)} of {size[0]} x {size[1]}"
            refused.append(answers.Refused(answers.OUTSIDE, detail))
    return kept, refused


def _shares(regions: Sequence[annotations.Region], size: tuple[int, int]) -> np.ndarray:
    """The boxes of regions as shares of the image, clipped to it, float32 [n, 4]."""
    boxes = np.array([region.box_xyxy for region in regions], np.float32).reshape(-1, 4)
    return np.clip(boxes / np.array([*size, *size], np.float32), 0, 1)
