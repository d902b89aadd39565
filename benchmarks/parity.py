"""The parity table: compares our numbers with those of the PyTorch reference, in groups.

    python -m benchmarks.parity [--json OUT.json]

Everything is float32 at full precision, on the goldens in tests/goldens, which are outputs of the reference
(tests/test_parity.py asserts the same comparisons). Each line shows the comparison of its group that is closest to
its tolerance.
"""

import argparse
import functools
import json
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import preprocessing, side_by_side
from benchmarks.preprocessing import GOLDENS, read_npz
from grain_jax import config as config_lib
from grain_jax import losses as losses_lib
from grain_jax import recipe, schema
from grain_jax.convert.reference import names as torch_names
from grain_jax.convert.reference.parameters import to_params
from grain_jax.convert.reference.sizes import infer, sizes_of
from grain_jax.inference import scores
from grain_jax.input_pipeline import packing, tokenizer
from grain_jax.losses import boxes, matching
from grain_jax.models import grain
from grain_jax.training import optim, train_step

RELATIVE = 1e-5  # of max |reference|
HEADS = {"image": 4, "text": 4, "decoder": 4}  # of grain_public.npz


class Comparison(NamedTuple):
    """The comparison of one of our arrays with that of the reference."""

    name: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return bool(self.error <= self.tolerance)


class Goldens(NamedTuple):
    """grain_public.npz and the model in it, as converted from the reference."""

    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]
    model: config_lib.Model
    params: Any


def relative(name: str, ours, reference, tolerance: float = RELATIVE) -> Comparison:
    """max |a - b| / max |b|."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    if ours.shape != reference.shape:
        raise ValueError(f"{name}: shape {ours.shape}, expected {reference.shape}")
    return Comparison(name, np.abs(ours - reference).max() / np.abs(reference).max(), tolerance)


def gradient(name: str, ours, reference) -> Comparison:
    """max |a - b| against the float32 accuracy of a gradient."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    if ours.shape != reference.shape:
        raise ValueError(f"{name}: shape {ours.shape}, expected {reference.shape}")
    tolerance = max(1e-7, 2e-5 * np.abs(reference).max())
    return Comparison(name, np.abs(ours - reference).max(), tolerance)


@functools.cache
def goldens() -> Goldens:
    """Reads and converts grain_public.npz."""
    arrays = read_npz("grain_public.npz")
    states = {
        module: {
            key.removeprefix(f"params/{module}/"): array
            for key, array in arrays.items()
            if key.startswith(f"params/{module}/")
        }
        for module in ("backbone", "decoder")
    }
    model = infer(states, HEADS).model
    params = to_params(states["backbone"], states["decoder"], model)
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
    lengths = [tokens.argmax(axis=1) + 1 for tokens in (captions, descriptions)]
    by_region = np.zeros(mask.shape, np.int64)
    by_region[mask] = lengths[1]
    texts = dict(
        caption_lengths=lengths[0][:, None], description_lengths=by_region, region_mask=mask
    )
    row_length = captions.shape[1]
    if packed:
        ranks = -np.arange(mask.size, dtype=np.float32).reshape(mask.shape)
        layout = packing.pack(
            **texts, region_scores=ranks, pack_group=len(mask), rows=5, row_length=row_length
        )
    else:
        layout = packing.one_text_per_row(**texts, row_length=row_length)
    ids = [
        np.concatenate([tokens[:n] for tokens, n in zip(of, count)])
        for of, count in zip((captions, descriptions), lengths)
    ]
    rows = packing.fill(
        layout,
        caption_ids=ids[0],
        caption_lengths=lengths[0][:, None],
        description_ids=ids[1],
        description_lengths=lengths[1],
        region_mask=mask,
    )
    if layout.texts_dropped or layout.captions_cut:
        raise ValueError("the goldens' texts must all fit into the packed rows")
    return schema.Batch(
        image=arrays["inputs/images"].transpose(0, 2, 3, 1),
        text_tokens=rows.tokens,
        text_positions=rows.positions,
        text_segments=rows.segments,
        caption_at=layout.caption_at,
        caption_id=np.arange(len(mask), dtype=np.int32)[:, None],
        caption_mask=np.ones((len(mask), 1), bool),
        description_at=layout.description_at,
        description_id=np.arange(mask.size, dtype=np.int32).reshape(mask.shape),
        region_boxes_cxcywh=np.asarray(
            boxes.xyxy_to_cxcywh(jnp.asarray(boxes_pixels.clip(0, 224) / 224))
        ),
        region_mask=layout.region_mask,
        texts_dropped=np.zeros(1, np.int32),
    )


