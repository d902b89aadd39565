"""Models with random weights, in which no error hides behind zeros and ones."""

from typing import Any

import jax
import numpy as np
from etils import epath

from grain_jax import config as config_lib
from grain_jax.config import recipe
from grain_jax.models import grain
from grain_jax.runtime import checkpoint


def perturbed(model: config_lib.Model, seed: int = 0) -> Any:
    """Random parameters as numpy arrays, without the zeros and ones of initial weights, which would hide errors.

    Their scale keeps activations in bounds and makes texts and queries differ.
    """
    size, rows = model.image.image_size, np.zeros((1, 1, model.text.context_length), np.int32)

    def everything(module, image):
        embeds = module.encode_image(image), module.encode_text(rows, rows, rows, rows[0, :, :2])
        bias = module.logit_bias if model.logit_bias_init is not None else 0
        boxes = module.encode_boxes(image, np.zeros((1, 1, 4))) if model.boxes.kind != "none" else 0
        return embeds, module.logit_scale, bias, boxes

    image = np.zeros((1, size, size, 3), np.float32)
    init = lambda key: grain.GRAIN(model).init(key, image, method=everything)
    shapes = jax.eval_shape(init, jax.random.key(0))["params"]
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name, shape = jax.tree_util.keystr(path, simple=True, separator="/"), leaf.value.shape
        noise = rng.standard_normal(shape, np.float32)
        if name == "logit_scale":
            return np.float32(2.5)
        if name.endswith("/scale"):
            return 1 + noise / 5
        if name.endswith("/kernel"):
            layer = shape[1:] if "/blocks/" in name else shape
            inputs = np.prod(layer[:-1]) if name.endswith("out/kernel") else layer[0]
            return noise / np.float32(np.sqrt(inputs))
        return noise if name.endswith("query_embed") else noise / 5

    return jax.tree_util.tree_map_with_path(draw, shapes, is_leaf=lambda x: hasattr(x, "value"))


def save(size: str, folder: epath.Path) -> config_lib.Model:
    """Saves a model of that size with random weights in the folder."""
    model = config_lib.model_from_dict(recipe.model(size).to_dict())
    checkpoint.save_model(folder, model, perturbed(model))
    return model
