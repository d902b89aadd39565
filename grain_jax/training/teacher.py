"""The teacher of a run: a model without a gradient that the local loss terms compare the trained one with.

`teacher.kind` says which (docs/method.md, Teacher):

    ema         the average of the trained parameters ("all"), or of those of the terms ("heads") beside the towers of
                the step; in `TrainState.teacher` and in every checkpoint
    checkpoint  another model, read by convert/whole.py; in `TrainState.teacher`, and in no checkpoint
    embeddings  vectors that grain-jax embed stored, which the batch holds

A term gets a `Teacher` as `seen.teacher`. What it asks for is computed in the step, for the images of a micro-batch,
sharded as they are.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from grain_jax import config as config_lib
from grain_jax.config import Config
from grain_jax.core import errors, named, schema
from grain_jax.core.schema import Patches
from grain_jax.input_pipeline import tokenizer
from grain_jax.models import grain, placement, towers
from grain_jax.terms import views
from grain_jax.training import optim

TERMS = "terms"  # the top level of the parameter tree below which terms have theirs
# Read models and embeddings; strings, since conversions and the package of data stand above this one.
_MODELS = "grain_jax.convert.whole:describe"
_EMBEDDINGS = "grain_jax.data.embed.stored:describe"
_DIGEST = "grain_jax.data.embed.stored:digest"


class Described(NamedTuple):
    """What is known of a teacher before anything is compiled."""

    model: config_lib.Model | None  # None: of stored embeddings
    embed_dim: int  # Dt
    has_texts: bool
    logit_scale: float | None = None  # of stored embeddings


def path_of(config: Config) -> str:
    """`teacher.path`, which checks.py demands of these kinds."""
    assert config.teacher.path is not None
    return config.teacher.path


def describe(config: Config) -> Described | None:
    """The teacher of a run, or None without one; arrays are read only where no file beside them tells their sizes.

    Raises:
      errors.UserError: `teacher.path` cannot be read.
    """
    kind = config.teacher.kind
    if kind == "none":
        return None
    if kind == "ema":
        return Described(config.model, config.model.embed_dim, True)
    try:
        if kind == "checkpoint":
            return named.find("teacher.kind", _MODELS, {})(path_of(config))
        stored = _settings(path_of(config), tuple(one.name for one in config.input.datasets))
    except errors.UserError as error:
        raise errors.UserError(f"teacher.path: {error}") from None
    return Described(None, stored.embed_dim, stored.texts, stored.logit_scale)


@functools.lru_cache(maxsize=8)
def _settings(path: str, names: tuple[str, ...]) -> Any:
    return named.find("teacher.kind", _EMBEDDINGS, {})(path, names)


def digest_of_embeddings(config: Config) -> str:
    """What tells the stored embeddings from others. Raises UserError."""
    names = [one.name for one in config.input.datasets]
    return named.find("teacher.kind", _DIGEST, {})(path_of(config), names)


def model_of(config: Config) -> config_lib.Model | None:
    """`losses.local.LocalTerm.teacher_model` of a run. Raises as `describe`."""
    found = describe(config)
    return found.model if found else None


def of_batch(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """The fields of the global Batch that a teacher adds, by name."""
    if config.teacher.kind != "embeddings":
        return {}
    found = describe(config)
    assert found is not None
    b, captions, regions = (
        config.batch_size,
        config.input.captions_per_image,
        config.input.max_regions,
    )
    of = lambda *shape: jax.ShapeDtypeStruct((*shape, found.embed_dim), jnp.float32)
    fields = {"teacher_image": of(b)}
    if found.has_texts:
        fields |= {"teacher_captions": of(b, captions), "teacher_descriptions": of(b, regions)}
    return fields


def initial(config: Config, params: Any) -> Any:
    """`TrainState.teacher` of step 0, boxed as `params` are; of a checkpoint zeros, which `convert.whole.place` fills.

    Args:
      config: of the run.
      params: all parameters of the run, boxed with their logical axes.
    """
    kind = config.teacher.kind
    if kind == "ema":
        return jax.tree.map(jnp.copy, _averaged(config, params))
    if kind != "checkpoint":
        return {}
    model = model_of(config)
    assert model is not None
    boxed = jax.eval_shape(lambda: grain.init(_module(config, model), jax.random.key(0)))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), boxed)


def _module(config: Config, model: config_lib.Model) -> grain.GRAIN:
    """The module of a teacher; the run says how attention is computed, and in which type."""
    of_run = dict(attention=config.model.attention, mlp=config.model.mlp)
    return grain.GRAIN(dataclasses.replace(model, **of_run), config.dtype)


def _averaged(config: Config, params: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of the parameters that `teacher.part` averages."""
    if config.teacher.part == "all":
        return params
    return {name: tree for name, tree in params.items() if name == TERMS}