@jax.jit
def _loss_and_grads(params, inputs: schema.Batch):
    model = grain.GRAIN(goldens().model)
    return train_step.loss_and_grads(model, config(), None, params, inputs, None)


@functools.cache
def run(which: str = "", *, packed: bool = False):
    """(losses, gradients, gradients under the reference's names) of the batch `which`: "" or "degenerate/"."""
    g = goldens()
    terms, grads = _loss_and_grads(g.params, batch(g.arrays[f"{which}inputs/boxes"], packed=packed))
    named = torch_names.state_dicts(grads, sizes_of(g.model))
    return terms, grads, {f"{m}/{name}": array for m in named for name, array in named[m].items()}


@functools.cache
def outputs(*, packed: bool = False) -> dict[str, np.ndarray]:
    """Outputs of towers and decoder for the batch of the goldens, before normalisation."""
    g = goldens()
    inputs = batch(g.arrays["inputs/boxes"], packed=packed)

    def forward(module):
        tokens, hidden = module.image_features(inputs.image)
        texts = (inputs.text_tokens, inputs.text_positions, inputs.text_segments)
        captions, descriptions = module.text_features(
            *texts, inputs.caption_at, inputs.description_at
        )
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


def image_tower() -> Iterator[Comparison]:
    """Tokens of the image tower."""
    yield relative("tokens", outputs()["vision_tokens"], goldens().arrays["outputs/vision_tokens"])


def text_tower() -> Iterator[Comparison]:
    """Embeddings of captions and descriptions before normalisation."""
    for name in ("text_embed", "desc_embed"):
        yield relative(name, outputs()[name], goldens().arrays[f"outputs/{name}"])


def decoder() -> Iterator[Comparison]:
    """Hidden state and boxes of every layer, and the embeddings before and after normalisation."""
    arrays, ours = goldens().arrays, outputs()
    last = len(ours["decoder_hs"]) - 1
    for i in range(last + 1):
        yield relative(f"hidden {i}", ours["decoder_hs"][i], arrays["outputs/decoder_hs"][i])
        name = "outputs/pred_boxes" if i == last else f"outputs/aux/{i}/pred_boxes"
        yield relative(f"boxes {i}", ours["pred_boxes"][i], arrays[name])
    for name in ("img_embed", "obj_embeds", "logit_scale_exp"):
        yield relative(name, ours[name], arrays[f"outputs/{name}"])
    batch_outputs = cast(schema.Outputs, ours["outputs"])
    batch_outputs = batch_outputs._replace(text_embed=batch_outputs.text_embed[:, 0])
    for name, field in (
        ("img_embed", "image_embed"),
        ("obj_embeds", "region_embed"),
        ("text_embed", "text_embed"),
    ):
        unit = scores.unit(arrays[f"outputs/{name}"])
        yield relative(f"unit {field}", getattr(batch_outputs, field), unit)
    yield relative("unit boxes", batch_outputs.pred_boxes_cxcywh[-1], arrays["outputs/pred_boxes"])


