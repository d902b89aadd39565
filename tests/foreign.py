"""Perturbed weights and comparisons for the models of other projects."""

import numpy as np

from grain_jax import inference


def perturb(module, seed: int = 0):
    """Adds noise to every parameter: zeros and ones would hide parameters that are not read."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = 0.5 * parameter.std() if parameter.numel() > 1 else 0.0
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (spread if spread > 0 else 0.1))
    return module.eval()


def torch_images(images):
    import torch

    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def close_to_ours(model, params, images, ids, theirs):
    """Our image and text embeddings are theirs; with the programs that the parity report has compiled."""
    predictor = inference.Predictor(model, params)
    for ours, other in zip((predictor.encode_image(images), predictor.encode_text(ids)), theirs):
        close(ours, other)


def close(ours, theirs, tolerance=1e-5):
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert ours.shape == theirs.shape and error <= tolerance, error
