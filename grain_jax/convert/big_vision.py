"""Checkpoints of big_vision (.npz) as ours: its ViT and text tower, alone or as its two_towers.

A path may name a sub-tree, `FILE.npz:img`, as big_vision's own do. The layouts of older files that its
loaders repair (models/vit.py, models/proj/image_text/text_transformer.py at 0127fb6) are read too.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from etils import epath

from grain_jax import config as config_lib
from grain_jax.convert import archives, parity, towers
from grain_jax.convert import torch_names as names
from grain_jax.convert.towers import Row, Settings, Tower, TowerError
from grain_jax.files import regular_file

PIXELS = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # its value_range(-1, 1)
_SCALARS = {"logit_scale": "t", "logit_bias": "b"}
_LAYERED = re.compile(r"(.*/)?encoderblock_(\d+)/(.*)")
_PROBE = names.Form(lambda a, s: a.reshape(-1), lambda a, s: a[None, None])
_PATCHES = names.Form(  # [p, p, 3, E] <-> [p * p * 3, E]
    lambda a, s: a.reshape(-1, a.shape[-1]), lambda a, s: a.reshape(s["p"], s["p"], 3, -1)
)


class Checkpoint(NamedTuple):
    """What was read: the file and its arrays, layers stacked as its scans have them."""

    path: str
    tree: dict[str, np.ndarray]  # "img/Transformer/encoderblock/LayerNorm_0/scale" -> array


def is_path(path: epath.PathLike) -> bool:
    """Whether a path names a .npz, with or without a sub-tree."""
    return bool(re.search(r"\.npz(:[^/:]+(/[^/:]+)*)?$", str(path)))


def read(path: epath.PathLike) -> Checkpoint:
    """`FILE.npz` or `FILE.npz:sub-tree` as float32 arrays.

    Raises:
      TowerError: no such file, not a .npz of arrays, or no such sub-tree.
    """
    text = str(path)
    file, subtree = text, ""
    if (match := re.fullmatch(r"(.*\.npz):(.+)", text)) is not None:
        file, subtree = match.groups()
    file = epath.Path(file)
    if not regular_file.is_one(file):
        raise TowerError(f"{file}: no such file; expected big_vision's .npz, or FILE.npz:sub-tree")
    try:
        with archives.reading(file, TowerError):
            arrays = archives.read_npz(file)
    except TowerError:
        raise
    except Exception as error:  # a damaged zip may raise anything
        raise TowerError(
            f"{file}: not a .npz of plain arrays ({type(error).__name__}: {str(error)[:120]})"
        ) from None
    # A checkpoint of training holds the parameters below one of these, beside the optimiser's state.
    for prefix in ("params/", "opt/target/"):
        inside = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
        if inside:
            arrays = inside
            break
    if subtree:
        inside = {
            k.removeprefix(f"{subtree}/"): v
            for k, v in arrays.items()
            if k.startswith(f"{subtree}/")
        }
        if not inside:
            there = sorted({k.partition("/")[0] for k in arrays})
            raise TowerError(f"{text}: no sub-tree {subtree!r}; there are: {', '.join(there)}")
        arrays = inside
    return Checkpoint(text, _stacked(arrays, text))


def _stacked(arrays: Mapping[str, np.ndarray], path: str) -> dict[str, np.ndarray]:
    """With `encoderblock_0 ..` as one `encoderblock`, stacked on a first axis."""
    out, layers = {}, {}
    for name, array in arrays.items():
        match = _LAYERED.fullmatch(name)
        if match is None:
            out[name] = array
        else:
            whole = f"{match[1] or ''}encoderblock/{match[3]}"
            layers.setdefault(whole, {})[int(match[2])] = array
    for name, parts in layers.items():
        shapes = {part.shape for part in parts.values()}
        if sorted(parts) != list(range(len(parts))) or len(shapes) > 1:
            raise TowerError(
                f"{path}: {name}: got layers {sorted(parts)} of shapes {sorted(shapes)}, expected"
                " 0, 1, ... of one shape"
            )
        out[name] = np.stack([parts[i] for i in range(len(parts))])
    return out


def _subtree(checkpoint: Checkpoint, which: str) -> tuple[str, dict[str, np.ndarray]]:
    """The tower's part of the checkpoint, which may be all of it, and its prefix."""
    prefix = {"image": "img/", "text": "txt/"}[which]
    if not any(name.startswith(prefix) for name in checkpoint.tree):
        prefix = ""
    return prefix, {
        name.removeprefix(prefix): array
        for name, array in checkpoint.tree.items()
        if name.startswith(prefix)
    }


