"""The text decoder in use: what it writes, by greedy or beam search, and how likely it holds given texts and boxes.

Log-probabilities are sums over the predicted tokens, in nats, of the softmax over the whole vocabulary, as in training.

Beam search keeps the `beams` best beginnings by that sum, without a normalisation by length; a text that has ended keeps
its place. It ends when the best one has ended, as none can overtake it, or at the limit, where texts are cut. Of equal
ones the beam before and the lower token come first. One beam is greedy search. A text has only words of the tokenizer
and the end, a box only location tokens.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grain_jax import config as config_lib
from grain_jax.inference.inputs import InputError, Tokens
from grain_jax.input_pipeline import tokenizer as tokenizer_lib
from grain_jax.losses import vocabulary
from grain_jax.models import text_decoder, towers
from grain_jax.models.text_decoder import BOX

MAX_BEAMS = 64
_LONGEST_ROW = 256  # positions of a row with several sequences of an image
_MOST_SEQUENCES = 32  # of a row
# Positions beside the words: the first token, and location tokens.
BESIDE_WORDS = {"caption": 1, "describe": 1 + BOX, "point": 1 + BOX}


class Written(NamedTuple):
    """A text that the decoder has written."""

    text: str
    log_probability: float  # of the tokens that were written and the end, where it came, in nats
    is_whole: bool = True  # False: cut at the most tokens, before an end


class Pointed(NamedTuple):
    """A box that the decoder has written."""

    box_xyxy: (
        np.ndarray
    )  # float32 [4] in [0, 1]; corners that were written in another order are put in order
    log_probability: float  # of its coordinates, in nats


class Given(NamedTuple):
    """What the programs depend on."""

    sizes: config_lib.TextDecoder  # with a number for each key
    model: config_lib.Model
    dtype: str
    excluded: tuple[int, ...]  # ids of the text tower that are no words of the tokenizer

    @property
    def vocabulary(self) -> text_decoder.Vocabulary:
        """Of the decoder."""
        return text_decoder.vocabulary(self.sizes, self.model)


class Words(NamedTuple):
    """Texts as sequences hold them."""

    ids: list[np.ndarray]  # int32 [n] of each
    is_whole: np.ndarray  # bool [N]; False: cut


class Sequences(NamedTuple):
    """What is asked of images, those of an image one after another."""

    image: np.ndarray  # int [n], the place of the image of each
    words: Words
    boxes_xyxy: np.ndarray  # float32 [n, 4]


def sequences_of(
    tokenizer: tokenizer_lib.Tokenizer,
    given: Given,
    task: str,
    texts: Sequence[Sequence[str]],
    boxes_xyxy: Sequence[np.ndarray] | None = None,
) -> Sequences:
    """The sequences of images; texts are cleaned and tokenized as in training, as many words as a sequence holds.

    Args:
      tokenizer: of the model.
      given: the decoder.
      task: a name of `text_decoder.TASKS`.
      texts: of each image.
      boxes_xyxy: float32 [n, 4] of each image, as many as texts; None: they do not count.

    Raises:
      TokenizerError: not texts.
    """
    image = np.repeat(np.arange(len(texts)), [len(x) for x in texts])
    flat = [*itertools.chain(*texts)]
    found = tokenizer.encode(flat, given.model.text.context_length)
    by_text = np.split(found.ids, np.cumsum(found.lengths)[:-1]) if flat else []
    sizes, empty = given.sizes, tokenizer.encode([""], given.model.text.context_length).ids
    # Special tokens by their number, as in training: an unknown word may be one. Padding makes two of an empty text.
    cut = lambda x: x[sizes.leading_specials : max(len(x) - sizes.trailing_specials, 0)]
    ids = [x[:0] if np.array_equal(x, empty) else cut(x) for x in by_text]
    most = _most_words(given, task)
    is_whole = np.array([len(x) <= most for x in ids], bool) & ~found.too_long
    words = Words([x[:most] for x in ids], is_whole)
    none = np.zeros((len(flat), BOX), np.float32)
    corners = none if boxes_xyxy is None else np.concatenate([none[:0], *boxes_xyxy])
    return Sequences(image, words, corners)


def excluded(library: tokenizer_lib.Tokenizer, text: config_lib.TextTower) -> tuple[int, ...]:
    """The ids of a text tower that are no words of its tokenizer: a tower may have more than it."""
    return library.special_ids + (*range(library.vocab_size, text.vocab_size),)


# (program, tokens of images, the place of the image of each row, an array of rows, ...) -> the program's results of all rows
Run = Callable[..., Any]


def _most_words(given: Given, task: str) -> int:
    """Of a sequence, as in training."""
    sizes = given.sizes
    return min(sizes.row_length - BESIDE_WORDS[task], sizes.most_predictions - 1)


def limit(max_tokens: int | None, given: Given, task: str) -> int:
    """The most tokens that are written of a text, the end counted. Raises InputError."""
    sizes, text = given.sizes, given.model.text
    room = _most_words(given, task) + 1
    if max_tokens is None:
        specials = sizes.leading_specials + sizes.trailing_specials
        return min(room, text.context_length - specials + 1)
    if not _is_count(max_tokens) or not 1 <= max_tokens <= room:
        raise InputError(
            f"max_tokens: got {max_tokens!r}, expected 1 to {room}, what a row of the text decoder holds"
        )
    return int(max_tokens)


def check_beams(beams: int) -> None:
    """Raises InputError."""
    if not _is_count(beams) or not 1 <= beams <= MAX_BEAMS:
        raise InputError(f"beams: got {beams!r}, expected 1 to {MAX_BEAMS}")


def _is_count(x: Any) -> bool:
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)


def write(
    run: Run, given: Given, task: str, tokens: Tokens, asked: Sequences, beams: int, steps: int
) -> list[tuple[list[int], float, bool]]:
    """For each sequence (the ids that the decoder writes, without the end; their log-probability; whether it ended).

    Args:
      run: of the Predictor.
      given: the decoder.
      task: a name of `text_decoder.TASKS`.
      tokens: of the image tower.
      asked: sequences of these images; of their words those of `point` count, of their boxes those of `describe`.
      beams: of the search; 1: greedy.
      steps: most tokens of a text, the end counted; of a box, 4.
    """
    if not len(asked.image):
        return []
    rows = np.arange(len(asked.image))
    arrays = _laid_out(asked, rows, np.zeros_like(rows))
    program = write_program(given, task, beams, steps)
    ids, count, score = run(program, tokens, asked.image, *arrays)
    return [(x[:n].tolist(), float(p), bool(n < steps)) for x, n, p in zip(ids, count, score)]


def log_likelihoods(
    run: Run, given: Given, task: str, tokens: Tokens, asked: Sequences
) -> np.ndarray:
    """The log-likelihood of what each sequence predicts, float32 [n]; arguments as of `write`.

    Sequences of an image lie side by side in rows.
    """
    if not len(asked.image):
        return np.zeros(0, np.float32)
    lengths = [len(ids) + BESIDE_WORDS[task] for ids in asked.words.ids]
    rows, slots, used = _packed(asked.image.tolist(), lengths)
    program = likelihood_program(given, task, _power_of_two(max(used, 32)))
    _, first = np.unique(rows, return_index=True)
    arrays = _laid_out(asked, rows, slots)
    return run(program, tokens, asked.image[first], *arrays)[rows, slots]


def _packed(image: list[int], lengths: list[int]) -> tuple[np.ndarray, np.ndarray, int]:
    """(the row of each sequence, its place in the row, the positions that the fullest row uses)."""
    rows, slots, used, most, last = [], [], 0, 0, None
    for at, length in zip(image, lengths):
        full = used + length > _LONGEST_ROW or slots and slots[-1] + 1 == _MOST_SEQUENCES
        if at != last or full:
            rows.append(rows[-1] + 1 if rows else 0)
            slots.append(0)
            used = 0
        else:
            rows.append(rows[-1])
            slots.append(slots[-1] + 1)
        used, last = used + length, at
        most = max(most, used)
    return np.array(rows), np.array(slots), most


def _laid_out(asked: Sequences, rows: np.ndarray, slots: np.ndarray) -> tuple[np.ndarray, ...]:
    """The arrays of a program: ids [R, S, n], count, is_whole, is_real [R, S], boxes [R, S, 4]; S and n powers of two."""
    shape = int(rows.max(initial=-1)) + 1, _power_of_two(int(slots.max(initial=0)) + 1)
    longest = max((len(x) for x in asked.words.ids), default=0)
    ids = np.zeros((*shape, _power_of_two(max(longest, 4))), np.int32)
    count, boxes = np.zeros(shape, np.int32), np.zeros((*shape, BOX), np.float32)
    is_whole, is_real = np.ones(shape, bool), np.zeros(shape, bool)
    for row, slot, words in zip(rows, slots, asked.words.ids):
        ids[row, slot, : len(words)], count[row, slot] = words, len(words)
    is_whole[rows, slots], is_real[rows, slots] = asked.words.is_whole, True
    boxes[rows, slots] = asked.boxes_xyxy
    return ids, count, is_whole, is_real, boxes


def _power_of_two(x: int) -> int:
    """The least one that is not below."""
    return 1 << (x - 1).bit_length()


class _Applied(NamedTuple):
    """The decoder in a program."""

    given: Given

    def __call__(self, params: Any, method: str, *arguments: Any) -> Any:
        """What the method of `text_decoder.TextDecoder` returns."""
        sizes, model = self.given.sizes, self.given.model
        dtype = np.dtype(self.given.dtype)
        module = text_decoder.TextDecoder(sizes, self.given.vocabulary, dtype, model.attention)
        return module.apply({"params": params}, *arguments, method=method)

    def patches(self, tokens: jax.Array) -> jax.Array:
        """The last tokens [B, P, E] of all tokens of the tower."""
        image = self.given.model.image
        return tokens[:, towers.image_tower(image).leading_tokens(image) :].astype(self.given.dtype)

    def sequences(
        self, task: str, text: text_decoder.Text, boxes: jax.Array
    ) -> text_decoder.Sequences:
        """Sequences of the task, as training has them."""
        words = self.given.vocabulary
        if task == "caption":
            return text_decoder.caption(words, text)
        if task == "describe":
            return text_decoder.describe(words, boxes, text)
        return text_decoder.point(words, text, boxes)

    def jitted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function in the precision of the decoder."""
        # "highest": full float32 also on devices that by default round the operands of a matrix product.
        precision = "highest" if self.given.dtype == "float32" else None

        @functools.wraps(function)
        def run(*arguments):
            with jax.default_matmul_precision(precision):
                return function(*arguments)

        return jax.jit(run)


