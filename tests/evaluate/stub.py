"""A predictor that looks embeddings up in tables, so that accuracies can be computed by hand.

An image is known by its number, which is the red value of its first pixel; a text by its words.
"""

import json
import pathlib
import types

import numpy as np
import PIL.Image

from grain_jax.core import schema
from grain_jax.evaluate import kinds


class StubPredictor:
    """Has the methods of a Predictor that evaluators call, from tables.

    Args:
      images: image number -> embedding [D].
      texts: text -> embedding [D]; other texts are a KeyError, and `asked` lists those that were asked for.
      regions: image number -> (boxes_xyxy [Q, 4], embed [Q, D]).
    """

    model = types.SimpleNamespace(image=types.SimpleNamespace(image_size=4))
    has_regions, has_box_head, has_proposals = True, False, False
    grounding_head = "embeddings"
    folder, digests, class_score = None, {}, "mean"

    def __init__(self, images=None, texts=None, regions=None):
        self.images, self.texts, self.regions = images or {}, texts or {}, regions or {}
        self.asked: list[str] = []

    def encode_image(self, images):
        return np.array([self.images[number(p)] for p in images], np.float32)

    def encode_text(self, texts):
        self.asked += texts
        return np.array([self.texts[text] for text in texts], np.float32)

    def encode_image_and_regions(self, images):
        boxes_xyxy, embed = zip(*(self.regions[number(p)] for p in images))
        boxes_xyxy, embed = np.array(boxes_xyxy, np.float32), np.array(embed, np.float32)
        prior = np.zeros(embed.shape[:2], np.float32)
        return self.encode_image(images), schema.Regions(boxes_xyxy, embed, prior)

    def encode_regions(self, images):
        return self.encode_image_and_regions(images)[1]


def number(picture) -> int:
    return int(np.asarray(picture)[0, 0, 0])


def write_picture(path, number, size=(10, 10)):
    """A PNG of one colour that StubPredictor knows as `number`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", size, (number, 0, 0)).save(path)


def region(box, description, score: float = 1, **more):
    return {"box": box, "description": description, "score": score, **more}


def annotate(folder, lines, size=(20, 10)):
    """Writes A.jsonl with a dict per line, and image number i for line i; returns options of an evaluator."""
    for i, _ in enumerate(lines):
        write_picture(folder / f"{i}.png", i, size)
    write_lines(folder / "A.jsonl", [{"image": f"{i}.png", **line} for i, line in enumerate(lines)])
    return dict(images=folder, annotations=folder / "A.jsonl")


def write_lines(path, lines):
    """Writes one line of JSON for each dict."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def measure(kind, predictor, *, batch_size=64, **options):
    """The result of an evaluator of the package with those options, of which paths may be paths."""
    texts = {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in options.items()}
    return {"kind": kind} | kinds.find(kind)(**texts, batch_size=batch_size).evaluate(predictor)