def import_tower(checkpoint: Checkpoint, which: str, settings: Settings) -> Tower:
    """The "image" or "text" tower of a checkpoint.

    Raises:
      TowerError: there is none, or an entry is missing or does not fit.
    """
    prefix, tree = _subtree(checkpoint, which)
    with towers.naming(f"{checkpoint.path}: {prefix}"):
        tower = (_image if which == "image" else _text)(tree, settings)
    theirs = {ours: prefix + name for ours, name in tower.theirs.items()}
    return tower._replace(theirs=theirs, prefix=prefix)


def _encoder(tower: str, theirs: str) -> list[Row]:
    block = f"{theirs}/encoderblock"
    return [
        *_norm(f"{tower}/blocks/norm_1", f"{block}/LayerNorm_0"),
        *_attention(f"{tower}/blocks/attention", f"{block}/MultiHeadDotProductAttention_0"),
        *_norm(f"{tower}/blocks/norm_2", f"{block}/LayerNorm_1"),
        *_mlp(f"{tower}/blocks/mlp", f"{block}/MlpBlock_0"),
        *_norm("image/norm" if tower == "image" else "text_norm", f"{theirs}/encoder_norm"),
    ]


def _norm(ours: str, theirs: str) -> list[Row]:
    return [Row(f"{ours}/{leaf}", f"{theirs}/{leaf}") for leaf in ("scale", "bias")]


def _dense(ours: str, theirs: str) -> list[Row]:
    return [Row(f"{ours}/{leaf}", f"{theirs}/{leaf}") for leaf in ("kernel", "bias")]


def _attention(ours: str, theirs: str) -> list[Row]:
    return [
        row
        for part in ("query", "key", "value", "out")
        for row in _dense(f"{ours}/{part}", f"{theirs}/{part}")
    ]


def _mlp(ours: str, theirs: str) -> list[Row]:
    return [*_dense(f"{ours}/in", f"{theirs}/Dense_0"), *_dense(f"{ours}/out", f"{theirs}/Dense_1")]


def _pool(ours: str) -> list[Row]:
    return [
        Row(f"{ours}/probe", "MAPHead_0/probe", _PROBE),
        *_attention(f"{ours}/attention", "MAPHead_0/MultiHeadDotProductAttention_0"),
        *_norm(f"{ours}/norm", "MAPHead_0/LayerNorm_0"),
        *_mlp(f"{ours}/mlp", "MAPHead_0/MlpBlock_0"),
    ]


def _shape(tree, name: str, axes: int) -> tuple[int, ...]:
    if name not in tree:
        raise TowerError(f"{name}: missing")
    if tree[name].ndim != axes or 0 in tree[name].shape:
        raise TowerError(f"{name}: got shape {tree[name].shape}, expected {axes} axes")
    return tree[name].shape


def _sizes(tree, encoder: str) -> dict[str, int]:
    """What both towers read off their first encoder arrays."""
    block = f"{encoder}/encoderblock"
    depth, width, heads, _ = _shape(tree, f"{block}/MultiHeadDotProductAttention_0/query/kernel", 4)
    mlp_dim = _shape(tree, f"{block}/MlpBlock_0/Dense_0/kernel", 3)[2]
    return dict(depth=depth, width=width, heads=heads, mlp_dim=mlp_dim)