def matched() -> Iterator[Comparison]:
    """The cost matrix, and the matched query of each region in each layer; counts the errors."""
    arrays, c = goldens().arrays, config().loss
    inputs = batch(arrays["inputs/boxes"], packed=False)
    layers = outputs()["pred_boxes"]
    cost_of = functools.partial(
        matching.cost_matrix, l1=c.match_l1, giou=c.match_giou, iou_epsilon=c.iou_epsilon
    )
    cost = cost_of(layers[-1], inputs.region_boxes_cxcywh)
    counts = inputs.region_mask.sum(axis=1)
    columns = np.cumsum(counts) - counts  # the golden matrix has the targets of all images
    reference = np.zeros(cost.shape)
    for i, (first, n) in enumerate(zip(columns, counts)):
        reference[i, :, :n] = arrays["outputs/cost_matrix"][i, :, first : first + n]
    ours = np.where(inputs.region_mask[:, None], cost, 0)
    yield relative("cost matrix", ours, reference)
    for i, pred in enumerate(layers):
        match = matching.match(cost_of(pred, inputs.region_boxes_cxcywh), inputs.region_mask)
        prefix = "outputs/" if i == len(layers) - 1 else f"outputs/aux/{i}/"
        queries, regions = arrays[prefix + "match_src"], arrays[prefix + "match_tgt"]
        expected = np.full(regions.shape, -1)
        image, pair = np.nonzero(queries >= 0)
        expected[image, regions[image, pair]] = queries[image, pair]
        ours = np.where(match.valid, match.query_index, -1)
        yield Comparison(f"layer {i}", float((ours != expected).sum()), 0.0)


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
    stored = {k.removeprefix("grads/"): a for k, a in arrays.items() if k.startswith("grads/")}
    yield Comparison("names", float(len(stored.keys() ^ ours.keys())), 0.0)
    for name, reference in stored.items():
        yield gradient(name, ours[name], reference)


def decay_groups() -> Iterator[Comparison]:
    """The parameters with weight decay; counts the errors."""
    g = goldens()
    mask = optim.decay_mask(g.params, "reference")
    ours = jax.tree.map(lambda p, decayed: np.full(p.shape, decayed, bool), g.params, mask)
    named = torch_names.state_dicts(ours, sizes_of(g.model))
    groups = json.loads((GOLDENS / "grain_public_param_groups.json").read_text())
    unused = {f"{m}/{name}" for m, names in torch_names.UNUSED.items() for name in names}
    for group, decayed in (("decay", True), ("no_decay", False)):
        found = {f"{m}/{n}" for m in named for n, a in named[m].items() if (a == decayed).all()}
        yield Comparison(group, float(len(found ^ (set(groups[group]) - unused))), 0.0)


def adamw() -> Iterator[Comparison]:
    """Parameters after one step: the stored ones outside of `unreliable` by value, all by checksum."""
    g = goldens()
    c = config()
    tx = optim.optimizer(c.optim, optax.constant_schedule(c.optim.learning_rate))

    @jax.jit
    def step(params, grads):
        updates, _ = tx.update(grads, tx.init(params), params)
        return optim.clip_logit_scale(optax.apply_updates(params, updates))

    named = torch_names.state_dicts(step(g.params, run()[1]), sizes_of(g.model))
    checksums = g.meta["adamw_checksum_after_[sum,sumabs]"]
    for module, entries in named.items():
        for key, ours in entries.items():
            name = f"{module}/{key}"
            bad = g.arrays.get(f"adamw/unreliable/{name}", np.zeros(ours.shape, bool))
            sums = np.array([ours.sum(dtype=np.float64), np.abs(ours).sum(dtype=np.float64)])
            unreliable = g.meta["grad_f32_vs_f64"][name]["n_unreliable"]
            yield Comparison(
                f"{name} checksum",
                float(np.abs(sums - checksums[name]).max()),
                1e-3 * unreliable + 1e-6 * ours.size,
            )
            reference = g.arrays.get(f"adamw/after/{name}")
            if reference is not None:
                # Of the token table the goldens keep the last rows only.
                error = np.abs(
                    ours[-len(reference) :] - reference if ours.ndim else ours - reference
                )
                bad = bad[-len(reference) :] if ours.ndim else bad
                yield Comparison(name, float(np.max(error, where=~bad, initial=0.0)), 3e-6)


def schedule() -> Iterator[Comparison]:
    """The learning rate of 200 steps, in float32."""
    c = config()
    rate = optim.learning_rate(c.optim, total_steps=c.total_steps, steps_per_epoch=40)
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
        yield Comparison(
            f"{name} checksum", error, ours.size * max(1e-7, 2e-5 * np.abs(ours).max())
        )
    inputs = batch(g.arrays["degenerate/inputs/boxes"], packed=False)
    c = config(shift_labels_after_empty_box=False).loss
    terms = jax.jit(lambda out: losses_lib.total_loss(out, inputs, c))(outputs()["outputs"])
    right = g.arrays["degenerate/losses/word_loss_if_labels_correct_and_desc_dropped"]
    yield relative("word_loss, dropped from both", terms.terms["region_description"], right)
    yield relative(
        "box_loss, dropped from both",
        1.5 * terms.terms["box"],
        g.arrays["degenerate/losses/box_loss"],
    )


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