@functools.lru_cache(maxsize=32)
def likelihood_program(given: Given, task: str, row_length: int) -> Callable[..., Any]:
    """The jitted (params, tokens [R, N, E], ids, count, is_whole, is_real, boxes) -> log-likelihoods float32 [R, S].

    A further argument is the Places of the tokens; without it all are real. The sequences of a row, which all are of its
    image, fit into `row_length` positions.
    """
    decoder, words = _Applied(given), given.vocabulary

    def log_likelihoods(params, tokens, ids, count, is_whole, is_real, boxes, places=None):
        text = text_decoder.Text(ids, count, is_whole, is_real)
        rows = text_decoder.pack([decoder.sequences(task, text, boxes)], row_length)
        features = decoder(params, "features", decoder.patches(tokens), rows, None, places)
        predicted, targets, slot = rows.predicted, rows.targets, rows.segments
        if task == "point":  # few positions predict: the vocabulary is read for these alone
            _, at = jax.lax.top_k(predicted.astype(jnp.int32), min(row_length, BOX * ids.shape[1]))
            features = jnp.take_along_axis(features, at[..., None], axis=1)
            predicted, targets, slot = (
                jnp.take_along_axis(x, at, axis=1) for x in (predicted, targets, slot)
            )
        loss = vocabulary.cross_entropy(features, params["head"], targets, size=words.size).loss
        of_slot = slot[:, None] == jnp.arange(1, ids.shape[1] + 1)[:, None]  # [R, S, T]
        return -jnp.where(of_slot & predicted[:, None], loss[:, None], 0).sum(2)

    return decoder.jitted(log_likelihoods)


