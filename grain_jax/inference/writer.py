"""What a Predictor does with its text decoder: it writes captions, describes boxes, points, says how likely texts are.

`inference/text_decoder.py` has the search and the programs; here is which images, boxes and texts they are asked about.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from grain_jax import config as config_lib
from grain_jax.inference import inputs, jitted, rerank
from grain_jax.inference import text_decoder as decoding
from grain_jax.inference.inputs import InputError, OneOrMany, Tokens
from grain_jax.inference.text_decoder import Given, Pointed, Written
from grain_jax.runtime import checkpoint


class Writer:
    """The methods of a `Predictor` that its text decoder answers."""

    # What they need of it.
    model: config_lib.Model
    dtype: str
    folder: epath.PathLike | None
    text_decoder: checkpoint.StoredDecoder | None
    logit_scale: Any
    encode_text: Any
    encode_tokens: Any
    _encode: Any
    _rows: Any
    _run: Any
    _run_text_decoder: Any

    @property
    def has_text_decoder(self) -> bool:
        """Whether the model has a text decoder: `caption`, `describe`, `point` and the likelihoods."""
        return self.text_decoder is not None

    def caption(
        self, images: OneOrMany | Tokens, beams: int = 1, max_tokens: int | None = None
    ) -> Any:
        """A caption for each image, as the text decoder writes it: a list of `Written`; of one image, one.

        Args:
          images: as for `encode_image`, or the result of `encode_tokens`.
          beams: of the search (inference/text_decoder.py), 1 to 64; 1: the likeliest token each time.
          max_tokens: most tokens of a text, its end counted; None: as long as a text of the model.

        Raises:
          InputError: as `encode_image`; the model has no text decoder; `beams` or `max_tokens` out of range.
        """
        if inputs.is_one_image(images):
            return self.caption(inputs.one_image(images), beams, max_tokens)[0]
        given = self._given_decoder("caption")
        steps = decoding.limit(max_tokens, given, "caption")
        decoding.check_beams(beams)
        found = []
        for tokens, _ in self._token_parts(images):
            none = [np.zeros((1, 4), np.float32)] * len(tokens.values)
            found += self._write(given, "caption", tokens, none, beams, steps)
        return [written for (written,) in found]

    def describe(
        self,
        images: OneOrMany | Tokens,
        boxes_xyxy: Iterable[Any] | np.ndarray,
        beams: int = 1,
        max_tokens: int | None = None,
    ) -> Any:
        """What is in given boxes: for each image a list of `Written`, one a box; for one image that list alone.

        Args:
          images: as for `caption`.
          boxes_xyxy: as for `encode_boxes`; what reaches over the edge of the image is cut.
          beams, max_tokens: as for `caption`.

        Raises:
          InputError: as `caption`; boxes of another shape, or not of as many images.
        """
        if inputs.is_one_image(images):
            return self.describe(inputs.one_image(images), [boxes_xyxy], beams, max_tokens)[0]
        given = self._given_decoder("describe")
        steps = decoding.limit(max_tokens, given, "describe")
        decoding.check_beams(beams)
        boxes = inputs.boxes_of_images(boxes_xyxy)
        found = []
        for tokens, (own,) in self._token_parts(images, boxes_xyxy=boxes):
            found += self._write(given, "describe", tokens, own, beams, steps)
        return found

    def point(self, images: OneOrMany | Tokens, texts: Any, beams: int = 1) -> Any:
        """Where the text decoder sees what a text says.

        Args:
          images: one: PIL, uint8 [H, W, 3], or float32 [S, S, 3] already normalised; or several, as for `caption`.
          texts: of one image its texts, or one; of several a list of texts for each.
          beams: as for `caption`.

        Returns:
          Of one image for each text a `Pointed`, of one text one; of several images a list for each.

        Raises:
          InputError: as `caption`; texts of another kind, or not of as many images.
          TokenizerError: the tokenizer of the model cannot be read.
        """
        if inputs.is_one_image(images):
            is_one = isinstance(texts, str)
            (found,) = self.point(inputs.one_image(images), [[texts] if is_one else texts], beams)
            return found[0] if is_one else found
        given = self._given_decoder("point")
        decoding.check_beams(beams)
        found = []
        for tokens, (own,) in self._token_parts(images, texts=inputs.checked_texts(texts)):
            written = self._searched(given, "point", tokens, own, None, beams, decoding.BOX)
            corners = decoding.boxes_of(given, [ids for ids, _, _ in written])
            pointed = [Pointed(box, p) for box, (_, p, _) in zip(corners, written)]
            found += decoding.grouped(pointed, [len(x) for x in own])
        return found

    def caption_log_likelihood(self, images: OneOrMany | Tokens, texts: Any) -> Any:
        """log p(text | image) by the text decoder, the sum over the words and the end, in nats.

        A text that is longer than the context or a row of the decoder is cut: its first words count, and no end.

        Args:
          images: as for `caption`.
          texts: for each image the texts that it is asked about; of one image its texts.

        Returns:
          For each image float32 [n], one a text; of one image [n].

        Raises:
          InputError, TokenizerError: as `point`.
        """
        if inputs.is_one_image(images):
            return self.caption_log_likelihood(inputs.one_image(images), [texts])[0]
        given = self._given_decoder("caption_log_likelihood")
        found = []
        for tokens, (own,) in self._token_parts(images, texts=inputs.checked_texts(texts)):
            found += self._log_likelihoods(given, "caption", tokens, own)
        return found

    def description_log_likelihood(
        self, images: OneOrMany | Tokens, boxes_xyxy: Iterable[Any] | np.ndarray, texts: Any
    ) -> Any:
        """log p(text | box of the image), as `caption_log_likelihood`.

        Args:
          images, boxes_xyxy: as for `describe`.
          texts: for each image and each of its boxes the texts that it is asked about.

        Returns:
          For each image a list: float32 [n] for each box. For one image that list alone.

        Raises:
          InputError, TokenizerError: as `point` and `describe`.
        """
        if inputs.is_one_image(images):
            one = inputs.one_image(images)
            return self.description_log_likelihood(one, [boxes_xyxy], [texts])[0]
        given = self._given_decoder("description_log_likelihood")
        boxes = inputs.boxes_of_images(boxes_xyxy)
        of_boxes = [
            inputs.checked_texts(x, f"texts[{i}]", "box") for i, x in enumerate(inputs.lists(texts))
        ]
        inputs.check_a_text_a_box(of_boxes, boxes, "lists of texts")
        found = []
        parts = self._token_parts(images, boxes_xyxy=boxes, texts=of_boxes)
        for tokens, (own, candidates) in parts:
            counts = [list(map(len, of)) for of in candidates]
            repeated = [np.repeat(x, n, axis=0) for x, n in zip(own, counts)]
            flat = [list(itertools.chain(*of)) for of in candidates]
            values = self._log_likelihoods(given, "describe", tokens, flat, repeated)
            found += [np.split(x, np.cumsum(n)[:-1]) if n else [] for x, n in zip(values, counts)]
        return found

    def box_log_likelihood(
        self, images: OneOrMany | Tokens, boxes_xyxy: Iterable[Any] | np.ndarray, texts: Any
    ) -> Any:
        """log p(box | text, image): of the location tokens of a box after the text, in nats.

        Args:
          images, boxes_xyxy: as for `describe`.
          texts: for each image the text of each of its boxes.

        Returns:
          For each image float32 [n], one a box; of one image [n].

        Raises:
          InputError, TokenizerError: as `point` and `describe`.
        """
        if inputs.is_one_image(images):
            return self.box_log_likelihood(inputs.one_image(images), [boxes_xyxy], [texts])[0]
        given = self._given_decoder("box_log_likelihood")
        boxes = inputs.boxes_of_images(boxes_xyxy)
        checked = inputs.checked_texts(texts)
        inputs.check_a_text_a_box(checked, boxes, "texts")
        found = []
        for tokens, (own, texts_of) in self._token_parts(images, boxes_xyxy=boxes, texts=checked):
            found += self._log_likelihoods(given, "point", tokens, texts_of, own)
        return found

    def rerank(
        self,
        images: OneOrMany | Tokens,
        texts: str | Iterable[str],
        top: int = rerank.TOP,
        weight: float | None = None,
    ) -> rerank.Reranked:
        """The best texts of each image and the best images of each text, by cosine and by likelihood.

        The first `top` by cosine are ordered by scale * cosine + weight * (log-likelihood - prior), where the prior of a
        text is the median of its log-likelihoods over other images of the call (docs/method.md, Reranking).

        Args:
          images: two or more, as for `encode_image`, or the result of `encode_tokens`; their tokens are held at once.
          texts: strings, or one.
          top: k, candidates of an image or a text.
          weight: of the log-likelihood, in nats; None: the one that is stored with the model.

        Raises:
          InputError: as `encode_image` and `encode_text`; one image, no weight, or the model has no text decoder.
        """
        self._given_decoder("rerank")
        if isinstance(top, bool) or not isinstance(top, (int, np.integer)) or top < 1:
            raise InputError(f"top: got {top!r}, expected a whole number of at least 1")
        if weight is not None and not 0 <= weight < math.inf:
            raise InputError(f"weight: got {weight!r}, expected a number of at least 0, in nats")
        weight, _ = rerank.weight_of(self, weight)
        if inputs.is_one_image(images):
            images = inputs.one_image(images)
        tokens = images if isinstance(images, Tokens) else self.encode_tokens(images)
        asked = [texts] if isinstance(texts, str) else list(texts)
        image_embed = self._encode(tokens)[0]
        text_embed = self.encode_text(asked)
        stage = rerank.first_stage(image_embed, text_embed, top)
        lists = [[asked[t] for t in stage.texts_of(i)] for i in range(len(image_embed))]
        ask = lambda _, *given: self.caption_log_likelihood(*given)
        likelihood: list[np.ndarray] = [np.zeros(0)]
        for part, (own,) in self._token_parts(tokens, texts=lists):
            likelihood += rerank.log_likelihoods(ask, part, own)
        found = rerank.parts(stage, np.concatenate(likelihood), image_embed, text_embed)
        return rerank.ordered(stage, found, self.logit_scale, weight)

    def _given_decoder(self, what: str) -> Given:
        """What the programs of the text decoder depend on. Raises InputError where there is none."""
        inputs.need_text_decoder(self, what)
        assert self.text_decoder is not None
        library = inputs.tokenizer_of(self.model.text, self.folder)
        excluded = decoding.excluded(library, self.model.text)
        return Given(self.text_decoder.config, self.model, self.dtype, excluded)

    def _token_parts(
        self, images: OneOrMany | Tokens, **lists: list[Any]
    ) -> Iterator[tuple[Tokens, list[list[Any]]]]:
        """(the tokens of some images, of each of the lists what belongs to them), some images after others.

        Raises InputError: the lists are of another number of images.
        """
        program, done = jitted.tokens_program(self.model, self.dtype), 0
        for part in self._rows(images):
            tokens = part if isinstance(part, Tokens) else self._run(program, part)
            count = len(tokens.values)
            own = [values[done : done + count] for values in lists.values()]
            done += count
            if all(len(x) == count for x in own):
                yield tokens, own
        for name, values in lists.items():
            if len(values) != done:
                raise InputError(
                    f"{name}: got those of {len(values)} images, expected of {done}, as many as images"
                )

    def _asked(
        self, given: Given, task: str, texts: Sequence[Sequence[str]], boxes: Any
    ) -> decoding.Sequences:
        """The sequences of images; `texts` and `boxes` [n, 4] (or None) of each image, of equal number."""
        library = inputs.tokenizer_of(self.model.text, self.folder)
        return decoding.sequences_of(library, given, task, texts, boxes)

    def _searched(self, given, task, tokens, texts, boxes, beams, steps):
        """What `text_decoder.write` finds for the texts and boxes of images."""
        run = functools.partial(self._run_text_decoder, beams)
        asked = self._asked(given, task, texts, boxes)
        return decoding.write(run, given, task, tokens, asked, beams, steps)

    def _write(self, given, task, tokens, boxes, beams, steps) -> list[list[Written]]:
        """For each image a text for each of its boxes."""
        texts = [[""] * len(x) for x in boxes]
        found = self._searched(given, task, tokens, texts, boxes, beams, steps)
        decode = inputs.tokenizer_of(self.model.text, self.folder).decode
        written = [Written(decode(ids), p, ended) for ids, p, ended in found]
        return decoding.grouped(written, [len(x) for x in boxes])

    def _log_likelihoods(self, given, task, tokens, texts, boxes=None) -> list[np.ndarray]:
        """For each image float32 [n], of its texts."""
        run = functools.partial(self._run_text_decoder, 1)
        asked = self._asked(given, task, texts, boxes)
        found = decoding.log_likelihoods(run, given, task, tokens, asked)
        return np.split(found, np.cumsum([len(x) for x in texts])[:-1])
