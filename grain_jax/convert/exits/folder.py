"""What the exports that write a folder share: the files, the model's predictor, inputs of the parity, the card."""

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from grain_jax import config as config_lib
from grain_jax import inference
from grain_jax.checkpoint import saved_model
from grain_jax.convert import model_card, parity, tables
from grain_jax.convert.faults import needing
from grain_jax.convert.tables import Arrays, NamePair
from grain_jax.core import images
from grain_jax.models import grain

MARK = "converted_from.json"  # every folder of an exit has it: where the model comes from


class Source(NamedTuple):
    """A model to write."""

    model: config_lib.Model
    params: Any
    folder: epath.Path  # that it was read from


def read(path: epath.PathLike) -> Source:
    """The model in a workdir, a checkpoint or a converted folder. Raises checkpoint.CheckpointError."""
    model, params, folder = saved_model.load_model(path)
    return Source(model, params, epath.Path(folder))


def needing_packages(prove: Callable[..., parity.Report]) -> Callable[..., parity.Report]:
    """`prove(target, source, ...)` whose report is NOT PROVEN where a package is missing, also one of the others' own."""

    @functools.wraps(prove)
    def proved(target: epath.Path, source: Source, *args: Any, **options: Any) -> parity.Report:
        try:
            return prove(target, source, *args, **options)
        except ImportError as error:
            reason = str(error).strip().partition("\n")[0]
            return parity.not_proven(source.params, f"{reason}; pip install 'grain_jax[interop]'")

    return proved


def flat(source: Source) -> Arrays:
    """The parameters by flat name, float32."""
    return {name: np.asarray(x, np.float32) for name, x in grain.flat(source.params).items()}


def entries(rows: list[NamePair], params: Arrays) -> Arrays:
    """The entries of all parameters. Raises ValueError where a parameter has no row."""
    lost = params.keys() - {row.ours for row in rows}
    if lost:
        raise ValueError(f"parameters without a name in the format: {', '.join(sorted(lost))}")
    return tables.write(rows, params)


def write_files(folder: epath.Path, weights: str, arrays: Arrays, files: Mapping[str, Any]) -> None:
    """Writes the files (bytes, texts, or JSON values), and the arrays as safetensors.

    Raises:
      ConvertError: safetensors is missing.
    """
    with needing("safetensors", weights):
        import safetensors.numpy

        for name, content in files.items():
            write_file(folder / name, content)
        content = safetensors.numpy.save(arrays, metadata={"format": "pt"})
        (folder / weights).write_bytes(content)


def write_file(path: epath.Path, content: Any) -> None:
    """Writes bytes, a text, or another value as JSON."""
    if isinstance(content, bytes):
        path.write_bytes(content)
        return
    if not isinstance(content, str):
        content = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(content)


def finish(
    folder: epath.Path,
    source: Source,
    use: str,
    proof: parity.Report,
    missing: str,
    library: str = "transformers",
    repo: str | None = None,
) -> None:
    """Writes the model card (`model_card.write`), and the mark with the verdict of the parity."""
    run = model_card.read_run(source.folder)
    card = model_card.write(source.model, run, proof, use, missing, library=library, repo=repo)
    write_file(folder / "README.md", card)
    write_file(folder / MARK, {"source": str(source.folder), "parity": proof.verdict})


def raw_images() -> list[np.ndarray]:
    """Two random images, uint8 [H, W, 3], of different shapes."""
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in ((37, 53), (300, 200))]


def our_pixels(tower: config_lib.ImageTower) -> np.ndarray:
    """`raw_images` as the model gets them, [N, S, S, 3]."""
    mean, std = np.array(tower.pixel_mean), np.array(tower.pixel_std)
    resized = np.stack([images.resize(image, tower.image_size) for image in raw_images()])
    return (resized / 255 - mean) / std


def our_outputs(source: Source, inputs: parity.Inputs) -> dict[str, np.ndarray]:
    """The outputs of a two-tower model, and its logits [images, texts]."""
    predictor = inference.Predictor(source.model, source.params)
    ours = parity.outputs_of(predictor, inputs)
    logits = predictor.logit_scale * ours["image_embed"] @ ours["text_embed"].T
    return ours | {"logits": logits + (predictor.logit_bias or 0.0)}
