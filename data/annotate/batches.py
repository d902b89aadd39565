"""Runs a model over batches; halves a batch when memory runs out or an item fails, down to single items."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from absl import logging
from grain_jax.data.annotate import chat

from grain_jax import errors

OUT_OF_MEMORY, MODEL_ERROR = "out of memory", "model error"

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batches:
    """Splits items into batches.

    Attributes:
      size: the most items in a batch; it is halved when memory runs out, and not raised again.
    """

    def __init__(self, size: int):
        self.size = size

    def run(
        self, model: Callable[[Sequence[Item]], list[Result]], items: Sequence[Item]
    ) -> list[Result | chat.Failure]:
        """One result an item; a failure where the model raises even for that item alone.

        Raises:
          UserError: raised by the model, since it concerns every item.
        """
        results: list[Result | chat.Failure] = []
        while len(results) < len(items):
            results += self._attempt(model, items[len(results) : len(results) + self.size])
        return results

    def _attempt(self, model, batch):
        import torch

        try:
            return model(batch)
        except errors.UserError:
            raise
        except Exception as error:  # one image must not end a job of millions, whatever it does
            # The error holds the frames, and they the tensors: keep only its text beyond this block.
            memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
            detail = chat.one_line(f"{type(error).__name__}: {error}")
        if memory and torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(batch) == 1:
            return [chat.Failure(OUT_OF_MEMORY if memory else MODEL_ERROR, detail)]
        half = len(batch) // 2
        if memory:
            self.size = half
            logging.warning("memory ran out at %d images: %d at a time now", len(batch), half)
        else:
            logging.warning(
                "a batch of %d images failed, trying its halves: %s", len(batch), detail
            )
        return self._attempt(model, batch[:half]) + self._attempt(model, batch[half:])
