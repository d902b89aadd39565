"""Checkpoints of the PyTorch reference (`.pth.tar`) to ours and back: sizes are read from the state dicts.

The file holds `backbone_state_dict` (both towers) and `state_dict` (the region decoder). What a state
dict cannot tell is the number of heads; it comes by flag, from the qk-norm's size, or is assumed.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from grain_jax import config as config_lib
from grain_jax import errors
from grain_jax.convert import archives, parity
from grain_jax.convert import torch_names as names
from grain_jax.files import regular_file
from grain_jax.runtime import checkpoint

StateDict = dict[str, np.ndarray]
_KEYS = {"backbone": "backbone_state_dict", "decoder": "state_dict"}
_MOST_LAYERS = 1000
# (tower, width) -> heads of the reference's own models (clip/custom_models.py and train.py).
_REFERENCE_HEADS = {
    ("image", 384): 12,
    ("image", 768): 12,
    ("image", 1024): 16,
    ("text", 512): 8,
    ("decoder", 512): 8,
}


class ConvertError(errors.UserError):
    """The checkpoint cannot be converted; the message has one line a fault."""


class Inferred(NamedTuple):
    """The sizes that were read, and how each tower's number of heads came about."""

    model: config_lib.Model
    heads: dict[str, str]  # tower -> words for the report


def read(path: epath.PathLike) -> dict[str, StateDict]:
    """The two state dicts as float32 numpy arrays: {"backbone": ..., "decoder": ...}, without `module.`.

    Nothing in the file is executed (`weights_only=True`).

    Raises:
      ConvertError: no such file, not a checkpoint, or one that asks to run code.
    """
    path = epath.Path(path)
    if not regular_file.is_one(path):
        raise ConvertError(f"{path}: no such file; expected the reference's .pth.tar")
    try:
        import torch
    except ImportError as error:
        raise ConvertError(
            f"{path}: PyTorch is needed to read it; pip install 'grain_jax[torch]'"
        ) from error
    try:
        with archives.reading(path, ConvertError):
            stored = archives.load_torch(path)
    except ConvertError:
        raise
    except Exception as error:  # a damaged or hostile pickle may raise anything
        raise ConvertError(
            f"{path}: not a checkpoint of plain tensors ({refusal(error)})"
        ) from error
    if not isinstance(stored, Mapping):
        raise ConvertError(
            f"{path}: got a {type(stored).__name__}, expected a dict with {' and '.join(_KEYS.values())}"
        )
    out, faults = {}, []
    for module, key in _KEYS.items():
        if not isinstance(stored.get(key), Mapping):
            found = ", ".join(map(str, list(stored)[:8])) or "nothing"
            faults.append(f"{path}: no state dict {key!r}; the file has {found}")
            continue
        for name, value in stored[key].items():
            if not isinstance(value, torch.Tensor):
                faults.append(f"{path}: {module} {name}: got {type(value).__name__}, not a tensor")
            elif not value.is_floating_point():
                faults.append(f"{path}: {module} {name}: got {value.dtype}, expected plain floats")
        with archives.reading(f"{path}: {module}", ConvertError):
            out[module] = archives.tensors_to_float32(path, stored[key])
    _raise(faults)
    return out


def refusal(error: Exception) -> str:
    """Why torch.load refused a file, without its advice to load it unchecked."""
    text = str(error).strip()
    asked = re.search(r"unsupported global:?(?: global)? (\S+)", text, re.IGNORECASE)
    if asked:
        return f"it asks for {asked[1]}; what might run code is not loaded"
    told = re.search(r"WeightsUnpickler error:\s*(.+)", text)
    reason = told[1] if told else text.partition(". ")[0].partition("\n")[0]
    return f"{type(error).__name__}: {reason[:120]}" if reason else type(error).__name__


