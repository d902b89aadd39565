"""from-big-vision and to-big-vision: the .npz of two_towers, which has no config; its habits stand here.

A path may name a sub-tree of the file, `FILE.npz:params`.
"""

import io
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from grain_jax import config as config_lib
from grain_jax.convert import archives, output, parity, tables, towers
from grain_jax.convert.exits import folder as exits
from grain_jax.convert.exits import needs
from grain_jax.convert.faults import ConvertError, prefixed, raise_any
from grain_jax.convert.tables import Arrays, Entries, NamePair
from grain_jax.core import atomic, errors, regular_file
from grain_jax.models import grain

SCALARS = (NamePair("logit_scale", "t"), NamePair("logit_bias", "b"))
_FIRST_VOCABULARY = 32000  # SigLIP's; its padding has the id 1


def from_big_vision(source: epath.PathLike, folder: epath.PathLike) -> parity.Report:
    """from-big-vision: a two_towers .npz to a model in `folder`.

    Raises:
      ConvertError: the checkpoint cannot be converted, or the folder holds something else.
    """
    target = output.check_free(folder)
    state = read(source)
    with prefixed(f"{source}: "):
        imported = towers.build(_towers(state), state)
    proof = _prove(source, state, imported.model, imported.params)
    lines = (
        "ASSUMED  norm epsilon 1e-6, tanh GELU, pixels in [-1, 1]: its models'",
        f"ASSUMED  texts padded with the id {imported.model.text.pad_id}; pools mean and last without a head",
    )
    return towers.write("from-big-vision", epath.Path(source), target, imported, proof, *lines)


def read(path: epath.PathLike) -> dict[str, np.ndarray]:
    """`FILE.npz` or `FILE.npz:sub-tree` as float32 arrays, each layer apart.

    Their names are as "img/Transformer/encoderblock_0/LayerNorm_0/scale".

    Raises:
      ConvertError: no such file, not a .npz of arrays, or no such sub-tree.
    """
    match = re.fullmatch(r"(.*\.npz):(.+)", str(path))
    file, subtree = match.groups() if match else (str(path), "")
    if not regular_file.is_one(file):
        raise ConvertError(f"{file}: no such file; expected a .npz, or FILE.npz:sub-tree")
    arrays = archives.read_npz(epath.Path(file))
    below = lambda prefix: {x.removeprefix(prefix): a for x, a in arrays.items() if x.startswith(prefix)}
    # A training checkpoint holds the parameters under one of these, beside the state of the optimizer.
    arrays = below("params/") or below("opt/target/") or arrays
    if subtree:
        there = sorted({name.partition("/")[0] for name in arrays})
        arrays = below(f"{subtree}/")
        if not arrays:
            raise ConvertError(f"{path}: no sub-tree {subtree!r}; there are: {', '.join(there)}")
    out: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        before, stacked, after = name.partition("encoderblock/")
        if not stacked:
            out[name] = array
        elif array.ndim and 0 < len(array) <= tables.MAX_LAYERS:  # scan stacks the layers
            out |= {f"{before}encoderblock_{i}/{after}": x for i, x in enumerate(array)}
        else:
            got = f"got shape {array.shape}, expected 1 to {tables.MAX_LAYERS} layers"
            raise ConvertError(f"{file}: {name}: {got}")
    return out


def _towers(state: Mapping[str, np.ndarray]) -> towers.Towers:
    """What shapes and habits say of the towers."""
    entries = Entries(state, ROWS)
    habits: Any = lambda tower, pool: dict(
        norm_eps=1e-6,
        activation="gelu_tanh",
        heads=entries.shape(f"{tower}/blocks/attention/query/kernel", 3)[1],
        pool="map" if f"{tower}_pool/probe" in entries else pool,
    )
    sizes, text_sizes = towers.image_sizes(entries), towers.text_sizes(entries)
    mean, std = towers.SIGLIP_PIXELS  # its value_range(-1, 1)
    image = config_lib.ImageTower(
        **(sizes | habits("image", "class" if sizes["class_token"] else "mean")),
        pixel_mean=mean,
        pixel_std=std,
    )
    text = config_lib.TextTower(
        **(text_sizes | habits("text", "last")),
        causal=False,
        cleaning="siglip2" if text_sizes["vocab_size"] == towers.GEMMA_VOCABULARY else "siglip",
        pad_id=1 if text_sizes["vocab_size"] == _FIRST_VOCABULARY else 0,
        tokenizer="siglip.model",
    )
    matrix = "image_projection/kernel"
    embed_dim = entries.shape(matrix, 2)[1] if matrix in entries else image.width
    return towers.Towers(embed_dim, image, text, ROWS)