def _renamed(tree: dict[str, np.ndarray]) -> tuple[dict, dict[str, str]]:
    """With the places that older files have for positions and the pooling head, and the original names."""
    moved = {
        "Transformer/posembed_input/pos_embedding": "pos_embedding",
        "Transformer/pos_embedding": "pos_embedding",
    }
    head = re.compile("(probe|MlpBlock_0|MultiHeadDotProductAttention_0|LayerNorm_0)(/|$)")
    name_of = {
        moved.get(name, f"MAPHead_0/{name}" if head.match(name) else name): name for name in tree
    }
    return {new: tree[old] for new, old in name_of.items()}, name_of


def _image(tree: dict[str, np.ndarray], settings: Settings) -> Tower:
    tree, original = _renamed(tree)
    patch = _shape(tree, "embedding/kernel", 4)[0]
    count = _shape(tree, "pos_embedding", 3)[1]
    token, pooled, head = "cls" in tree, "MAPHead_0/probe" in tree, "head/kernel" in tree
    grid = towers.side_of_grid("pos_embedding", count, token)
    assumed = ["norm epsilon 1e-6 and tanh GELU, its models'; pixels in [-1, 1]"]
    if not pooled and not token:
        assumed.append("pool mean, as its pool_type=gap")
    mean, std = PIXELS
    config = config_lib.ImageTower(
        **_sizes(tree, "Transformer"),
        image_size=grid * patch,
        patch_size=patch,
        qk_norm=False,
        norm_eps=1e-6,
        position_init="normal",
        position_period=1e4,
        block_init="trunc_normal",
        unroll=1,
        class_token=token,
        patch_bias="embedding/bias" in tree,
        activation=towers.settled(
            "image activation", settings.activation.get("image"), "gelu_tanh"
        ),
        pool="map" if pooled else "class" if token else "mean",
        projection="affine" if head else "none",
        pixel_mean=mean,
        pixel_std=std,
    )
    rows = [
        Row("image/patch_embed/kernel", "embedding/kernel", _PATCHES),
        *([Row("image/patch_embed/bias", "embedding/bias")] if config.patch_bias else []),
        *([Row("image/class_token", "cls", names.TOKEN)] if token else []),
        Row("image/position_embed", "pos_embedding", names.BATCHED),
        *_encoder("image", "Transformer"),
        *(_pool("image_pool") if pooled else []),
        *(_dense("image_projection", "head") if head else []),
    ]
    params, theirs = towers.arrange(tree, rows, config.depth, {"p": patch})
    params["image/position_embed"] = towers.with_class_position(
        params["image/position_embed"], grid, token
    )
    theirs = {k: original[v] for k, v in theirs.items()}
    return Tower(config, params, theirs, tuple(assumed), prefix="")


def _text(tree: dict[str, np.ndarray], settings: Settings) -> Tower:
    tree, original = _renamed(tree)
    extra = tree.pop("Encoder_0/pos_embedding", None)
    _, length, _ = _shape(tree, "pos_embedding", 3)
    if extra is not None:  # old files have the positions added twice
        tree["pos_embedding"] = tree["pos_embedding"] + extra
    vocab, _ = _shape(tree, "Embed_0/embedding", 2)
    pooled, head = "MAPHead_0/probe" in tree, "head/kernel" in tree
    pad_id = settings.pad_id
    if pad_id is None:
        pad_id = 1 if vocab == 32000 else 0
    config = config_lib.TextTower(
        **_sizes(tree, "Encoder_0"),
        vocab_size=vocab,
        context_length=length,
        norm_eps=1e-6,
        unroll=1,
        causal=False,
        activation=towers.settled("text activation", settings.activation.get("text"), "gelu_tanh"),
        pool="map" if pooled else "last",
        projection="affine" if head else "none",
        tokenizer="siglip.model",
        cleaning="canonical",
        pad_id=pad_id,
    )
    assumed = [
        "norm epsilon 1e-6 and tanh GELU, its models'",
        f"texts padded with the id {pad_id}" + ("" if pooled else "; pool last, its default"),
    ]
    rows = [
        Row("text/token_embed/embedding", "Embed_0/embedding"),
        Row("text/position_embed", "pos_embedding", names.BATCHED),
        *_encoder("text", "Encoder_0"),
        *(_pool("text_pool") if pooled else []),
        *(_dense("text_projection", "head") if head else []),
    ]
    params, theirs = towers.arrange(tree, rows, config.depth, {})
    theirs = {k: original[v] for k, v in theirs.items()}
    if extra is not None:
        theirs["text/position_embed (added)"] = "Encoder_0/pos_embedding"
    return Tower(config, params, theirs, tuple(assumed), prefix="")