def zero_shot() -> Iterator[Comparison]:
    """Class features, region scores and logits of eval.npz, with every alpha."""
    arrays = read_npz("eval.npz")
    count = len(json.loads(str(arrays["meta_json"]))["class_names"])
    embeds = lambda tag: [arrays[f"class_text_embed/{tag}/{i:02d}"] for i in range(count)]
    region = scores.region_scores(arrays["inputs/obj_embeds"], embeds("desc_only"))
    yield relative("region scores", region, arrays["outputs/desc_sim"])
    for tag in ("use_desc", "no_desc"):
        features = scores.class_features(embeds(tag))
        yield relative(f"{tag} class features", features, arrays[f"outputs/{tag}/class_feats"])
        whole = scores.global_scores(arrays["inputs/img_embed"], features)
        for alpha in (1.0, 0.75, 0.5, 0.25, 0.0):
            reference = arrays[f"outputs/{tag}/alpha_{alpha}/logits"]
            yield relative(f"{tag} alpha {alpha}", scores.combine(whole, region, alpha), reference)


def tokens() -> Iterator[Comparison]:
    """The 338 strings of tokenizer.json; counts strings with other ids."""
    strings = json.loads((GOLDENS / "tokenizer.json").read_text())["strings"]
    ours = tokenizer.ClipTokenizer()([entry["text"] for entry in strings], 77)
    wrong = sum(
        list(row[: len(entry["ids"])]) != entry["ids"] or row[len(entry["ids"]) :].any()
        for row, entry in zip(ours, strings)
    )
    yield Comparison(f"{len(strings)} strings", float(wrong), 0.0)


def preprocessing_pil() -> Iterator[Comparison]:
    """The PIL path (evaluation, `grain_jax.load`): the worst pixel of each image, in levels of 255."""
    for name in preprocessing.names():
        yield Comparison(name, float(preprocessing.pil_distance(name).max()), 0.0)


def preprocessing_tf() -> Iterator[Comparison]:
    """tf.data's path (training) against PIL's: worst and mean in levels; nothing without TensorFlow."""
    try:
        for name in preprocessing.names():
            distance = preprocessing.tf_distance(name)
            worst, mean = preprocessing.TF_DISTANCE.get(name, (0, 0))
            yield Comparison(f"{name} worst", float(distance.max()), float(worst))
            yield Comparison(f"{name} mean", float(distance.mean()), float(mean))
    except ImportError as error:
        if not (error.name or "").startswith("tensorflow"):
            raise


GROUPS = {
    "image tokens": image_tower,
    "text embeddings": text_tower,
    "decoder": decoder,
    "matching": matched,
    "losses": losses,
    "gradients": gradients,
    "decay groups": decay_groups,
    "AdamW step": adamw,
    "schedule": schedule,
    "degenerate boxes": degenerate,
    "packed texts": packed,
    "zero-shot scores": zero_shot,
    "tokenizer": tokens,
    "preprocessing, PIL": preprocessing_pil,
    "preprocessing, tf": preprocessing_tf,  # empty without TensorFlow
}


def compare(group: str) -> list[Comparison]:
    """All comparisons of a group of `GROUPS`, at full float32 precision."""
    with jax.default_matmul_precision("highest"):
        return list(GROUPS[group]())


def main() -> int:
    """Prints the table; the exit status is 1 if a comparison fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="file to write every comparison to")
    args = parser.parse_args()
    print(f"device: {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"{'group':18} {'compared':>8} {'failed':>6} {'worst error':>11} {'tolerance':>9}  worst")
    everything, failures = {}, 0
    for group in GROUPS:
        found = compare(group)
        everything[group] = [c._asdict() | {"ok": c.ok} for c in found]
        failed = sum(not c.ok for c in found)
        failures += failed
        if not found:
            print(f"{group:18} {0:8d}  not compared: TensorFlow is not installed")
            continue
        worst = max(
            found, key=lambda c: (not c.ok, c.error / c.tolerance if c.tolerance else c.error)
        )
        print(
            f"{group:18} {len(found):8d} {failed:6d} {worst.error:11.2e} {worst.tolerance:9.1e}"
            f"  {worst.name}"
        )
    side_by_side.write(args.json, everything)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
