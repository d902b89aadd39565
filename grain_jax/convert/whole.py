"""A whole model of any origin, as `teacher.path` names one: its configuration and its parameters.

It reads what `init.image` reads: our runs, checkpoints, converted folders and folders of to-hf, the models of the
package, `hf://ORG/NAME`, and CLIP, SigLIP and others from open_clip, OpenAI, transformers, timm and big_vision. Of an
image tower alone (DINOv3) it makes a model without texts.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from grain_jax import config as config_lib
from grain_jax.convert import huggingface, tables, towers
from grain_jax.convert.big_vision import checkpoint as big_vision
from grain_jax.convert.big_vision import towers as big_vision_towers
from grain_jax.convert.faults import ConvertError, prefixed
from grain_jax.convert.open_clip import checkpoint as open_clip
from grain_jax.convert.open_clip import towers as open_clip_towers
from grain_jax.core import regular_file
from grain_jax.input_pipeline import sources, tokenizer
from grain_jax.models import grain
from grain_jax.runtime import checkpoint, pretrained, saved_model
from grain_jax.runtime.pretrained import hub
from grain_jax.training import teacher, train_step

# Of a model without texts: as small as a tower can be.
_NO_TEXT: dict[str, Any] = dict(
    vocab_size=3, context_length=3, width=1, depth=1, heads=1, mlp_dim=1
)


class Whole(NamedTuple):
    """A model."""

    model: config_lib.Model  # `text.tokenizer` is "clip", or the file where there is one
    has_texts: bool  # False: its text tower is a placeholder
    params: Any  # nested dict of float32 numpy arrays
    report: tuple[str, ...]  # lines about what was assumed


@functools.lru_cache(maxsize=8)
def describe(path: str) -> teacher.Described:
    """The configuration of a model, without its arrays where a file beside them tells it.

    Raises:
      errors.UserError: as `load`.
    """
    folder = _ours(path)
    if folder is None:
        found = load(path)
        return teacher.Described(found.model, found.model.embed_dim, found.has_texts)
    if _is_of_to_hf(folder):
        model = huggingface.read_config(folder / "config.json")
    else:
        model = saved_model.read_model(folder)
    return teacher.Described(_with_tokenizer(model, folder), model.embed_dim, True)


@functools.lru_cache(maxsize=1)
def load(path: str) -> Whole:
    """A model; the last one is kept until `forget`.

    Args:
      path: as `init.image`; or the name of a model of the package.

    Raises:
      errors.UserError: there is none, or it is damaged or not supported.
    """
    folder = _ours(path)
    if folder is None:
        return _foreign(path)
    model, params, where = saved_model.load_model(folder)
    return Whole(_with_tokenizer(model, epath.Path(where)), True, params, ())


def forget() -> None:
    """Lets go of the arrays of the last model."""
    load.cache_clear()


def _ours(path: str) -> epath.Path | None:
    """The folder of a model that `grain_jax.load` reads, or None."""
    if path in pretrained.NAMES:
        return saved_model.find(path)
    text, head = open_clip.split(path)
    folder = hub.local(text)
    if head is None and any((folder / x).is_dir() for x in ("params", "checkpoints", "state")):
        return folder
    return folder if head is None and _is_of_to_hf(folder) else None


def _is_of_to_hf(folder: epath.Path) -> bool:
    file = folder / "config.json"
    if not regular_file.is_one(file) or (folder / "params").is_dir():
        return False
    content = regular_file.read_json(file, dict[str, Any], "a JSON object")
    return content.get("model_type") == "grain"


def _foreign(path: str) -> Whole:
    """A model of another package."""
    text, _ = open_clip.split(path)
    if (
        not big_vision.is_path(path)
        and not hub.is_reference(text)
        and not epath.Path(text).exists()
    ):
        raise ConvertError(f"{path}: no such file or folder, expected a checkpoint")
    files, importers = open_clip, open_clip_towers
    if big_vision.is_path(path):
        files, importers = big_vision, big_vision_towers
    stored: Any = files.read(path)
    image = importers.import_tower("image", stored, towers.Settings())
    try:
        words = importers.import_tower("text", stored, towers.Settings())
    except ConvertError:
        if any(name in stored.state for name in files.SCALARS.values()):
            raise  # a model of two towers
        return _image_alone(path, image, stored.state)
    with prefixed(f"{path}: "):
        model, params = towers.two_tower_model(stored.state, image, words, files.SCALARS)
    tokenizers = getattr(stored, "tokenizers", ())
    file = next((x for x in tokenizers if x.name == model.text.tokenizer), None)
    if file is not None:
        model = _named(model, str(file))
    report = [f"ASSUMED {x}" for x in (*image.assumed, *words.assumed)]
    return Whole(model, True, params, tuple(report))


def _image_alone(path: str, image: towers.Tower, state: Mapping[str, np.ndarray]) -> Whole:
    """A model of an image tower, pooled by its class token or as the mean of its patches where it has no pool."""
    config = image.config
    if config.pool == "none":
        config = dataclasses.replace(config, pool="class" if config.class_token else "mean")
    width = config.width
    if config.projection != "none":
        width = tables.Entries(state, image.rows).width("image_projection/kernel")
    model = config_lib.Model(
        embed_dim=width,
        image=config,
        text=config_lib.TextTower(**_NO_TEXT),
        decoder=None,
    )
    model = config_lib.model_from_dict(dataclasses.asdict(model))
    shapes = grain.parameter_shapes(model)
    own = {name: x for name, x in shapes.items() if name.startswith("image")}
    rest = {name: np.zeros(x, np.float32) for name, x in shapes.items() if name not in own}
    with prefixed(f"{path}: "):
        params = tables.read(image.rows, towers.completed(state, image), own)
    report = tuple(f"ASSUMED {x}" for x in image.assumed)
    return Whole(model, False, tables.nested(params | rest), report)


def _named(model: config_lib.Model, file: str) -> config_lib.Model:
    return dataclasses.replace(model, text=dataclasses.replace(model.text, tokenizer=file))


def _with_tokenizer(model: config_lib.Model, folder: epath.Path) -> config_lib.Model:
    """The model with the path of its own tokenizer, where it came with one."""
    if model.text.tokenizer == "clip":
        return model
    file = tokenizer.own_file(model.text, folder)
    return _named(model, str(file or model.text.tokenizer))


def identity_of_teacher(config: config_lib.Config) -> list[sources.Identity]:
    """What tells the teacher of a run from others: [] where nothing but the config decides it.

    Raises:
      errors.UserError: it cannot be read.
    """
    kind = config.teacher.kind
    if kind not in ("checkpoint", "embeddings"):
        return []
    if kind == "checkpoint":
        found = load(teacher.path_of(config))
        digests = saved_model.model_digests(found.model, found.params)
        digest = f"{digests['params']}{digests['model'][:16]}"
    else:
        digest = teacher.digest_of_embeddings(config)
    return [
        sources.Identity(
            name=checkpoint.TEACHER,
            split=teacher.path_of(config),
            shard_lengths=[],
            digest=digest,
            digest_of=kind,
        )
    ]


def place(
    config: config_lib.Config, state: train_step.TrainState, shardings: train_step.TrainState
) -> train_step.TrainState:
    """`state` with the parameters of a teacher that no checkpoint holds, on the devices; then they are forgotten.

    Raises:
      errors.UserError: as `load`.
    """
    if config.teacher.kind != "checkpoint":
        return state
    params = load(teacher.path_of(config)).params
    for zeros in jax.tree.leaves(
        state.teacher
    ):  # of the first step: never two teachers on a device
        zeros.delete()
    put = lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])
    placed = jax.tree.map(put, params, shardings.teacher)
    forget()
    return state._replace(teacher=placed)
