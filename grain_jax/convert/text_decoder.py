"""A text decoder under the names of the modeling file of to-hf, and what its parity compares."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from grain_jax import config as config_lib
from grain_jax.convert import formats, tables
from grain_jax.convert.faults import raise_any
from grain_jax.convert.tables import Arrays, NamePair
from grain_jax.core import schema
from grain_jax.inference import Predictor, jitted
from grain_jax.inference import text_decoder as searches
from grain_jax.input_pipeline import clip_tokenizer, tokenizer
from grain_jax.models import grain, places, text_decoder
from grain_jax.models.text_decoder import BOX, Rows
from grain_jax.runtime.saved_model import StoredDecoder

NAME = "text_decoder"  # of the decoder in the files of others
_OF_WORDS = ("end_of_text", "special_ids", "words")  # keys beside the sizes in config.json of to-hf
_TABLES = ("token_embed", "head")  # with rows that stand for no token
_LONGEST = 12  # tokens of a sequence of the parity
_LAYER = "blocks.{}."


def _attention(ours: str, theirs: str) -> list[NamePair]:
    qkv = tuple(f"{_LAYER}{theirs}.{x}_proj.{{kind}}" for x in "qkv")
    return formats.attention(f"blocks/{ours}", qkv, f"{_LAYER}{theirs}.out_proj")


_ROWS = [
    NamePair("token_embed", "token_embedding.weight"),
    NamePair("position_embed", "positional_embedding"),
    *(row for i in (1, 2, 3) for row in formats.norm(f"blocks/norm_{i}", f"{_LAYER}norm{i}")),
    *_attention("self_attention", "self_attn"),
    *_attention("cross_attention", "multihead_attn"),
    *formats.linear("blocks/mlp/in", f"{_LAYER}mlp.fc1"),
    *formats.linear("blocks/mlp/out", f"{_LAYER}mlp.fc2"),
    *formats.norm("norm", "norm"),
    NamePair("head", "head.weight"),
]


def module(sizes: config_lib.TextDecoder, model: config_lib.Model) -> text_decoder.TextDecoder:
    """The decoder of these sizes beside a model, in float32."""
    words = text_decoder.vocabulary(sizes, model)
    return text_decoder.TextDecoder(sizes, words, np.dtype("float32"), "xla")


def state(decoder: StoredDecoder, model: config_lib.Model) -> Arrays:
    """The arrays of the modeling file, float32, without the rows of the vocabulary that stand for no token."""
    size = text_decoder.vocabulary(decoder.config, model).size
    flat = {name: np.asarray(x, np.float32) for name, x in grain.flat(decoder.params).items()}
    return tables.write(_ROWS, flat | {name: flat[name][:size] for name in _TABLES})


def read(
    stored: Mapping[str, Any], arrays: Mapping[str, np.ndarray], model: config_lib.Model
) -> StoredDecoder:
    """The inverse of `state`, with zeros in the rows that stand for no token.

    Args:
      stored: the sizes in config.json.
      arrays: of the modeling file.
      model: beside which the decoder stands.

    Raises:
      ConvertError: unknown or missing keys, other shapes, values that are not finite; a line each.
      config.ConfigError: sizes that are no decoder's.
    """
    sizes = {key: value for key, value in stored.items() if key not in _OF_WORDS}
    config = config_lib.text_decoder_from_dict(sizes).beside(model)
    words, expected = text_decoder.vocabulary(config, model), dict(shapes(config, model))
    for name in _TABLES:
        expected[name] = (words.size, *expected[name][1:])
    unknown = sorted(arrays.keys() - tables.used(_ROWS, expected))
    raise_any([f"{name}: unknown key, shape {arrays[name].shape}" for name in unknown])
    found = tables.read(_ROWS, arrays, expected)
    for name in _TABLES:
        found[name] = np.pad(found[name], ((0, words.rows - words.size), (0, 0)))
    return StoredDecoder(config, tables.nested(found))


@functools.lru_cache(maxsize=8)
def shapes(config: config_lib.TextDecoder, model: config_lib.Model) -> Mapping[str, Any]:
    """The name and shape of every parameter; nothing is computed."""
    decoder = module(config, model)
    patches = jnp.zeros((1, 1, model.image.width))
    made = lambda: decoder.init(
        jax.random.key(0), patches, _rows(jnp.zeros((1, 1), jnp.int32)), method="features"
    )["params"]
    return {name: x.shape for name, x in grain.flat(jax.eval_shape(made)).items()}


def _rows(tokens: jax.Array) -> Rows:
    """Rows [B, T] of a sequence each."""
    nothing = jnp.zeros_like(tokens)
    place = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    is_there = jnp.ones((len(tokens), 1), bool)
    return Rows(tokens, place, nothing + 1, nothing, nothing > 0, nothing, is_there)


def stored_sizes(
    decoder: StoredDecoder, model: config_lib.Model, folder: epath.PathLike | None
) -> dict[str, Any]:
    """The sizes as the config.json of to-hf has them, with what the tokenizer says of words.

    Args:
      decoder: whose sizes they are.
      model: beside which the decoder stands.
      folder: where the file of the tokenizer lies; None: there is none.
    """
    text, trailing = model.text, decoder.config.trailing_specials
    end, specials, count = text.pad_id, (), text.vocab_size
    if folder is not None:
        words = tokenizer.of_tower(text, folder)
        specials, count = words.special_ids, words.vocab_size
        if trailing:
            end = int(words.encode(["a"], text.context_length).ids[-trailing])
    elif text.seeks_end:
        end = text.vocab_size - 1 if text.end_id is None else text.end_id
    of_words = {"end_of_text": end, "special_ids": [*specials], "words": count}
    return dataclasses.asdict(decoder.config) | of_words


def _excluded(text: config_lib.TextTower, folder: epath.PathLike | None) -> tuple[int, ...]:
    """The ids that are no words of the tokenizer; () where it is not there."""
    if text.tokenizer == "clip":
        is_there = text.vocab_size == clip_tokenizer.VOCAB_SIZE
    else:
        is_there = tokenizer.own_file(text, folder) is not None
    if not is_there:
        return ()
    return searches.excluded(tokenizer.of_tower(text, folder), text)


def ids_of(decoder: StoredDecoder, model: config_lib.Model) -> dict[str, Any]:
    """What a user of exported files must know of the tokens, by the name of the decoder."""
    words = text_decoder.vocabulary(decoder.config, model)
    tasks = {name: words.task(name) for name in text_decoder.TASKS}
    own = {"end": words.end, **tasks, "first_bin": words.first_bin, "bins": words.bins}
    sizes = decoder.config
    specials = {"leading_specials": sizes.leading_specials}
    specials |= {"trailing_specials": sizes.trailing_specials}
    return {NAME: own | specials | {"positions": sizes.row_length}}


def sequences(
    decoder: StoredDecoder | None, model: config_lib.Model, count: int
) -> np.ndarray | None:
    """What the parity reads: the token of a task, then any, int32 [count, T]; None without a decoder."""
    if decoder is None:
        return None
    words = text_decoder.vocabulary(decoder.config, model)
    length = min(_LONGEST, decoder.config.row_length)
    tokens = np.random.default_rng(0).integers(0, words.size, (count, length))
    tokens[:, 0] = [words.task(text_decoder.TASKS[i % 3]) for i in range(count)]
    return tokens.astype(np.int32)


def logits(
    decoder: StoredDecoder,
    model: config_lib.Model,
    params: Any,
    images: Any,
    tokens: Any,
) -> np.ndarray:
    """What follows each token of a sequence an image, float32 [B, T, vocabulary].

    Args:
      decoder: whose logits they are.
      model: beside which it stands.
      params: of the model.
      images: float32 [B, S, S, 3], normalised, or Patches.
      tokens: int32 [B, T].
    """
    made, size = module(decoder.config, model), text_decoder.vocabulary(decoder.config, model).size

    @jax.jit
    def run(params, patches, tokens):
        with jax.default_matmul_precision("highest"):
            given = patches, _rows(tokens)
            found = made.apply({"params": params}, *given, places=seen, method="features")
            return found @ params["head"][:size].T

    seen = places.of_images(images, model.image.patch_size)
    return np.asarray(run(decoder.params, patches_of(model, params, images), tokens))


def patches_of(
    model: config_lib.Model, params: Any, images: np.ndarray | schema.Patches
) -> jax.Array:
    """What the decoder sees of images, float32 [B, P, E of the image tower]."""
    tokens = jitted.program(model, "float32", "image_tokens")(params, images)
    return tokens[:, grain.leading_tokens(model) :]


def of_model(params: Mapping[str, Any]) -> dict:
    """Of flat parameters those of the model, nested, without those of its text decoder."""
    return tables.nested({x: y for x, y in params.items() if not x.startswith(f"{NAME}/")})


def search(
    predictor: Predictor, task: str
) -> tuple[Callable[..., dict[str, jax.Array]], dict[str, jax.ShapeDtypeStruct]]:
    """A task of the text decoder, by greedy search.

    Args:
      predictor: a model with a text decoder.
      task: a name of TASKS.

    Returns:
      (the function of flat parameters, images uint8 [B, S, S, 3] or Patches and the inputs, its inputs beside those, without the axis
      of images). `caption` and `describe` (boxes_xyxy [4]) give the words as `tokens` int32 [B, n], of which `count` [B] are
      real; `point` (`tokens`: `count` words of a text, without special tokens) gives `box_xyxy` [B, 4]; and each the
      `log_probability` [B], in nats.
    """
    model, decoder = predictor.model, predictor.text_decoder
    assert decoder is not None
    specials = _excluded(model.text, predictor.folder)
    given = searches.Given(decoder.config, model, predictor.dtype, specials)
    longest = searches.limit(None, given, task) - 1  # words, without the end
    spec, inputs = jax.ShapeDtypeStruct, {}
    if task == "describe":
        inputs = {"boxes_xyxy": spec((BOX,), np.float32)}
    if task == "point":
        inputs = {"tokens": spec((longest,), np.int32), "count": spec((), np.int32)}
    steps = BOX if task == "point" else longest + 1
    program = searches.write_program(given, task, 1, steps)
    encode = jitted.program(model, predictor.dtype, "image_tokens")

    def run(params, image, *arrays):
        asked, seen = dict(zip(inputs, arrays)), places.of_images(image, model.image.patch_size)
        shape = (jax.tree.leaves(image)[0].shape[0], 1)
        words = asked.get("tokens", jnp.zeros(shape, jnp.int32))[:, None]
        count = asked.get("count", jnp.zeros(shape[:1], jnp.int32))[:, None]
        boxes = asked.get("boxes_xyxy", jnp.zeros((shape[0], BOX)))[:, None]
        is_there, tokens = jnp.ones(shape, bool), encode(of_model(params), image)
        own = tables.nested(params)[NAME]
        beside = [] if seen is None else [seen]
        found, count, score = program(own, tokens, words, count, is_there, is_there, boxes, *beside)
        if task != "point":
            return {"tokens": found, "count": count, "log_probability": score}
        corners = given.vocabulary.boxes(found).reshape(shape[0], 2, 2)
        box = jnp.concatenate([corners.min(1), corners.max(1)], axis=1)
        return {"box_xyxy": box, "log_probability": score}

    return run, inputs
