"""The optimiser: AdamW or Muon, with the schedule and decay groups of docs/method.md, Training recipe."""

import math
import re
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from grain_jax.config import LAYER_MAPS, Optim
from grain_jax.core import errors
from grain_jax.train import sharding

MAX_LOG_SCALE = 4.6052  # ln 100, as the reference writes it

# The reference's groups on our names (quirk 7). In the decoder it decays norm weights, attention input biases
# and queries; in the backbone the class token, positions and embeddings.
REFERENCE_DECAY = re.compile(
    r".*/((\w+_)?kernel|lora_[ab])"
    r"|decoder/.*norm.*/scale"
    r"|decoder/blocks/\w+_attention/(query|key|value)/bias"
    r"|decoder/query_embed"
    r"|image/(class_token|position_embed)"
    r"|text/(token_embed/embedding|position_embed)"
)
MATRICES_DECAY = re.compile(r".*/((\w+_)?kernel|lora_[ab])")
# The matrices of the towers' stacked layers.
_TOWER_MATRICES = re.compile(rf"(?:image|text)/blocks/({'|'.join(LAYER_MAPS)})/kernel")
MUON_ITERATION = (3.4445, -4.7750, 2.0315)  # of x, x x' x and (x x')^2 x (Jordan 2024)
MUON_RMS = 0.2  # of an update, about that of AdamW's (Liu et al. 2025, arXiv 2502.16982)
# Parameters of a tower before its first layer.
_EMBEDDINGS = re.compile(
    r"(image|text)/(patch_embed|token_embed|class_token|registers|position_embed|pre_norm)(/.*)?"
)


def decay_mask(params, reference: bool = False):
    """True for each parameter that weight decay applies to.

    Args:
      params: the parameter tree.
      reference: whether these are the reference's (quirk 7), not matrices (`kernel`, `NAME_kernel`, LoRA's).
    """
    pattern = REFERENCE_DECAY if reference else MATRICES_DECAY
    matches = lambda path, _: pattern.fullmatch(_name(path)) is not None
    return jax.tree_util.tree_map_with_path(matches, params)


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_frozen(path, patterns: Sequence[str]) -> bool:
    return any(re.fullmatch(pattern, _name(path)) for pattern in patterns)


def frozen_mask(params, patterns: Sequence[str]):
    """True for each parameter whose whole name matches one of the regular expressions.

    Args:
      params: the parameter tree, with or without the boxes of logical axes.
      patterns: `Config.frozen`.

    Raises:
      UserError: a pattern that matches no parameter.
    """
    # A box is a leaf, so that a frozen parameter leaves no empty box among the moments.
    name_of = lambda path, _: _name(path)
    names = jax.tree_util.tree_map_with_path(name_of, params, is_leaf=sharding.is_box)
    all_names = jax.tree.leaves(names)
    for pattern in patterns:
        if not any(re.fullmatch(pattern, name) for name in all_names):
            raise errors.UserError(
                f"optim.frozen: {pattern!r} matches no parameter; names are such as {all_names[0]}"
            )
    return jax.tree.map(lambda name: any(re.fullmatch(p, name) for p in patterns), names)


def stop_frozen(params, patterns: Sequence[str]):
    """`params` with the gradient of frozen ones stopped, so that it is not computed.

    A pattern may match none: these may be a part of the parameters.
    """
    stop = lambda path, x: jax.lax.stop_gradient(x) if _is_frozen(path, patterns) else x
    return jax.tree_util.tree_map_with_path(stop, params)


