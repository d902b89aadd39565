"""The same function in the arrays that another format has: our flat parameters before their names change."""

import numpy as np

from grain_jax.convert.tables import Arrays


def without_patch_bias(flat: Arrays) -> Arrays:
    """The bias of the patches as part of their positions, of a tower with a class token."""
    flat = dict(flat)
    bias = flat.pop("image/patch_embed/bias", None)
    if bias is not None:
        positions = np.array(flat["image/position_embed"])
        positions[1:] += bias
        flat["image/position_embed"] = positions
    return flat


def with_patch_bias(flat: Arrays) -> Arrays:
    """A bias of zeros where the patches have none."""
    width = flat["image/patch_embed/kernel"].shape[1]
    return {"image/patch_embed/bias": np.zeros(width, np.float32), **flat}


def with_projection(flat: Arrays, tower: str, width: int, *, bias: bool) -> Arrays:
    """The identity if a tower of that width has no projection and, with `bias`, zeros if it has no bias."""
    name = f"{tower}_projection"
    kernel = flat.get(f"{name}/kernel", np.eye(width, dtype=np.float32))
    zeros = {f"{name}/bias": np.zeros(kernel.shape[1], np.float32)} if bias else {}
    return {**zeros, **flat, f"{name}/kernel": kernel}


def without_class_position(flat: Arrays) -> Arrays:
    """The position of the class token as part of the token."""
    if "image/class_token" not in flat:
        return flat
    positions = flat["image/position_embed"]
    token = flat["image/class_token"] + positions[0]
    return {**flat, "image/class_token": token, "image/position_embed": positions[1:]}
