"""What is compared with the reference: each group yields the comparisons of a stage."""

import functools
import json
from collections.abc import Iterator
from typing import cast

import jax
import numpy as np
import optax

from benchmarks.parity import preprocessing
from benchmarks.parity.goldens import (
    GOLDENS,
    Comparison,
    batch,
    below,
    config,
    goldens,
    gradient,
    outputs,
    read_npz,
    relative,
    run,
)
from grain_jax import losses as losses_lib
from grain_jax.convert.reference import names as torch_names
from grain_jax.core import schema
from grain_jax.inference import scores
from grain_jax.input_pipeline import tokenizer
from grain_jax.losses import matching
from grain_jax.training import optim


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
    fields = dict(img_embed="image_embed", obj_embeds="region_embed", text_embed="text_embed")
    for name, field in fields.items():
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
    stored = below(arrays, "grads/")
    yield Comparison("names", float(len(stored.keys() ^ ours.keys())), 0.0)
    for name, reference in stored.items():
        yield gradient(name, ours[name], reference)


def decay_groups() -> Iterator[Comparison]:
    """The parameters with weight decay; counts the errors."""
    g = goldens()
    mask = optim.decay_mask(g.params, "reference")
    ours = jax.tree.map(lambda p, decayed: np.full(p.shape, decayed, bool), g.params, mask)
    named = torch_names.state_dicts(ours)
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

    named = torch_names.state_dicts(step(g.params, run()[1]))
    checksums = g.meta["adamw_checksum_after_[sum,sumabs]"]
    for module, entries in named.items():
        for key, ours in entries.items():
            name = f"{module}/{key}"
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
        tolerance = ours.size * max(1e-7, 2e-5 * np.abs(ours).max())
        yield Comparison(f"{name} checksum", error, tolerance)
    inputs = batch(g.arrays["degenerate/inputs/boxes"], packed=False)
    c = config(shift_labels_after_empty_box=False).loss
    terms = jax.jit(lambda out: losses_lib.total_loss(out, inputs, c))(outputs()["outputs"])
    right = g.arrays["degenerate/losses/word_loss_if_labels_correct_and_desc_dropped"]
    yield relative("word_loss, dropped from both", terms.terms["region_description"], right)
    right = g.arrays["degenerate/losses/box_loss"]
    yield relative("box_loss, dropped from both", 1.5 * terms.terms["box"], right)


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
