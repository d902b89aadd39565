"""A trained model for users: `grain_jax.load(DIR)` gives a `Predictor` that encodes images, texts and regions.

Any number of images or texts may be given, also by a generator; they run in batches of a few fixed
sizes, so that only a few programs are compiled. Those are shared by all Predictors of one model
configuration. Large calls use all devices of the process. A model without region queries, such as one of
two towers, has no regions: what needs them says so.
"""

import functools
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import tqdm
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grain_jax import config as config_lib
from grain_jax import errors, schema
from grain_jax.files import images
from grain_jax.inference import prompts, scores
from grain_jax.input_pipeline import tokenizer
from grain_jax.models import grain
from grain_jax.runtime import checkpoint

MAX_BATCH = 64  # images or texts at once on a device; smaller calls take the next power of two
_ROW_LENGTHS = (16, 32, 64)  # most texts are short, and attention costs by the row


class InputError(errors.UserError):
    """Pictures, texts or classes that the model cannot take; the message is one line."""


class Grounding(NamedTuple):
    """Where a text is in an image."""

    box_xyxy: np.ndarray  # float32 [4] in [0, 1]
    score: float  # cosine of the text and the best region


class ClassFeatures(NamedTuple):
    """Classes as embeddings; compute them once for any number of images."""

    names: tuple[str, ...]
    features: np.ndarray  # float32 [C, D], means of normalised texts, not of unit length
    descriptions: tuple[np.ndarray, ...] | None  # for each class float32 [n_c, D], unit length


def load(
    path: epath.PathLike,
    dtype: str = "float32",
    templates: Sequence[str] | None = None,
    progress: bool = False,
) -> "Predictor":
    """The model in a training workdir (its newest checkpoint), a checkpoint or a converted folder.

    Args:
      path: of the folder, local or remote.
      dtype: this and the others as in `Predictor`.
      templates: sentences for class names.
      progress: whether calls show on stderr how many images they have encoded.

    Raises:
      checkpoint.CheckpointError: there is none.
      InputError: no such dtype.
    """
    model, params, folder = checkpoint.load_model(path)
    return Predictor(model, params, dtype, templates, folder, progress)


