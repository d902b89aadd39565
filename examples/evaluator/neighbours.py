"""An evaluator of your own: k-nearest-neighbour accuracy on class folders.

Each test image gets the class of most of its k nearest training images, by the cosine of the image
embeddings. The entry of a training config, whose numbers are eval/neighbours/top1 and so on:

  c.evals.neighbours = kinds.evaluator(
      "examples.evaluator.neighbours:Neighbours", "TEST_FOLDERS", train="TRAIN_FOLDERS", k=5
  )

In a suite, that entry alone: `c = ConfigDict(); c.evals = dict(neighbours=kinds.evaluator(...))`.
From the folder that holds `examples`:

  grain-jax evaluate suite --checkpoint DIR --config FILE --config.evals.neighbours.k=3 --output OUT.json
"""

import dataclasses

import numpy as np

from grain_jax.core import errors
from grain_jax.evaluate import encode, evaluators, rates, test_sets
from grain_jax.evaluate.base import option
from grain_jax.inference import scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Neighbours(evaluators.LabelledImages):
    """Its options: the fields of LabelledImages (`images`, `tfds`, `split`, ...), and these."""

    train: str = ""  # class folders of the training images, with the same classes
    k: int = option(5, "Neighbours that vote.", low=1)

    @property
    def data(self):
        """What has to be there: with `missing="skip"` the entry is skipped if it is not."""
        return self.images, self.train

    def open_train(self):
        """The training images."""
        return test_sets.ClassFolders(self.train)

    def check(self, model=None):
        """Before a model is loaded or trained. Returns how many images there are."""
        test, train = self.open(), self.open_train()
        if list(test.classes) != list(train.classes):
            raise errors.UserError(
                f"{self.train}: got the classes {', '.join(train.classes)}, expected those of"
                f" {self.images}: {', '.join(test.classes)}"
            )
        if self.k > len(train):
            raise errors.UserError(f"k: got {self.k}, expected at most the {len(train)} training images")
        return len(test) + len(train)

    def evaluate(self, predictor):
        """With the model: the processes share the images, and all return the same result."""
        read = dict(label="neighbours", batch_size=self.batch_size)
        test_set = self.open()
        test = encode.gather_images(predictor, test_set, **read)
        train = encode.gather_images(predictor, self.open_train(), **read)
        cosine = scores.unit(test.image_embed) @ scores.unit(train.image_embed).T  # [N, M]
        nearest = np.argsort(-cosine, axis=1, kind="stable")[:, : self.k]
        votes = np.zeros((len(test.labels), len(test_set.classes)))
        np.add.at(votes, (np.arange(len(votes))[:, None], train.labels[nearest]), 1)
        right = test.labels[:, None] == np.arange(votes.shape[1])
        top1, top5 = (rates.topk_hits(votes, right, k) for k in (1, 5))
        return {
            "images": len(test.labels),
            "train_images": len(train.labels),
            **encode.report_unreadable(test.unreadable | train.unreadable),
            "chance": 1 / votes.shape[1],
            **rates.of_classes(top1, top5, test.labels, test_set.classes),
        }
