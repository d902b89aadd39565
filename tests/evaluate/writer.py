"""A predictor with a text decoder whose texts are in tables, and in which each word of a text costs the same."""

from typing import NamedTuple

import numpy as np

from grain_jax import config as config_lib
from grain_jax.runtime import checkpoint
from tests.evaluate.stub import StubPredictor, number


class Written(NamedTuple):
    text: str
    log_probability: float


class Pointed(NamedTuple):
    box_xyxy: np.ndarray
    log_probability: float


class Writer(StubPredictor):
    """Has the methods of `evaluate.encode.Predictor` that a text decoder gives.

    Args:
      texts: as of StubPredictor.
      captions: image number -> text.
      descriptions: image number -> a text a box, in the order of the boxes.
      cost: of a word of a text, nats.
      beams: that are expected.
      has_text_decoder: False: the methods must not be called.
    """

    folder, dtype = None, "float32"
    model = config_lib.Model()
    text_decoder = checkpoint.StoredDecoder(config_lib.TextDecoder().beside(model), {})
    number: type = float

    def __init__(
        self,
        texts=None,
        captions=None,
        descriptions=None,
        cost=2.0,
        beams=1,
        has_text_decoder=True,
        **more,
    ):
        super().__init__(texts=texts, **more)
        self.captions, self.descriptions = captions or {}, descriptions or {}
        self.cost, self.beams, self.has_text_decoder = cost, beams, has_text_decoder

    def encode_tokens(self, images):
        assert self.has_text_decoder
        return [number(image) for image in images]

    def caption(self, tokens, *, beams):
        assert beams == self.beams
        return [Written(self.captions[i], self.number(-1.5)) for i in tokens]

    def describe(self, tokens, boxes_xyxy, *, beams):
        assert beams == self.beams
        found = [[Written(x, self.number(-0.5)) for x in self.descriptions[i]] for i in tokens]
        assert [len(x) for x in boxes_xyxy] == [len(x) for x in found]
        return found

    def point(self, image, texts, *, beams=1):
        return [Pointed(np.array([0, 0, 0.5, 1], np.float32), -2.0) for _ in texts]

    def log_p(self, image, text):
        """The log-likelihood of a text."""
        return -self.cost * len(text.split())

    def caption_log_likelihood(self, tokens, texts):
        return [
            np.array([self.log_p(i, text) for text in own], np.float32)
            for i, own in zip(tokens, texts, strict=True)
        ]

    def description_log_likelihood(self, tokens, boxes_xyxy, texts):
        assert [len(x) for x in boxes_xyxy] == [len(x) for x in texts]
        assert all(((0 <= x) & (x <= 1)).all() for x in boxes_xyxy)
        return [
            [np.array([self.log_p(i, text) for text in box], np.float32) for box in own]
            for i, own in zip(tokens, texts, strict=True)
        ]
