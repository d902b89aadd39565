"""What the exits that write a folder share: the files, the model's predictor, inputs of the parity, the card."""

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from grain_jax import config as config_lib
from grain_jax import inference
from grain_jax.convert import parity, tables, towers
from grain_jax.convert.exits import reasons
from grain_jax.convert.faults import needing
from grain_jax.convert.tables import Arrays, NamePair
from grain_jax.core import images, patches, schema
from grain_jax.models import grain
from grain_jax.runtime import checkpoint
from grain_jax.runtime.saved_model import StoredDecoder

MARK = "converted_from.json"  # every folder of an exit has it: where the model comes from


class Source(NamedTuple):
    """A model to write."""

    model: config_lib.Model
    params: Any
    folder: epath.Path  # that it was read from
    text_decoder: StoredDecoder | None = None
    sequence_lengths: tuple[int, ...] = ()  # of images in their own shape; (): squares


def read(path: epath.PathLike) -> Source:
    """The model in a workdir, a checkpoint or a converted folder. Raises checkpoint.CheckpointError."""
    stored = checkpoint.load_stored(path)
    given = stored.model, stored.merged(), epath.Path(stored.folder), stored.text_decoder
    return Source(*given, stored.sequence_lengths)


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


def towers_alone(source: Source) -> tuple[Source, list[str]]:
    """The two towers of a model, and lines about what is left behind.

    Of a model with a region decoder no projection of the tower itself was trained: the identity, cut to the width of the
    joint space or filled with zeros, stands in for it.
    """
    model = reasons.towers_alone(source.model)
    of_decoder = source.model.decoder is not None
    shapes = grain.parameter_shapes(model)
    params = flat(source)
    left = {name.partition("/")[0] for name in params.keys() - shapes.keys()}
    left |= {"image_projection"} if of_decoder else set()
    left |= {"text decoder"} if source.text_decoder is not None else set()
    params = {name: x for name, x in params.items() if name in shapes}
    if of_decoder and model.image.projection != "none":
        params["image_projection/kernel"] = np.eye(
            model.image.width, model.embed_dim, dtype=np.float32
        )
    lines = [f"left behind: {', '.join(sorted(left))}"] if left else []
    if of_decoder:
        lines.append(
            f"ATTENTION: the image embedding of the model came from its decoder; here it is the {model.image.pool} of the"
            " tokens, which nothing trained: take the image tower's tokens, or train on"
        )
    lengths = source.sequence_lengths
    return Source(model, tables.nested(params), source.folder, sequence_lengths=lengths), lines


def left_behind(source: Source) -> list[str]:
    """A line where the model has a text decoder, of an exit that cannot hold one."""
    return [] if source.text_decoder is None else ["left behind: text decoder"]


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
    library: str,
    proof: parity.Report,
    repo: str | None = None,
    missing: str = "",
) -> None:
    """Writes the model card, and the mark with the verdict of the parity.

    Args:
      folder: of the exit.
      source: the model.
      use: code that loads FOLDER.
      library: that loads it, as the Hub names it.
      proof: the report.
      repo: ORG/NAME on the Hub, in place of FOLDER.
      missing: why the folder has no tokenizer, or "".
    """
    report = proof.text if proof.verdict != parity.NOT_PROVEN else proof.text.splitlines()[-1]
    card = _CARD.format(
        use=use.strip().replace("FOLDER", repo or "FOLDER"),
        sizes="\n".join(towers.describe(source.model, {})),
        source=source.folder,
        report=report,
        missing=f"The folder has {missing}. A tokenizer that a library takes instead is another.\n\n"
        if missing
        else "",
        library=library,
        resized="in their own shape" if source.sequence_lengths else "to a square without a crop",
    )
    write_file(folder / "README.md", card)
    write_file(folder / MARK, {"source": str(source.folder), "parity": proof.verdict})


def raw_images() -> list[np.ndarray]:
    """Two random images, uint8 [H, W, 3], of different shapes."""
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in ((37, 53), (300, 200))]


def our_pixels(tower: config_lib.ImageTower, lengths: reasons.Lengths = ()) -> np.ndarray:
    """`raw_images` as the model gets them, [N, S, S, 3]; in their own shape [N, length, p*p*3], then zeros."""
    mean, std = np.array(tower.pixel_mean), np.array(tower.pixel_std)
    if not lengths:
        resized = np.stack([images.resize(image, tower.image_size) for image in raw_images()])
        return (resized / 255 - mean) / std
    found = our_patches(tower, lengths)
    pixels = found.pixels.reshape(*found.pixels.shape[:2], -1, 3)
    real = np.arange(pixels.shape[1]) < found.grid.prod(1, keepdims=True)
    pixels = (pixels / 255 - mean) / std * real[..., None, None]
    return pixels.reshape(found.pixels.shape)


def our_patches(tower: config_lib.ImageTower, lengths: reasons.Lengths) -> schema.Patches:
    """`raw_images` in their own shape, uint8, of the longest length."""
    size = tower.patch_size, max(lengths)
    return patches.stack([patches.of_image(image, *size) for image in raw_images()])


def our_outputs(source: Source, given: parity.Inputs) -> dict[str, np.ndarray]:
    """The outputs of a two-tower model, and its logits [images, texts]."""
    sizes = source.model, source.params
    predictor = inference.Predictor(*sizes, sequence_length=given.sequence_length)
    ours = parity.outputs_of(predictor, given)
    logits = predictor.logit_scale * ours["image_embed"] @ ours["text_embed"].T
    return ours | {"logits": logits + (predictor.logit_bias or 0.0)}


_CARD = """---
library_name: {library}
license: other
---

# Image and text towers

`grain-jax convert` wrote this folder from {source}.

```python
{use}
```

{missing}Images are resized {resized}. Texts with broken encodings or HTML entities, which training repaired, are
not repaired here.

## Model

```
{sizes}
```

Parity of the conversion:

```
{report}
```

## Licence

The weights: not stated by the run; the terms of the training data and of the model's author apply. State a licence
before you publish the weights.
"""
