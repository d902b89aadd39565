"""Using a trained model: `grain_jax.load(DIR)` returns a `Predictor` that encodes images, texts and regions.

A call takes any number of images or texts, also from a generator. For one image or text the result lacks the
axis of the batch: `encode_image(image)` is [D], `encode_image([image])` is [1, D]. Boxes are corners in
[0, 1] of the image; `ground` and `detect` give pixels on request. Predictors of one configuration share the
programs. Large calls use all devices of the process.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias, cast, overload

import numpy as np
from etils import epath
from scipy import special

from grain_jax.checkpoint import saved_model
from grain_jax.inference import batches, calibration, inputs, prompts, scores, segmentation
from grain_jax.inference.encoder import Boxes, Encoder


class Grounding(NamedTuple):
    """The region of an image that fits a text best."""

    box_xyxy: np.ndarray  # float32 [4] in [0, 1], or with `pixels` in pixels of the image
    score: float  # cosine of the text and the best region; with proposals, plus its prior (schema.Regions)


class Detections(NamedTuple):
    """The regions of an image that show one of several texts, the highest scores first."""

    boxes_xyxy: np.ndarray  # float32 [n, 4] in [0, 1], or with `pixels` in pixels of the image
    scores: np.ndarray  # float32 [n], see `Predictor.detect`
    texts: tuple[str, ...]  # n
    labels: np.ndarray  # int [n], positions in the given texts


class ClassFeatures(NamedTuple):
    """Embeddings of classes, computed once for any number of images."""

    names: tuple[str, ...]
    features: np.ndarray  # float32 [C, D], means of unit-length text embeddings; not of unit length
    descriptions: tuple[np.ndarray, ...] | None  # per class float32 [n_c, D], unit length, if there are any


Classes: TypeAlias = inputs.ClassTexts | ClassFeatures


def load(
    name: epath.PathLike,
    *,
    device: Any = None,
    dtype: str | None = None,
    templates: Sequence[str] | None = None,
    progress: bool = False,
) -> "Predictor":
    """Loads the model of a workdir (its newest checkpoint), a checkpoint, a converted folder, or a name.

    Args:
      name: the folder, local or remote; one of transformers or open_clip is converted into the user's cache.
        If no folder has that name: a model of the package ("aviary-tiny") or of the Hugging Face Hub
        ("hf://ORG/NAME", "hf://ORG/NAME@REVISION"). No code of the Hub is downloaded.
      device: a device of JAX or "cpu", "gpu", "gpu:1"; None: the default one, and all for large calls.
      dtype: "float32" or "bfloat16"; None: float32.
      templates, progress: as in `Predictor`.

    Raises:
      checkpoint.CheckpointError: there is no such model, or it is damaged.
      errors.UserError: it cannot be downloaded or converted; an InputError for `dtype` and `device`.
    """
    stored = saved_model.load_stored(name)
    settings = dtype or "float32", templates, stored.folder, progress, device
    return Predictor(stored.model, stored.merged(), *settings)


class Predictor(Encoder):
    """Encodes and compares images and texts; every result is float32 numpy.

    An image is a path, a PIL image of any mode, or an array [H, W, 3], uint8 or float in [0, 1]. Images come
    as one, as anything to iterate over, or as an array [B, H, W, 3], and are resized to the model's size.
    Files and PIL images are turned by their EXIF orientation, as a viewer shows them; `np.asarray(image)`
    takes the pixels as they are. With `normalized=True` images are float32 [B, S, S, 3], as `preprocess`
    makes them. Classes are names, {name: [description, ...]}, or the result of `class_features`.

    Boxes, given and returned, are corners x1, y1, x2, y2 in [0, 1] of the image. With `pixels=True`, `ground`
    and `detect` return them in pixels of the image as it was given, turned by its EXIF orientation.

    Every method raises InputError for arguments that it cannot take, and if the model lacks region queries, a
    box head or a grid of patches that the method needs. A tokenizer that cannot be read is a UserError.

    Args:
      model: configuration of the model.
      params: nested dict of arrays. Arrays on a device stay there.
      dtype: of activations, "float32" (at full precision on every device) or "bfloat16".
      templates: prompts with `{}` for the class name; None: the ones in `inference/templates.txt`.
      folder: folder of the model, where the files of its tokenizer are looked for first.
      progress: whether calls show on stderr how many images they have encoded.
      device: see `load`.
    """

    def class_features(self, classes: inputs.ClassTexts, alpha: float = 0.5) -> ClassFeatures:
        """Embeds classes, maybe with descriptions, in prompts (docs/method.md, Zero-shot evaluation).

        With an alpha of 0 or 1 it leaves out what `classify` with that alpha does not read.
        """
        names, described = zip(*inputs.class_pairs(classes))
        features, embeds = np.zeros((len(names), self.model.embed_dim), np.float32), None
        if alpha > 0:
            features = prompts.embed_classes(self.encode_text, names, self.templates, described)
        if alpha < 1 and described[0] is not None:
            embeds = tuple(prompts.encode_lists(self.encode_text, described))
        return ClassFeatures(names, features, embeds)

    @inputs.one_or_many
    def classify(
        self,
        images: inputs.OneOrMany,
        classes: inputs.ClassTexts | ClassFeatures,
        alpha: float = 1.0,
        *,
        normalized: bool = False,
    ) -> np.ndarray:
        """Scores of classes, float32 [B, C]: alpha * global + (1 - alpha) * region cosines; one image -> [C].

        `alpha` is the share of the global score; values below 1 need descriptions.
        """
        if not 0.0 <= alpha <= 1.0:
            raise inputs.InputError(f"alpha: got {alpha}, expected a number from 0 to 1")
        if alpha < 1.0:
            self.need_regions(f"alpha {alpha}")
        if not isinstance(classes, ClassFeatures):
            classes = self.class_features(classes, alpha)
        if alpha < 1.0 and classes.descriptions is None:
            needed = "descriptions of the classes: {name: [description, ...]}"
            raise inputs.InputError(f"alpha {alpha} needs {needed}")
        image_embed, regions = self._encode(inputs.marked(images, normalized))
        region = None
        if classes.descriptions and alpha < 1.0:
            described, by = classes.descriptions, self.class_score
            region = scores.region_scores(regions.embed, described, by, regions.prior)
        return scores.combine(scores.global_scores(image_embed, classes.features), region, alpha)

    @inputs.for_each_image
    def classify_boxes(self, images: inputs.Images, boxes_xyxy: Boxes, classes: Classes) -> list[np.ndarray]:
        """For each image the cosines of classes and its boxes in [0, 1] (`encode_boxes`), float32 [n, C]."""
        if not isinstance(classes, ClassFeatures):
            classes = self.class_features(classes)
        embeds = self.encode_boxes(images, boxes_xyxy)
        return [scores.global_scores(embed, classes.features) for embed in embeds]

    @overload
    def ground(  # pyright: ignore[reportOverlappingOverload]
        self, image: inputs.OneImage | np.ndarray, texts: str, *, pixels: bool = False
    ) -> Grounding: ...

    @overload
    def ground(
        self, image: inputs.OneImage | np.ndarray, texts: Iterable[str], *, pixels: bool = False
    ) -> list[Grounding]: ...

    def ground(self, image: inputs.OneImage | np.ndarray, texts: Any, *, pixels: bool = False) -> Any:
        """For each text, or one, the box of the region with the highest score (by the box head, if any).

        A score is the cosine of text and region; with `model.boxes.proposals` the region's prior is added.
        The box is in [0, 1], with `pixels` in pixels of the image as it was given (see `Predictor`).
        """
        if inputs.is_one_text(texts):
            return self.ground(image, inputs.one_text(texts), pixels=pixels)[0]
        self.need_regions("ground")
        boxes_xyxy, embeds, prior = self._encode([image], self.grounding_head)[1]
        score = self.encode_text(texts) @ embeds[0].T + prior[0]  # [N, Q]
        best = score.argmax(axis=1)
        boxes_xyxy = boxes_xyxy[0]
        if pixels:
            boxes_xyxy = boxes_xyxy * _size(inputs.as_uint8(0, image))
        return [Grounding(boxes_xyxy[q], float(row[q])) for row, q in zip(score, best)]

    @inputs.for_each_image
    def detect(
        self,
        images: inputs.Images,
        texts: Iterable[str],
        *,
        threshold: float = 0.0,
        top_k: int = 100,
        pixels: bool = False,
    ) -> list[Detections]:
        """For each image the regions that show one of the texts, as `evaluate detection` measures them.

        A score is the probability by calibration.json (`present`), or without one the softmax over the texts
        of the scaled cosines; a single text then has its cosine. Boxes are in [0, 1].

        Args:
          texts: what is looked for; each may have several regions, which overlap by an IoU of at most 0.5.
          threshold: the lowest score.
          top_k: detections per image at most.
          pixels: whether boxes are in pixels of the image as it was given (see `Predictor`) instead.
        """
        self.need_regions("detect")
        names = [] if isinstance(texts, str) else list(texts)
        if not names or not all(isinstance(x, str) for x in names):
            raise inputs.InputError(f"texts: got {texts!r:.100}, expected a list of strings")
        features, detections = self.encode_text(names), []
        numbered = enumerate(inputs.checked_images(images, self.model.image.image_size))
        while batch := [inputs.as_uint8(*x) for x in itertools.islice(numbered, batches.MAX_BATCH)]:
            boxes_xyxy, embeds, prior = self._encode(batch)[1]
            for image, score, boxes in zip(batch, self.text_scores(embeds, features, prior), boxes_xyxy):
                region, label = scores.best_pairs(score, boxes, top_k, threshold)
                boxes = boxes[region] * _size(image) if pixels else boxes[region]
                of_texts = tuple(names[i] for i in label)
                detections.append(Detections(boxes, score[region, label], of_texts, label))
        return detections

    def text_scores(
        self, region_embeds: np.ndarray, features: np.ndarray, prior: np.ndarray | float = 0.0
    ) -> np.ndarray:
        """`detect`'s scores of embeddings [..., Q, D] for texts or classes [K, D]: float32 [..., Q, K].

        `prior` [..., Q] is that of schema.Regions. All texts share it, so that it would vanish in their
        softmax: it multiplies the result instead.
        """
        cosines = scores.unit(region_embeds) @ np.asarray(features, np.float32).T
        prior = np.asarray(prior, np.float32)[..., None]
        calibrated = self._calibration("regions")[0]
        if calibrated is not None:
            return calibrated.probabilities(cosines / np.linalg.norm(features, axis=1) + prior)
        if len(features) == 1:
            return cosines + prior
        scale = self.region_logit_scale
        shares = special.softmax(scale * cosines.astype(np.float64), axis=-1)
        return (shares * np.exp(scale * prior.astype(np.float64))).astype(np.float32)

    @inputs.one_or_many
    def present(self, images: inputs.OneOrMany, texts: str | Iterable[str], by: str = "image") -> np.ndarray:
        """Probabilities that texts are true of images, float32 [B, N]; one image -> [N], one text -> [B].

        It needs calibration.json in the model's folder, which `grain-jax evaluate calibrate` makes.

        Args:
          texts: strings; names of classes if class folders made the calibration.
          by: "image", the embedding of the image, or "regions", the region that fits best.
        """
        if isinstance(texts, str):
            return self.present(images, [texts], by)[:, 0]
        if by not in ("image", "regions"):
            raise inputs.InputError(f"by: got {by!r}, expected image or regions")
        score, fault = self._calibration(by)
        if score is None:
            data = "--images DIR" + " --annotations A.jsonl" * (by == "regions")
            make = f"grain-jax evaluate calibrate --checkpoint {self.folder} {data} --output OUT.json"
            got = f"{self.folder}/{calibration.NAME}: got {fault}"
            raise inputs.InputError(f"{got}, expected a calibration; make it by: {make}")
        text_embeds = calibration.embed_texts(self.encode_text, list(texts), score.templates)
        if by == "image":
            return score.probabilities(calibration.cosines(self.encode_image(images), text_embeds))
        _, embeds, prior = self.encode_regions(images)
        return score.probabilities(calibration.cosines(embeds, text_embeds, prior))

    def _calibration(self, by: str) -> tuple[calibration.Score | None, str]:
        """(the calibration of a score, or None; what is there instead)."""
        if self.folder is None or not (epath.Path(self.folder) / calibration.NAME).exists():
            return None, "nothing"
        stored = calibration.read(self.folder)
        if stored.params != self.digests["params"]:
            return None, "that of other parameters"
        return getattr(stored, by), f"one without {by}"

    def similarity_map(self, image: inputs.OneImage | np.ndarray, texts: inputs.Texts) -> np.ndarray:
        """Where each text lies in an image: cosines at the patches, float32 [N, h, w]; one text -> [h, w].

        A patch has its own cosine (`encode_patches`), the best cosine of the regions there, or the mean of
        the two, depending on what the model has. `scores.resize_map` makes the map as large as the image.
        """
        if inputs.is_one_text(texts):
            return self.similarity_map(image, inputs.one_text(texts))[0]
        return self.similarity_maps([image], [self.encode_text(texts)])[0]

    def similarity_maps(self, images: inputs.Images, text_embeds: Sequence[np.ndarray]) -> list[np.ndarray]:
        """For each image the maps [n, h, w] of its own texts, whose embeddings are [n, D], each."""
        tokens, ways = images if isinstance(images, inputs.Tokens) else self.encode_tokens(images), []
        if self.has_patches:
            pairs = zip(text_embeds, self.encode_patches(tokens), strict=True)
            ways.append([np.einsum("nd,hwd->nhw", *pair) for pair in pairs])
        if self.has_regions or not self.has_patches:
            regions = zip(text_embeds, *self.encode_regions(tokens), strict=True)
            ways.append([scores.region_map(t @ x.T + p, boxes, self.grid) for t, boxes, x, p in regions])
        return [np.asarray(np.mean(maps, axis=0), np.float32) for maps in zip(*ways)]

    @inputs.for_each_image
    def segment(
        self,
        images: inputs.Images | Sequence[segmentation.Windows],
        classes: inputs.ClassTexts | segmentation.Classes,
        *,
        background: float | None = None,
        skip: int | None = None,
        short_side: int = 0,
        stride: int = 0,
        **maps: Any,
    ) -> list[np.ndarray]:
        """For each image the position of each pixel's class, int32 [H, W]; for one image [H, W].

        Args:
          images: see `Predictor`, of any size; or one; or what `segmentation.cut` made of each.
          classes: names, {name: [description, ...]} or the result of `segmentation_classes`. Commas divide
            names of one class: "sofa, couch".
          background: pixels whose best class has a smaller share of the softmax of scaled cosines are -1.
          skip: the position of a class that no pixel gets, and that the softmax leaves out.
          short_side: pixels that the shorter side is resized to; 0: the model's image size.
          stride: pixels between windows of the model's size; 0: half of it.
          **maps: `by`, `patch_features`, `patch_weight` and `patch_sides`, as for `class_maps`.
        """
        size = self.model.image.image_size
        segmentation.check_stride(size, short_side, stride)
        if not isinstance(classes, segmentation.Classes):
            classes = self.segmentation_classes(classes)
        of_pixels: dict[str, Any] = dict(background=background, scale=self.logit_scale, skip=skip)
        labels, options = [], (size, short_side, stride, len(classes.names))
        numbered = enumerate(cast(Iterable[Any], images))
        windows = (segmentation.windows_of(*each, *options) for each in numbered)
        while group := list(itertools.islice(windows, segmentation.AT_ONCE)):
            maps_of = lambda part: (self.class_maps(part, classes, **maps),)
            (joined,) = scores.in_parts(maps_of, np.concatenate([each.pixels for each in group]))
            batches.check_finite(joined)
            parts = np.split(joined, np.cumsum([len(each.pixels) for each in group])[:-1])
            labels += [segmentation.labels(*pair, **of_pixels) for pair in zip(parts, group)]
        return labels

    def segmentation_classes(self, classes: inputs.ClassTexts) -> segmentation.Classes:
        """Embeds classes for `segment`, once for any number of images."""
        names, described = zip(*inputs.class_pairs(classes))
        return segmentation.embed_classes(self.encode_text, names, self.templates, described)

    def class_maps(
        self,
        images: inputs.Images,
        classes: segmentation.Classes,
        *,
        by: str = "auto",
        patch_features: str = "auto",
        patch_weight: float = 0.5,
        patch_sides: Sequence[int] = (1, 2, 3),
    ) -> np.ndarray:
        """Where every class lies in each image of a batch: cosines at the patches, float32 [B, C, h, w].

        Args:
          images, classes: a batch, and the result of `segmentation_classes`.
          by: "patches"; "regions", each query's cosine in its box (`scores.region_map`); "both"; or "auto",
            what the model has, as in `similarity_maps`.
          patch_features: "tokens", the last ones (`encode_patches`); "values", for which each token of the
            last layer attends to itself alone (MaskCLIP); or "auto", tokens with a box head, else values.
          patch_weight: share of the patches in "both"; the regions have the rest.
          patch_sides: `sides` of `encode_patches`; a box head takes a box of one patch for a small part.
        """
        by, patch_features = self.maps_by(by, patch_features)
        maps, use_values = [], patch_features == "values"
        if not isinstance(images, (np.ndarray, inputs.Normalized)):
            images = list(images)  # they may be read twice
        tokens = images
        if by != "regions":
            tokens = self.encode_tokens(images, values=use_values)
            cosines = classes.cosines(self.encode_patches(tokens, patch_sides))
            maps.append(cosines.transpose(0, 3, 1, 2))
        if by != "patches":
            boxes_xyxy, embed, prior = self.encode_regions(images if use_values else tokens)
            pairs = zip(classes.cosines(embed).transpose(0, 2, 1) + prior[:, None], boxes_xyxy)  # [B, C, Q]
            maps.append(np.stack([scores.region_map(*pair, self.grid) for pair in pairs]))
        if len(maps) == 1:
            return maps[0]
        return np.float32(patch_weight) * maps[0] + np.float32(1 - patch_weight) * maps[1]

    def maps_by(self, by: str, patch_features: str) -> tuple[str, str]:
        """The options of `class_maps` without "auto"."""
        return segmentation.maps_by(self.model, by, patch_features)


def _size(image: np.ndarray) -> np.ndarray:
    """Width and height of an image [H, W, 3], twice, in pixels; float32 [4]."""
    return np.array(image.shape[1::-1] * 2, np.float32)
