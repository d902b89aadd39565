"""calibration.json beside a model: from the cosine of a text to the probability that it is true."""

from collections.abc import Sequence

import msgspec
import numpy as np
from etils import epath
from scipy import special

from grain_jax.core import atomic, regular_file
from grain_jax.inference import prompts, scores

NAME = "calibration.json"


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """P(text is true) = sigmoid(logit_scale * cosine + logit_bias), and thresholds of P."""

    logit_scale: float
    logit_bias: float
    threshold: float  # for all texts
    thresholds: dict[str, float] = {}  # for each text of the validation set; may be empty
    templates: list[str] = []  # prompts of class names; empty: texts are read as they are

    def probabilities(self, cosines: np.ndarray) -> np.ndarray:
        """float32 in [0, 1], of the shape of `cosines`."""
        logits = self.logit_scale * np.asarray(cosines, np.float64) + self.logit_bias
        return special.expit(logits).astype(np.float32)


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """The content of the file."""

    params: str  # digest of the model's parameters
    image: Score | None = None  # the cosine of the image embedding
    regions: Score | None = None  # the largest cosine of the regions


def read(folder: epath.PathLike) -> Calibration:
    """The calibration in a folder. Raises regular_file.FileError."""
    return regular_file.read_json(epath.Path(folder) / NAME, Calibration, "a calibration")


def write(folder: epath.PathLike, calibration: Calibration) -> None:
    """Stores it in a folder as a whole, or raises OSError."""
    content = msgspec.json.format(msgspec.json.encode(calibration))
    atomic.write_bytes(epath.Path(folder) / NAME, content + b"\n")


def embed_texts(encode: prompts.Encode, texts: Sequence[str], templates: Sequence[str]) -> np.ndarray:
    """Embeddings of texts, float32 [N, D], unit length; with templates the texts are names of classes."""
    if not templates:
        return scores.unit(encode(list(texts)))
    return prompts.embed_classes(encode, texts, templates, unit_length=True)


def cosines(image_embeds: np.ndarray, text_embeds: np.ndarray, prior: np.ndarray | None = None) -> np.ndarray:
    """Cosines of images [B, D], or the largest of regions [B, Q, D], with texts [N, D]: float32 [B, N].

    `prior` [B, Q] is added to those of regions; None: 0.
    """
    of_regions = image_embeds.reshape(len(image_embeds), -1, image_embeds.shape[-1])
    prior = np.zeros(of_regions.shape[:2], np.float32) if prior is None else prior
    best = lambda part, prior: [(scores.unit(part) @ text_embeds.T + prior[..., None]).max(axis=1)]
    return scores.in_parts(best, of_regions, prior)[0]