@functools.lru_cache(maxsize=32)
def write_program(given: Given, task: str, beams: int, steps: int) -> Callable[..., Any]:
    """The jitted (params, tokens [B, N, E], ids, count, is_whole, is_real, boxes), of one sequence an image.

    A further argument is the Places of the tokens; without it all are real.

    Returns:
      (ids int32 [B, steps], how many of them count, without the end, int32 [B], log-probability float32 [B]).
    """
    decoder, words = _Applied(given), given.vocabulary
    place, is_box = np.arange(words.rows), task == "point"
    if is_box:
        allowed = (place >= words.first_bin) & (place < words.size)
    else:
        allowed = (place <= words.end) & ~np.isin(place, given.excluded)
    search = _Search(allowed, None if is_box else words.end, beams, steps)

    def write(params, tokens, ids, count, is_whole, is_real, boxes, places=None):
        text = text_decoder.Text(ids, count, is_whole, is_real)
        sequences = decoder.sequences(task, text._replace(count=count * is_box), boxes)
        # Of a box all but the last coordinate are read, too; before them is what is given.
        given_tokens = (
            sequences.tokens[:, 0] if is_box else sequences.tokens[:, 0, : BESIDE_WORDS[task]]
        )
        given_count = sequences.length[:, 0] - (BOX - 1) * is_box
        capacity = given_tokens.shape[1] + (0 if is_box else steps - 1)
        patches = decoder.patches(tokens)
        first = decoder(params, "start", patches, given_tokens, given_count, capacity, places)
        return search(functools.partial(decoder, params, "step"), *first)

    return decoder.jitted(write)


