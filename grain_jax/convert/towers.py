"""What imports of other libraries' checkpoints share: towers and arrays become one of our models.

Each import states the configuration of its two towers and the table of its names. Every array of the
checkpoint is accounted for.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from grain_jax import config as config_lib
from grain_jax.checkpoint.saved_model import Stored
from grain_jax.convert import output, parity, tables
from grain_jax.convert.exits import tokenizers
from grain_jax.convert.faults import raise_any
from grain_jax.convert.tables import Entries, NamePair
from grain_jax.core import regular_file
from grain_jax.input_pipeline import tokenizer
from grain_jax.models import grain

TOWERS = ("image", "text")
# Keys of a tower that change neither its parameters nor what they compute.
OF_TRAINING = (
    *("position_init", "position_period", "block_init", "qkv_init_gain"),
    *("dropout", "unroll", "keep"),
)
CLIP_PIXELS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIGLIP_PIXELS = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
SCALARS = (NamePair("logit_scale", "logit_scale"), NamePair("logit_bias", "logit_bias"))
_CLIP_VOCABULARY, GEMMA_VOCABULARY = 49408, 256000  # the second is SigLIP 2's
_TOKENIZERS = ("tokenizer.json", "spiece.model")
# Stands in for the text tower of a model that embeds images alone: the smallest tower there is.
_NO_TEXTS: dict[str, Any] = dict(vocab_size=8, context_length=8, width=1, depth=1, heads=1, mlp_dim=1)


class Towers(NamedTuple):
    """What a format says of a checkpoint."""

    embed_dim: int
    image: config_lib.ImageTower
    text: config_lib.TextTower | None  # None: an image tower alone
    rows: Sequence[NamePair]  # the names of all parameters


class Imported(NamedTuple):
    """One of our models, made of a checkpoint."""

    model: config_lib.Model
    params: dict  # nested, float32
    has_texts: bool


def model_of(towers: Towers, scale: Any = 0.0, bias: Any = None) -> config_lib.Model:
    """The model of one or two towers; `scale` (a logarithm) and `bias` of logits may be arrays of one value.

    Raises:
      config.ConfigError: sizes that no model has.
    """
    model = config_lib.Model(
        embed_dim=towers.embed_dim,
        logit_scale_init=float(np.clip(np.exp(np.minimum(scale, 88)), 1, 100)),
        logit_bias_init=None if bias is None else float(bias),
        image=towers.image,
        text=towers.text or config_lib.TextTower(**_NO_TEXTS),
        decoder=None,
    )
    return config_lib.model_from_dict(dataclasses.asdict(model))


def build(towers: Towers, state: Mapping[str, np.ndarray]) -> Imported:
    """The model of a checkpoint, all of its arrays in `state`; logit scale (a logarithm) and bias may be [1].

    Raises:
      ConvertError: arrays that are missing, unknown, not finite or of another shape; one line per fault.
      config.ConfigError: sizes that no model has.
    """
    names = {row.ours: row.theirs for row in towers.rows}
    scalars = [names.get(x, "") for x in ("logit_scale", "logit_bias")]
    state = {k: x.reshape(()) if k in scalars and x.size == 1 else x for k, x in state.items()}
    scale, bias = map(state.get, scalars)
    finite = lambda x: x is not None and x.shape == () and np.isfinite(x)
    bias = None if bias is None else bias if finite(bias) else 0.0
    model = model_of(towers, scale if finite(scale) else 0.0, bias)
    shapes = grain.parameter_shapes(model)
    read = {name: x for name, x in shapes.items() if towers.text or name.startswith("image/")}
    name, image = names.get("image/position_embed", ""), towers.image
    if image.class_token and name in state:  # without a position, as in big_vision and some models of timm
        positions, grid = state[name], image.image_size // image.patch_size
        if positions.shape[-2:-1] == (grid**2,):
            state[name] = np.concatenate([0 * positions[..., :1, :], positions], axis=-2)
    params = tables.read(towers.rows, state, read, unused=())
    rest = {name: np.zeros(x, np.float32) for name, x in shapes.items() if name not in read}
    return Imported(model, tables.nested(params | rest), towers.text is not None)


def text_fields(
    folder: epath.Path, vocab_size: int, *, siglip: bool = False, end_id: int | None = None
) -> dict[str, Any]:
    """The keys of a text tower about its tokenizer: `tokenizer`, `cleaning`, `pad_id` and `end_id`.

    SigLIP 2 at a fixed size calls itself siglip: its tokenizer differs, or else the size of its vocabulary.

    `siglip`: the tower is SigLIP's or SigLIP 2's; `end_id` ends a text, where it is not the highest.
    """
    config, name = folder / "tokenizer_config.json", ""
    if regular_file.is_one(config):
        content = regular_file.read_json(config, dict[str, Any], "a JSON object")
        name = str(content.get("tokenizer_class") or "")
    is_first = name.startswith("SiglipTokenizer") if name else vocab_size != GEMMA_VOCABULARY
    first = siglip and is_first
    fields = dict(tokenizer="clip", cleaning="lower", pad_id=0, end_id=end_id)
    if siglip:
        fields |= dict(cleaning="siglip", pad_id=1) if first else dict(cleaning="siglip2")
    if end_id is not None:  # MetaCLIP 2
        fields |= dict(cleaning="none", pad_id=1)
    if siglip or vocab_size != _CLIP_VOCABULARY:
        suffix = ".model" if first else ".json"  # the file that the model was trained with
        files = [x for x in _TOKENIZERS if regular_file.is_one(folder / x)]
        fields["tokenizer"] = min(files, key=lambda x: not x.endswith(suffix), default=_TOKENIZERS[0])
    return fields


def write(
    command: str,
    source: epath.Path,
    folder: epath.Path,
    imported: Imported,
    proof: parity.Report,
    *lines: str,
) -> parity.Report:
    """Writes a model, with its tokenizer's file if it lies beside the weights; returns the whole report.

    Raises:
      ConvertError: the tokenizer ends texts otherwise than the tower expects.
      UserError: the tokenizer's file cannot be read, or has ids beyond the vocabulary of the tower.
    """
    model, params, has_texts = imported
    name, files, lines = model.text.tokenizer, {}, (*describe(model), *lines)
    if not has_texts:
        lines += ("no text tower: the model embeds images alone; finetune and init.image read it",)
    elif name != "clip":
        file = (source if source.is_dir() else source.parent) / name
        if regular_file.is_one(file):
            tokenizer.of_tower(model.text, file.parent)  # raises if it does not fit the tower
            model = tokenizers.with_end(Stored(model, params, str(file.parent))).model
            files[name] = file.read_bytes()
            lines += (f"tokenizer {file}, copied",)
        else:
            lines += (f"tokenizer NOT FOUND; copy it to {folder / name}",)
    output.save(folder, model, params, source, proof, files=files, has_texts=has_texts)
    return proof.after(f"{command}: {source} -> {folder}", *lines)


def image_sizes(entries: Entries) -> dict[str, Any]:
    """The keys of an image tower that the shapes of a checkpoint without a config tell.

    Raises:
      ConvertError: an array that gives a size is missing or has another number of axes.
    """
    (width,) = entries.shape("image/norm/scale", 1)
    kernel = entries.shape("image/patch_embed/kernel", 4)
    patch = math.isqrt(math.prod(kernel) // 3 // width)
    positions = entries.shape("image/position_embed", 2, 3)[-2]
    class_token = "image/class_token" in entries
    grid = math.isqrt(positions)
    if class_token and grid * grid != positions:
        grid = math.isqrt(positions - 1)
    if positions - grid * grid not in (0, int(class_token)):
        name = entries.name("image/position_embed")
        raise_any([f"{name}: got {positions} positions, expected a square"])
    return dict(
        image_size=grid * patch,
        patch_size=patch,
        width=width,
        qk_norm="image/blocks/attention/query_norm/scale" in entries,
        pre_norm="image/pre_norm/scale" in entries,
        patch_bias="image/patch_embed/bias" in entries,
        class_token=class_token,
        projection=_projection(entries, "image_projection"),
        **block_sizes(entries, "image"),
    )


def text_sizes(entries: Entries) -> dict[str, Any]:
    """The keys of a text tower that the shapes of a checkpoint tell; raises as `image_sizes`."""
    vocab_size, width = entries.shape("text/token_embed/embedding", 2)
    return dict(
        context_length=entries.shape("text/position_embed", 2, 3)[-2],
        vocab_size=vocab_size,
        width=width,
        projection=_projection(entries, "text_projection"),
        **block_sizes(entries, "text"),
    )


def block_sizes(entries: Entries, tower: str) -> dict[str, Any]:
    """The keys of a tower or decoder that the arrays of its layers tell; raises as `image_sizes`."""
    depth = entries.depth(f"{tower}/blocks/norm_1/scale")
    return dict(depth=depth, mlp_dim=entries.shape(f"{tower}/blocks/mlp/in/bias", 1)[0], unroll=1)


def _projection(entries: Entries, name: str) -> str:
    if f"{name}/kernel" not in entries:
        return "none"
    return "affine" if f"{name}/bias" in entries else "matrix"


def describe(model: config_lib.Model) -> list[str]:
    """The lines of a report about a model: the keys of its parts."""
    # Reports and cards are published: no path of this machine stands in them.
    text = dataclasses.replace(model.text, tokenizer=epath.Path(model.text.tokenizer).name)
    model, lines = dataclasses.replace(model, text=text), [f"embedding {model.embed_dim}"]
    for part in ("image", "text", "decoder", "boxes"):
        config = getattr(model, part)
        keys = {} if config is None else dataclasses.asdict(config)
        shown = [f"{key} {x}" for key, x in keys.items() if key not in (*OF_TRAINING, "options")]
        lines.append(f"{part:8} {', '.join(shown) or 'none'}")
    return lines