def infer(states: Mapping[str, StateDict], heads: Mapping[str, int | None]) -> Inferred:
    """The model whose parameters these state dicts are.

    Args:
      states: {"backbone": ..., "decoder": ...}.
      heads: "image", "text", "decoder" -> heads, or None to read or assume them.

    Raises:
      ConvertError: what tells a size is missing or has another number of axes, or heads do not fit.
    """
    faults: list[str] = []

    def shape(module: str, name: str, axes: int) -> tuple[int, ...]:
        array = states[module].get(name)
        if array is None:
            faults.append(f"{module} {name}: missing")
        elif array.ndim != axes or 0 in array.shape:
            faults.append(f"{module} {name}: got shape {array.shape}, expected {axes} axes")
        else:
            return array.shape
        return (1,) * axes

    def depth(module: str, pattern: str) -> int:
        found = [int(m[1]) for name in states[module] if (m := re.match(pattern, name))]
        found = [i for i in found if i < _MOST_LAYERS]
        if not found:
            faults.append(f"{module}: no layer like {pattern}")
        return 1 + max(found, default=0)

    _, positions, _ = shape("backbone", "visual.pos_embed", 3)
    image_width, _, patch, _ = shape("backbone", "visual.patch_embed.proj.weight", 4)
    image_mlp, _ = shape("backbone", "visual.blocks.0.mlp.fc1.weight", 2)
    vocab, text_width = shape("backbone", "token_embedding.weight", 2)
    context, _ = shape("backbone", "positional_embedding", 2)
    text_mlp, _ = shape("backbone", "transformer.resblocks.0.mlp.c_fc.weight", 2)
    _, embed_dim = shape("backbone", "text_projection", 2)
    queries, decoder_width = shape("decoder", "query_embed.weight", 2)
    decoder_mlp, _ = shape("decoder", "transformer.decoder.layers.0.linear1.weight", 2)
    image_depth = depth("backbone", r"visual\.blocks\.(\d+)\.")
    text_depth = depth("backbone", r"transformer\.resblocks\.(\d+)\.")
    decoder_depth = depth("decoder", r"transformer\.decoder\.layers\.(\d+)\.")
    grid = math.isqrt(positions - 1)
    if grid * grid != positions - 1 and not faults:
        faults.append(
            f"backbone visual.pos_embed: got {positions} positions, expected a class token and a square"
        )
    _raise(faults)

    q_norm = states["backbone"].get("visual.blocks.0.attn.q_norm.weight")
    head_dim = q_norm.size if q_norm is not None else None
    widths = {"image": image_width, "text": text_width, "decoder": decoder_width}
    count, words = {}, {}
    for tower, width in widths.items():
        count[tower], words[tower] = _heads(
            tower, width, heads.get(tower), head_dim if tower == "image" else None, faults
        )
    _raise(faults)
    # Norm epsilons and dropout are the reference's constants; the initialisers are never used again.
    model = config_lib.Model(
        embed_dim=embed_dim,
        logit_scale_init=1 / 0.07,
        logit_bias_init=None,
        image=config_lib.ImageTower(
            image_size=grid * patch,
            patch_size=patch,
            width=image_width,
            depth=image_depth,
            heads=count["image"],
            mlp_dim=image_mlp,
            qk_norm=q_norm is not None,
            norm_eps=1e-6,
            position_init="normal",
            position_period=1e4,
            block_init="torch",
            unroll=1,
        ),
        text=config_lib.TextTower(
            vocab_size=vocab,
            context_length=context,
            width=text_width,
            depth=text_depth,
            heads=count["text"],
            mlp_dim=text_mlp,
            norm_eps=1e-5,
            unroll=1,
        ),
        decoder=config_lib.RegionDecoder(
            queries=queries - 1,
            width=decoder_width,
            depth=decoder_depth,
            heads=count["decoder"],
            mlp_dim=decoder_mlp,
            dropout=0.1,
            qkv_init_gain=1.0,
            norm_eps=1e-5,
            unroll=1,
        ),
    )
    return Inferred(model, words)


