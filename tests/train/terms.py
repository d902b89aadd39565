"""Local loss terms of tests: with parameters and state, with an average of parameters, with neither."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from grain_jax.losses import local
from grain_jax.models import layers


@dataclasses.dataclass(frozen=True)
class Options:
    """Keys of the term."""

    factor: float = 2.0


class Smooth(local.LocalTerm):
    """Patches through a map of its own, against their neighbours; a centre in its state."""

    Options: ClassVar[type] = Options

    def setup(self):
        self.map = layers.dense(4, ("width",), ("vector",), dtype=jnp.float32, kernel_init=layers.normal(0.2))

    def initial_state(self, params):
        return {"centre": jnp.zeros(4)}

    def update(self, state, statistics, params):
        return {"centre": 0.5 * state["centre"] + 0.5 * statistics["sum"] / statistics["count"]}

    def __call__(self, seen):
        patches = self.map(seen.tokens[:, seen.leading :].astype(jnp.float32))
        noise = jax.vmap(lambda key: jax.random.normal(key, (4,)))(seen.keys)
        centred = patches - seen.state["centre"] + 0.1 * noise[:, None]
        other = seen.apply("image_tokens", seen.batch.image[:, ::-1])
        loss = self.options.factor * jnp.square(centred).sum((1, 2)) + other.mean((1, 2))
        of_groups = seen.text_hidden.mean((1, 2, 3))
        loss = loss + jnp.repeat(of_groups, len(loss) // len(of_groups))
        count = 1 + seen.batch.caption_id[:, 0] % 3  # ints, as the sum of a mask is
        return local.LocalOutput(
            local.PerImage(loss * count, count),
            {"norm": local.PerImage(jnp.abs(patches).mean((1, 2)), jnp.ones(len(loss), bool))},
            statistics={"sum": patches.mean(1).sum(0), "count": jnp.int32(len(loss))},
        )


class Average(Smooth):
    """The map of an average of all parameters, its own too, on the average's tokens of a mirrored image."""

    def initial_state(self, params):
        return {"average": jax.tree.map(jnp.copy, params), "steps": jnp.zeros(())}

    def update(self, state, statistics, params):
        moved = lambda old, new: 0.75 * old + 0.25 * new
        average = jax.tree.map(moved, state["average"], params)
        return {"average": average, "steps": state["steps"] + 1}

    def __call__(self, seen):
        average = seen.state["average"]
        mirrored = seen.batch.image[:, :, ::-1]
        target = seen.apply("image_tokens", mirrored, params=average.model)[:, 0]
        if not self.is_initializing():
            linear = average.term["map"]
            target = target @ linear["kernel"] + linear["bias"]
        else:
            target = self.map(target)
        loss = jnp.square(self.map(seen.tokens[:, 0]) - target).sum(-1)
        return local.LocalOutput(local.PerImage(loss, jnp.ones(len(loss))))


class Bare(local.LocalTerm):
    """A term without parameters."""

    def __call__(self, seen):
        loss = seen.outputs.image_embed[:, 0]
        return local.LocalOutput(local.PerImage(loss, jnp.ones(len(loss))))


ENTRIES = {
    name.lower(): {"term": f"{__name__}:{name}", "weight": weight, "factor": 1.5}
    for name, weight in (("Smooth", 0.3), ("Average", 0.7))
}
