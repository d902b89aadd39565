"""The transform of a record in tf.data: choose its texts and regions, decode, crop, resize, mirror.

Every random choice reads one of the `draws` of the record (uniform in [0, 1), see order.py). So the result
depends only on the record and its position in the stream. Images stay uint8: the device normalises them.
"""

from typing import Any

import tensorflow as tf

from grain_jax.config import Config

NUM_DRAWS = 8
_NO_LIMIT = 2**31 - 1  # of a number of regions
_WEB_OR_SYNTHETIC, _WHICH_CAPTION, _FLIP, _AREA, _ASPECT, _TOP, _LEFT, _NEGATIVE = range(NUM_DRAWS)
_MAX_ASPECT_CHANGE = 4 / 3  # of a random crop against the image
# "leftmost" and "right-hand" too, "leftovers" and "bright" not.
_SIDE = r"(?is).*\b(left|right)(most|wards?|hand|side)?\b.*"
_MIN_INSIDE = 0.5  # of a box's area, below which a crop drops the region


def _sequence(kind: tf.DType, *shape: int) -> tf.io.FixedLenSequenceFeature:
    return tf.io.FixedLenSequenceFeature(shape, kind, allow_missing=True)


FEATURES = {
    "image": tf.io.FixedLenFeature([], tf.string),
    "captions": _sequence(tf.string),
    "synthetic_caption": tf.io.FixedLenFeature([], tf.string, default_value=""),
    "regions/bbox": _sequence(tf.float32, 4),
    "regions/description": _sequence(tf.string),
    "regions/score": _sequence(tf.float32),
}
# TFDS's names for the hard negatives: all texts, and how many each region has.
NEGATIVES = {
    "regions/negatives/ragged_flat_values": _sequence(tf.string),
    "regions/negatives/ragged_row_lengths_0": _sequence(tf.int64),
}


class Transform:
    """A serialized record and its draws -> the columns of a batch, by name. Texts are UTF-8 bytes.

    image: uint8 [S, S, 3].
    captions: string [C]; caption_mask: bool [C].
    descriptions: string [R], the highest score first; region_mask: bool [R].
    region_boxes_cxcywh: float32 [R, 4]; region_scores: float32 [R].
    negatives: string [R, H]; negative_mask: bool [R, H].
    """

    def __init__(self, config: Config):
        self.input, self.size = config.input, config.model.image.image_size

    def __call__(self, record: tf.Tensor, draws: tf.Tensor) -> dict[str, Any]:
        """Args: record string [], draws float32 [NUM_DRAWS]."""
        features = FEATURES | (NEGATIVES if self.input.negatives_per_region else {})
        fields = tf.io.parse_single_example(record, features)
        boxes_xyxy = tf.gather(fields["regions/bbox"], [1, 0, 3, 2], axis=1)
        kept = tf.ones_like(fields["regions/score"], tf.bool)
        if self.input.crop_min_area < 1:
            image, window_xyxy = decode_cropped(fields["image"], draws, self.input.crop_min_area)
            boxes_xyxy, kept = crop_boxes(boxes_xyxy, window_xyxy)
        else:
            image = decode(fields["image"])
        image = resize(image, self.size)
        if self.input.flip_rate > 0:
            may_flip = tf.logical_not(mentions_side(fields))
            flipped = tf.logical_and(draws[_FLIP] < self.input.flip_rate, may_flip)
            image = tf.cond(flipped, lambda: tf.reverse(image, [1]), lambda: image)
            x1, y1, x2, y2 = tf.unstack(boxes_xyxy, axis=1)
            mirrored = tf.stack([1 - x2, y1, 1 - x1, y2], axis=1)
            boxes_xyxy = tf.where(flipped, mirrored, boxes_xyxy)
        captions = self._captions(fields, draws, kept)
        negatives, negative_mask = self._negatives(fields, draws, kept)
        return dict(
            image=image,
            captions=captions,
            caption_mask=tf.strings.length(captions) > 0,
            **top_regions(fields, boxes_xyxy, kept, self.input.max_regions),
            negatives=negatives,
            negative_mask=negative_mask,
        )

    def _negatives(self, fields, draws, kept) -> tuple[tf.Tensor, tf.Tensor]:
        """The hard negatives of the kept regions, string [R, H], and which the record has, bool [R, H].

        If the record has more than H, they are H in a row from a drawn one on; the first follows the last.
        """
        shape = regions, most = self.input.max_regions, self.input.negatives_per_region
        if 0 in shape:
            return tf.zeros(shape, tf.string), tf.zeros(shape, tf.bool)
        texts, counts = (fields[name] for name in NEGATIVES)
        # A record without negatives has no counts either.
        missing = tf.size(fields["regions/score"]) - tf.size(counts)
        counts = tf.pad(tf.cast(counts, tf.int32), [[0, missing]])
        chosen = best_regions(fields["regions/score"], kept, regions)
        first = tf.gather(tf.cumsum(counts, exclusive=True), chosen)[:, None]
        count = tf.gather(counts, chosen)[:, None]  # [regions, 1]
        column = tf.range(most)[None]
        mask = column < count
        start = tf.cast(draws[_NEGATIVE] * tf.cast(count, tf.float32), tf.int32)
        index = first + tf.math.floormod(start + column, tf.maximum(count, 1))
        none = tf.size(texts)  # the index of the empty text behind the last one
        drawn = tf.gather(tf.concat([texts, [""]], 0), tf.where(mask, index, none))
        return _padded(drawn, regions), _padded(mask, regions)

    def _captions(self, fields, draws, kept) -> tf.Tensor:
        """The captions, string [C], "" for one that the record lacks; `kept` [M]: regions in the crop."""

        def joined(texts, number: int):
            best = best_regions(fields["regions/score"], kept, number)
            added = tf.gather(fields["regions/description"], best)
            return tf.strings.reduce_join(tf.concat([texts, added], 0), separator=", ")

        number = self.input.descriptions_in_captions
        if self.input.captions_per_image == 1:
            caption = choose_caption(fields, draws, self.input.synthetic_caption_rate)
            if number:
                there = tf.boolean_mask([caption], tf.strings.length([caption]) > 0)
                caption = joined(there, number)
            return tf.stack([caption])
        # The draw of the one web caption is the same as above.
        web = choose_caption(fields | {"synthetic_caption": ""}, draws, 0.0)
        captions = [web, fields["synthetic_caption"]]
        if self.input.captions_per_image == 3:
            captions.append(joined(tf.zeros([0], tf.string), number or _NO_LIMIT))
        return tf.stack(captions)