class Predictor:
    """Encodes images and texts; every result is float32 numpy.

    Args:
      model: the towers' sizes.
      params: nested dict of arrays. Arrays that are on a device already stay as they are.
      dtype: of activations, "float32" (at full precision on every device) or "bfloat16".
      templates: sentences for class names; None for `inference/templates.txt`.
      folder: where the model lies; files that its tokenizer needs are looked for there first.
      progress: whether calls show on stderr how many images they have encoded.
    """

    def __init__(
        self,
        model: config_lib.Model,
        params: Any,
        dtype: str = "float32",
        templates: Sequence[str] | None = None,
        folder: epath.PathLike | None = None,
        progress: bool = False,
    ):
        if dtype not in config_lib.DTYPES:
            names = " or ".join(config_lib.DTYPES)
            raise InputError(f"dtype: got {dtype!r}, expected {names}")
        self.model = model
        self.dtype = dtype
        self.folder = folder
        self.progress = progress
        self.params = jax.tree.map(jnp.asarray, params)
        # Parameters that the caller spread over a mesh keep their places, and so the work does.
        places = set().union(*(leaf.devices() for leaf in jax.tree.leaves(self.params)))
        self._devices = jax.local_devices() if places == {jax.local_devices()[0]} else [None]
        self.templates = list(templates) if templates is not None else prompts.load_templates()
        self._encode_images, self._encode_texts = programs(model, dtype)

    def encode_image(self, pictures) -> np.ndarray:
        """Pictures -> float32 [B, D], unit length.

        Args:
          images: PIL images of any mode or uint8 [H, W, 3] of any size, as a list, a generator or
            anything else to iterate over; uint8 [B, H, W, 3]; or float32 [B, H, W, 3] of the model's
            size, already normalised (by `model.image.pixel_mean` and `pixel_std`). All but the last
            are resized to the model's size.

        Raises:
          InputError: images of another kind or shape, or one that cannot be read.
        """
        return self._encode(pictures)[0]

    def encode_regions(self, pictures) -> schema.Regions:
        """Pictures, as for `encode_image` -> boxes_xyxy [B, Q, 4] in [0, 1] and embed [B, Q, D].

        Raises:
          InputError: also where the model has no region decoder.
        """
        return self.encode_image_and_regions(pictures)[1]

    def encode_image_and_regions(self, pictures) -> tuple[np.ndarray, schema.Regions]:
        """What `encode_image` and `encode_regions` return, in one pass; raises as the latter."""
        self._need_regions("regions")
        image, region, boxes = self._encode(pictures)
        return image, schema.Regions(boxes, region)

    def _need_regions(self, what: str) -> None:
        decoder = self.model.decoder
        if decoder is None or not decoder.queries:
            has = "two towers and no region decoder (model.decoder is null)"
            if decoder is not None:
                has = "no region queries (model.decoder.queries is 0)"
            raise InputError(
                f"{what}: the model has {has}, expected one that finds regions; use encode_image,"
                " encode_text, or classify with alpha 1"
            )

    def _encode(self, pictures) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pictures -> float32 (image [B, D], regions [B, Q, D], boxes_xyxy [B, Q, 4])."""
        pictures = _checked_pictures(pictures, self.model.image.image_size)
        q = 0 if self.model.decoder is None else self.model.decoder.queries
        d = self.model.embed_dim
        parts = [(np.zeros((0, d)), np.zeros((0, q, d)), np.zeros((0, q, 4)))]
        total = len(pictures) if hasattr(pictures, "__len__") else None
        with tqdm.tqdm(
            total=total, desc="pictures", unit="", file=sys.stderr, disable=not self.progress
        ) as bar:
            for part in self._parts(pictures):
                parts.append(self._run(self._encode_images, part))
                bar.update(len(part))
        image, region, boxes = (np.concatenate(x).astype(np.float32) for x in zip(*parts))
        return image, region, boxes

    def _parts(self, pictures) -> Iterator[np.ndarray]:
        """Pictures, resized where they are not floats, in arrays [at most MAX_BATCH a device, S, S, 3]."""
        size, most = self.model.image.image_size, MAX_BATCH * len(self._devices)
        if _is_float(pictures):
            yield from (pictures[first : first + most] for first in range(0, len(pictures), most))
            return
        numbered = enumerate(pictures)
        while part := [_resize(i, p, size) for i, p in itertools.islice(numbered, most)]:
            yield np.stack(part)

    def _run(self, program, *rows: np.ndarray) -> Any:
        """What `program` makes of `rows` (arrays of one length), as numpy.

        They are padded, so that there are few programs; on one device to the next power of two.
        More than MAX_BATCH are shared out among the devices.
        """
        params, count = self.params, len(rows[0])
        if count > MAX_BATCH:
            params, sharding = self._on_all_devices
            rows = [jax.device_put(_pad(x, len(self._devices)), sharding) for x in rows]
        else:
            rows = [_pad(x) for x in rows]
        return jax.tree.map(lambda x: np.asarray(x)[:count], program(params, *rows))

    @functools.cached_property
    def _on_all_devices(self) -> tuple[Any, NamedSharding]:
        """The parameters on each device, and how a batch is cut."""
        mesh = Mesh(self._devices, ("batch",))
        params = jax.device_put(self.params, NamedSharding(mesh, PartitionSpec()))
        return params, NamedSharding(mesh, PartitionSpec("batch"))

    def encode_text(self, texts: Iterable[str] | np.ndarray) -> np.ndarray:
        """Texts -> float32 [N, D], unit length.

        Args:
          texts: strings, also from a generator, or int32 token ids [N, L]. Of ids, a text ends at its
            highest one, as in CLIP; where the tower sees its padding (SigLIP), shorter rows are padded
            as it expects.
        """
        tokens, ends = self._tokens(texts)
        out = np.empty((len(tokens), self.model.embed_dim), np.float32)
        order = np.argsort(ends, kind="stable")  # short texts share batches, and short rows
        most = MAX_BATCH * len(self._devices)
        for first in range(0, len(tokens), most):
            rows = order[first : first + most]
            length = tokens.shape[1]
            if self.model.text.packable:  # what follows the end token is never looked at
                longest = int(ends[rows[-1]]) + 1
                length = next((n for n in _ROW_LENGTHS if longest <= n), length)
            part = tokens[rows, :length]
            out[rows] = self._run(self._encode_texts, part, ends[rows].astype(np.int32))
        return out

    def class_features(self, classes: Iterable[str] | Mapping[str, Sequence[str]]) -> ClassFeatures:
        """Names through the templates, or names x descriptions, as embeddings (docs/method.md, Zero-shot evaluation).

        Args:
          classes: names, or {name: [description, ...]}.
        """
        described = isinstance(classes, Mapping)
        if not described and not isinstance(classes, str):
            classes = list(classes)
        if isinstance(classes, str) or not classes:
            raise InputError(f"classes: got {classes!r}, expected names or {{name: descriptions}}")
        for name in classes:
            if not isinstance(name, str) or (described and isinstance(classes[name], str)):
                raise InputError(
                    f"classes: at {name!r}, expected a name or name: [description, ...]"
                )
            if described and not len(classes[name]):
                raise InputError(f"classes: {name!r} has no description")
        names = tuple(classes)
        texts = [
            prompts.class_texts(name, self.templates, classes[name] if described else None)
            for name in names
        ]
        features = scores.class_features(self._encode_lists(texts))
        descriptions = self._encode_lists([list(classes[n]) for n in names]) if described else None
        return ClassFeatures(names, features, descriptions)

    def classify(
        self,
        pictures,
        classes: Iterable[str] | Mapping[str, Sequence[str]] | ClassFeatures,
        alpha: float = 1.0,
    ) -> np.ndarray:
        """Scores of every class, float32 [B, C]: alpha * global + (1 - alpha) * region cosines.

        Args:
          images: as for `encode_image`.
          classes: names, {name: [description, ...]}, or what `class_features` made of either.
          alpha: share of the global score; below 1 needs descriptions.
        """
        if not 0.0 <= alpha <= 1.0:
            raise InputError(f"alpha: got {alpha}, expected a number from 0 to 1")
        if alpha < 1.0:
            self._need_regions(f"alpha {alpha}")
        if not isinstance(classes, ClassFeatures):
            if alpha < 1.0 and not isinstance(classes, Mapping):
                raise InputError(_NEEDS_DESCRIPTIONS.format(alpha))
            classes = self.class_features(classes)
        if alpha < 1.0 and classes.descriptions is None:
            raise InputError(_NEEDS_DESCRIPTIONS.format(alpha))
        image_embed, region_embed, _ = self._encode(pictures)
        region = scores.region_scores(region_embed, classes.descriptions) if alpha < 1.0 else None
        return scores.combine(scores.global_scores(image_embed, classes.features), region, alpha)

    def ground(self, picture, texts: Iterable[str] | np.ndarray) -> list[Grounding]:
        """For each text the box of the image's region that fits it best, and the cosine.

        Args:
          image: one: PIL, uint8 [H, W, 3], or float32 [H, W, 3] already normalised.
          texts: as for `encode_text`.
        """
        self._need_regions("ground")
        if not isinstance(picture, PIL.Image.Image):
            picture = np.asarray(picture)
            if picture.ndim != 3:
                raise InputError(f"image: got shape {list(picture.shape)}, expected [H, W, 3]")
        regions = self.encode_regions(picture[None] if _is_float(picture) else [picture])
        similarity = self.encode_text(texts) @ regions.embed[0].T  # [N, Q]
        best = similarity.argmax(axis=1)
        return [
            Grounding(regions.boxes_xyxy[0, q], float(row[q])) for row, q in zip(similarity, best)
        ]

    def _encode_lists(self, texts: list[list[str]]) -> tuple[np.ndarray, ...]:
        """For each list the embeddings of its texts; a text that comes twice is encoded once."""
        distinct = {text: i for i, text in enumerate(dict.fromkeys(sum(texts, [])))}
        embeds = self.encode_text(list(distinct))
        return tuple(embeds[[distinct[text] for text in part]] for part in texts)

    def _tokens(self, texts) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32 [N, L] and the positions [N] at which the texts end."""
        tower = self.model.text
        vocab, context = tower.vocab_size, tower.context_length
        if isinstance(texts, str):
            raise InputError("texts: got one string, expected a list of strings")
        if not hasattr(texts, "dtype"):
            texts = list(texts)
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            if not texts:
                return np.zeros((0, context), np.int32), np.zeros(0, np.int32)
            ids, lengths, _ = _tokenizer(tower, self.folder).encode(texts, context)
            tokens = np.full((len(texts), context), tower.pad_id, np.int32)
            tokens[np.arange(context) < lengths[:, None]] = ids
            return tokens, lengths - 1
        tokens = np.asarray(texts)
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or not 1 <= tokens.shape[1] <= context:
            raise InputError(
                f"texts: got {tokens.dtype} {list(tokens.shape)}, expected strings or int32 token ids"
                f" [N, at most {context}]"
            )
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab:
            raise InputError(
                f"texts: got token ids {tokens.min()} to {tokens.max()}, expected 0 to {vocab - 1}"
            )
        tokens = tokens.astype(np.int32)
        ends = tokens.argmax(axis=1)
        if not tower.packable:
            missing = ((0, 0), (0, context - tokens.shape[1]))
            tokens = np.pad(tokens, missing, constant_values=tower.pad_id)
        return tokens, ends


