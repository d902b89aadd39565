"""The recorded outputs of the reference (tests/goldens), and ours for the same batch."""

import dataclasses
import functools
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.parity.comparison import read_npz
from grain_jax import config as config_lib
from grain_jax.config import recipe
from grain_jax.convert.reference import names
from grain_jax.core import boxes, schema
from grain_jax.input_pipeline import packing
from grain_jax.models import grain
from grain_jax.train import train_step

HEADS = {"image": 4, "text": 4, "decoder": 4}  # of grain_public.npz


class Goldens(NamedTuple):
    """grain_public.npz and the model in it, as converted from the reference."""

    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]
    model: config_lib.Model
    params: Any


def below(arrays: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The entries whose names start with the prefix, without it."""
    return {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}


def state_of(arrays: dict[str, Any]) -> dict[str, Any]:
    """The parameters of the reference under their names in `convert.reference.names`."""
    return {name.replace("/", ".", 1): x for name, x in below(arrays, "params/").items()}


def named(params: Any) -> dict[str, Any]:
    """Our parameters, or their gradients, under the goldens' names."""
    return {name.replace(".", "/", 1): x for name, x in names.state_dict(params).items()}


@functools.cache
def goldens() -> Goldens:
    """Reads and converts grain_public.npz."""
    arrays = read_npz("grain_public.npz")
    state = state_of(arrays)
    model, _ = names.infer(state, HEADS)
    params = names.to_params(state, model)
    meta = json.loads(str(arrays["meta_json"]))
    return Goldens(arrays, meta, model, jax.tree.map(jnp.asarray, params))


def config(**loss) -> config_lib.Config:
    """A config with the behaviour of the reference for the batch of the goldens, with changes to `loss`."""
    c = recipe.reference_behaviour(recipe.base())
    c.total_steps, c.optim.warmup_steps = 200, 40
    c.batch_size, c.input.lanes, c.dtype = 6, 1, "float32"
    c.loss.group_size = 0  # the goldens come from one device
    c.loss.update(loss)
    return config_lib.from_dict(c)


def batch(boxes_pixels: np.ndarray, *, packed: bool) -> schema.Batch:
    """The inputs of the goldens as a Batch; boxes are xyxy pixels of a 224 image and are clipped here."""
    arrays = goldens().arrays
    mask = arrays["inputs/avail"] == 1
    captions, descriptions = arrays["inputs/text"], arrays["inputs/desc"][mask]
    in_captions, in_descriptions = (t.argmax(axis=1) + 1 for t in (captions, descriptions))
    by_region = np.zeros(mask.shape, np.int64)
    by_region[mask] = in_descriptions
    negatives = np.zeros((*mask.shape, 0), np.int64)
    lengths = packing.TextArrays(in_captions[:, None], by_region, negatives)
    row_length = captions.shape[1]
    if packed:
        ranks = -np.arange(mask.size, dtype=np.float32).reshape(mask.shape)
        sizes = dict(pack_group=len(mask), rows=5, row_length=row_length)
        places = packing.pack(lengths, ranks, **sizes)
    else:
        places = packing.one_text_per_row(lengths, row_length=row_length)
    joined = lambda texts, lengths: np.concatenate([t[:n] for t, n in zip(texts, lengths)])
    ids = [joined(captions, in_captions), joined(descriptions, in_descriptions)]
    tokens, positions, segments = packing.fill(places, np.concatenate(ids), lengths)
    if places.misfits.slots().any():
        raise ValueError("the goldens' texts must all fit into the packed rows")
    return schema.Batch(
        image=arrays["inputs/images"].transpose(0, 2, 3, 1),
        text_tokens=tokens,
        text_positions=positions,
        text_segments=segments,
        caption_at=places.ends.captions,
        caption_id=np.arange(len(mask), dtype=np.int32)[:, None],
        caption_mask=np.ones((len(mask), 1), bool),
        description_at=places.ends.descriptions,
        description_id=np.arange(mask.size, dtype=np.int32).reshape(mask.shape),
        region_boxes_cxcywh=np.asarray(boxes.xyxy_to_cxcywh(boxes_pixels.clip(0, 224) / 224)),
        region_mask=places.lengths.descriptions > 0,
        texts_dropped=np.zeros(1, np.int32),
    )


@jax.jit
def _loss_and_grads(params, inputs: schema.Batch):
    of_goldens = dataclasses.replace(config(), model=goldens().model)
    return train_step.loss_and_grads(of_goldens, None, params, inputs, None)


@functools.cache
def run(which: str = "", *, packed: bool = False):
    """(losses, gradients, gradients by the reference's names) of the batch `which`: "" or "degenerate/"."""
    g = goldens()
    terms, grads = _loss_and_grads(g.params, batch(g.arrays[f"{which}inputs/boxes"], packed=packed))
    return terms, grads, named(grads)


@functools.cache
def outputs(*, packed: bool = False) -> dict[str, np.ndarray]:
    """Outputs of towers and decoder for the batch of the goldens, before normalisation."""
    g = goldens()
    inputs = batch(g.arrays["inputs/boxes"], packed=packed)

    def forward(module):
        tokens = module.image_tokens(inputs.image)
        hidden = module.decoder(tokens)
        texts = (inputs.text_tokens, inputs.text_positions, inputs.text_segments)
        captions, descriptions = module.text_features(*texts, inputs.caption_at, inputs.description_at)
        return dict(
            vision_tokens=tokens,
            decoder_hs=hidden,
            pred_boxes=module.box_mlp(hidden[:, :, :-1]),
            img_embed=module.image_projection(hidden[-1, :, -1]),
            obj_embeds=module.region_projection(hidden[-1, :, :-1]),
            text_embed=captions[:, 0],
            desc_embed=descriptions,
            logit_scale_exp=jnp.exp(module.logit_scale),
            outputs=module(inputs),
        )

    apply = lambda params: grain.GRAIN(g.model).apply({"params": params}, method=forward)
    out = jax.tree.map(np.asarray, jax.jit(apply)(g.params))
    return out | {"desc_embed": out["desc_embed"][inputs.region_mask]}
