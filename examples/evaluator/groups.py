"""An evaluator: which of four captions belongs to which of four images that differ in one thing.

c.evals.groups = kinds.evaluator(
    "examples.evaluator.groups:Groups", "FOLDER", annotations="FOLDER/A.jsonl"
)
"""

import dataclasses

import numpy as np

from grain_jax.core import errors
from grain_jax.evaluate import encode, evaluators, rates
from grain_jax.inference import scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups(evaluators.AnnotatedImages):
    """It has the options of AnnotatedImages, and the size of a group: that many lines of A.jsonl in a row."""

    shown = ("image_to_text", "text_to_image")
    kind: str = "groups"
    size: int = 4

    def usable(self, record):
        """An annotation with a caption."""
        return record.captions

    def evaluate(self, predictor):
        """Shares of images nearest to their caption within the group, and of captions; chance 1 / size."""
        records, seen, counts = self.gather(predictor, regions=False)
        if seen.unreadable or len(records) % self.size:
            raise errors.UserError(f"{self.annotations}: expected whole groups of {self.size}")
        texts = scores.unit(encode.encode_distinct(predictor, [x.captions[0] for x in records]))
        images = scores.unit(seen.image_embed).reshape(-1, self.size, texts.shape[-1])
        cosine = np.einsum("gid,gtd->git", images, texts.reshape(images.shape))
        out = {**counts, "groups": len(images), "chance": 1 / self.size}
        for name, each in (("image_to_text", cosine), ("text_to_image", cosine.swapaxes(1, 2))):
            own = np.tile(np.arange(self.size), len(images))
            out |= rates.rate(name, rates.topk_hits(each.reshape(-1, self.size), own, 1))
        return out
