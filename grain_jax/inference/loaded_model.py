"""A model with its parameters on devices, and what it has: regions, a box head, patches, scales."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding

from grain_jax import config as config_lib
from grain_jax.checkpoint import saved_model
from grain_jax.core import errors, low_rank
from grain_jax.inference import batches, jitted, prompts
from grain_jax.inference.inputs import InputError
from grain_jax.models import box_head, towers


class LoadedModel:
    """The base of `Predictor`, which documents its arguments."""

    def __init__(
        self,
        model: config_lib.Model,
        params: Any,
        dtype: str = "float32",
        templates: Sequence[str] | None = None,
        folder: epath.PathLike | None = None,
        progress: bool = False,
        device: Any = None,
    ):
        if dtype not in config_lib.DTYPES:
            raise InputError(f"dtype: got {dtype!r}, expected {' or '.join(config_lib.DTYPES)}")
        # Raises early if a stored config names towers that may not be imported.
        towers.image_tower(model.image)
        towers.text_tower(model.text)
        if any(low_rank.maps_in(params)):
            expected = "merged parameters, as grain_jax.load and grain_jax.models.lora.merged return them"
            raise InputError(f"params: got factors of LoRA, expected {expected}")
        self.dtype, self.folder, self.progress = dtype, folder, progress
        # Parameters that the caller has put on a mesh or a device stay there, and the programs run there.
        mesh = _mesh_of(params) if device is None else None
        # The run chose its programs for its own devices. XLA's attention is the same on all meshes.
        self.model = dataclasses.replace(model, attention="xla" if mesh else "auto")
        settings = model.image.image_size, progress
        if mesh:
            self.params, self._runner = params, batches.MeshRunner(params, mesh, *settings)
        else:
            self.params = jax.device_put(params, None if device is None else _device(device))
            devices = set().union(*(leaf.devices() for leaf in jax.tree.leaves(self.params)))
            is_free = device is None and devices == {jax.local_devices()[0]}
            devices = jax.local_devices() if is_free else [None]
            self._runner = batches.BatchRunner(self.params, devices, *settings)
        self.templates = list(templates) if templates is not None else prompts.load_templates()

    def __reduce__(self):
        """Weights and settings: a copy, or one that is read from a pickle, lies on the default devices."""
        settings = self.dtype, self.templates, self.folder, self.progress
        return type(self), (self.model, jax.device_get(self.params), *settings)

    def __repr__(self) -> str:
        image, text, decoder = self.model.image, self.model.text, self.model.decoder
        size, count = image.image_size, sum(x.size for x in jax.tree.leaves(self.params))
        return (
            f"<Predictor of {self.folder or 'given parameters'}:"
            f" image {size} x {size} ({image.tower}, depth {image.depth}, width {image.width});"
            f" text of {text.context_length} tokens ({text.tower}, depth {text.depth}, width {text.width});"
            f" {decoder.queries if decoder else 0} region queries; box head {self.model.boxes.kind}"
            f"{', whose regions are the boxes of all patches' * self.has_proposals};"
            f" embeddings of {self.model.embed_dim}; {count:,} parameters, {self.dtype}>"
        )

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """Digests of the model's configuration and of its parameters."""
        return saved_model.model_digests(self.model, jax.device_get(self.params))

    @property
    def logit_scale(self) -> float:
        """The factor of the cosines in the loss; `params` hold its logarithm."""
        return float(np.exp(self.params["logit_scale"]))

    @property
    def logit_bias(self) -> float | None:
        """What a sigmoid model adds to the scaled cosines; None for others."""
        return float(self.params["logit_bias"]) if "logit_bias" in self.params else None

    @property
    def region_logit_scale(self) -> float:
        """The factor of the cosines in the losses of regions; `logit_scale` in most models."""
        return float(np.exp(self.params.get("region_logit_scale", self.params["logit_scale"])))

    @property
    def region_logit_bias(self) -> float | None:
        """What a sigmoid model adds to the scaled cosines of regions; None for others."""
        has_scale = "region_logit_scale" in self.params
        bias = self.params.get("region_logit_bias" if has_scale else "logit_bias")
        return None if bias is None else float(bias)

    @property
    def has_regions(self) -> bool:
        """Whether the model finds regions, by region queries or by the boxes of patches."""
        decoder = self.model.decoder
        return self.has_proposals or (decoder is not None and decoder.queries > 0)

    @property
    def has_proposals(self) -> bool:
        """Whether the regions are the boxes that patches predict."""
        return self.model.boxes.proposals

    @property
    def grounding_head(self) -> str:
        """The head of jitted.image_program that embeds regions for `ground`."""
        by_box_head = self.has_box_head and not self.has_proposals  # those have no other embedding
        return "regions_by_box_head" if by_box_head else "embeddings"

    @property
    def class_score(self) -> str:
        """How regions score a class: `by` of scores.region_scores."""
        if self.has_proposals:  # most patches show other things, or none
            return "best"
        return self.model.decoder.class_score if self.model.decoder else "mean"

    @property
    def has_box_head(self) -> bool:
        """Whether the model embeds given boxes."""
        return self.model.boxes.kind != "none"

    @property
    def has_patches(self) -> bool:
        """Whether patches have embeddings in the space of the texts."""
        return self.has_box_head or self.model.tower_pools

    def need_regions(self, argument: str) -> None:
        """Raises InputError if the model has no region queries; `argument` begins the message."""
        if not self.has_regions:
            has = "two towers and no region decoder (model.decoder is null)"
            if self.model.decoder is not None:
                has = "no region queries (model.decoder.queries is 0)"
            advice = "use encode_image, encode_text, or classify with alpha 1"
            raise InputError(f"{argument}: the model has {has}, expected one that finds regions; {advice}")

    @functools.cached_property
    def grid(self) -> int:
        """Patches along a side of an image. Raises InputError if the tower has no grid of them."""
        tower, size = towers.image_tower(self.model.image), self.model.image.image_size
        if tower.pooled:
            raise InputError("model.image.tower: pools its tokens, expected a grid of them")
        pixels = jax.ShapeDtypeStruct((1, size, size, 3), np.uint8)
        program = jitted.program(self.model, self.dtype, "image_tokens")
        count = jax.eval_shape(program, self.params, pixels).shape[1]
        try:
            return box_head.grid_size(count, tower.leading_tokens(self.model.image))
        except errors.UserError as error:
            raise InputError(str(error)) from None


def _mesh_of(params: Any) -> Mesh | None:
    """The mesh of several devices that the arrays lie on; None: they lie on one, or are numpy's."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) and sharding.mesh.size > 1:
        return sharding.mesh
    return None


def _device(name: Any) -> Any:
    """A device, or the one with a name such as "cpu", "gpu" or "gpu:1". Raises InputError."""
    if not isinstance(name, str):
        return name
    platform, _, number = name.partition(":")
    try:
        return jax.local_devices(backend=platform)[int(number or 0)]
    except (RuntimeError, ValueError, IndexError):
        there = ", ".join(f"{x.platform}:{i}" for i, x in enumerate(jax.local_devices()))
        raise InputError(f"device: got {name!r}, expected one of {there}, or cpu") from None
