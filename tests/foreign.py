"""Inputs, perturbed weights and comparisons for the models of other projects."""

import numpy as np


def perturb(module, seed: int = 0):
    """Adds noise to every parameter: zeros and ones would hide parameters that are not read."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(
                noise
                * (0.5 * parameter.std() if parameter.numel() > 1 and parameter.std() > 0 else 0.1)
            )
    return module.eval()


def inputs(size: int, vocab: int, length: int, *, padded_with: int = 0, seed: int = 0):
    """Images float32 [4, S, S, 3] and token ids int64 [4, L]; each text ends at the highest id."""
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((4, size, size, 3)).astype(np.float32)
    ids = rng.integers(2, vocab - 2, (4, length))
    for row, end in zip(ids, (2, 5, length - 1, 7)):
        row[0], row[end], row[end + 1 :] = vocab - 2, vocab - 1, padded_with
    return images, ids


def torch_images(images):
    import torch

    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def outputs_of_ours(model, params, images, ids):
    """(image_embed, text_embed) of our model, called as the trainer calls it."""
    import jax
    import jax.numpy as jnp

    from grain_jax.models.grain import GRAIN

    ids = jnp.asarray(ids, jnp.int32)
    n, length = ids.shape
    at = jnp.stack([jnp.arange(n), ids.argmax(1)], axis=1)
    positions = jnp.broadcast_to(jnp.arange(length), (1, n, length))
    module = GRAIN(model)
    image = jax.jit(lambda p, x: module.apply({"params": p}, x, method=GRAIN.encode_image))
    text = jax.jit(lambda p, *x: module.apply({"params": p}, *x, method=GRAIN.encode_text))
    with jax.default_matmul_precision("highest"):
        return (
            np.asarray(image(params, images)[0]),
            np.asarray(text(params, ids[None], positions, jnp.ones_like(positions), at)[0]),
        )


def close(ours, theirs, tolerance=1e-5):
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert ours.shape == theirs.shape and error <= tolerance, error
