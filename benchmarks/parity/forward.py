"""Comparisons with the reference: towers, decoder, matching, zero-shot scores, tokenizer."""

import functools
import json
from collections.abc import Iterator
from typing import cast

import numpy as np

from benchmarks.parity.comparison import GOLDENS, Comparison, read_npz, relative
from benchmarks.parity.goldens import batch, config, goldens, outputs
from grain_jax.core import schema
from grain_jax.inference import scores
from grain_jax.input_pipeline import tokenizer
from grain_jax.losses import matching
from grain_jax.losses.shard import iou_epsilon


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
    yield relative("unit boxes", batch_outputs.pred_boxes_cxcywh[:, -1], arrays["outputs/pred_boxes"])


def matched() -> Iterator[Comparison]:
    """The cost matrix, and the matched query of each region in each layer; counts the errors."""
    arrays, c = goldens().arrays, config().loss
    inputs = batch(arrays["inputs/boxes"], packed=False)
    layers = outputs()["pred_boxes"]
    cost_of = functools.partial(
        matching.cost_matrix, l1=c.match_l1, giou=c.match_giou, iou_epsilon=iou_epsilon(reference=True)
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
