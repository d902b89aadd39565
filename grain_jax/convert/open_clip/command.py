"""The commands from-open-clip and, of CLIP, SigLIP and DINOv3's image tower, from-hf."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from grain_jax import config as config_lib
from grain_jax.convert import output, parity, tables, towers
from grain_jax.convert.faults import ConvertError, prefixed
from grain_jax.convert.open_clip import checkpoint as files
from grain_jax.convert.open_clip import comparison
from grain_jax.convert.open_clip.towers import import_tower
from grain_jax.models import grain

# In the place of the texts of an image tower alone: as small as a tower can be, and for no tokenizer.
_NO_TEXTS: dict[str, Any] = dict(
    vocab_size=8, context_length=8, width=1, depth=1, heads=1, mlp_dim=1
)


class Imported(NamedTuple):
    """The model of a checkpoint."""

    model: config_lib.Model
    params: dict  # nested, float32
    has_texts: bool
    assumed: dict[str, Any]  # tower -> lines for the report


def from_open_clip(
    source: epath.PathLike, folder: epath.PathLike, settings: towers.Settings
) -> parity.Report:
    """from-open-clip: the weights of OpenAI's or open_clip's CLIP or SigLIP to a two-tower model in `folder`.

    Raises:
      ConvertError: the checkpoint cannot be converted, or the folder holds something else.
    """
    target = output.check_free(folder)
    checkpoint = files.read(source, library="open_clip")
    if checkpoint.is_hf:
        raise ConvertError(
            f"{source}: got weights of transformers; grain-jax convert from-hf --input {source} --output {folder}"
        )
    return _convert(checkpoint, source, target, settings, "from-open-clip")


def from_transformers(
    source: epath.PathLike, folder: epath.PathLike, settings: towers.Settings
) -> parity.Report:
    """from-hf: CLIP, SigLIP or DINOv3 of transformers to a model in `folder`; raises as `from_open_clip`."""
    target = output.check_free(folder)
    checkpoint = files.read(source)
    if not checkpoint.is_hf:
        raise ConvertError(
            f"{source}: got no weights of transformers; grain-jax convert from-open-clip --input {source} --output {folder}"
            " reads those of open_clip and OpenAI"
        )
    return _convert(checkpoint, source, target, settings, "from-hf")


def import_model(checkpoint: files.Checkpoint, settings: towers.Settings) -> Imported:
    """The model of a checkpoint of either package.

    Raises:
      ConvertError: there is none, or arrays are missing, unknown or of another shape.
    """
    image = import_tower("image", checkpoint, settings)
    if checkpoint.is_dinov3:
        return _of_image(checkpoint, image)
    text = import_tower("text", checkpoint, settings)
    with prefixed(f"{checkpoint.path}: "):
        model, params = towers.two_tower_model(checkpoint.state, image, text, files.SCALARS)
    return Imported(model, params, True, {"image": image.assumed, "text": text.assumed})


def _of_image(checkpoint: files.Checkpoint, image: towers.Tower) -> Imported:
    """An image tower alone; its class token, of the tower's width, embeds an image."""
    model = config_lib.Model(
        embed_dim=image.config.width,
        image=image.config,
        text=config_lib.TextTower(**_NO_TEXTS),
        decoder=None,
    )
    model = config_lib.model_from_dict(dataclasses.asdict(model))
    shapes = grain.parameter_shapes(model)
    own = {name: x for name, x in shapes.items() if name.startswith("image/")}
    rest = {name: np.zeros(x, np.float32) for name, x in shapes.items() if name not in own}
    with prefixed(f"{checkpoint.path}: "):
        state = towers.completed(checkpoint.state, image)
        params = tables.read(image.rows, state, own)
        towers.refuse_unknown(state, image.rows, own)
    return Imported(model, tables.nested(params | rest), False, {"image": image.assumed})


def describe(path: epath.PathLike) -> tuple[dict[str, Any], bool]:
    """The configuration of the model in a folder or file of either package, and whether it reads texts.

    Raises:
      ConvertError: as `import_model`.
    """
    imported = import_model(files.read(path), towers.Settings())
    return dataclasses.asdict(imported.model), imported.has_texts


def _convert(
    checkpoint: files.Checkpoint,
    source: epath.PathLike,
    folder: epath.Path,
    settings: towers.Settings,
    command: str,
) -> parity.Report:
    imported = import_model(checkpoint, settings)
    model, params = imported.model, imported.params
    proof = comparison.prove(checkpoint, model, params, has_texts=imported.has_texts)
    name = model.text.tokenizer
    file = next((x for x in checkpoint.tokenizers if x.name == name), None)
    words = {} if file is None else {name: file.read_bytes()}
    output.save(folder, model, params, source, proof, files=words, has_texts=imported.has_texts)
    lines = towers.describe(model, imported.assumed)
    if (scale := np.exp(params["logit_scale"])) > 100.5:  # CLIP stops near 100
        lines.append(
            f"logit scale {scale:.4g}; training clips it at 100 unless optim.frozen has it"
        )
    if not checkpoint.hf and not checkpoint.open_clip:
        lines.append(
            "The parity below cannot show whether heads and activations are right: there is no config, so the"
            " other side is built with those assumed or told above; check them"
        )
    if not imported.has_texts:
        lines.append(
            "no text tower: the folder embeds images alone; finetune and init.image read it"
        )
    elif file is not None:
        lines.append(f"tokenizer {file}, copied")
    elif name != "clip":
        lines.append(f"tokenizer NOT FOUND; copy the tower's to {folder / name}")
    return proof.after(f"{command}: {checkpoint.path} -> {folder}", *lines)
