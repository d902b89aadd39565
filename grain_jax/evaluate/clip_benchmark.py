"""Adapter that lets the tasks of clip-benchmark use a GRAIN checkpoint (docs/library.md).

  python -m grain_jax.evaluate.clip_benchmark eval --model_type grain_jax --model GRAIN --pretrained DIR ...

is the command of clip-benchmark with one more model type. Written for clip-benchmark 1.6.2. Needs torch; the model
itself runs in JAX.
"""

import importlib
import sys
from collections.abc import Callable, Sequence

import numpy as np
import PIL.Image
import torch

from grain_jax import inference
from grain_jax.core import errors
from grain_jax.input_pipeline import tokenizer

NAME = "grain_jax"  # value of --model_type in clip-benchmark


class ClipBenchmarkError(errors.UserError):
    """clip-benchmark is missing, or the model does not fit it; the message is one line."""


def register() -> None:
    """Registers the model type with clip-benchmark. Raises ClipBenchmarkError if it is not installed."""
    try:
        models = importlib.import_module("clip_benchmark.models")
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != "clip_benchmark":
            raise
        raise ClipBenchmarkError(
            "clip-benchmark: not installed, expected it; pip install clip-benchmark requests, in an"
            " environment of its own with numpy below 2.4"
        ) from None
    models.TYPE2FUNC[NAME] = load
    if NAME not in models.MODEL_TYPES:  # the command line may have this list already
        models.MODEL_TYPES.append(NAME)


class Model(torch.nn.Module):
    """A Predictor behind the two methods that clip-benchmark calls; its parameters are JAX arrays."""

    def __init__(self, predictor: inference.Predictor):
        super().__init__()
        self.predictor = predictor

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Images from the transform, uint8 [B, S, S, 3] -> float32 [B, D], unit length."""
        embed = self.predictor.encode_image(images.cpu().numpy())
        return torch.from_numpy(embed).to(images.device)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids, int32 [N, L] from the tokenizer -> float32 [N, D], unit length."""
        embed = self.predictor.encode_text(tokens.cpu().numpy())
        return torch.from_numpy(embed).to(tokens.device)


def load(
    model_name: str = "", pretrained: str = "", **_: object
) -> tuple[Model, Callable[[PIL.Image.Image], torch.Tensor], Callable[..., torch.Tensor]]:
    """The loader that `load_clip` of clip-benchmark calls: (model, transform, tokenizer).

    `pretrained` is a training workdir, a checkpoint or a converted folder. The other arguments do not matter: nothing
    is downloaded, and JAX chooses the device.

    Raises:
      ClipBenchmarkError: the end of a text cannot be found from its token ids.
      checkpoint.CheckpointError: there is no model.
    """
    predictor = inference.load(pretrained)
    tower = predictor.model.text
    if tower.seeks_end and tower.tokenizer != "clip" and tower.end_id is None:
        raise ClipBenchmarkError(
            f"{pretrained}: got a text tower that is read at its end token, with {tower.tokenizer};"
            " expected CLIP's tokenizer there, whose end token is its highest id, or model.text.end_id"
        )
    library = tokenizer.of_tower(tower, predictor.folder)

    def ids(texts: str | Sequence[str]) -> torch.Tensor:  # padded as in training
        texts = [texts] if isinstance(texts, str) else list(texts)
        return torch.from_numpy(np.asarray(library(texts, tower.context_length), np.int32))

    # Resized as in `grain_jax.evaluate`, uint8 [S, S, 3].
    return Model(predictor), lambda image: torch.from_numpy(predictor.resized(image).copy()), ids


def main() -> int:
    """Runs the command of clip-benchmark with this model type; exit status 2 after a UserError."""
    try:
        register()
        importlib.import_module("clip_benchmark.cli").main()
    except errors.UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
