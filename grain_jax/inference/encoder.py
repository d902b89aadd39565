"""Batches of images, boxes and texts through a model, whose embeddings come back as numpy."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias, overload

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grain_jax import config as config_lib
from grain_jax.checkpoint import saved_model
from grain_jax.core import errors, low_rank, schema
from grain_jax.core import progress as progress_lib
from grain_jax.inference import inputs, jitted, prompts
from grain_jax.inference.inputs import Images, InputError, Normalized, OneImage, OneOrMany, Texts, Tokens
from grain_jax.models import box_head, towers

MAX_BATCH = 64  # images or texts per device and batch
_FEW = 8  # rows of the programs of small batches; images also go one by one
_COMPILING = "usually under a minute, on few CPU cores a few; once for each kind of call"
Boxes: TypeAlias = Iterable[Any] | np.ndarray  # for each image its boxes [n, 4], xyxy in [0, 1]
_ROW_LENGTHS = (16, 32, 64)  # token rows are cut to these lengths: most texts are short


class Encoder:
    """Embeds images, regions, boxes, patches and texts; `Predictor` builds on it and has its documentation."""

    def __init__(
        self,
        model: config_lib.Model,
        params: Any,
        dtype: str = "float32",
        templates: Sequence[str] | None = None,
        folder: epath.PathLike | None = None,
        progress: bool = False,
        device: Any = None,
    ):
        if dtype not in config_lib.DTYPES:
            names = " or ".join(config_lib.DTYPES)
            raise InputError(f"dtype: got {dtype!r}, expected {names}")
        # Raises early if a stored config names towers that may not be imported.
        towers.image_tower(model.image)
        towers.text_tower(model.text)
        if any(low_rank.maps_in(params)):
            raise InputError(
                "params: got factors of LoRA, which a Predictor does not apply; expected merged parameters, as"
                " grain_jax.load and grain_jax.models.lora.merged return them"
            )
        # The run chose its programs for its own devices.
        self.model = model = dataclasses.replace(model, attention="auto")
        self.dtype = dtype
        self.folder = folder
        self.progress = progress
        self.params = jax.device_put(params, None if device is None else _device(device))
        # Parameters that the caller has put on a mesh or a device stay there, and the programs run there.
        devices = set().union(*(leaf.devices() for leaf in jax.tree.leaves(self.params)))
        is_free = device is None and devices == {jax.local_devices()[0]}
        self._devices = jax.local_devices() if is_free else [None]
        self.templates = list(templates) if templates is not None else prompts.load_templates()

    def __reduce__(self):
        """Weights and settings: a copy, or one that is read from a pickle, lies on the default devices."""
        settings = self.dtype, self.templates, self.folder, self.progress
        return type(self), (self.model, jax.device_get(self.params), *settings)

    def __repr__(self) -> str:
        image, text, decoder = self.model.image, self.model.text, self.model.decoder
        size, count = image.image_size, sum(x.size for x in jax.tree.leaves(self.params))
        return (
            f"<Predictor of {self.folder or 'given parameters'}:"
            f" image {size} x {size} ({image.tower}, depth {image.depth}, width {image.width});"
            f" text of {text.context_length} tokens ({text.tower}, depth {text.depth}, width {text.width});"
            f" {decoder.queries if decoder else 0} regions; box head {self.model.boxes.kind};"
            f" embeddings of {self.model.embed_dim}; {count:,} parameters, {self.dtype}>"
        )

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """Digests of the model's configuration and of its parameters."""
        return saved_model.model_digests(self.model, jax.device_get(self.params))

    @property
    def logit_scale(self) -> float:
        """The factor of the cosines in the loss; `params` hold its logarithm."""
        return float(np.exp(self.params["logit_scale"]))

    @property
    def logit_bias(self) -> float | None:
        """What a sigmoid model adds to the scaled cosines; None for others."""
        return float(self.params["logit_bias"]) if "logit_bias" in self.params else None

    @property
    def region_logit_scale(self) -> float:
        """The factor of the cosines in the losses of regions; `logit_scale` in most models."""
        own = self.params.get("region_logit_scale")
        return self.logit_scale if own is None else float(np.exp(own))

    @property
    def region_logit_bias(self) -> float | None:
        """What a sigmoid model adds to the scaled cosines of regions; None for others."""
        if "region_logit_scale" not in self.params:
            return self.logit_bias
        own = self.params.get("region_logit_bias")
        return None if own is None else float(own)

    @property
    def has_regions(self) -> bool:
        """Whether the model has region queries, which find regions."""
        return self.model.decoder is not None and self.model.decoder.queries > 0

    @property
    def class_score(self) -> str:
        """How regions score a class: `by` of scores.region_scores."""
        return self.model.decoder.class_score if self.model.decoder else "mean"

    @property
    def has_box_head(self) -> bool:
        """Whether the model embeds given boxes."""
        return self.model.boxes.kind != "none"

    @property
    def has_patches(self) -> bool:
        """Whether patches have embeddings in the space of the texts."""
        return self.has_box_head or self.model.tower_pools

    def need_regions(self, argument: str) -> None:
        """Raises InputError if the model has no region queries; `argument` begins the message."""
        if not self.has_regions:
            has = "two towers and no region decoder (model.decoder is null)"
            if self.model.decoder is not None:
                has = "no region queries (model.decoder.queries is 0)"
            raise InputError(
                f"{argument}: the model has {has}, expected one that finds regions; use encode_image,"
                " encode_text, or classify with alpha 1"
            )

    def _need_box_head(self) -> None:
        if not self.has_box_head:
            raise InputError(
                "boxes: the model has no box head (model.boxes.kind is none), expected one that was trained with"
                " loss.box_description"
            )

    @functools.cached_property
    def grid(self) -> int:
        """Patches along a side of an image. Raises InputError if the tower has no grid of them."""
        size = self.model.image.image_size
        pixels = jax.ShapeDtypeStruct((1, size, size, 3), np.uint8)
        program = jitted.program(self.model, self.dtype, "image_tokens")
        shape = jax.eval_shape(program, self.params, pixels).shape
        tower = towers.image_tower(self.model.image)
        if tower.pooled:
            raise InputError("model.image.tower: pools its tokens, expected a grid of them")
        try:
            return box_head.grid_size(shape[1], tower.leading_tokens(self.model.image))
        except errors.UserError as error:
            raise InputError(str(error)) from None

    def preprocess(self, image: OneImage | np.ndarray) -> np.ndarray:
        """An image -> float32 [S, S, 3], resized and normalised, for calls with `normalized=True`."""
        return inputs.normalised(self.resized(image), self.model.image)

    def resized(self, image: OneImage | np.ndarray, index: int = 0) -> np.ndarray:
        """An image -> uint8 [S, S, 3]; an error names the `index`."""
        return inputs.resize(index, image, self.model.image.image_size)

    def warm_up(self, images: int = 1) -> None:
        """Compiles the programs of calls with so many images and a few texts, before the first of them."""
        size = self.model.image.image_size
        blank = np.zeros((images, size, size, 3), np.uint8)
        self._encode(blank)
        if self.has_regions and self.has_box_head:
            self._encode(blank, by_box_head=True)
        self.encode_text(["a"])

    def encode_image(self, images: OneOrMany, *, normalized: bool = False) -> np.ndarray:
        """Images -> float32 [B, D], unit length; one image -> [D]."""
        images = inputs.marked(images, normalized)
        if inputs.is_one_image(images):
            return self.encode_image(inputs.one_image(images))[0]
        return self._encode(images)[0]

    def encode_regions(self, images: OneOrMany | Tokens, *, normalized: bool = False) -> schema.Regions:
        """Images -> boxes_xyxy [B, Q, 4] in [0, 1] and embed [B, Q, D]; one image -> [Q, 4] and [Q, D].

        `images` may be the result of `encode_tokens`.
        """
        return self.encode_image_and_regions(images, normalized=normalized)[1]

    def encode_image_and_regions(
        self, images: OneOrMany | Tokens, *, normalized: bool = False
    ) -> tuple[np.ndarray, schema.Regions]:
        """(`encode_image(images)`, `encode_regions(images)`) in one pass."""
        images = inputs.marked(images, normalized)
        if inputs.is_one_image(images):
            batch = self.encode_image_and_regions(inputs.one_image(images))
            return jax.tree.map(lambda x: x[0], batch)
        self.need_regions("regions")
        image, region, boxes = self._encode(images)
        return image, schema.Regions(boxes, region)

    def encode_tokens(self, images: OneOrMany, *, normalized: bool = False) -> Tokens:
        """A batch of images -> their tokens, which `encode_boxes` takes in their place."""
        self._need_box_head()
        return self.image_tokens(inputs.marked(images, normalized))

    def image_tokens(self, images: OneOrMany, method: str = "image_tokens") -> Tokens:
        """A batch of images -> their tokens, by `image_tokens` or `image_values` of `models.grain.GRAIN`."""
        return Tokens(self._all(jitted.program(self.model, self.dtype, method), images))

    @overload
    def encode_boxes(self, images: OneImage, boxes_xyxy: Boxes) -> np.ndarray: ...  # pyright: ignore[reportOverlappingOverload]

    @overload
    def encode_boxes(self, images: np.ndarray, boxes_xyxy: Boxes) -> Any: ...

    @overload
    def encode_boxes(self, images: Images | Tokens, boxes_xyxy: Boxes) -> list[np.ndarray]: ...

    def encode_boxes(self, images: OneOrMany | Tokens, boxes_xyxy: Boxes) -> Any:
        """The embeddings of given boxes by the box head: for each image float32 [n, D], unit length.

        Args:
          images: as for `encode_image`, or the result of `encode_tokens`.
          boxes_xyxy: for each image its boxes [n, 4], n = 0, 1, 2, ..., corners in [0, 1] of the image; they may reach
            over its edge.

        Returns:
          A list; for one image and its boxes [n, D].
        """
        if inputs.is_one_image(images):
            return self.encode_boxes(inputs.one_image(images), [boxes_xyxy])[0]
        method = "box_embeddings" if isinstance(images, Tokens) else "encode_boxes"
        return self._with_boxes(method, images, boxes_xyxy)[1]

    def encode_image_and_boxes(self, images: OneOrMany, boxes_xyxy: Boxes) -> tuple[np.ndarray, Any]:
        """(`encode_image(images)`, `encode_boxes(images, boxes_xyxy)`) in one pass."""
        if inputs.is_one_image(images):
            image, boxes = self.encode_image_and_boxes(inputs.one_image(images), [boxes_xyxy])
            return image[0], boxes[0]
        return self._with_boxes("encode_image_and_boxes", images, boxes_xyxy)

    def _with_boxes(
        self, method: str, images: OneOrMany | Tokens, boxes_xyxy: Boxes
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """(embeddings of the images, [0, D] if the method returns none; per image the embeddings of its boxes [n, D])."""
        self._need_box_head()
        program = jitted.program(self.model, self.dtype, method)
        boxes = inputs.checked_boxes(boxes_xyxy)
        whole, parts = [np.zeros((0, self.model.embed_dim), np.float32)], []
        for batch in self._batches(images):
            of_batch = boxes[len(parts) : len(parts) + len(batch)]
            of_batch += [np.zeros((0, 4), np.float32)] * (len(batch) - len(of_batch))
            # A power of two of boxes per image, so that few programs are compiled.
            most = 1 << (max(map(len, of_batch)) - 1).bit_length()
            padded = np.stack([np.pad(x, ((0, most - len(x)), (0, 0))) for x in of_batch])
            results = self._run(program, batch, padded)
            *image, embeds = results if isinstance(results, tuple) else (results,)
            whole += [embed.astype(np.float32) for embed in image]
            parts += [embed[: len(x)].astype(np.float32) for embed, x in zip(embeds, of_batch)]
        if len(parts) != len(boxes):
            raise InputError(
                f"boxes_xyxy: got boxes of {len(boxes)} images, expected of {len(parts)}, as many as images"
            )
        return np.concatenate(whole), parts

    def encode_patches(self, images: OneOrMany | Tokens, sides: Sequence[int] = (1,)) -> np.ndarray:
        """Images -> an embedding of each patch, float32 [B, h, w, D], unit length; one image -> [h, w, D].

        With a box head a patch is a box, or the mean of boxes around it that are `sides` patches wide. A model of two
        towers pools each patch alone, as MaskCLIP does (Zhou et al. 2022).
        """
        if inputs.is_one_image(images):
            return self.encode_patches(inputs.one_image(images), sides)[0]
        grid = self.grid
        if self.has_box_head:
            tokens = images if isinstance(images, Tokens) else self.encode_tokens(images)
            boxes = [_boxes_around(grid, sides)] * len(tokens.values)
            patches = np.array([_means(x, sides) for x in self.encode_boxes(tokens, boxes)])
        elif not self.model.tower_pools:
            raise InputError(
                "patches: got a model with a decoder and no box head, expected a box head; similarity_maps asks the"
                " regions"
            )
        else:
            method = "patch_embeddings" if isinstance(images, Tokens) else "encode_patches"
            patches = self._all(jitted.program(self.model, self.dtype, method), images)
        return patches.astype(np.float32).reshape(-1, grid, grid, self.model.embed_dim)

    def tokenizer(self, texts: str | Iterable[str]) -> np.ndarray:
        """Texts -> token ids int32 [N, L], padded, as `encode_text` takes them; one text -> [L]."""
        if isinstance(texts, str):
            return self.tokenizer([texts])[0]
        tokens, ends = self._tokens(list(texts))
        tower = self.model.text
        if tower.seeks_end and (tower.ends(tokens) != ends).any():
            expected = "the highest id" if tower.end_id is None else f"the id {tower.end_id}"
            raise InputError(
                f"tokenizer: got texts of {tower.tokenizer} that do not end with {expected}, by which encode_text finds"
                " the end; give encode_text the texts"
            )
        return tokens

    def encode_text(self, texts: Texts) -> np.ndarray:
        """Texts -> float32 [N, D], unit length; one text -> [D].

        Args:
          texts: strings, also from a generator, or int32 token ids [N, L] (`tokenizer`); or one string, or ids [L]. The
            highest id of a row ends its text, as in CLIP. Shorter rows are padded for a tower that sees its padding
            (SigLIP).
        """
        if inputs.is_one_text(texts):
            return self.encode_text(inputs.one_text(texts))[0]
        tokens, ends = self._tokens(texts)
        program = jitted.text_program(self.model, self.dtype)
        # One program for most calls; more of them, with less padding, for many texts.
        lengths, kinds = _ROW_LENGTHS[1:], (_FEW,)
        if len(tokens) > 16 * MAX_BATCH:
            lengths, kinds = _ROW_LENGTHS, (MAX_BATCH, _FEW)
        out = np.empty((len(tokens), self.model.embed_dim), np.float32)
        order = np.argsort(ends, kind="stable")  # batches of short texts have short rows
        most = MAX_BATCH * len(self._devices)
        for first in range(0, len(tokens), most):
            rows = order[first : first + most]
            length = tokens.shape[1]
            if self.model.text.packable:  # tokens after the end token have no effect
                longest = int(ends[rows[-1]]) + 1
                length = next((n for n in lengths if longest <= n), length)
            positions = ends[rows].astype(np.int32)
            out[rows] = self._run(program, tokens[rows, :length], positions, kinds=kinds)
        return out

    def _tokens(self, texts: Any) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32 [N, L] and the positions [N] at which the texts end."""
        tower = self.model.text
        vocabulary, context = tower.vocab_size, tower.context_length
        if not hasattr(texts, "dtype"):
            texts = list(texts)
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            if not texts:
                return np.zeros((0, context), np.int32), np.zeros(0, np.int32)
            ids, lengths, *_ = inputs.tokenizer_of(tower, self.folder).encode(texts, context)
            tokens = np.full((len(texts), context), tower.pad_id, np.int32)
            tokens[np.arange(context) < lengths[:, None]] = ids
            return tokens, lengths - 1
        tokens = np.asarray(texts)
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or not 1 <= tokens.shape[1] <= context:
            raise InputError(
                f"texts: got {inputs.kind_of(tokens)}, expected strings or int32 token ids [N, at most {context}]"
            )
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocabulary:
            raise InputError(
                f"texts: got token ids {tokens.min()} to {tokens.max()}, expected 0 to {vocabulary - 1}"
            )
        tokens = tokens.astype(np.int32)
        if tower.seeks_end and tower.end_id is not None and (tokens != tower.end_id).all(1).any():
            raise InputError(
                f"texts: got token ids without {tower.end_id}, the end of a text (model.text.end_id)"
            )
        ends = tower.ends(tokens)
        if not tower.packable:
            missing = ((0, 0), (0, context - tokens.shape[1]))
            tokens = np.pad(tokens, missing, constant_values=tower.pad_id)
        return tokens, ends

    def _encode(self, images: Any, by_box_head: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Images -> float32 (image [B, D], regions [B, Q, D], boxes_xyxy [B, Q, 4]), as jitted.image_program."""
        of_tokens = isinstance(images, Tokens)
        program = jitted.image_program(self.model, self.dtype, of_tokens, by_box_head)
        results = self._all(program, images)
        return jax.tree.map(lambda x: x.astype(np.float32), results)

    def _all(self, program: Callable[..., Any], images: OneOrMany | Tokens) -> Any:
        """The results of `program` on all images, as numpy."""
        parts = [self._run(program, batch) for batch in self._batches(images)]
        if not parts:  # no image: the shapes alone
            size = self.model.image.image_size
            shape, dtype = (size, size, 3), np.dtype(np.uint8)
            if isinstance(images, Tokens):
                shape, dtype = images.values.shape[1:], images.values.dtype
            shapes = jax.eval_shape(program, self.params, jax.ShapeDtypeStruct((1, *shape), dtype))
            parts = [jax.tree.map(lambda x: np.zeros((0, *x.shape[1:]), x.dtype), shapes)]
        return jax.tree.map(lambda *x: np.concatenate(x), *parts)

    def _batches(self, images: Any) -> Iterator[np.ndarray]:
        """Images, checked, or tokens, at most MAX_BATCH rows per device at a time. Raises InputError."""
        most = MAX_BATCH * len(self._devices)
        images = inputs.checked_images(images, self.model.image.image_size)
        if isinstance(images, (Tokens, Normalized)):
            for first in range(0, len(images[0]), most):
                yield images[0][first : first + most]
            return
        total = len(images) if hasattr(images, "__len__") else None
        counter = progress_lib.Counter("images", total, silent=not self.progress)
        resized = (self.resized(x, i) for i, x in enumerate(images))
        while batch := list(itertools.islice(resized, most)):
            yield np.stack(batch)
            counter.add(len(batch))
        counter.close(stays=True)

    def _run(self, program: Callable[..., Any], *rows: np.ndarray, kinds=(MAX_BATCH, _FEW, 1)) -> Any:
        """The results of `program` on `rows`, arrays of equal length, as numpy.

        Programs have `kinds` of rows per device; the last row is repeated to fill them. Up to MAX_BATCH rows run on one
        device, more on all devices.
        """
        count, params, sharding, devices = len(rows[0]), self.params, None, 1
        if count > MAX_BATCH:
            (params, sharding), devices = self._on_all_devices, len(self._devices)
        results, first = [], 0
        for size in _sizes(-(-count // devices), kinds):
            last = first + size * devices
            padded = [_pad(x[first:last], size * devices) for x in rows]
            with progress_lib.while_compiling(
                "the model for this machine", _COMPILING, silent=jax.process_index() > 0, once=True
            ):  # returns before it is computed
                padded = jax.device_put(padded, sharding) if sharding else padded
                results.append(program(params, *padded))
            first = min(last, count - 1)
        return jax.tree.map(lambda *x: np.concatenate([*map(np.asarray, x)])[:count], *results)

    @functools.cached_property
    def _on_all_devices(self) -> tuple[Any, NamedSharding]:
        """The parameters replicated on every device, and the sharding of a batch."""
        mesh = Mesh(self._devices, ("batch",))
        params = jax.device_put(self.params, NamedSharding(mesh, PartitionSpec()))
        return params, NamedSharding(mesh, PartitionSpec("batch"))


def _sizes(count: int, kinds: Sequence[int]) -> list[int]:
    """The rows of the programs that take `count` rows, of descending `kinds`; no program is filled less than half."""
    sizes = []
    for kind in kinds:
        times, rest = divmod(count, kind)
        if rest > kind // 2 or (rest and kind == kinds[-1]):
            times, rest = times + 1, 0
        sizes += [kind] * times
        count = rest
    return sizes


def _pad(x: np.ndarray, rows: int) -> np.ndarray:
    """`x` with copies of its last row, to that many rows."""
    return np.concatenate([x, np.repeat(x[-1:], rows - len(x), axis=0)])


def _device(name: Any) -> Any:
    """A device, or the one with a name such as "cpu", "gpu" or "gpu:1". Raises InputError."""
    if not isinstance(name, str):
        return name
    platform, _, number = name.partition(":")
    try:
        return jax.local_devices(backend=platform)[int(number or 0)]
    except (RuntimeError, ValueError, IndexError):
        there = ", ".join(f"{x.platform}:{i}" for i, x in enumerate(jax.local_devices()))
        raise InputError(f"device: got {name!r}, expected one of {there}, or cpu") from None


def _boxes_around(grid: int, sides: Sequence[int]) -> np.ndarray:
    """Boxes around each patch of a grid, `sides` patches wide, float32 xyxy [S * grid * grid, 4], cut at the image."""
    if min(sides, default=0) < 1:
        raise InputError(f"sides: got {tuple(sides)}, expected numbers of patches, 1 or more")
    y, x = np.divmod(np.arange(grid * grid), grid)
    middle = np.stack([x, y], axis=1) + 0.5
    half = np.array(sides)[:, None, None] / 2
    corners = np.concatenate([middle - half, middle + half], axis=-1).reshape(-1, 4)
    return np.clip(corners / grid, 0, 1).astype(np.float32)


def _means(embeds: np.ndarray, sides: Sequence[int]) -> np.ndarray:
    """Embeddings of the boxes of each of `sides` [S * P, D] -> their means, [P, D], unit length."""
    total = embeds.astype(np.float32).reshape(len(sides), -1, embeds.shape[-1]).sum(axis=0)
    return total / np.linalg.norm(total, axis=-1, keepdims=True)
