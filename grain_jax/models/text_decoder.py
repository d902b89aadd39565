"""Text decoder: a causal transformer that sees the patches of an image, and writes texts and boxes.

The decoder of LocCa (Wan et al. 2024, arXiv 2403.19596), with three tasks, each told by the first token of a sequence:

    caption     CAPTION | w1 .. wn END                  image -> text
    describe    DESCRIBE x0 y0 x1 y1 | w1 .. wn END     box -> text
    point       POINT w1 .. wn END | x0 y0 x1 y1        text -> box

What follows the bar is predicted; `together` has all boxes of an image in one sequence, which it predicts, too:

    DESCRIBE | x0 y0 x1 y1 w1 .. wn END x0 y0 x1 y1 w1 .. wn END .. END

A row holds several sequences of one image, side by side; a position sees itself and
earlier ones of its sequence, and all patches. A coordinate is a location token, one of `bins` equal parts of the side.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from grain_jax import config as config_lib
from grain_jax.config import TextDecoder as Config
from grain_jax.models import attention, layers, placement
from grain_jax.models import places as places_lib
from grain_jax.models.places import Places

xavier = nn.initializers.xavier_uniform()
TASKS = ("caption", "describe", "point")
BOX = 4  # location tokens of a box
_PAD_TO = 128  # rows of the embeddings are a multiple of this, so that a mesh may cut them


class Vocabulary(NamedTuple):
    """The ids of the decoder: those of the tokenizer, special tokens, location tokens."""

    texts: int  # ids of the tokenizer, 0 to texts - 1
    bins: int

    @property
    def end(self) -> int:
        """Ends a text."""
        return self.texts

    @property
    def mask(self) -> int:
        """Stands for a token that is predicted without those before it."""
        return self.texts + 1

    def task(self, name: str) -> int:
        """The first token of a sequence of that task."""
        return self.texts + 2 + TASKS.index(name)

    @property
    def first_bin(self) -> int:
        """The location token of 0."""
        return self.texts + 2 + len(TASKS)

    @property
    def size(self) -> int:
        """All ids."""
        return self.first_bin + self.bins

    @property
    def rows(self) -> int:
        """Rows of the tables of embeddings; those from `size` on stand for nothing."""
        return -(-self.size // _PAD_TO) * _PAD_TO

    def quantise(self, boxes_xyxy: jax.Array) -> jax.Array:
        """Boxes [..., 4] in [0, 1] -> location tokens int32 [..., 4].

        A corner on the edge of two parts belongs to the second, also where its float32 is a little less, as that of a
        box which was a centre and sides.
        """
        rounding = max(1e-3, 4e-7 * self.bins)  # in parts
        part = jnp.floor(boxes_xyxy * self.bins + rounding).astype(jnp.int32)
        return self.first_bin + jnp.clip(part, 0, self.bins - 1)

    def boxes(self, tokens: jax.Array) -> jax.Array:
        """Location tokens [..., 4] -> boxes_xyxy float32 [..., 4], the middles of the parts."""
        return (tokens - self.first_bin + 0.5) / self.bins


def vocabulary(config: Config, model: config_lib.Model) -> Vocabulary:
    """The vocabulary of a decoder beside this model."""
    return Vocabulary(model.text.vocab_size, config.bins)


class Sequences(NamedTuple):
    """Sequences of a task, S an image, of at most M positions; what is beyond a length is anything."""

    tokens: jax.Array  # int32 [B, S, M], what the decoder sees
    targets: jax.Array  # int32 [B, S, M], what it predicts there
    predicted: jax.Array  # bool [B, S, M], whether it predicts there
    length: jax.Array  # int32 [B, S]; 0: there is none
    task: int  # place in TASKS

    def of(self, i: int) -> "Sequences":
        """The one at place `i` alone."""
        tokens, targets, predicted, length = (x[:, i : i + 1] for x in self[:4])
        return Sequences(tokens, targets, predicted, length, self.task)


class Text(NamedTuple):
    """Texts as sequences hold them, without the special tokens of the tokenizer."""

    ids: jax.Array  # int32 [B, S, n]
    count: jax.Array  # int32 [B, S], at most n
    is_whole: jax.Array  # bool [B, S]; False: cut
    is_real: jax.Array  # bool [B, S]


def caption(vocabulary: Vocabulary, text: Text) -> Sequences:
    """Sequences of the task `caption`, of n + 1 positions."""
    first = jnp.full((*text.count.shape, 1), vocabulary.task("caption"), jnp.int32)
    return _of_text(vocabulary, first, text, TASKS.index("caption"))


def describe(vocabulary: Vocabulary, boxes_xyxy: jax.Array, text: Text) -> Sequences:
    """Sequences of the task `describe` of boxes [B, S, 4], of n + 5 positions."""
    first = jnp.full((*text.count.shape, 1), vocabulary.task("describe"), jnp.int32)
    prefix = jnp.concatenate([first, vocabulary.quantise(boxes_xyxy)], axis=-1)
    return _of_text(vocabulary, prefix, text, TASKS.index("describe"))


def _of_text(vocabulary: Vocabulary, prefix: jax.Array, text: Text, task: int) -> Sequences:
    """A prefix [B, S, p], after which the text is predicted."""
    ids = _ended(vocabulary, text)  # [B, S, n + 1]
    tokens = jnp.concatenate([prefix, ids[..., :-1]], axis=-1)
    given = prefix.shape[-1] - 1  # positions before the one that predicts the first word
    targets = jnp.concatenate([jnp.zeros_like(prefix[..., 1:]), ids], axis=-1)
    place = jnp.arange(tokens.shape[-1])
    count = text.count[..., None]
    predicted = (place >= given) & (place < given + count + text.is_whole[..., None])
    length = jnp.where(text.is_real, prefix.shape[-1] + text.count, 0)
    return Sequences(tokens, targets, predicted, length, task)


def point(vocabulary: Vocabulary, text: Text, boxes_xyxy: jax.Array) -> Sequences:
    """Sequences of the task `point` of boxes [B, S, 4], of n + 5 positions."""
    words = _ended(vocabulary, text)  # [B, S, n + 1]
    first = jnp.full_like(words[..., :1], vocabulary.task("point"))
    given = jnp.concatenate([first, words], axis=-1)  # [B, S, n + 2]
    given = jnp.pad(given, ((0, 0), (0, 0), (0, BOX - 1)))
    box = vocabulary.quantise(boxes_xyxy)
    place = jnp.arange(given.shape[-1])
    last = text.count[..., None] + 1  # the end of the text, which predicts the first coordinate
    of_box = lambda shift: jnp.take_along_axis(box, jnp.clip(place - last + shift, 0, BOX - 1), -1)
    tokens = jnp.where(place <= last, given, of_box(-1))
    predicted = (place >= last) & (place < last + BOX)
    length = jnp.where(text.is_real, text.count + 1 + BOX, 0)
    return Sequences(tokens, of_box(0), predicted, length, TASKS.index("point"))


def together(
    vocabulary: Vocabulary,
    boxes_xyxy: jax.Array,
    text: Text,
    row_length: int,
    space: jax.Array,
) -> tuple[Sequences, jax.Array]:
    """One sequence an image that predicts boxes [B, S, 4] and their texts, in order; its task is `describe`.

    Args:
      vocabulary: of the decoder.
      boxes_xyxy: [B, S, 4] in [0, 1].
      text: of the boxes; one that is cut is not there.
      row_length: positions of the sequence, at most.
      space: int32 [B], positions that the image has for it; a box that does not fit into what is left is not there.

    Returns:
      (Sequences of `row_length` positions, bool [B, S] the boxes that are there).
    """
    items = jnp.concatenate([vocabulary.quantise(boxes_xyxy), _ended(vocabulary, text)], axis=-1)
    length = jnp.where(text.is_real & text.is_whole, BOX + text.count + 1, 0)
    task = TASKS.index("describe")
    side_by_side = Sequences(items, items, jnp.ones_like(items, bool), length, task)
    found = pack([side_by_side], row_length - 1, space - 1)
    count = (found.segments > 0).sum(1, keepdims=True)[..., None]  # [B, 1, 1]
    first = jnp.full((len(items), 1, 1), vocabulary.task("describe"), jnp.int32)
    tokens = jnp.concatenate([first, found.tokens[:, None]], axis=-1)
    place = jnp.arange(row_length)
    targets = jnp.pad(found.tokens[:, None], ((0, 0), (0, 0), (0, 1)))
    targets = jnp.where(place == count, vocabulary.end, targets)
    length = jnp.where(count > 0, count + 1, 0)[..., 0]
    return Sequences(tokens, targets, place <= count, length, task), found.kept


def _ended(vocabulary: Vocabulary, text: Text) -> jax.Array:
    """Texts [B, S, n] with the end after the last word, int32 [B, S, n + 1]."""
    ids = jnp.pad(text.ids, ((0, 0), (0, 0), (0, 1)))
    at_end = jnp.arange(ids.shape[-1]) == text.count[..., None]
    return jnp.where(at_end, vocabulary.end, ids)


class Rows(NamedTuple):
    """Sequences side by side, a row an image."""

    tokens: jax.Array  # int32 [B, T]
    positions: jax.Array  # int32 [B, T], from 0 in each sequence
    segments: jax.Array  # int32 [B, T], the place of the sequence + 1; 0: padding
    targets: jax.Array  # int32 [B, T]
    predicted: jax.Array  # bool [B, T]
    task: jax.Array  # int32 [B, T], place in TASKS
    kept: jax.Array  # bool [B, S], the sequences that are there and fit


def pack(
    parts: list[Sequences],
    row_length: int,
    space: jax.Array | None = None,
    predictions: int | None = None,
) -> Rows:
    """The sequences of each image in one row, in order; one that does not fit into what is left is not there.

    Args:
      parts: the sequences of each kind.
      row_length: T.
      space: int32 [B], positions that are used, at most; None: T.
      predictions: positions of a row that predict, at most; None: T.
    """
    longest = min(row_length, max(part.tokens.shape[-1] for part in parts))

    def of_longest(x):
        x = x[..., :longest]
        return jnp.pad(x, ((0, 0), (0, 0), (0, longest - x.shape[-1])))

    tokens, targets, predicted = (
        jnp.concatenate([of_longest(part[i]) for part in parts], axis=1) for i in range(3)
    )
    length = jnp.concatenate([part.length for part in parts], axis=1)  # [B, S]
    numbers = [np.full(part.length.shape[1], part.task, np.int32) for part in parts]
    task = jnp.asarray(np.concatenate(numbers))
    asked = (predicted & (jnp.arange(longest) < length[..., None])).sum(-1)
    start, kept, used, of_them = [], [], jnp.zeros_like(length[:, 0]), jnp.zeros_like(asked[:, 0])
    most = row_length if space is None else jnp.minimum(space, row_length)
    for one, count in zip(length.T, asked.T):
        fits = (one > 0) & (used + one <= most)
        fits &= of_them + count <= (predictions or row_length)
        start.append(used)
        kept.append(fits)
        used = used + jnp.where(fits, one, 0)
        of_them = of_them + jnp.where(fits, count, 0)
    start, kept = jnp.stack(start, axis=1), jnp.stack(kept, axis=1)
    place = jnp.arange(row_length)
    inside = kept[..., None] & (place >= start[..., None])
    inside &= place < (start + length)[..., None]  # [B, S, T], at most one sequence a position
    is_real = inside.any(1)
    which = jnp.argmax(inside, axis=1)  # [B, T]
    position = jnp.where(is_real, place - jnp.take_along_axis(start, which, axis=1), 0)
    index = which * longest + position
    read = lambda x: jnp.take_along_axis(x.reshape(len(length), -1), index, axis=1)
    return Rows(
        tokens=jnp.where(is_real, read(tokens), 0),
        positions=position,
        segments=jnp.where(is_real, which + 1, 0),
        targets=jnp.where(is_real, read(targets), 0),
        predicted=is_real & read(predicted),
        task=task[which],
        kept=kept,
    )


class LayerState(NamedTuple):
    """What a layer keeps of the positions that it has seen, and of the patches: keys and values by head."""

    keys: jax.Array  # [B, t, K, E / K], t the capacity
    values: jax.Array
    # [b, P, K, E / K]; b divides B: so many sequences after each other share the patches of an image.
    patch_keys: jax.Array
    patch_values: jax.Array


class State(NamedTuple):
    """The key-value cache of a batch of sequences."""

    layers: LayerState  # each array with a leading axis of layers
    count: jax.Array  # int32 [B], positions that are filled
    sees: jax.Array | None = None  # bool [b, 1, 1, P], the patches that are real; None: all


class _Heads(nn.Module):
    """The maps of `layers.Attention`, with its parameters, one at a time."""

    width: int
    heads: int
    dtype: np.dtype

    def setup(self):
        head_dim = self.width // self.heads
        to_heads = lambda: layers.dense(
            (self.heads, head_dim),
            ("width",),
            ("heads", "head_dim"),
            dtype=self.dtype,
            kernel_init=xavier,
        )
        self.query, self.key, self.value = to_heads(), to_heads(), to_heads()
        self.out = layers.dense(
            self.width, ("heads", "head_dim"), ("width",), dtype=self.dtype, kernel_init=xavier
        )

    def keys_values(self, x):
        """[B, L, E*] -> keys and values [B, L, K, E / K]."""
        return self.key(x), self.value(x)

    def attend(self, x, keys, values, mask=None):
        """Queries [B, t, E] to keys and values; mask bool [B, 1, t, L]."""
        q = self.query(x)
        logits = jnp.einsum(
            "bqkh,bskh->bkqs", q * q.shape[-1] ** -0.5, keys, preferred_element_type=jnp.float32
        )
        if mask is not None:
            logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
        return self.out(jnp.einsum("bkqs,bskh->bqkh", layers.softmax(logits, self.dtype), values))


class _Shared(NamedTuple):
    """What all layers see."""

    patches: Any  # [B, P, E_image]; None where the state has their keys
    mask: Any  # of self-attention (layers.Attention)
    keys: Any  # of dropout [B], or None
    count: Any  # int32 [B], positions before these; None in training
    sees: Any  # bool [b, 1, 1, P], the patches that are real; None: all


class Block(nn.Module):
    """Pre-norm: causal self-attention, attention to the patches, MLP."""

    config: Any  # a Config, resolved
    dtype: np.dtype
    program: str  # of self-attention (attention.choose)
    dropout: float = 0.0
    capacity: int = 0  # positions that the layer keeps keys of; 0: it keeps none

    @nn.compact
    def __call__(self, x, layer, state, shared: _Shared):
        """x [B, t, E], layer int32 [], state LayerState or None -> (x, the state with these positions, or None)."""
        c = self.config
        keys = shared.keys
        if keys is not None:
            keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, layer)
        drop = lambda x, site: layers.example_dropout(x, keys, site, self.dropout)
        norm = lambda name: layers.LayerNorm(c.norm_eps, name=name)
        attend: Any = self._cached_attention if self.capacity else self._attention
        to_own, to_patches = attend(state, shared)
        y, own = to_own(norm("norm_1")(x))
        x = x + drop(y, 0)
        y, of_patches = to_patches(norm("norm_2")(x))
        x = x + drop(y, 1)
        mlp = layers.MLP(
            c.width,
            c.mlp_dim,
            c.activation,
            self.dtype,
            in_init=xavier,
            out_init=xavier,
            dropout=self.dropout,
            name="mlp",
        )
        x = x + drop(mlp(norm("norm_3")(x), keys, 2), 3)
        return placement.by_batch(x), LayerState(*own, *of_patches) if self.capacity else None

    @nn.nowrap
    def _attention(self, state, shared: _Shared):
        """The two attentions in training, each to (its result, None)."""
        del state
        c = self.config
        own, to_patches = (
            layers.Attention(c.width, c.heads, self.dtype, xavier, xavier, program=p, name=name)
            for name, p in (("self_attention", self.program), ("cross_attention", "xla"))
        )
        return (
            lambda y: (own(y, y, y, shared.mask), None),
            lambda y: (to_patches(y, shared.patches, shared.patches, shared.sees), None),
        )

    @nn.nowrap
    def _cached_attention(self, state, shared: _Shared):
        """As `_attention`, each to (its result, keys and values that the layer keeps)."""
        c, count = self.config, shared.count
        own, to_patches = (
            _Heads(c.width, c.heads, self.dtype, name=name)
            for name in ("self_attention", "cross_attention")
        )
        of_patches = (
            to_patches.keys_values(shared.patches)
            if state is None
            else (state.patch_keys, state.patch_values)
        )

        def to_own(y):
            found = own.keys_values(y)
            kept = (state.keys, state.values) if state is not None else map(self._empty, found)
            write = jax.vmap(
                lambda old, new, at: jax.lax.dynamic_update_slice_in_dim(old, new, at, 0)
            )
            keys, values = (write(old, new, count) for old, new in zip(kept, found))
            place = count[:, None] + jnp.arange(y.shape[1])
            sees = jnp.arange(self.capacity) <= place[:, None, :, None]  # [B, 1, t, capacity]
            return own.attend(y, keys, values, sees), (keys, values)

        def to_shared(y):
            of_image = y.reshape(of_patches[0].shape[0], -1, y.shape[-1])
            found = to_patches.attend(of_image, *of_patches, shared.sees)
            return found.reshape(y.shape), of_patches

        return to_own, to_shared

    @nn.nowrap
    def _empty(self, x):
        """Keys [B, t, K, h] of no position yet."""
        return jnp.zeros((x.shape[0], self.capacity, *x.shape[2:]), x.dtype)


class TextDecoder(nn.Module):
    """Patches and rows of tokens to the features that predict the next tokens."""

    config: Any  # a Config, resolved
    vocabulary: Vocabulary
    dtype: np.dtype
    attention: str = "auto"  # as `model.attention`
    remat: str = "none"
    dropout: float = 0.0

    def setup(self):
        c, shape = self.config, (self.vocabulary.rows, self.config.width)
        table = lambda name, deviation, axis, shape: layers.parameter(
            self, name, layers.normal(deviation), (axis, "width"), shape
        )
        self.token_embed = table("token_embed", 0.02, "vocab", shape)
        self.position_embed = table("position_embed", 0.01, "positions", (c.row_length, c.width))
        # Of logits, [rows of the vocabulary, E], without a bias.
        self.head = table("head", c.width**-0.5, "vocab", shape)
        self.norm = layers.LayerNorm(c.norm_eps)

    def features(
        self,
        patches: jax.Array,
        rows: Rows,
        dropout_keys: jax.Array | None = None,
        places: Places | None = None,
    ) -> jax.Array:
        """The features at every position of the rows.

        Args:
          patches: [B, P, E_image], the last tokens of the image tower.
          rows: of any length; a position is below `row_length`.
          dropout_keys: PRNG keys [B] (training), or None.
          places: of the patches; None: all are real.

        Returns:
          [B, T, E]; `head` times these are the logits.
        """
        within = attention.CausalWithin(rows.segments)
        program = attention.choose(self.attention, self.dtype, self.config.heads)
        mask: Any = within.mask() if program == "xla" else within
        x = self._embed(rows.tokens, rows.positions)
        sees = places_lib.keys(places, patches.shape[1])
        shared = _Shared(patches, mask, dropout_keys, None, sees)
        return self.norm(self._layers(x, None, shared, program, 0)[0])

    def start(
        self,
        patches: jax.Array,
        tokens: jax.Array,
        count: jax.Array,
        capacity: int,
        places: Places | None = None,
    ) -> tuple[jax.Array, State]:
        """Reads the first tokens of a sequence an image.

        Args:
          patches: [B, P, E_image].
          tokens: int32 [B, t], padded with anything.
          count: int32 [B], those that are real, 1 or more.
          capacity: positions of the cache, at least t and at most `row_length`.
          places: of the patches; None: all are real.

        Returns:
          (logits float32 [B, rows of the vocabulary] of what follows, the cache).
        """
        nothing = jnp.zeros_like(count)
        x = self._embed(tokens, jnp.arange(tokens.shape[1]))
        sees = places_lib.keys(places, patches.shape[1])
        shared = _Shared(patches, None, None, nothing, sees)
        x, state = self._layers(x, None, shared, "xla", capacity)
        last = jnp.take_along_axis(x, (count - 1)[:, None, None], axis=1)[:, 0]
        return self._logits(last), State(state, count, sees)

    def step(self, state: State, tokens: jax.Array) -> tuple[jax.Array, State]:
        """Reads the next token int32 [B] of each sequence; returns as `start`."""
        x = self._embed(tokens[:, None], state.count[:, None])
        capacity = state.layers.keys.shape[2]
        shared = _Shared(None, None, None, state.count, state.sees)
        x, found = self._layers(x, state.layers, shared, "xla", capacity)
        return self._logits(x[:, 0]), State(found, state.count + 1, state.sees)

    def _embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """[B, t, E] of the decoder's dtype."""
        x = placement.lookup(self.token_embed, tokens, self.dtype)
        return placement.by_batch(
            (x + placement.whole(self.position_embed)[positions]).astype(self.dtype)
        )

    @nn.compact
    def _layers(self, x, state, shared, program, capacity):
        c, every = self.config, nn.broadcast
        blocks = layers.scan_layers(
            Block,
            c.depth,
            remat=self.remat if capacity == 0 else "none",
            unroll=c.unroll,
            in_axes=(0, 0, every),
        )(c, self.dtype, program, self.dropout, capacity, name="blocks")
        return blocks(x, jnp.arange(c.depth), state, shared)

    def _logits(self, x: jax.Array) -> jax.Array:
        """[B, E] -> float32 [B, rows of the vocabulary]; -inf where a row stands for nothing."""
        x = self.norm(x).astype(self.dtype)
        logits = jnp.einsum(
            "be,ve->bv", x, self.head.astype(self.dtype), preferred_element_type=jnp.float32
        )
        return jnp.where(jnp.arange(len(self.head)) < self.vocabulary.size, logits, -jnp.inf)