def mentions_side(fields: dict[str, tf.Tensor]) -> tf.Tensor:
    """Whether a text says left or right, which would be untrue of the mirrored image; bool []."""
    kinds = ("captions", "synthetic_caption", "regions/description", *list(NEGATIVES)[:1])
    texts = [tf.reshape(fields[name], [-1]) for name in kinds if name in fields]
    return tf.reduce_any(tf.strings.regex_full_match(tf.concat(texts, 0), _SIDE))


def choose_caption(fields: dict[str, tf.Tensor], draws: tf.Tensor, rate: float) -> tf.Tensor:
    """A web caption, or with probability `rate` the synthetic one; the other kind if one is missing."""
    synthetic = fields["synthetic_caption"]
    web = tf.boolean_mask(fields["captions"], tf.strings.length(fields["captions"]) > 0)
    has_synthetic = tf.strings.length(synthetic) > 0
    takes_synthetic = has_synthetic & (draws[_WEB_OR_SYNTHETIC] < rate)
    number = tf.size(web)
    index = tf.cast(draws[_WHICH_CAPTION] * tf.cast(number, tf.float32), tf.int32)
    return tf.concat([web, [synthetic]], 0)[
        tf.where(takes_synthetic, number, tf.minimum(index, tf.maximum(number - 1, 0)))
    ]


def best_regions(scores: tf.Tensor, kept: tf.Tensor, number: int) -> tf.Tensor:
    """Indices of at most `number` kept regions with the highest scores; among equals the first come first."""
    chosen = tf.boolean_mask(tf.range(tf.size(scores)), kept)
    # top_k takes the lower index first among equals.
    best = tf.math.top_k(tf.gather(scores, chosen), tf.minimum(tf.size(chosen), number)).indices
    return tf.gather(chosen, best)


def top_regions(
    fields: dict[str, tf.Tensor], boxes_xyxy: tf.Tensor, kept: tf.Tensor, number: int
) -> dict[str, tf.Tensor]:
    """The `best_regions` of a record, padded to `number`: the columns of a batch."""
    chosen = best_regions(fields["regions/score"], kept, number)
    boxes = tf.gather(boxes_xyxy, chosen)
    low, high = boxes[:, :2], boxes[:, 2:]
    columns = dict(
        descriptions=tf.gather(fields["regions/description"], chosen),
        region_boxes_cxcywh=tf.concat([(low + high) / 2, high - low], 1),
        region_mask=tf.ones_like(chosen, tf.bool),
        region_scores=tf.gather(fields["regions/score"], chosen),
    )
    return {name: _padded(rows, number) for name, rows in columns.items()}