def _heads(tower, width, flag, head_dim, faults) -> tuple[int, str]:
    """The tower's heads, and for the report how they are known."""
    if head_dim is not None and width % head_dim == 0:
        read_off = width // head_dim
        if flag is not None and flag != read_off:
            faults.append(
                f"--{tower}-heads: got {flag}, but the qk-norm of size {head_dim} means {read_off}"
            )
        return read_off, f"{read_off} (width {width}; read from the qk-norm's size {head_dim})"
    if flag is not None:
        if flag < 1 or width % flag:
            faults.append(f"--{tower}-heads: got {flag}, expected a divisor of the width {width}")
        return flag, f"{flag} (width {width}; given by --{tower}-heads)"
    if (tower, width) in _REFERENCE_HEADS:
        known = _REFERENCE_HEADS[tower, width]
        return known, f"{known} (width {width}; ASSUMED, as in the reference's models)"
    if width % 64 == 0:
        return width // 64, f"{width // 64} (width {width}; ASSUMED, heads of size 64)"
    faults.append(
        f"--{tower}-heads: must be given; a width of {width} does not tell the number of heads"
    )
    return 1, ""


def sizes_of(model: config_lib.Model) -> dict[str, dict[str, int]]:
    """For each tower the letters that `torch_names` writes shapes with, and "layers"."""
    out = {}
    for tower in ("image", "text", "decoder"):
        c = getattr(model, tower)
        out[tower] = dict(
            E=c.width,
            F=c.mlp_dim,
            K=c.heads,
            h=c.width // c.heads,
            D=model.embed_dim,
            layers=c.depth,
        )
    grid = model.image.image_size // model.image.patch_size
    positions = int(model.image.class_token) + grid * grid
    out["image"] |= dict(N=positions, p=model.image.patch_size)
    out["text"] |= dict(V=model.text.vocab_size, L=model.text.context_length)
    out["decoder"] |= dict(I=model.image.width, Q=model.decoder.queries)
    return out


def to_params(backbone: StateDict, decoder: StateDict, model: config_lib.Model) -> dict:
    """The reference's state dicts as our parameters: a nested dict of float32 numpy arrays.

    Raises:
      ConvertError: unknown or missing keys, other shapes, values that are not finite; a line each.
    """
    states = {"backbone": backbone, "decoder": decoder}
    sizes = sizes_of(model)
    faults = [
        f"{tower}: got {of_tower['layers']} layers, expected at most {_MOST_LAYERS}"
        for tower, of_tower in sizes.items()
        if of_tower["layers"] > _MOST_LAYERS
    ]
    _raise(faults)
    expected: dict[str, set[str]] = {m: set(unused) for m, unused in names.UNUSED.items()}
    params: dict = {}
    for tower, module, rows in names.TABLES:
        for row in rows:
            if not names.is_in(row, model):
                continue
            shape = names.shape_of(row, sizes[tower])
            layers = range(sizes[tower]["layers"]) if "{}" in row.theirs else (None,)
            parts = []
            for name in (row.theirs.format(i) for i in layers):
                array = states[module].get(name)
                fault = None
                if array is None:
                    fault = "missing"
                elif array.shape != shape:
                    fault = f"got shape {array.shape}, expected {shape}"
                elif not np.isfinite(array).all():
                    fault = "holds values that are not finite"
                if fault and name not in expected[module]:
                    faults.append(f"{module} {name}: {fault}")
                elif not fault and not faults:
                    array = np.asarray(array, np.float32)
                    parts.append(names.to_ours(row, array, sizes[tower]))
                expected[module].add(name)
            if not faults:
                names.put(params, row.ours, parts[0] if layers == (None,) else np.stack(parts))
    for module, state in states.items():
        for name in sorted(state.keys() - expected[module]):
            faults.append(f"{module} {name}: unknown key, shape {state[name].shape}")
    _raise(faults)
    return params


