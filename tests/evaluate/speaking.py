"""A stub with a text decoder, whose likelihoods and boxes stand in tables."""

from typing import NamedTuple

import numpy as np

from grain_jax.inference.predictor import Tokens
from tests.evaluate.stub import StubPredictor, number


class Pointed(NamedTuple):
    box_xyxy: np.ndarray
    log_probability: float


class SpeakingStub(StubPredictor):
    """Also says log p(text | image), and boxes of texts; the tokens of an image are its number.

    Args:
      log_p: (image number, text) -> nats.
      of_boxes: (image number, text) -> nats for each of the boxes that are asked, [Q].
      points: (image number, text) -> box [4].

    Attributes:
      pairs: (image number, text) of every likelihood of a caption that was asked for, in order.
      calls: (images, texts, as many numbers as the answer has) of each call.
    """

    has_text_decoder = True
    logit_scale = 20.0
    folder: str | None = None
    digest = "of the stub"

    def __init__(self, *tables, log_p=None, of_boxes=None, points=None):
        super().__init__(*tables)
        self.log_p, self.of_boxes, self.points = log_p or {}, of_boxes or {}, points or {}
        self.pairs, self.calls = [], []

    def encode_tokens(self, images):
        return Tokens(np.array([number(x) for x in images], np.float32)[:, None, None])

    def caption_log_likelihood(self, tokens, texts):
        images = tokens.values[:, 0, 0].astype(int).tolist()
        self.pairs += [(i, text) for i, own in zip(images, texts, strict=True) for text in own]
        self.calls.append((len(images), sum(map(len, texts))))
        return [
            np.array([self.log_p[i, text] for text in own], np.float32)
            for i, own in zip(images, texts)
        ]

    def description_log_likelihood(self, tokens, boxes_xyxy, texts):
        images, out = tokens.values[:, 0, 0].astype(int).tolist(), []
        for i, boxes, of_boxes in zip(images, boxes_xyxy, texts, strict=True):
            assert len(boxes) == len(of_boxes)
            at = range(len(boxes))
            out.append([np.array([self.of_boxes[i, text][q] for text in of_boxes[q]]) for q in at])
        self.calls.append((len(images), sum(len(own) for of in texts for own in of)))
        return out

    def point(self, tokens, texts, *, beams=1):
        images = tokens.values[:, 0, 0].astype(int).tolist()
        box = lambda i, text: Pointed(np.array(self.points[i, text], np.float32), -1.0)
        return [[box(i, text) for text in own] for i, own in zip(images, texts, strict=True)]
