"""Using a trained model: `grain_jax.load(DIR)` returns a `Predictor` that encodes images, texts and regions.

A call takes any number of images or texts, also from a generator, and runs them in batches of a few fixed sizes,
so that few programs are compiled. Of one image or one text it returns what belongs to that one, without the axis of the
batch: `encode_image(image)` is [D], `encode_image([image])` is [1, D]. Predictors with the same model configuration share the programs. Large calls use
all devices of the process. Methods that return or use regions raise InputError if the model has no region queries.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grain_jax import config as config_lib
from grain_jax.checkpoint import saved_model
from grain_jax.core import progress as progress_lib
from grain_jax.core import schema
from grain_jax.inference import inputs, jitted, prompts, scores
from grain_jax.inference.inputs import InputError, OneOrMany, Tokens
from grain_jax.inference.mapper import Mapper
from grain_jax.models import lora, towers

MAX_BATCH = 64  # images or texts per device and batch; smaller batches are padded to a power of two
_COMPILING = "usually under a minute, on few CPU cores a few; once for each number of rows"
_ROW_LENGTHS = (16, 32, 64)  # token rows are cut to these lengths: most texts are short


class Grounding(NamedTuple):
    """The region of an image that fits a text best."""

    box_xyxy: np.ndarray  # float32 [4] in [0, 1]
    score: float  # cosine of the text and the best region


class ClassFeatures(NamedTuple):
    """Embeddings of classes, computed once for any number of images."""

    names: tuple[str, ...]
    features: np.ndarray  # float32 [C, D], means of unit-length text embeddings; not of unit length
    # Per class float32 [n_c, D], unit length; None: no descriptions.
    descriptions: tuple[np.ndarray, ...] | None


def load(
    path: epath.PathLike,
    dtype: str = "float32",
    templates: Sequence[str] | None = None,
    progress: bool = False,
) -> "Predictor":
    """Loads the model of a training workdir (its newest checkpoint), a checkpoint, a converted folder, or a name.

    Args:
      path: the folder, local or remote; or a model that comes with the package ("aviary-tiny"), where no folder has that
        name; or one of the Hugging Face Hub ("hf://ORG/NAME", "hf://ORG/NAME@REVISION"): a folder of `convert to-hf`, or
        any other conversion. No code of the Hub is downloaded.
      dtype, templates, progress: as in `Predictor`.

    Raises:
      checkpoint.CheckpointError: there is no such model, or it is damaged.
      pretrained.hub.HubError: it cannot be downloaded.
      InputError: unknown `dtype`.
    """
    stored = saved_model.load_stored(path)
    return Predictor(stored.model, stored.merged(), dtype, templates, stored.folder, progress)


class Predictor(Mapper):
    """Encodes images and texts; every result is float32 numpy.

    Args:
      model: configuration of the model.
      params: nested dict of arrays. Arrays on a device stay there.
      dtype: of activations, "float32" (at full precision on every device) or "bfloat16".
      templates: prompts with `{}` for the class name; None: those of `inference/templates.txt`.
      folder: folder of the model, where the files of its tokenizer are looked for first.
      progress: whether calls show on stderr how many images they have encoded.

    Raises:
      InputError: unknown `dtype`, or factors of LoRA among the parameters.
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
        # Raises early if a stored config names towers that may not be imported.
        towers.image_tower(model.image)
        towers.text_tower(model.text)
        if lora.left_out(params):
            raise InputError(
                "params: got factors of LoRA, which a Predictor does not apply; expected them folded in, as"
                " grain_jax.load does and grain_jax.models.lora.merged"
            )
        # The programs that the run was told to take are of its training and its devices.
        self.model = model = dataclasses.replace(model, attention="auto", mlp="auto")
        self.dtype = dtype
        self.folder = folder
        self.progress = progress
        self.params = jax.tree.map(jnp.asarray, params)
        # Parameters that the caller has put on a mesh stay on it, and the programs run there.
        places = set().union(*(leaf.devices() for leaf in jax.tree.leaves(self.params)))
        self._devices = jax.local_devices() if places == {jax.local_devices()[0]} else [None]
        self.templates = list(templates) if templates is not None else prompts.load_templates()
        self._encode_images = jitted.image_program(model, dtype)
        self._encode_texts = jitted.text_program(model, dtype)

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
        """The factor of the cosines in the loss (not its logarithm, which `params` hold)."""
        return float(jnp.exp(self.params["logit_scale"]))

    @property
    def logit_bias(self) -> float | None:
        """What a sigmoid model adds to the scaled cosines; None for others."""
        return float(self.params["logit_bias"]) if "logit_bias" in self.params else None

    def preprocess(self, image: PIL.Image.Image | np.ndarray) -> np.ndarray:
        """A PIL image or uint8 [H, W, 3] -> float32 [S, S, 3], resized and normalised, as `encode_image` takes it.

        Raises:
          InputError: another kind of image, or one that cannot be read.
        """
        return inputs.normalised(self.resized(image), self.model.image)

    def resized(self, image: PIL.Image.Image | np.ndarray, index: int = 0) -> np.ndarray:
        """As `preprocess`, not normalised: uint8 [S, S, 3]; an error names the `index`."""
        return inputs.resize(index, image, self.model.image.image_size)

    def tokenizer(self, texts: str | Iterable[str]) -> np.ndarray:
        """Texts -> token ids int32 [N, L], padded, as `encode_text` takes them; one text -> [L].

        Raises:
          TokenizerError: the tokenizer of the model cannot be read.
          InputError: its ids do not show where a text ends: another one than the end has the highest id.
        """
        if isinstance(texts, str):
            return self.tokenizer([texts])[0]
        tokens, ends = self._tokens(list(texts))
        tower = self.model.text
        if tower.seeks_end and (tower.ends(tokens) != ends).any():
            which = "the highest id" if tower.end_id is None else f"the id {tower.end_id}"
            raise InputError(
                f"tokenizer: of {tower.tokenizer} the end of a text has not {which}, by which encode_text finds it;"
                " give encode_text the texts"
            )
        return tokens

    def encode_image(self, images: OneOrMany) -> np.ndarray:
        """Images -> float32 [B, D], unit length; one image -> [D].

        Args:
          images: PIL images of any mode, uint8 [H, W, 3] of any size or float32 [S, S, 3] of the model's size, already
            normalised (`preprocess`), as a list, a generator or anything else to iterate over; uint8 [B, H, W, 3] or
            float32 [B, S, S, 3]; or one image. What is not normalised is resized to the model's size. PIL
            images are turned by their EXIF orientation, as a viewer shows them; `np.asarray(image)` takes the pixels as
            they are.

        Raises:
          InputError: images of another kind or shape, or one that cannot be read.
        """
        if inputs.is_one_image(images):
            return self.encode_image(inputs.one_image(images))[0]
        return self._encode(images)[0]

    def encode_regions(self, images: OneOrMany | Tokens) -> schema.Regions:
        """Images, as for `encode_boxes` -> boxes_xyxy [B, Q, 4] in [0, 1] and embed [B, Q, D].

        One image -> [Q, 4] and [Q, D].

        Raises:
          InputError: as `encode_image`, or the model has no region queries.
        """
        return self.encode_image_and_regions(images)[1]

    def encode_image_and_regions(
        self, images: OneOrMany | Tokens
    ) -> tuple[np.ndarray, schema.Regions]:
        """(`encode_image(images)`, `encode_regions(images)`) in one pass; raises as `encode_regions`."""
        if inputs.is_one_image(images):
            batch = self.encode_image_and_regions(inputs.one_image(images))
            return jax.tree.map(lambda x: x[0], batch)
        self._need_regions("regions")
        image, region, boxes = self._encode(images)
        return image, schema.Regions(boxes, region)

    @property
    def has_regions(self) -> bool:
        """Whether the model has queries that find regions."""
        return self.model.decoder is not None and self.model.decoder.queries > 0

    def _need_regions(self, what: str) -> None:
        decoder = self.model.decoder
        if not self.has_regions:
            has = "two towers and no region decoder (model.decoder is null)"
            if decoder is not None:
                has = "no region queries (model.decoder.queries is 0)"
            raise InputError(
                f"{what}: the model has {has}, expected one that finds regions; use encode_image,"
                " encode_text, or classify with alpha 1"
            )

    def encode_tokens(self, images: OneOrMany) -> Tokens:
        """A batch of images, as for `encode_image` -> their tokens, which `encode_boxes` takes in their place.

        Raises:
          InputError: as `encode_image`; the model has no box head.
        """
        self._need_box_head()
        return self._tokens_of(images)

    def _tokens_of(self, images: OneOrMany, method: str = "image_tokens") -> Tokens:
        return self._all(jitted.tokens_program(self.model, self.dtype, method), images)

    def _need_box_head(self) -> None:
        if self.model.boxes.kind == "none":
            raise InputError(
                "boxes: the model has no box head (model.boxes.kind is none), expected one that was trained with"
                " loss.box_description; encode_regions finds boxes itself"
            )

    def encode_boxes(
        self, images: OneOrMany | Tokens, boxes_xyxy: Iterable[Any] | np.ndarray
    ) -> Any:
        """The embeddings of given boxes, by the box head.

        Args:
          images: as for `encode_image`, or the result of `encode_tokens`.
          boxes_xyxy: for each image its boxes [n, 4], n = 0, 1, 2, ..., corners in [0, 1] of the image; they may reach
            over its edge. For one image its boxes alone.

        Returns:
          A list: for each image float32 [n, D], unit length. For one image [n, D] alone.

        Raises:
          InputError: as `encode_image`; the model has no box head; boxes of another shape, or not of as many images.
        """
        if inputs.is_one_image(images):
            return self.encode_boxes(inputs.one_image(images), [boxes_xyxy])[0]
        method = "box_embeddings" if isinstance(images, Tokens) else "encode_boxes"
        program = jitted.program(self.model, self.dtype, method)
        return self._run_with_boxes(program, images, boxes_xyxy)[1]

    def encode_image_and_boxes(
        self, images: OneOrMany, boxes_xyxy: Iterable[Any] | np.ndarray
    ) -> tuple[np.ndarray, Any]:
        """(`encode_image(images)`, `encode_boxes(images, boxes_xyxy)`) in one pass; raises as `encode_boxes`."""
        if inputs.is_one_image(images):
            image, boxes = self.encode_image_and_boxes(inputs.one_image(images), [boxes_xyxy])
            return image[0], boxes[0]
        program = jitted.program(self.model, self.dtype, "encode_image_and_boxes")
        return self._run_with_boxes(program, images, boxes_xyxy)

    def _run_with_boxes(
        self, program: Callable[..., Any], images: OneOrMany | Tokens, boxes_xyxy: Iterable[Any]
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """(embeddings of the images, [0, D] where `program` returns none; for each image those of its boxes [n, D])."""
        self._need_box_head()
        boxes = inputs.boxes_of_images(boxes_xyxy)
        whole, parts = [np.zeros((0, self.model.embed_dim), np.float32)], []
        for part in self._rows(images):
            count = _count(part)
            own = boxes[len(parts) : len(parts) + count]
            own += [np.zeros((0, 4), np.float32)] * (count - len(own))
            # A power of two of boxes an image, so that few programs are compiled.
            most = 1 << (max(map(len, own)) - 1).bit_length()
            padded = np.stack([np.pad(x, ((0, most - len(x)), (0, 0))) for x in own])
            found = self._run(program, part, padded)
            *image, embeds = found if isinstance(found, tuple) else (found,)
            whole += [embed.astype(np.float32) for embed in image]
            parts += [embed[: len(x)].astype(np.float32) for embed, x in zip(embeds, own)]
        if len(parts) != len(boxes):
            raise InputError(
                f"boxes_xyxy: got boxes of {len(boxes)} images, expected of {len(parts)}, as many as images"
            )
        return np.concatenate(whole), parts

    def classify_boxes(
        self,
        images: OneOrMany | Tokens,
        boxes_xyxy: Iterable[Any] | np.ndarray,
        classes: Iterable[str] | Mapping[str, Sequence[str]] | ClassFeatures,
    ) -> Any:
        """For each image the cosine scores of every class for each of its boxes, float32 [n, C]; for one [n, C] alone.

        Args:
          images, boxes_xyxy: as for `encode_boxes`.
          classes: as for `classify`.

        Raises:
          InputError: as `encode_boxes` and `class_features`.
        """
        if inputs.is_one_image(images):
            return self.classify_boxes(inputs.one_image(images), [boxes_xyxy], classes)[0]
        if not isinstance(classes, ClassFeatures):
            classes = self.class_features(classes)
        embeds = self.encode_boxes(images, boxes_xyxy)
        return [scores.global_scores(embed, classes.features) for embed in embeds]

    def _encode(self, images: OneOrMany | Tokens) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Images -> float32 (image [B, D], regions [B, Q, D], boxes_xyxy [B, Q, 4])."""
        program = self._encode_images
        if isinstance(images, Tokens):
            program = jitted.image_program(self.model, self.dtype, of_tokens=True)
        return jax.tree.map(lambda x: x.astype(np.float32), self._all(program, images))

    def _all(self, program: Callable[..., Any], images: OneOrMany | Tokens) -> Any:
        """The results of `program` on all images, as numpy."""
        parts = [self._run(program, part) for part in self._rows(images)]
        if not parts:  # of no image, the shapes
            size = self.model.image.image_size
            none: Any = np.zeros((0, size, size, 3), np.uint8)
            if isinstance(images, Tokens):
                none = images
            one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), none)
            shapes = jax.eval_shape(program, self.params, one)
            parts = [jax.tree.map(lambda x: np.zeros((0, *x.shape[1:]), x.dtype), shapes)]
        return jax.tree.map(lambda *x: np.concatenate(x), *parts)

    def _rows(self, images: OneOrMany | Tokens) -> Iterator[Any]:
        """Images, checked, an array, or Tokens, at most MAX_BATCH rows per device. Raises InputError."""
        tower, most = self.model.image, MAX_BATCH * len(self._devices)
        if isinstance(images, Tokens):
            for first in range(0, len(images.values), most):
                yield _part(images, first, most)
            return
        images = inputs.checked_images(images, tower.image_size)
        total = len(images) if isinstance(images, Sized) else None
        counter = progress_lib.Counter("images", total, silent=not self.progress)
        resized = (self.resized(x, i) for i, x in enumerate(images))
        while part := list(itertools.islice(resized, most)):
            yield inputs.together(part, tower)
            counter.add(len(part))
        counter.close(stays=True)

    def _run(self, program: Callable[..., Any], *rows: Any) -> Any:
        """The results of `program` on `rows` (arrays, or trees of them, of equal length), as numpy.

        The rows are padded to a power of two per device, so that few programs are compiled. Up to MAX_BATCH rows
        run on one device, more on all devices.
        """
        count = _count(rows)
        if count > MAX_BATCH:
            params, sharding = self._on_all_devices
            wide = jax.tree.map(lambda x: _pad(x, len(self._devices)), rows)
            padded = jax.device_put(wide, sharding)
        else:
            params, padded = self.params, jax.tree.map(_pad, rows)
        with progress_lib.while_compiling(
            f"{program.__name__} for {_count(padded)} rows",
            _COMPILING,
            silent=jax.process_index() > 0,
        ):
            results = program(params, *padded)  # returns before it is computed
        return jax.tree.map(lambda x: np.asarray(x)[:count], results)

    @functools.cached_property
    def _on_all_devices(self) -> tuple[Any, NamedSharding]:
        """The parameters replicated on every device, and the sharding of a batch."""
        mesh = Mesh(self._devices, ("batch",))
        params = jax.device_put(self.params, NamedSharding(mesh, PartitionSpec()))
        return params, NamedSharding(mesh, PartitionSpec("batch"))

    def encode_text(self, texts: str | Iterable[str] | np.ndarray) -> np.ndarray:
        """Texts -> float32 [N, D], unit length; one text -> [D].

        Args:
          texts: strings, also from a generator, or int32 token ids [N, L] (`tokenizer`); or one string, or ids [L]. The
            highest id of a row ends its text, as in CLIP; for a tower that sees its padding (SigLIP), shorter rows are
            padded.

        Raises:
          InputError: texts of another kind, or ids that the tower has no embedding of.
          TokenizerError: the tokenizer of the model cannot be read.
        """
        if inputs.is_one_text(texts):
            return self.encode_text(inputs.one_text(texts))[0]
        tokens, ends = self._tokens(texts)
        out = np.empty((len(tokens), self.model.embed_dim), np.float32)
        order = np.argsort(ends, kind="stable")  # batches of short texts have short rows
        most = MAX_BATCH * len(self._devices)
        for first in range(0, len(tokens), most):
            rows = order[first : first + most]
            length = tokens.shape[1]
            if self.model.text.packable:  # tokens after the end token have no effect
                longest = int(ends[rows[-1]]) + 1
                length = next((n for n in _ROW_LENGTHS if longest <= n), length)
            part = tokens[rows, :length]
            out[rows] = self._run(self._encode_texts, part, ends[rows].astype(np.int32))
        return out

    def class_features(self, classes: Iterable[str] | Mapping[str, Sequence[str]]) -> ClassFeatures:
        """Embeds classes: names in prompts, or names with descriptions (docs/method.md, Zero-shot evaluation).

        Args:
          classes: names, or {name: [description, ...]}.

        Raises:
          InputError: no class, a value of another type, or an empty list of descriptions.
        """
        pairs = inputs.class_pairs(classes)
        texts = [prompts.class_texts(name, self.templates, own) for name, own in pairs]
        described = [list(own) for _, own in pairs if own is not None]
        return ClassFeatures(
            tuple(name for name, _ in pairs),
            scores.class_features(prompts.encode_lists(self.encode_text, texts)),
            tuple(prompts.encode_lists(self.encode_text, described)) if described else None,
        )

    def classify(
        self,
        images: OneOrMany,
        classes: Iterable[str] | Mapping[str, Sequence[str]] | ClassFeatures,
        alpha: float = 1.0,
    ) -> np.ndarray:
        """Scores of every class, float32 [B, C]: alpha * global + (1 - alpha) * region cosines; of one image [C].

        Args:
          images: as for `encode_image`.
          classes: names, {name: [description, ...]}, or the result of `class_features`.
          alpha: share of the global score; values below 1 need descriptions.

        Raises:
          InputError: images, classes or `alpha` cannot be used, or regions are needed and the model has none.
        """
        if inputs.is_one_image(images):
            return self.classify(inputs.one_image(images), classes, alpha)[0]
        if not 0.0 <= alpha <= 1.0:
            raise InputError(f"alpha: got {alpha}, expected a number from 0 to 1")
        if alpha < 1.0:
            self._need_regions(f"alpha {alpha}")
        if not isinstance(classes, ClassFeatures):
            classes = self.class_features(classes)
        if alpha < 1.0 and classes.descriptions is None:
            raise InputError(
                f"alpha {alpha} needs descriptions of the classes: {{name: [description, ...]}}"
            )
        image_embed, region_embed, _ = self._encode(images)
        region = None
        if alpha < 1.0:
            region = scores.region_scores(region_embed, classes.descriptions or ())
        return scores.combine(scores.global_scores(image_embed, classes.features), region, alpha)

    def ground(
        self, image: PIL.Image.Image | np.ndarray, texts: str | Iterable[str] | np.ndarray
    ) -> Any:
        """For each text the box of the region with the largest cosine, and that cosine: a list of `Grounding`, or one.

        Args:
          image: one: PIL, uint8 [H, W, 3], or float32 [H, W, 3] already normalised.
          texts: as for `encode_text`; of one text, one `Grounding` is returned.

        Raises:
          InputError: as `encode_regions` and `encode_text`.
        """
        if inputs.is_one_text(texts):
            return self.ground(image, inputs.one_text(texts))[0]
        self._need_regions("ground")
        images = inputs.one_image(image)
        regions = self.encode_regions(images)
        similarity = self.encode_text(texts) @ regions.embed[0].T  # [N, Q]
        best = similarity.argmax(axis=1)
        return [
            Grounding(regions.boxes_xyxy[0, q], float(row[q])) for row, q in zip(similarity, best)
        ]

    def _tokens(self, texts) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32 [N, L] and the positions [N] at which the texts end."""
        tower = self.model.text
        vocab, context = tower.vocab_size, tower.context_length
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
                f"texts: got {tokens.dtype} {list(tokens.shape)}, expected strings or int32 token ids"
                f" [N, at most {context}]"
            )
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab:
            raise InputError(
                f"texts: got token ids {tokens.min()} to {tokens.max()}, expected 0 to {vocab - 1}"
            )
        tokens = tokens.astype(np.int32)
        ends = tower.ends(tokens)
        if tower.seeks_end and tower.end_id is not None and (tokens != tower.end_id).all(1).any():
            raise InputError(
                f"texts: got token ids without {tower.end_id}, the end of a text (model.text.end_id)"
            )
        if not tower.packable:
            missing = ((0, 0), (0, context - tokens.shape[1]))
            tokens = np.pad(tokens, missing, constant_values=tower.pad_id)
        return tokens, ends


def _part(rows: Any, first: int, count: int) -> Any:
    """Some rows of a tree of arrays."""
    return jax.tree.map(lambda x: x[first : first + count], rows)


def _count(rows: Any) -> int:
    """The rows of arrays, or of a tree of them."""
    return len(jax.tree.leaves(rows)[0])


def _pad(x: np.ndarray, devices: int = 1) -> np.ndarray:
    """`x` padded with copies of its last row, to a power of two of rows per device."""
    wanted = devices << (-(-len(x) // devices) - 1).bit_length()
    return np.concatenate([x, np.repeat(x[-1:], wanted - len(x), axis=0)])