def decay_at(config: config_lib.Teacher, step: Any, total_steps: int) -> jax.Array:
    """The decay after a step, float32 []: `decay` after the first, `end_decay` after the last, on a cosine between.

    Source: BYOL (Grill et al. 2020, arXiv 2006.07733), 3.2.

    Args:
      config: `teacher`.
      step: int [], from 0.
      total_steps: length of the run.
    """
    share = jnp.clip(step / max(total_steps - 1, 1), 0, 1)
    return config.end_decay - (config.end_decay - config.decay) * (1 + jnp.cos(jnp.pi * share)) / 2


def updated(config: Config, average: Any, params: Any, step: Any, total_steps: int) -> Any:
    """`TrainState.teacher` after a step; frozen parameters keep their bits.

    Args:
      config: of the run.
      average: `TrainState.teacher`.
      params: all parameters after the step.
      step: int [], of the step, from 0.
      total_steps: length of the run.
    """
    if config.teacher.kind != "ema":
        return average
    decay = decay_at(config.teacher, step, total_steps)
    return optim.average(_averaged(config, params), average, decay, config.frozen)


def line(config: Config, state: Any) -> str:
    """A line about the teacher for the log; "" without one.

    Args:
      config: of the run.
      state: `TrainState.teacher`.
    """
    found = describe(config)
    if found is None:
        return ""
    millions = f"{sum(x.size for x in jax.tree.leaves(state)) / 1e6:.1f}M parameters"
    teacher = config.teacher
    if teacher.kind == "ema":
        what = {"all": "all parameters", "heads": "the parameters of the terms"}[teacher.part]
        return f"teacher: the average of {what} ({millions}), decay {teacher.decay:g} to {teacher.end_decay:g}"
    if teacher.kind == "embeddings":
        texts = "images and texts" if found.has_texts else "images, without texts"
        return f"teacher: stored embeddings of {teacher.path}, D {found.embed_dim}, of {texts}"
    assert found.model is not None
    size = f"of {found.model.image.image_size} px"
    if config.input.sequence_lengths:
        size = "in the run's own shapes"
    fault = _text_fault(config, found)
    texts = f"no texts ({fault})" if fault else "texts"
    return f"teacher: {teacher.path}, {millions}, images {size}, D {found.embed_dim}, {texts}"


def _text_fault(config: Config, found: Described) -> str:
    """Why the texts of a batch are none for the teacher's text tower, or ""."""
    if not found.has_texts:
        return f"{config.teacher.path} has no text tower"
    assert found.model is not None
    own, run = found.model.text, config.model.text
    for key in ("vocab_size", "context_length", "cleaning"):
        if getattr(own, key) != getattr(run, key):
            return f"its model.text.{key} is {getattr(own, key)}, the run's {getattr(run, key)}"
    if _words(own) != _words(run):
        return f"its tokenizer {own.tokenizer} is not the run's {run.tokenizer}"
    if config.text.packing and not own.packable:
        return "its text tower sees the padding of a row; set text.packing=False"
    if config.row_length != own.context_length and not own.packable:
        return "its text tower sees the padding, of rows as long as its context; set input.text_length=0"
    return ""


def shape_fault(config: Config) -> str:
    """Why the teacher takes no images in the run's own shapes, or ""; raises as `describe`."""
    if config.teacher.kind != "checkpoint":
        return ""
    model = model_of(config)
    assert model is not None
    own, run = model.image, config.model.image
    if own.patch_size != run.patch_size:
        return (
            f"teacher.path: {config.teacher.path} has model.image.patch_size = {own.patch_size}, the run {run.patch_size};"
            " expected the same, as images in their own shape come cut into patches, or input.sequence_lengths=()"
        )
    if not towers.image_tower(own).any_grid:
        return (
            f"teacher.path: {config.teacher.path} has the image tower {own.tower}, which takes squares alone; expected a"
            " tower with any_grid = True, or input.sequence_lengths=()"
        )
    return ""


@functools.lru_cache(maxsize=8)
def _words(tower: config_lib.TextTower) -> bytes | str:
    """What tells the tokenizer of a tower from others: the content of its file where it is there."""
    path = epath.Path(tower.tokenizer)
    if tower.tokenizer == "clip" or not path.exists():
        return tower.tokenizer
    return tokenizer.content_of(path)


def of_step(config: Config, state: Any, params: Any, batch: schema.Batch) -> "Teacher | None":
    """The teacher of a forward pass, or None without one; arguments as of `Teacher`."""
    found = describe(config)
    return found and Teacher(config, found, state, params, batch)