def _padded(rows: tf.Tensor, number: int) -> tf.Tensor:
    """[n, ...] -> [number, ...], with zeros behind the rows."""
    padding = [[0, number - tf.shape(rows)[0]], *[[0, 0]] * (rows.shape.rank - 1)]
    return tf.ensure_shape(tf.pad(rows, padding), [number, *rows.shape[1:]])


def decode(encoded: tf.Tensor) -> tf.Tensor:
    """JPEG or PNG -> uint8 [H, W, 3]; JPEG by the accurate inverse DCT, as PIL."""
    image = tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE"),
        lambda: tf.io.decode_png(encoded, channels=3),
    )
    image.set_shape([None, None, 3])
    return image


def decode_cropped(encoded: tf.Tensor, draws: tf.Tensor, min_area: float) -> tuple[tf.Tensor, tf.Tensor]:
    """A random window of the image; of a JPEG only the window is decoded.

    Returns: uint8 [h, w, 3] and the window as shares of the image, xyxy float32 [4].
    """

    def jpeg():
        window, shares = crop_window(tf.io.extract_jpeg_shape(encoded), draws, min_area)
        image = tf.io.decode_and_crop_jpeg(encoded, window, channels=3, dct_method="INTEGER_ACCURATE")
        return image, shares

    def png():
        whole = tf.io.decode_png(encoded, channels=3)
        window, shares = crop_window(tf.shape(whole), draws, min_area)
        top, left, height, width = tf.unstack(window)
        return whole[top : top + height, left : left + width], shares

    image, window_xyxy = tf.cond(tf.io.is_jpeg(encoded), jpeg, png)
    image.set_shape([None, None, 3])
    return image, window_xyxy


def crop_window(shape: tf.Tensor, draws: tf.Tensor, min_area: float) -> tuple[tf.Tensor, tf.Tensor]:
    """A window of at least `min_area` of the image: int32 (top, left, height, width), shares xyxy."""
    size = tf.cast(shape[:2], tf.float32)
    area = min_area + (1 - min_area) * draws[_AREA]
    aspect = tf.pow(_MAX_ASPECT_CHANGE, 2 * draws[_ASPECT] - 1)
    height = tf.clip_by_value(tf.sqrt(area * aspect), area, 1.0)
    window = tf.minimum(tf.math.ceil(tf.stack([height, area / height]) * size), size)
    corner = tf.floor(tf.stack([draws[_TOP], draws[_LEFT]]) * (size - window + 1))
    shares = tf.reverse(tf.stack([corner / size, (corner + window) / size]), [1])
    return tf.cast(tf.concat([corner, window], 0), tf.int32), tf.reshape(shares, [4])


def crop_boxes(boxes_xyxy: tf.Tensor, window_xyxy: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Boxes as shares of the window, clipped to it; a mask of those that keep at least half their area."""
    corner = tf.tile(window_xyxy[:2], [2])
    extent = tf.tile(window_xyxy[2:] - window_xyxy[:2], [2])
    moved = (boxes_xyxy - corner) / extent
    clipped = tf.clip_by_value(moved, 0.0, 1.0)
    area, left = (tf.reduce_prod(b[:, 2:] - b[:, :2], axis=1) for b in (moved, clipped))
    return clipped, left >= _MIN_INSIDE * area


def resize(image: tf.Tensor, size: int) -> tf.Tensor:
    """uint8 [H, W, 3] -> uint8 [S, S, 3], antialiased bicubic; an image of that size is returned as it is.

    Gives the bits of one `tf.image.resize`, whose second pass goes pixel by pixel, three numbers at a time.
    Here each pass goes over whole lines, in about half of the time.
    """

    def resize_rows(image):
        """[H, W, 3] -> [S, W, 3]: an image of one pixel per line, which has 3 W channels."""
        height, width, _ = tf.unstack(tf.shape(image))
        lines = tf.reshape(image, [height, 1, 3 * width])
        lines = tf.image.resize(lines, (size, 1), "bicubic", antialias=True)
        return tf.reshape(lines, [size, width, 3])

    def resized():
        turned = resize_rows(tf.transpose(resize_rows(image), [1, 0, 2]))
        return tf.transpose(tf.saturate_cast(tf.round(turned), tf.uint8), [1, 0, 2])

    fits = tf.reduce_all(tf.equal(tf.shape(image)[:2], size))
    return tf.ensure_shape(tf.cond(fits, lambda: image, resized), [size, size, 3])