def to_states(model: config_lib.Model, params: Any) -> dict[str, StateDict]:
    """Our parameters as the reference's two state dicts, with zeros for what it carries and never uses.

    Args:
      model: the sizes.
      params: nested dict, as `GRAIN.init` gives.

    Raises:
      ConvertError: the reference has no place for something that the model has; a line each.
    """
    if model.decoder is None:
        raise ConvertError("model.decoder: got none; the reference's format is of models with one")
    image, text = model.image, model.text
    faults = []
    for name, got, expected in (
        ("logit_bias_init", model.logit_bias_init, None),
        ("image.norm_eps", image.norm_eps, 1e-6),
        ("image.class_token", image.class_token, True),
        ("image.patch_bias", image.patch_bias, True),
        ("image.pre_norm", image.pre_norm, False),
        ("image.activation", image.activation, "gelu"),
        ("image.pixel_mean", image.pixel_mean, config_lib.ImageTower.pixel_mean),
        ("image.pixel_std", image.pixel_std, config_lib.ImageTower.pixel_std),
        ("text.norm_eps", text.norm_eps, 1e-5),
        ("text.causal", text.causal, True),
        ("text.activation", text.activation, "quick_gelu"),
        ("text.pool", text.pool, "end"),
        ("text.projection", text.projection, "matrix"),
        ("text.tokenizer", text.tokenizer, "clip"),
        ("decoder.norm_eps", model.decoder.norm_eps, 1e-5),
    ):
        if got != expected:
            faults.append(f"model.{name}: got {got}, the reference's model has {expected}")
    if model.decoder.queries == 0:
        faults.append("model.decoder.queries: got 0, the reference's model has other parts then")
    _raise(faults)
    sizes = sizes_of(model)
    used, unused = names.state_dicts(params, sizes), names.unused(sizes)
    return {module: used[module] | unused[module] for module in used}


def write(path: epath.PathLike, states: Mapping[str, StateDict]) -> None:
    """Writes the state dicts as the reference's train.py does, names with `module.` (it saves DDP's).

    Its other keys are there too, of a run that has not begun: epoch and iteration 0, an empty optimizer.
    """
    import torch

    stored: dict[str, Any] = {
        key: {
            f"module.{name}": torch.tensor(array)  # a copy, one storage an entry
            for name, array in states[module].items()
        }
        for module, key in _KEYS.items()
    }
    stored |= {"epoch": 0, "iteration": 0, "best_acc": 0.0}
    stored |= {"optimizer": {"state": {}, "param_groups": []}}
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        torch.save(stored, file)


def make_module(model: config_lib.Model, losses: Mapping[str, Any] | None = None) -> Any:
    """The torch module of that model (`hf_files/modeling_grain.py`), in eval mode, weights at random.

    Raises:
      ImportError: torch or transformers is missing.
    """
    from grain_jax.convert.hf_files import configuration_grain, modeling_grain

    config = configuration_grain.GrainConfig(towers=dataclasses.asdict(model), losses=losses)
    return modeling_grain.GrainModel(config).eval()


def load_states(module: Any, states: Mapping[str, StateDict]) -> None:
    """Loads the reference's state dicts into the torch module, strictly but for what GRAIN never uses."""
    import torch

    module.load_state_dict(
        {
            f"{part}.{name}": torch.tensor(array)
            for part in names.UNUSED
            for name, array in states[part].items()
            if name not in names.UNUSED[part]
        }
    )


def outputs(model: config_lib.Model, params: Any, given: parity.Inputs) -> dict[str, np.ndarray]:
    """`parity.outputs` and the factor (and bias) of the similarities, from our model."""
    out = parity.outputs(model, params, given) | {"logit_scale": np.exp(params["logit_scale"])}
    return out | {name: params[name] for name in ("logit_bias",) if name in params}