class Teacher:
    """What a local term sees of the teacher for the images of a micro-batch; nothing of it has a gradient.

    It lives as long as the trace of a forward pass, in which each of its embeddings is computed once, when it is asked for.

    Args:
      config: of the run.
      found: `describe(config)`.
      state: `TrainState.teacher`.
      params: all parameters of the student.
      batch: of the images.

    Attributes:
      kind: `teacher.kind`.
      config: its model; None: of stored embeddings.
      leading: tokens of `tokens` that stand for no place in the image.
      params_of_term: of ema, its own parameters of the term that looks at it; {} while those are made, else None.
    """

    def __init__(
        self, config: Config, found: Described, state: Any, params: Any, batch: schema.Batch
    ):
        self._run, self._found, self._batch = config, found, batch
        self._made: dict[str, Any] = {}  # shared by the terms
        self.kind, self.config = config.teacher.kind, found.model
        self.leading, self.params_of_term = 0, None
        self._params: Any = {}
        stop = lambda tree: jax.tree.map(jax.lax.stop_gradient, tree)
        self._of_terms = stop(state.get(TERMS, {})) if self.kind == "ema" else {}
        if self.config is not None:
            of_student = self.kind == "ema" and config.teacher.part == "heads"
            towers_of = params if of_student else state
            self._params = stop({name: x for name, x in towers_of.items() if name != TERMS})
            self._model = _module(config, self.config)
            tower = towers.image_tower(self.config.image)
            self.leading = tower.leading_tokens(self.config.image)

    def of_term(self, name: str) -> "Teacher":
        """The same teacher, as the term of that name sees it; what is computed is shared."""
        found = copy.copy(self)
        found.params_of_term = self._of_terms.get(name, {}) if self.kind == "ema" else None
        return found

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    @property
    def image_embed(self) -> jax.Array:
        """Embeddings of the images of the batch, float32 [B, Dt], unit length."""
        return self._once("images", self._images)

    def _images(self) -> jax.Array:
        if self.config is None:
            return self._batch.teacher_image
        image = self._batch.image
        if not isinstance(image, Patches) and image.shape[1] == self.config.image.image_size:
            return self._apply("encode_image", image)[0]
        return self.embed(views.as_floats(image))

    @property
    def text_embed(self) -> jax.Array:
        """Embeddings of the captions, float32 [B, C, Dt]. Raises UserError where their tokens are not the teacher's."""
        return self._once("texts", self._texts)[0]

    @property
    def region_text_embed(self) -> jax.Array | None:
        """Embeddings of the descriptions, float32 [B, R, Dt]; None of a run without regions. Raises as `text_embed`."""
        return self._once("texts", self._texts)[1] if self._run.input.max_regions else None

    @property
    def logit_scale(self) -> jax.Array:
        """The factor of the cosines in the teacher's own loss, float32 []. Raises UserError: it is not stored."""
        if self.config is not None:
            return jnp.exp(self._params["logit_scale"])
        if self._found.logit_scale is None:
            raise errors.UserError(
                f"teacher.path: {self._run.teacher.path} has no logit scale; embed again with this version of grain-jax"
            )
        return jnp.float32(self._found.logit_scale)

    def tokens(self, image01: jax.Array | Patches) -> jax.Array:
        """Tokens [n, N, Et] of images float32 [n, S, S, 3] in [0, 1], resized to the teacher's size; or of Patches.

        Raises:
          UserError: there is no model, or it takes no Patches of this size.
        """
        return self._apply("image_tokens", self._input(image01))

    def embed(self, image01: jax.Array | Patches) -> jax.Array:
        """Embeddings float32 [n, Dt] of images, unit length; as `tokens`."""
        return self._apply("encode_image", self._input(image01))[0]

    def _input(self, image01: Any) -> Any:
        """Images in [0, 1], or Patches, as the image tower takes them."""
        if self.config is None:
            raise errors.UserError(
                "teacher.kind: got embeddings, which are stored of whole images and texts, where a term of loss.terms asks"
                " for other images; expected checkpoint or ema"
            )
        tower = self.config.image
        if isinstance(image01, Patches):
            if fault := shape_fault(self._run):
                raise errors.UserError(fault)
            return views.normalised(image01, tower)
        if image01.shape[1:3] != (tower.image_size,) * 2:
            shape = (len(image01), tower.image_size, tower.image_size, 3)
            # Bilinear; an image that shrinks is antialiased.
            image01 = placement.by_batch(jax.image.resize(image01, shape, "bilinear"))
        return views.normalised(image01, tower)

    def _apply(self, method: str, *args: Any) -> Any:
        found = self._model.apply({"params": self._params}, *args, method=method)
        return jax.tree.map(jax.lax.stop_gradient, found)

    def _texts(self) -> tuple[jax.Array, jax.Array]:
        """Embeddings of captions and descriptions."""
        batch, path = self._batch, self._run.teacher.path
        if self.config is None:
            if batch.teacher_captions is None:
                raise errors.UserError(
                    f"teacher.path: {path} has no embeddings of texts, which a term of loss.terms reads; expected those of"
                    " grain-jax embed --texts"
                )
            return batch.teacher_captions, batch.teacher_descriptions
        if fault := self.kind == "checkpoint" and _text_fault(self._run, self._found):
            raise errors.UserError(
                f"teacher.path: {path} cannot read the texts of the run, which a term of loss.terms compares: {fault};"
                " expected a teacher with the run's text keys, or stored embeddings (grain-jax embed --texts)"
            )
        rows = batch.text_tokens, batch.text_positions, batch.text_segments
        b, captions, _ = batch.caption_at.shape
        at = batch.caption_at.reshape(b * captions, 2), batch.description_at
        of_captions, descriptions = self._apply("encode_text", *rows, *at)
        return of_captions.reshape(b, captions, -1), descriptions