def text_of_batch(
    tokens: jax.Array,
    positions: jax.Array,
    at: jax.Array,
    real: jax.Array,
    config: Config,
    most: int,
    longest: int = 0,
) -> Text:
    """The texts of a batch (`schema.Batch`) as sequences hold them.

    One that is as long as the tokenizer lets it be counts as cut: nothing tells whether words are missing.

    Args:
      tokens: int32 [G, rows, L].
      positions: int32 [G, rows, L].
      at: int32 [B, S, 2], (row within the image's group, end token).
      real: bool [B, S].
      config: for the special tokens around a text.
      most: n, words that are kept.
      longest: tokens that the tokenizer cuts a text to; 0: those of a row.
    """
    groups, rows, length = tokens.shape
    images, texts = real.shape
    flat = at[..., 0] * length + at[..., 1]
    read = lambda x, index: jnp.take_along_axis(
        jnp.reshape(x, (groups, rows * length)), index.reshape(groups, -1), axis=1
    ).reshape(index.shape)
    last = read(positions, flat)  # of the text's last token
    first = flat - last + config.leading_specials
    count = jnp.maximum(last + 1 - config.leading_specials - config.trailing_specials, 0)
    index = jnp.minimum(first[..., None] + jnp.arange(most), rows * length - 1)
    kept = jnp.minimum(count, most)
    ids = jnp.where(jnp.arange(most) < kept[..., None], read(tokens, index), 0)
    return Text(ids, kept, (count <= most) & (last + 1 < (longest or length)), real)
