"""A model of `transformers` from a folder (local or remote) or the Hub's cache, and its runs over batches."""

import tempfile
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from absl import logging
from etils import epath, epy

from grain_jax.core import errors
from grain_jax.data.annotate import chat

with epy.lazy_imports():  # slow to start, and not needed with an endpoint
    import torch
    import transformers

OUT_OF_MEMORY, MODEL_ERROR = "out of memory", "model error"

Item = TypeVar("Item")
Result = TypeVar("Result")


class CheckpointError(errors.UserError):
    """A model cannot be loaded."""


def load(name: str, auto_class: str, *, half: bool) -> tuple[Any, Any, str]:
    """Loads a model for inference, on the accelerator if there is one, else on the CPU.

    Args:
      name: a folder as `save_pretrained` writes it, or a name on the Hub.
      auto_class: the class of `transformers` that chooses the model's.
      half: bfloat16 on an accelerator; on the CPU it is always float32.

    Returns: the model, its processor, its device.

    Raises:
      CheckpointError: there is no such model, or the class does not know it.
    """
    # Without this question a torch that was built for CUDA names it on machines that have none.
    some = torch.accelerator.is_available()
    device = torch.accelerator.current_accelerator().type if some else "cpu"
    dtype = torch.bfloat16 if half and some else torch.float32
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        folder = name
        if "://" in name:  # transformers opens local folders
            folder = scratch
            if not epath.Path(name).is_dir():
                raise CheckpointError(
                    f"{name}: no such folder, expected a model as save_pretrained writes it"
                )
            for path in epath.Path(name).iterdir():
                if not path.is_dir():
                    path.copy(epath.Path(scratch) / path.name)
        try:
            processor = transformers.AutoProcessor.from_pretrained(folder)
            model = getattr(transformers, auto_class).from_pretrained(folder, dtype=dtype)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{name}: cannot be loaded by transformers' {auto_class}: {chat.one_line(error)}"
            ) from error
    return model.to(device).eval(), processor, device


class Batches:
    """Splits items into batches; halves one when memory runs out or an item fails, down to single items.

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
        try:
            return model(batch)
        except errors.UserError:
            raise
        except Exception as error:  # one image must not end a job of millions, whatever it does
            # The error holds the frames, and they the tensors: keep only its text beyond this block.
            memory = errors.is_out_of_memory(error) or type(error).__name__ == "OutOfMemoryError"
            detail = chat.one_line(f"{type(error).__name__}: {error}")
        if memory and torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(batch) == 1:
            return [chat.Failure(OUT_OF_MEMORY if memory else MODEL_ERROR, detail)]
        half = len(batch) // 2
        self.size = half if memory else self.size
        logging.warning("a batch of %d images failed, trying its halves: %s", len(batch), detail)
        return self._attempt(model, batch[:half]) + self._attempt(model, batch[half:])
