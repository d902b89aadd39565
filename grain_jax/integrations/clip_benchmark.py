"""clip-benchmark beside us: a GRAIN checkpoint as one of its models, so that its tasks run it (docs/library.md).

  python -m grain_jax.integrations.clip_benchmark eval --model_type grain_jax --model GRAIN --pretrained DIR ...

is its own command with this model type added. What is said of it is of clip-benchmark 1.6.2. Needs torch;
the model itself runs in JAX.
"""

import functools
import sys
from collections.abc import Callable, Sequence

import numpy as np
import PIL.Image
import torch

import grain_jax
from grain_jax import errors, inference
from grain_jax.files import images
from grain_jax.input_pipeline import tokenizer

NAME = "grain_jax"  # clip-benchmark's --model_type


class ClipBenchmarkError(errors.UserError):
    """clip-benchmark is missing, or asks for what this adapter does not do; the message is one line."""


def register() -> None:
    """Makes the model type known to clip-benchmark, also to a command line that is imported already.

    Raises:
      ClipBenchmarkError: clip-benchmark is not installed.
    """
    try:
        from clip_benchmark import models
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] != "clip_benchmark":
            raise
        raise ClipBenchmarkError(
            "clip-benchmark: not installed, expected it; pip install clip-benchmark requests, in an"
            " environment of its own with numpy below 2.4"
        ) from None
    models.TYPE2FUNC[NAME] = load
    if NAME not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(NAME)


class Model(torch.nn.Module):
    """A Predictor behind the two methods that clip-benchmark calls.

    Args:
      predictor: the model; its parameters are JAX's, this module has none.
    """

    def __init__(self, predictor: inference.Predictor):
        super().__init__()
        self.predictor = predictor

    def encode_image(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pictures, uint8 [B, S, S, 3] of the transform -> float32 [B, D], unit length."""
        embed = self.predictor.encode_image(pictures.cpu().numpy())
        return torch.from_numpy(embed).to(pictures.device)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids, int32 [N, L] of the tokenizer -> float32 [N, D], unit length."""
        embed = self.predictor.encode_text(tokens.cpu().numpy())
        return torch.from_numpy(embed).to(tokens.device)


def load(
    model_name: str = "", pretrained: str = "", cache_dir: str | None = None, device: str = "cpu"
) -> tuple[Model, Callable[[PIL.Image.Image], torch.Tensor], Callable[..., torch.Tensor]]:
    """What clip-benchmark's `load_clip` asks of a loader: (model, transform, tokenizer).

    Args:
      model_name: for its results' names only.
      pretrained: a training workdir, a checkpoint or a converted folder.
      cache_dir, device: not looked at; nothing is downloaded, and JAX chooses the device.

    Raises:
      ClipBenchmarkError: the end of this model's texts cannot be told from their ids.
      checkpoint.CheckpointError: there is no model.
    """
    predictor = grain_jax.load(pretrained)
    tower = predictor.model.text
    if tower.pool == "end" and tower.tokenizer != "clip":
        raise ClipBenchmarkError(
            f"{pretrained}: got a text tower that is read at its end token, with {tower.tokenizer};"
            " expected CLIP's tokenizer there, whose end token is its highest id"
        )
    ids = functools.partial(
        _tokenize, tokenizer.of_tower(tower, predictor.folder), tower.context_length
    )
    return Model(predictor), functools.partial(_resize, predictor.model.image.image_size), ids


def _resize(size: int, picture: PIL.Image.Image) -> torch.Tensor:
    """As in our evaluations: uint8 [S, S, 3], normalised in the model."""
    return torch.from_numpy(images.resize(picture, size).copy())


def _tokenize(
    library: tokenizer.Tokenizer, context_length: int, texts: str | Sequence[str]
) -> torch.Tensor:
    """int32 [N, context length], padded as the tower was trained."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    return torch.from_numpy(np.asarray(library(texts, context_length), np.int32))


def main() -> int:
    """clip-benchmark's command with this model type; the exit status is 2 where our part is misused."""
    try:
        register()
        from clip_benchmark import cli

        cli.main()
    except errors.UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
