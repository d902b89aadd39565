"""Loads a model of `transformers` with its processor, from a folder (local or remote) or the Hub's cache."""

import tempfile
from typing import Any, NamedTuple

from etils import epath
from grain_jax.data.annotate import chat

from grain_jax import errors


class CheckpointError(errors.UserError):
    """A model cannot be loaded."""


class Loaded(NamedTuple):
    """A model that is ready to run."""

    model: Any
    processor: Any
    device: str


def load(name: str, auto_class: str, *, device: str, half: bool) -> Loaded:
    """Loads a model for inference.

    Args:
      name: a folder as `save_pretrained` writes it, or a name on the Hub.
      auto_class: the class of `transformers` that chooses the model's.
      device: as torch names it; "" takes the accelerator if there is one, else the CPU.
      half: bfloat16 on an accelerator; on the CPU it is always float32.

    Raises:
      CheckpointError: there is no such model, or the class does not know it.
    """
    import torch
    import transformers

    if not device:
        # Without this question a torch that was built for CUDA names it on machines that have none.
        some = torch.accelerator.is_available()
        accelerator = torch.accelerator.current_accelerator() if some else None
        device = accelerator.type if accelerator else "cpu"
    dtype = torch.bfloat16 if half and not device.startswith("cpu") else torch.float32
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        folder = _local(name, scratch)
        try:
            processor = transformers.AutoProcessor.from_pretrained(folder)
            model = getattr(transformers, auto_class).from_pretrained(folder, dtype=dtype)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{name}: cannot be loaded by transformers' {auto_class}: {chat.one_line(error)}"
            ) from error
    return Loaded(model.to(device).eval(), processor, device)


def _local(name: str, scratch: str) -> str:
    """The folder itself, or a copy of a remote one, which transformers could not open."""
    if "://" not in name:
        return name
    source = epath.Path(name)
    if not source.is_dir():
        raise CheckpointError(
            f"{name}: no such folder, expected a model as save_pretrained writes it"
        )
    for path in source.iterdir():
        if not path.is_dir():
            path.copy(epath.Path(scratch) / path.name)
    return scratch