def run_module(module: Any, given: parity.Inputs) -> dict[str, np.ndarray]:
    """What `outputs` gives, from the torch module."""
    import torch

    with torch.no_grad():
        pixels = torch.tensor(given.pictures).permute(0, 3, 1, 2)
        regions = module.get_regions(pixels)
        unit = torch.nn.functional.normalize
        out = dict(
            image_embed=unit(module.get_image_features(pixels), dim=-1),
            text_embed=unit(module.get_text_features(torch.tensor(given.token_ids).long()), dim=-1),
            region_embed=regions.embeds,
            boxes_xyxy=regions.boxes_xyxy,
            logit_scale=module.backbone.logit_scale.exp(),
        )
        if module.backbone.logit_bias is not None:
            out["logit_bias"] = module.backbone.logit_bias
    return {name: value.detach().numpy() for name, value in out.items()}


def prove(model: config_lib.Model, params: Any, states: Mapping[str, StateDict]) -> parity.Report:
    """Our model with `params` against the torch module with `states`, the arrays of the file itself."""
    try:
        module = make_module(model)
    except ImportError as error:
        return parity.not_proven(params, f"{error}; pip install torch transformers")
    load_states(module, states)
    given = parity.inputs(model.image.image_size, model.text.vocab_size, model.text.context_length)
    found = parity.compare(outputs(model, params, given), run_module(module, given))
    return parity.report(found, f"the torch module, {torch_versions()}", given)


def torch_versions() -> str:
    """The versions of what runs the other side, for reports."""
    import torch
    import transformers

    return f"transformers {transformers.__version__}, torch {torch.__version__}"


def check_free(path: epath.Path, mark: str) -> None:
    """Raises ConvertError unless `path` is new, empty, or a folder with `mark`: an older conversion."""
    if path.exists() and not (path.is_dir() and (path / mark).exists()):
        if not path.is_dir() or any(path.iterdir()):
            raise ConvertError(f"{path}: is in use by something else; expected a new folder")


def in_file(path: epath.PathLike, error: errors.UserError) -> ConvertError:
    """The error with the file's name before each of its lines."""
    return ConvertError("\n".join(f"{path}: {line}" for line in str(error).split("\n")))


def convert(
    source: epath.PathLike, folder: epath.PathLike, heads: Mapping[str, int | None]
) -> parity.Report:
    """from-torch: the reference's file to a folder that `grain_jax.load` reads.

    Args:
      source: the `.pth.tar`.
      folder: new, or an older conversion.
      heads: "image", "text", "decoder" -> heads, or None to read or assume them.

    Raises:
      ConvertError: the file cannot be converted, or the folder holds something else.
    """
    folder = epath.Path(folder)
    check_free(folder, "params")
    states = read(source)
    try:
        inferred = infer(states, heads)
        params = to_params(states["backbone"], states["decoder"], inferred.model)
    except ConvertError as error:
        raise in_file(source, error) from error
    proof = prove(inferred.model, params, states)
    save(folder, inferred.model, params, source, proof)
    head = _report(source, folder, states, inferred, params)
    return proof._replace(text=f"{head}\n\n{proof.text}")


def save(folder: epath.Path, model, params, source: epath.PathLike, proof: parity.Report) -> None:
    """Writes a converted model for `grain_jax.load`. Raises ConvertError where that fails."""
    try:
        checkpoint.save_model(folder, model, params, source=str(source), parity=proof.verdict)
    except OSError as error:
        raise ConvertError(f"{folder}: cannot be written ({error})") from error