_NEEDS_DESCRIPTIONS = "alpha {} needs descriptions of the classes: {{name: [description, ...]}}"


@functools.lru_cache(maxsize=8)
def _tokenizer(tower: config_lib.TextTower, folder: epath.PathLike | None) -> tokenizer.Tokenizer:
    return tokenizer.of_tower(tower, folder)


@functools.lru_cache(maxsize=8)
def programs(model: config_lib.Model, dtype: str):
    """The two jitted programs of a model; parameters are arguments, so any Predictor may use them.

    Returns:
      encode_images(params, image [B, S, S, 3] uint8, or float32 normalised) -> image_embed [B, D],
      region_embed [B, Q, D], boxes_xyxy [B, Q, 4]; and encode_texts(params, tokens int32 [N, L], ends
      int32 [N], the positions of the texts' last tokens) -> [N, D].
    """
    module = grain.GRAIN(model, dtype)
    # "float32" must mean it on chips whose matrix units would cut operands to fewer bits.
    precision = "highest" if dtype == "float32" else None

    def encode_images(params, image):
        with jax.default_matmul_precision(precision):
            image_embed, region_embed, boxes = module.apply(
                {"params": params}, image, method=grain.GRAIN.encode_image
            )
        center, size = boxes[-1, ..., :2], boxes[-1, ..., 2:]
        corners = jnp.concatenate([center - size / 2, center + size / 2], axis=-1)
        return image_embed, region_embed, jnp.clip(corners, 0.0, 1.0)

    def encode_texts(params, tokens, ends):
        # A group a text, so that devices which share a batch need nothing of each other.
        tokens = tokens[:, None]
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[2]), tokens.shape)
        at = jnp.stack([jnp.zeros_like(ends), ends], axis=1)
        with jax.default_matmul_precision(precision):
            (embed,) = module.apply(
                {"params": params},
                tokens,
                positions,
                jnp.ones_like(positions),
                at,
                method=grain.GRAIN.encode_text,
            )
        return embed

    return jax.jit(encode_images), jax.jit(encode_texts)