class _Beams(NamedTuple):
    """Beginnings, the most likely first."""

    written: jax.Array  # int32 [B, K, steps]
    score: jax.Array  # float32 [B, K], log-probability; -inf: there is none
    ended: jax.Array  # bool [B, K]


class _Search(NamedTuple):
    """Beam search with the key-value cache."""

    allowed: np.ndarray  # bool [rows of the vocabulary]
    end: int | None  # the token that ends a text; None: all have `steps` tokens
    beams: int  # K
    steps: int

    def __call__(
        self, step: Callable[..., Any], logits: jax.Array, state: text_decoder.State
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The best continuations of B sequences, as `write_program` returns them.

        Args:
          step: (state, tokens int32 [B * K]) -> (logits [B * K, V], state).
          logits: [B, V], of the first token.
          state: of B sequences.
        """
        shape = logits.shape[0], 1  # a symbol in an export
        none = _Beams(
            jnp.zeros((*shape, self.steps), jnp.int32), jnp.zeros(shape), jnp.zeros(shape, bool)
        )
        found, _ = self._best(none, logits[:, None], 0)
        keys, values = (jnp.repeat(x, self.beams, axis=1) for x in state.layers[:2])
        layers = state.layers._replace(keys=keys, values=values)
        state = text_decoder.State(layers, jnp.repeat(state.count, self.beams), state.sees)

        def goes_on(carry):
            at, found, _ = carry
            return (at < self.steps) & ~found.ended[:, 0].all()

        def body(carry):
            at, found, state = carry
            last = jax.lax.dynamic_index_in_dim(found.written, at - 1, 2, keepdims=False)
            logits, state = step(state, last.reshape(-1))
            found, beam = self._best(found, logits.reshape(*found.score.shape, -1), at)
            return at + 1, found, self._reordered(state, beam)

        _, found, _ = jax.lax.while_loop(goes_on, body, (jnp.int32(1), found, state))
        ids, count = found.written[:, 0], jnp.full(logits.shape[:1], self.steps)
        if self.end is not None:
            count = jnp.where(found.ended[:, 0], (ids == self.end).argmax(1), count)
        return ids, count, found.score[:, 0]

    def _best(self, found: _Beams, logits: jax.Array, at: Any) -> tuple[_Beams, jax.Array]:
        """The best continuations by the token `at`, and the beam int32 [B, K] that each comes from.

        Args:
          found: of any number k of beams.
          logits: float32 [B, k, V].
          at: the place of the token.
        """
        size, score = logits.shape[-1], found.score[..., None]
        total = score + jnp.where(self.allowed, jax.nn.log_softmax(logits), -jnp.inf)
        if self.end is not None:
            stays = jnp.where(np.arange(size) == self.end, score, -jnp.inf)
            total = jnp.where(found.ended[..., None], stays, total)
        best, place = jax.lax.top_k(total.reshape(total.shape[0], -1), self.beams)
        beam, token = place // size, place % size
        written = jnp.take_along_axis(found.written, beam[..., None], axis=1)
        written = jax.lax.dynamic_update_index_in_dim(written, token, at, axis=2)
        ended = jnp.take_along_axis(found.ended, beam, axis=1)
        if self.end is not None:
            ended |= token == self.end
        return _Beams(written, best, ended), beam

    def _reordered(self, state: text_decoder.State, beam: jax.Array) -> text_decoder.State:
        """The cache of the sequences that each beam [B, K] goes on with; the patches of an image are those of all."""
        if self.beams == 1:
            return state
        index = (jnp.arange(len(beam))[:, None] * self.beams + beam).reshape(-1)
        keys, values = (x[:, index] for x in state.layers[:2])
        return state._replace(layers=state.layers._replace(keys=keys, values=values))


def boxes_of(given: Given, ids: Sequence[Sequence[int]]) -> np.ndarray:
    """The boxes [n, 4] of location tokens; corners are put in order where the decoder wrote them in another one."""
    bins: Any = np.array(ids, np.int32).reshape(-1, BOX)
    found = np.asarray(given.vocabulary.boxes(bins), np.float32)
    first, last = found[:, :2], found[:, 2:]
    return np.concatenate([np.minimum(first, last), np.maximum(first, last)], axis=1)


def grouped(items: Iterable[Any], counts: Sequence[int]) -> list[list[Any]]:
    """The items in lists of these lengths."""
    items = iter(items)
    return [[next(items) for _ in range(count)] for count in counts]