def layer_scales(params, decay: float):
    """The factor of the learning rate of each parameter by layer-wise decay, float32, to broadcast over it.

    In a tower of N layers: decay^(N - l) for layer l = 0 .. N-1, so that the last layer has decay^1, and
    decay^(N + 1) for what comes before the layers (patches, tokens, positions, class token, registers, the
    norm after them). 1 for all else: the towers' last norms, projections, the decoder, heads, the logit
    scale. Each tower counts its own layers. Source: microsoft/unilm beit/optim_factory.py and
    facebookresearch/mae util/lr_decay.py (Clark et al. 2020, ELECTRA).

    Args:
      params: the parameter tree; layers are stacked along the first axis of `TOWER/blocks`.
      decay: `optim.layer_decay`.
    """
    depth = {}
    for tower in {"image", "text"} & set(params):
        if "blocks" not in params[tower]:
            raise errors.UserError(
                f"optim.layer_decay: got {decay}, but the {tower} tower has no layers below {tower}/blocks"
                " (layers.scan_layers); expected 1"
            )
        depth[tower] = jax.tree.leaves(params[tower]["blocks"])[0].shape[0]

    def scale(path, x):
        name = _name(path)
        tower = name.partition("/")[0]
        if name.startswith(("image/blocks/", "text/blocks/")):
            layers = decay ** np.arange(depth[tower], 0, -1, dtype=np.float32)
            return layers.reshape(-1, *[1] * (x.ndim - 1))
        return np.float32(decay ** (depth[tower] + 1) if _EMBEDDINGS.fullmatch(name) else 1)

    return jax.tree_util.tree_map_with_path(scale, params)


def learning_rate(
    config: Optim, *, total_steps: int, steps_per_epoch: float, reference: bool = False
) -> optax.Schedule:
    """The learning rate of each step, float32 [].

    Linear from `warmup_init` to `learning_rate`, then a cosine to `end_learning_rate` at the last step. The
    schedule of the reference reaches the peak one step early, stays there for a step, and does not reach the
    end (quirk 12).
    """
    warmup = config.warmup_steps
    if warmup is None:
        warmup = round((config.warmup_epochs or 0) * steps_per_epoch)
    warmup = min(warmup, total_steps)
    peak, end = config.learning_rate, config.end_learning_rate
    early = int(reference)
    span = total_steps - warmup - 1 + early

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        rise = config.warmup_init + (peak - config.warmup_init) * step / max(warmup - early, 1)
        progress = jnp.clip((step - warmup) / max(span, 1), 0, 1)
        fall = end + (peak - end) * (1 + jnp.cos(jnp.pi * progress)) / 2
        return jnp.where(step < warmup, rise, fall)

    return schedule


def scale_by_adam(b1: float, b2: float, eps: float, moment_dtype: str):
    """`optax.scale_by_adam`, computed in float32, which stores the first moment as `moment_dtype`.

    optax multiplies `b1` in the stored type, where 0.9 is 0.8984. To the nearest bfloat16 a moment that
    moves by less than half a unit stands still: 2 to 7% below a constant gradient. So rounding is random.
    """
    adam = optax.scale_by_adam(b1, b2, eps)
    if moment_dtype == "float32":
        return adam

    def init(params):
        state: Any = adam.init(params)
        return state._replace(mu=optax.tree.cast(state.mu, jnp.bfloat16))

    def update(updates, state: Any, params=None):
        state = state._replace(mu=optax.tree.cast(state.mu, jnp.float32))
        after: Any
        scaled, after = adam.update(updates, state, params)
        round_leaf = lambda path, mu: _bfloat16_at_random(mu, _name(path), after.count)
        mu = jax.tree_util.tree_map_with_path(round_leaf, after.mu)
        return scaled, after._replace(mu=mu)

    return optax.GradientTransformation(init, update)


def _bfloat16_at_random(x, name: str, step):
    """`x` as one of the two bfloat16 around it, which is `x` on average.

    The random bits are a hash of the element's position in the whole array, the array's name and the step, so
    they are the same on every mesh. A hash of the gradient is not: its last bits depend on the mesh.
    """
    position = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        position = position * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    seed = _scramble(step.astype(jnp.uint32) + np.uint32(zlib.crc32(name.encode())))
    random = _scramble(_scramble(position) + seed) >> 16
    bits = (jax.lax.bitcast_convert_type(x, jnp.uint32) + random) & np.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)