def _is_float(pictures) -> bool:
    return getattr(getattr(pictures, "dtype", None), "kind", "") == "f"


def _pad(x: np.ndarray, devices: int = 1) -> np.ndarray:
    """`x` with copies of its last row, up to a power of two for each device."""
    wanted = devices << (-(-len(x) // devices) - 1).bit_length()
    return np.concatenate([x, np.repeat(x[-1:], wanted - len(x), axis=0)])


def _resize(index: int, picture: Any, size: int) -> np.ndarray:
    """The image as uint8 [size, size, 3]. Raises InputError, which names it by its `index`."""
    if isinstance(picture, PIL.Image.Image):
        try:
            picture = images.to_rgb(picture)
        except Exception as error:  # PIL reads a file's pixels only now, and raises much
            raise InputError(
                f"pictures[{index}]: {' '.join(str(error).split())}, expected a readable image"
            ) from None
    elif getattr(picture, "dtype", None) != np.uint8:
        raise InputError(
            f"pictures[{index}]: got {type(picture).__name__}, expected a PIL image or uint8 [H, W, 3]"
        )
    try:
        return images.resize(picture, size)
    except images.ImageError as error:
        raise InputError(f"pictures[{index}]: {error}") from None


def _checked_pictures(pictures, size: int):
    """Pictures to iterate over, or float32 [B, size, size, 3]. Raises InputError."""
    if isinstance(pictures, PIL.Image.Image):
        raise InputError("pictures: got one PIL image, expected a list of them")
    if not hasattr(pictures, "dtype"):
        if not isinstance(pictures, Iterable) or isinstance(pictures, (str, bytes)):
            raise InputError(
                f"images: got {type(pictures).__name__}, expected images to iterate over"
            )
        return pictures
    pictures = np.asarray(pictures)
    if pictures.ndim != 4 or pictures.shape[3] != 3:
        raise InputError(f"images: got shape {list(pictures.shape)}, expected [B, H, W, 3]")
    if pictures.dtype == np.uint8:
        return pictures
    if not _is_float(pictures):
        raise InputError(f"images: got {pictures.dtype}, expected uint8, or float32 normalised")
    if pictures.shape[1:3] != (size, size):
        raise InputError(
            f"images: got float32 of {pictures.shape[1]} x {pictures.shape[2]} pixels, expected"
            f" {size} x {size}; give uint8 or PIL images to have them resized"
        )
    return pictures.astype(np.float32)
