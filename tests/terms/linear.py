"""A student and a teacher that are two products each: what a local term sees of them, and the same in torch, float64."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn import functional

from grain_jax.losses.local import Seen
from grain_jax.models.grain import normalize
from grain_jax.terms import views

PATCH, WIDTH, EMBED = 4, 6, 5


def params(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(0, shape[0] ** -0.5, shape).astype(np.float32)
    return {
        "patch": draw(PATCH * PATCH * 3, WIDTH),
        "mix": draw(WIDTH, WIDTH),
        "project": draw(WIDTH, EMBED),
    }


def _patches(image):
    n, size = image.shape[:2]
    x = image.reshape(n, size // PATCH, PATCH, size // PATCH, PATCH, 3)
    axes = (0, 1, 3, 2, 4, 5)
    x = x.permute(*axes) if isinstance(x, torch.Tensor) else x.transpose(axes)
    return x.reshape(n, (size // PATCH) ** 2, -1)


def tokens(p, image, masked=None):
    """A class token, the mean, and the patches; each patch sees the mean of all."""
    x = _patches(image) @ p["patch"]
    if masked is not None:
        mask, token = masked
        where = torch.where if isinstance(x, torch.Tensor) else jnp.where
        x = where(mask[..., None], token, x)
    mean = x.mean(1)[:, None]
    x = x @ p["mix"] + mean
    return torch.cat([mean, x], 1) if isinstance(x, torch.Tensor) else jnp.concatenate([mean, x], 1)


def embed(p, image):
    x = tokens(p, image)[:, 1:].mean(1) @ p["project"]
    return functional.normalize(x, dim=-1) if isinstance(x, torch.Tensor) else normalize(x)


def student(p):
    return lambda method, image, **options: {
        "image_tokens": lambda: tokens(p, image, **options),
        "encode_image": lambda: (embed(p, image),),
    }[method]()


def seen(model, p, its, *, head=None, state=None, share=0.1, images=4, local=3, size=8, seed=0):
    """What a term sees of random views.

    Args:
      model: config.Model, for the statistics of pixels.
      p: `params` of the student.
      its: those of the teacher.
      head: the teacher's parameters of the term.
      state: of the term.
      share: of the run.
      images: B.
      local: local views.
      size: of a local view; the global one has twice as many pixels a side.
      seed: of the views.
    """
    rng = np.random.default_rng(seed)
    draw = lambda n, size: rng.random((images, n, size, size, 3)).astype(np.float32)
    whole, parts, image = draw(1, 2 * size), draw(local, size), draw(1, 2 * size)[:, 0]
    view = lambda x: views.View(jnp.asarray(x), None, None)
    normalised = lambda x: views.normalised(x, model.image)
    teacher = types.SimpleNamespace(
        kind="ema",
        params_of_term=head,
        leading=1,
        tokens=lambda x: tokens(its, normalised(x)),
        embed=lambda x: embed(its, normalised(x)),
    )
    return Seen(
        batch=types.SimpleNamespace(image=jnp.asarray(image)),
        tokens=tokens(p, normalised(image)),
        hidden=None,
        text_features=None,
        outputs=types.SimpleNamespace(image_embed=embed(p, normalised(image))),
        leading=1,
        keys=jax.random.split(jax.random.key(seed), images),
        student=student(p),
        teacher=teacher,
        views=views.Views(view(whole), view(parts)),
        state=state or {},
        share=jnp.float32(share),
    )


def double(tree):
    """The tree as tensors of float64 with gradients."""
    return jax.tree.map(
        lambda x: torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True), tree
    )


def normalised(image, model):
    mean, std = (
        torch.tensor(x, dtype=torch.float64)
        for x in (model.image.pixel_mean, model.image.pixel_std)
    )
    return (torch.tensor(np.asarray(image), dtype=torch.float64) - mean) / std


def head(p, x, maps):
    """The logits of DINO's head of so many linear maps, and its bottleneck."""
    linear = lambda name, x: x @ p[name]["kernel"] + p[name]["bias"]
    for i in range(maps - 1):
        x = functional.gelu(linear(f"hidden_{i}", x))
    x = functional.normalize(linear("bottleneck", x), dim=-1)
    return x @ functional.normalize(p["prototypes"], dim=-1).T


def perturbed(tree, seed=0):
    """Parameters of which every one counts: biases, too."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.float32(rng.normal(0, 0.4, x.shape)), tree)


def cross_entropy(target, logits, temperature):
    return -(target * functional.log_softmax(logits / temperature, -1)).sum(-1)


def worst(tree, other):
    """The largest difference of two trees, relative to the largest entry of each array."""

    def relative(a, b):
        a, b = np.asarray(a), np.asarray(b)
        return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))

    return max(jax.tree.leaves(jax.tree.map(relative, tree, other)))


def gradients(tree):
    return jax.tree.map(lambda x: np.zeros(x.shape) if x.grad is None else x.grad.numpy(), tree)


def shapes(term, seen):
    """The shapes of the parameters of a term."""
    return nn.unbox(jax.eval_shape(lambda: term.init(jax.random.key(0), seen)))["params"]