def _scramble(x):
    """uint32 -> uint32, one to one, every bit matters (the finaliser of MurmurHash3, Appleby 2011)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def muon_axes(params):
    """How Muon reads each parameter: a batch of matrices, one per layer, inputs to outputs; None: AdamW's.

    Args:
      params: the parameter tree, or one of its form with gaps; layers are stacked along the first axis.
    """
    return jax.tree_util.tree_map_with_path(_muon_axes, params)


def _muon_axes(path, x):
    name = _TOWER_MATRICES.fullmatch(_name(path))
    if name is None:
        return None
    outputs = 1 + LAYER_MAPS[name[1]]
    return contrib.MuonDimensionNumbers(tuple(range(1, outputs)), tuple(range(outputs, x.ndim)))


def _as_adamw(path, orthogonal):
    """Orthogonal matrices, as `muon_axes` reads them, with the root mean square MUON_RMS."""
    axes: Any = _muon_axes(path, orthogonal)
    sizes = (math.prod(orthogonal.shape[i] for i in part) for part in axes)
    return MUON_RMS * math.sqrt(max(sizes)) * orthogonal


def _orthogonal_momentum(beta: float) -> optax.GradientTransformation:
    """`contrib.scale_by_muon`, whose state does not hold the coefficients: they are constants."""
    axes: Any = muon_axes
    muon: Any = contrib.scale_by_muon(MUON_ITERATION, beta=beta, weight_dimension_numbers=axes)

    def update(updates, state: Any, params=None):
        state = state._replace(ns_coeffs=jnp.float32(MUON_ITERATION))
        updates, after = muon.update(updates, state, params)
        return updates, after._replace(ns_coeffs=())

    return optax.GradientTransformation(lambda params: muon.init(params)._replace(ns_coeffs=()), update)


def scale_by_muon(config: Optim) -> optax.GradientTransformation:
    """Muon (Jordan 2024) for the matrices of the towers' layers, AdamW's scaling for all other parameters.

    The momentum of a matrix, with Nesterov's step and optax's bias correction, is made orthogonal by five
    Newton-Schulz iterations, and scaled to the RMS of AdamW's updates. Both share learning rate and decay.
    """
    muon = optax.chain(
        _orthogonal_momentum(config.muon_beta),
        optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(_as_adamw, updates)),
    )
    adam = scale_by_adam(config.b1, config.b2, config.eps, config.moment_dtype)

    def labels(params):
        label = lambda path, _: "muon" if _TOWER_MATRICES.fullmatch(_name(path)) else "adamw"
        return jax.tree_util.tree_map_with_path(label, params, is_leaf=sharding.is_box)

    return optax.partition({"muon": muon, "adamw": adam}, labels)


def optimizer(
    config: Optim, schedule: optax.Schedule, reference: bool = False
) -> optax.GradientTransformation:
    """Clipping by global norm (if on), AdamW's or Muon's scaling, decay, schedule, layer-wise decay (if on).

    Frozen parameters have no moments and an update of zero. The learning rate, and with it layer-wise
    decay, scales weight decay too, as in torch's AdamW. LoRA's factors all learn at the same rate.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    if config.name == "muon":
        scale = scale_by_muon(config)
    else:
        scale = scale_by_adam(config.b1, config.b2, config.eps, config.moment_dtype)
    updates = optax.chain(
        clip,
        scale,
        optax.add_decayed_weights(config.weight_decay, mask=lambda params: decay_mask(params, reference)),
        optax.scale_by_learning_rate(schedule),
    )
    if config.frozen:
        kind = lambda frozen: "frozen" if frozen else "trained"
        updates = optax.partition(
            {"trained": updates, "frozen": optax.set_to_zero()},
            lambda params: jax.tree.map(kind, frozen_mask(params, config.frozen)),
        )
    if config.layer_decay == 1 or config.lora.rank:  # the chain has no link for it, and the state no entry
        return updates
    by_layer = lambda updates, params: jax.tree.map(
        jnp.multiply, updates, layer_scales(params, config.layer_decay)
    )
    return optax.chain(updates, optax.stateless(by_layer))


def average(params, average_so_far, decay: float | jax.Array, frozen: Sequence[str] = ()):
    """The moving average updated with `params`; frozen parameters keep their bits."""
    moved = optax.incremental_update(params, average_so_far, 1 - decay)
    choose = lambda path, new, old: old if _is_frozen(path, frozen) else new
    return jax.tree_util.tree_map_with_path(choose, moved, average_so_far)


def clip_logit_scales(params, frozen: Sequence[str] = ()):
    """Clips the logit scales to [0, ln 100], as the reference does after every step; not what is frozen."""
    names = [name for name in ("logit_scale", "region_logit_scale") if name in params]
    free = [n for n in names if not any(re.fullmatch(pattern, n) for pattern in frozen)]
    return {**params, **{name: jnp.clip(params[name], 0, MAX_LOG_SCALE) for name in free}}
