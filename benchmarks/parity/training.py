"""Comparisons with the reference: losses, gradients, the optimiser's step and schedule, our packed texts."""

import json
from collections.abc import Iterator

import jax
import numpy as np
import optax

from benchmarks.parity.comparison import GOLDENS, Comparison, gradient, relative
from benchmarks.parity.goldens import batch, below, config, goldens, named, outputs, run
from grain_jax import losses as losses_lib
from grain_jax.convert.reference import names
from grain_jax.train import optim


def _losses(prefix: str, terms) -> Iterator[Comparison]:
    arrays = goldens().arrays
    for name, ours in (
        ("clip_loss", terms.terms["image_caption"]),
        ("box_loss", 1.5 * terms.terms["box"]),
        ("word_loss", terms.terms["region_description"]),
        ("total", terms.total),
    ):
        yield relative(name, ours, arrays[f"{prefix}losses/{name}"])


def losses() -> Iterator[Comparison]:
    """Each loss and the total."""
    yield from _losses("", run()[0])


def gradients() -> Iterator[Comparison]:
    """The gradient of every parameter that the reference has one for."""
    arrays, (_, _, ours) = goldens().arrays, run()
    stored = below(arrays, "grads/")
    yield Comparison("names", float(len(stored.keys() ^ ours.keys())), 0.0)
    for name, reference in stored.items():
        yield gradient(name, ours[name], reference)


def decay_groups() -> Iterator[Comparison]:
    """The parameters with weight decay; counts the errors."""
    g = goldens()
    mask = optim.decay_mask(g.params, reference=True)
    ours = jax.tree.map(lambda p, decayed: np.full(p.shape, decayed, bool), g.params, mask)
    groups = json.loads((GOLDENS / "grain_public_param_groups.json").read_text())
    unused = {name.replace(".", "/", 1) for name in names.UNUSED}
    for group, decayed in (("decay", True), ("no_decay", False)):
        decayed_names = {name for name, x in named(ours).items() if (x == decayed).all()}
        yield Comparison(group, float(len(decayed_names ^ (set(groups[group]) - unused))), 0.0)


def adamw() -> Iterator[Comparison]:
    """Parameters after one step: the stored ones outside of `unreliable` by value, all by checksum."""
    g = goldens()
    c = config()
    tx = optim.optimizer(c.optim, optax.constant_schedule(c.optim.learning_rate), reference=True)

    @jax.jit
    def step(params, grads):
        updates, _ = tx.update(grads, tx.init(params), params)
        return optim.clip_logit_scales(optax.apply_updates(params, updates))

    checksums = g.meta["adamw_checksum_after_[sum,sumabs]"]
    for name, ours in named(step(g.params, run()[1])).items():
        bad = g.arrays.get(f"adamw/unreliable/{name}", np.zeros(ours.shape, bool))
        sums = np.array([ours.sum(dtype=np.float64), np.abs(ours).sum(dtype=np.float64)])
        unreliable = g.meta["grad_f32_vs_f64"][name]["n_unreliable"]
        error = float(np.abs(sums - checksums[name]).max())
        yield Comparison(f"{name} checksum", error, 1e-3 * unreliable + 1e-6 * ours.size)
        reference = g.arrays.get(f"adamw/after/{name}")
        if reference is not None:
            if ours.ndim:  # of the token table the goldens keep the last rows only
                ours, bad = ours[-len(reference) :], bad[-len(reference) :]
            error = np.abs(ours - reference)
            yield Comparison(name, float(np.max(error, where=~bad, initial=0.0)), 3e-6)


def schedule() -> Iterator[Comparison]:
    """The learning rate of 200 steps, in float32."""
    c = config()
    steps = dict(total_steps=c.total_steps, steps_per_epoch=40)
    rate = optim.learning_rate(c.optim, **steps, reference=True)
    reference = goldens().arrays["lr_schedule"]
    yield relative("200 steps", jax.vmap(rate)(np.arange(len(reference))), reference)


def degenerate() -> Iterator[Comparison]:
    """Boxes that are empty after clipping: the reference's labels (quirk 1), and the right ones."""
    g = goldens()
    terms, _, grads = run("degenerate/")
    yield from _losses("degenerate/", terms)
    for name, sums in g.meta["degenerate_grad_checksum_[sum,sumabs]"].items():
        ours = grads[name].astype(np.float64)
        error = np.abs(np.array([ours.sum(), np.abs(ours).sum()]) - sums).max()
        # The tolerance of `gradient` for every element.
        tolerance = ours.size * max(1e-7, 2e-5 * np.abs(ours).max())
        yield Comparison(f"{name} checksum", error, tolerance)
    inputs = batch(g.arrays["degenerate/inputs/boxes"], packed=False)
    c = config().loss  # without the quirks
    terms = jax.jit(lambda out: losses_lib.total_loss(out, inputs, c))(outputs()["outputs"])
    right = g.arrays["degenerate/losses/word_loss_if_labels_correct_and_desc_dropped"]
    yield relative("word_loss, dropped from both", terms.terms["region_description"], right)


def packed() -> Iterator[Comparison]:
    """Our packed texts against the reference's padded ones: embeddings, losses, every gradient."""
    arrays = goldens().arrays
    for name in ("text_embed", "desc_embed"):
        yield relative(name, outputs(packed=True)[name], arrays[f"outputs/{name}"])
    terms, _, grads = run(packed=True)
    yield from _losses("", terms)
    _, _, unpacked = run()
    for name, ours in grads.items():
        yield gradient(f"{name} against the reference", ours, arrays[f"grads/{name}"])
        yield gradient(f"{name} against our padded path", ours, unpacked[name])