def to_big_vision(source: epath.PathLike, path: epath.PathLike) -> parity.Report:
    """to-big-vision: a two-tower model that `grain_jax.load` reads to a .npz.

    Raises:
      ConvertError: big_vision cannot express the model, or `path` is no file name that ends in .npz.
      checkpoint.CheckpointError: `source` cannot be read.
    """
    path = epath.Path(path)
    if path.suffix != ".npz" or path.is_dir():
        raise ConvertError(f"{path}: expected the name of a file that ends in .npz")
    source_model = exits.read_towers(source)
    model = source_model.model
    raise_any(needs.BIG_VISION.faults(model))
    flat = grain.flat(source_model.params)
    flat = tables.with_patch_bias(tables.without_class_position(flat))
    for tower in towers.TOWERS:
        if f"{tower}_projection/kernel" in flat:
            flat = tables.with_projection(flat, tower, 0, bias=True)
    state = tables.write(ROWS, flat)
    state |= {row.theirs: state[row.theirs].reshape(1) for row in SCALARS if row.ours in flat}
    content = io.BytesIO()
    named: dict[str, Any] = {f"params/{name}": array for name, array in state.items()}
    np.savez(content, **named)
    with errors.storage_faults_as_one_line(path):
        atomic.write_bytes(path, content.getvalue())
    proof = _prove(path, read(path), model, source_model.params)
    mean, std = model.image.pixel_mean, model.image.pixel_std
    pixels = f"pixels not in a .npz: ([0, 1] - {list(mean)}) / {list(std)}"
    if (tuple(mean), tuple(std)) != towers.SIGLIP_PIXELS:
        pixels = f"ATTENTION: {pixels}; value_range(-1, 1) and from-big-vision give others"
    tokenizer = f"tokenizer not in a .npz: {model.text.tokenizer}, texts {model.text.cleaning}"
    return proof.after(
        f"to-big-vision: {source_model.folder} -> {path}, its sub-trees img and txt",
        f"{tokenizer}, padded with the id {model.text.pad_id}",
        pixels,
        f"for its config: {_sizes_of(model)}",
    )


def _sizes_of(model: config_lib.Model) -> dict[str, Any]:
    """The arguments of big_vision's two_towers.Model for a two-tower model."""
    kinds = {"map": "map", "class": "tok", "mean": "gap", "last": "last"}
    sizes = lambda tower: dict(
        **dict(width=tower.width, depth=tower.depth, mlp_dim=tower.mlp_dim),
        **dict(num_heads=tower.heads, pool_type=kinds[tower.pool]),
    )
    return dict(
        image=sizes(model.image) | dict(patch_size=(model.image.patch_size,) * 2),
        text=sizes(model.text) | dict(vocab_size=model.text.vocab_size),
        out_dim=tuple(model.embed_dim if t.projection != "none" else None for t in (model.image, model.text)),
        bias_init=model.logit_bias_init,
    )


def _prove(path: epath.PathLike, state: Arrays, model: config_lib.Model, params: Any) -> parity.Report:
    """Our model against big_vision's two_towers, loaded by its own code, if big_vision is on the path."""
    try:  # not a package of an index: it is on the path where its repository is
        from big_vision.models import vit  # pyright: ignore[reportMissingImports]
        from big_vision.models.proj.image_text import text_transformer, two_towers  # pyright: ignore[reportMissingImports]
    except ImportError:
        return parity.not_proven("big_vision is not on the path, so nothing could be compared.")
    path = str(path) if "/" in str(path) else f"./{path}"
    subtree = lambda tower: f"{path}/{tower}" if ".npz:" in path else f"{path}:{tower}"
    tree = tables.nested({name: x for name, x in state.items() if "/" not in name})
    tree["img"] = vit.load(None, subtree("img"), {})
    tree["txt"] = text_transformer.load(None, subtree("txt"), {})
    stated = _sizes_of(model)
    stated["image"]["scan"] = "encoderblock" in tree["img"]["Transformer"]
    stated["text"]["scan"] = "encoderblock" in tree["txt"]["Encoder_0"]
    theirs = two_towers.Model(**stated)

    def outputs(inputs: parity.Inputs) -> dict[str, np.ndarray]:
        image, text, _ = theirs.apply({"params": tree}, inputs.images, inputs.token_ids)
        return dict(image_embed=np.asarray(image), text_embed=np.asarray(text))

    return parity.prove(model, params, "big_vision's two_towers", (), outputs)


_ATTENTION = ("query", "key", "value", "out")
_BLOCK = {
    **{f"attention/{x}": f"MultiHeadDotProductAttention_0/{x}" for x in _ATTENTION},
    "mlp/in": "MlpBlock_0/Dense_0",
    "mlp/out": "MlpBlock_0/Dense_1",
}


def _tower(tower: str, encoder: str, norm: str) -> list[NamePair]:
    """The rows of what both towers have."""
    prefix = encoder.partition("/")[0]
    norms = {"norm_1": "LayerNorm_0", "norm_2": "LayerNorm_1"}
    return [
        *_rows(f"{tower}/blocks/", f"{encoder}/encoderblock_{{}}/", norms | _BLOCK),
        *_rows("", "", {norm: f"{encoder}/encoder_norm", f"{tower}_projection": f"{prefix}/head"}),
        NamePair(f"{tower}/position_embed", f"{prefix}/pos_embedding", tables.THREE_AXES),
        NamePair(f"{tower}_pool/probe", f"{prefix}/MAPHead_0/probe", tables.THREE_AXES),
        *_rows(f"{tower}_pool/", f"{prefix}/MAPHead_0/", {"norm": "LayerNorm_0"} | _BLOCK),
    ]


def _rows(ours: str, theirs: str, names: Mapping[str, str]) -> list[NamePair]:
    """The rows of modules, whose arrays have our layout."""
    return [
        NamePair(f"{ours}{part}/{leaf}", f"{theirs}{name}/{leaf}")
        for part, name in names.items()
        for leaf in ("scale" if "norm" in part else "kernel", "bias")
    ]


ROWS = (
    NamePair("image/patch_embed/kernel", "img/embedding/kernel", tables.PATCHES_LAST),
    NamePair("image/patch_embed/bias", "img/embedding/bias"),
    NamePair("image/class_token", "img/cls", tables.THREE_AXES),
    *_tower("image", "img/Transformer", "image/norm"),
    NamePair("text/token_embed/embedding", "txt/Embed_0/embedding"),
    *_tower("text", "txt/Encoder_0", "text_norm"),
    *SCALARS,
)