def unused(checkpoint: Checkpoint, *used: Tower) -> list[str]:
    """The entries that none of these towers took, sorted."""
    return sorted(checkpoint.tree.keys() - {n for u in used for n in u.theirs.values()})


def convert(source: epath.PathLike, folder: epath.PathLike, settings: Settings) -> parity.Report:
    """Converts a two_towers .npz and writes a model to `folder`; the report ends with the parity.

    Raises:
      TowerError: the checkpoint cannot be converted, or the folder holds something else.
    """
    folder = towers.check_output(folder)
    checkpoint = read(source)
    image, text = (import_tower(checkpoint, which, settings) for which in towers.TOWERS)
    left = [name for name in unused(checkpoint, image, text) if name not in _SCALARS.values()]
    if left:
        raise TowerError("\n".join(f"{checkpoint.path}: {name}: unknown key" for name in left))
    with towers.naming(f"{checkpoint.path}: "):
        scalars = towers.scalars(checkpoint.tree, _SCALARS)
        model, params = towers.two_tower_model(image, text, scalars)
    proof = _parity(checkpoint, model, params)
    towers.save(folder, model, params, str(source), proof)
    lines = [f"from-big-vision: {source} -> {folder}", *towers.describe(model, image, text)]
    lines.append(
        f"tokenizer not in a .npz; copy the tower's to {folder / model.text.tokenizer}, or set"
        " model.text.tokenizer in config.json"
    )
    return proof._replace(text="\n".join([*lines, "", proof.text]))


def _parity(checkpoint: Checkpoint, model: config_lib.Model, params: dict) -> parity.Report:
    """Ours against big_vision's own two_towers, loaded by its own repairs, where it is on the path."""
    try:
        from big_vision.models import vit
        from big_vision.models.proj.image_text import text_transformer, two_towers
    except ImportError:
        return parity.not_proven(
            params, "big_vision is not on the path, so nothing could be compared."
        )
    image, text = model.image, model.text
    shared = lambda t: dict(width=t.width, depth=t.depth, mlp_dim=t.mlp_dim, num_heads=t.heads)  # noqa: E731
    pool = {"map": "map", "class": "tok", "mean": "gap", "last": "last"}
    tree: dict = {}
    for name, array in checkpoint.tree.items():
        names.put(tree, name, array)
    tree["img"] = vit.fix_old_checkpoints(tree["img"])
    path = checkpoint.path if "/" in checkpoint.path else f"./{checkpoint.path}"
    subtree = f"{path}/txt" if ".npz:" in path else f"{path}:txt"
    tree["txt"] = text_transformer.load(None, subtree, {})
    scan = "encoderblock" in tree["txt"]["Encoder_0"]
    theirs = two_towers.Model(
        image=dict(
            shared(image),
            patch_size=(image.patch_size, image.patch_size),
            pool_type=pool[image.pool],
            scan=True,
        ),
        text=dict(shared(text), vocab_size=text.vocab_size, pool_type=pool[text.pool], scan=scan),
        out_dim=tuple(model.embed_dim if t.projection != "none" else None for t in (image, text)),
        bias_init=model.logit_bias_init,
    )
    given = parity.inputs(image.image_size, text.vocab_size, text.context_length)
    image_embed, text_embed, _ = theirs.apply({"params": tree}, given.pictures, given.token_ids)
    return parity.report(
        parity.compare(
            parity.outputs(model, params, given),
            dict(image_embed=np.asarray(image_embed), text_embed=np.asarray(text_embed)),
        ),
        "big_vision's two_towers",
        given,
    )