def convert_back(source: epath.PathLike, path: epath.PathLike) -> parity.Report:
    """to-torch: what `grain_jax.load` reads, to the reference's `.pth.tar`.

    Args:
      source: a workdir, a checkpoint or a converted folder.
      path: the file to write.

    Raises:
      ConvertError: the reference's format cannot hold the model, torch is missing, or `path` is a folder.
      checkpoint.CheckpointError: nothing to read.
    """
    path = epath.Path(path)
    if path.is_dir():
        raise ConvertError(f"{path}: is a folder; expected a file name such as grain.pth.tar")
    model, params, read_from = checkpoint.load_model(source)
    states = to_states(model, params)
    try:
        write(path, states)
    except ImportError as error:
        raise ConvertError(
            f"{path}: PyTorch is needed to write it; pip install 'grain_jax[torch]'"
        ) from error
    except OSError as error:
        raise ConvertError(f"{path}: cannot be written ({error})") from error
    proof = prove(model, params, read(path))
    lines = [f"to-torch: {read_from} -> {path}"]
    for module, key in _KEYS.items():
        size = sum(array.size for array in states[module].values())
        lines.append(f"{key}: {len(states[module])} entries, {size:,} values, names with module.")
    lines += [_heads_line(tower, getattr(model, tower)) for tower in ("image", "text", "decoder")]
    zeros = ", ".join(f"{m} {name}" for m, of in names.UNUSED.items() for name in of)
    lines.append(f"zeros, because the reference carries them and never uses them: {zeros}")
    return proof._replace(text="\n".join([*lines, "", proof.text]))


def _heads_line(tower: str, sizes: Any) -> str:
    """The heads, which the file does not hold: the reference's code takes its own for that width."""
    line = f"{tower}: width {sizes.width}, depth {sizes.depth}, {sizes.heads} heads"
    theirs = _REFERENCE_HEADS.get((tower, sizes.width), sizes.heads)
    if theirs != sizes.heads:
        line += f"; ATTENTION: the reference's code has {theirs} and would give other outputs"
    return line


def _report(source, folder, states, inferred: Inferred, params) -> str:
    model, sizes = inferred.model, sizes_of(inferred.model)
    image, text, decoder = model.image, model.text, model.decoder
    lines = [
        f"from-torch: {source} -> {folder}",
        f"image    {image.image_size} px, patch {image.patch_size}, width {image.width}, depth {image.depth},"
        f" MLP {image.mlp_dim}, qk-norm {'yes' if image.qk_norm else 'no'}, heads {inferred.heads['image']}",
        f"text     vocabulary {text.vocab_size}, context {text.context_length}, width {text.width},"
        f" depth {text.depth}, MLP {text.mlp_dim}, heads {inferred.heads['text']}",
        f"decoder  {decoder.queries} + 1 queries, width {decoder.width}, depth {decoder.depth},"
        f" MLP {decoder.mlp_dim}, heads {inferred.heads['decoder']}; embedding {model.embed_dim}",
        "",
        f"{'parameter':45} {'shape':20} {'norm':>12}  reference",
    ]
    count = 0
    for _, module, rows in names.TABLES:
        for row in rows:
            leaf = names.get(params, row.ours)
            if leaf is not None:
                third = "" if row.third is None else f" [third {row.third + 1}]"
                norm = np.linalg.norm(leaf.astype(np.float64))
                lines.append(
                    f"{row.ours:45} {str(leaf.shape):20} {norm:12.6g}  {module} {row.theirs}{third}"
                )
                count += leaf.size
    back = names.state_dicts(params, sizes)
    used = sum(states[m][k].size for m in back for k in back[m])
    total = sum(array.size for state in states.values() for array in state.values())
    lines += ["", "left out, because no output of GRAIN depends on it:"]
    for module, unused in names.UNUSED.items():
        for name in unused:
            shape = states[module][name].shape if name in states[module] else "not in the file"
            lines.append(f"  {module} {name} {shape}")
    lines += [
        f"values: {total:,} in the file = {used:,} used + {total - used:,} left out; {count:,} written",
    ]
    return "\n".join(lines)


def _raise(faults: list[str]) -> None:
    if faults:
        raise ConvertError("\n".join(faults))
