"""The parity report of a conversion: the same images and texts through our model and through the other side.

The other side is an independent implementation: transformers, open_clip, big_vision or a torch module.
Without its package the report says NOT PROVEN; a round trip through our own code would prove nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np

from grain_jax import config as config_lib
from grain_jax import inference
from grain_jax.core import errors
from grain_jax.inference import inputs as inference_inputs

_EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-7}  # from 1 to the next number
# Given boxes of every image, xyxy in [0, 1]: the image, a part of it, one over its edge, a point.
BOXES = np.array(
    [[0, 0, 1, 1], [0.1, 0.3, 0.45, 0.5], [0.7, 0.8, 1.2, 1.1], [0.5, 0.5, 0.5, 0.5]], np.float32
)
PROVEN, NOT_PROVEN = "PROVEN", "NOT PROVEN"


def tolerance(model: config_lib.Model, dtype: str = "float32") -> float:
    """The largest max|a-b| / max|b| of two programs of a model that differ in the order of their sums alone.

    It is 2 eps sqrt(n), since n roundings of random sign grow so, with n on the longest way to an output. In
    float32 n counts the products in its sums; in bfloat16 (the `dtype` of activations) the layers, since
    products are summed in float32.
    """
    image, patches = model.image, (model.image.image_size // model.image.patch_size) ** 2
    decoder = [(model.decoder, patches)] if model.decoder else []
    ways = [(image, patches), *decoder], [(model.text, model.text.context_length)]
    terms = lambda t, tokens: t.depth * ((4 * t.width + t.mlp_dim + tokens) if dtype == "float32" else 1)
    count = max(sum(terms(*part) for part in way) for way in ways)
    count += 3 * image.patch_size**2 + model.embed_dim if dtype == "float32" else 0
    return 2 * _EPSILON[dtype] * count**0.5


class ParityError(errors.UserError):
    """The two sides cannot be compared: they give different outputs or shapes."""


class Inputs(NamedTuple):
    """The inputs of both sides."""

    images: np.ndarray  # float32 [N, S, S, 3], normalised; or uint8
    token_ids: np.ndarray  # int32 [N, L]: start (V - 2), words, end (V - 1), zeros


class Comparison(NamedTuple):
    """One output: ours (a) against the other side's (b)."""

    name: str
    error: float  # max|a - b| / max|b|
    cosine: float  # over the last axis; the smallest of all
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return bool(self.error <= self.tolerance)


class Report(NamedTuple):
    """The printed report; `ok` is False only where a comparison failed."""

    text: str
    ok: bool
    verdict: str  # "PROVEN", "FAILED" or "NOT PROVEN", stored in the converted folder
    comparisons: tuple[Comparison, ...] = ()

    def after(self, *lines: str) -> "Report":
        """The report with these lines before it."""
        return self._replace(text="\n".join([*lines, "", self.text]))


def inputs_of(model: config_lib.Model, *, count: int = 4, seed: int = 0) -> Inputs:
    """Random images and texts in the sizes of a model, the same for the same arguments.

    The two highest ids start and end a text, or the tower's `end_id` ends it, which is nowhere else. The
    first text is empty, the second fills the whole context.
    """
    image_size, text = model.image.image_size, model.text
    rng = np.random.default_rng(seed)
    # One value a quarter, plus noise: images differ in coarse and fine structure.
    half = -(-image_size // 2)
    coarse = rng.standard_normal((count, 2, 2, 3)).repeat(half, 1).repeat(half, 2)
    coarse = coarse[:, :image_size, :image_size]
    images = coarse + 0.5 * rng.standard_normal(coarse.shape)
    ids = rng.integers(1, text.vocab_size - 2, (count, text.context_length))
    lengths = rng.integers(3, text.context_length + 1, count)
    lengths[:2] = (2, text.context_length)[:count]
    ids[:, 0] = text.vocab_size - 2
    if text.has_end_id:
        ids[ids == text.end_id] = text.vocab_size - 1
    for row, length in zip(ids, lengths):
        row[length - 1], row[length:] = text.end_id if text.has_end_id else text.vocab_size - 1, 0
    return Inputs(images.astype(np.float32), ids.astype(np.int32))


def outputs_of(predictor: inference.Predictor, batch: Inputs) -> dict[str, np.ndarray]:
    """Our outputs: image_embed, text_embed, and what the model has of regions, proposals and a box head."""
    out = {"text_embed": predictor.encode_text(batch.token_ids)}
    images = inference_inputs.marked(batch.images, batch.images.dtype == np.float32)
    if predictor.has_box_head:
        boxes = np.repeat(BOXES[None], len(batch.images), axis=0)
        out["box_embed"] = np.stack(predictor.encode_boxes(images, boxes))
    if not predictor.has_regions:
        return out | {"image_embed": predictor.encode_image(images)}
    image_embed, (boxes_xyxy, embed, prior) = predictor.encode_image_and_regions(images)
    out |= dict(image_embed=image_embed, region_embed=embed, boxes_xyxy=boxes_xyxy)
    return out | ({"region_prior": prior} if predictor.has_proposals else {})


def compare(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], *, tolerance: float
) -> list[Comparison]:
    """Compares the outputs of the two sides by name; integers, such as token ids, must be equal.

    Raises:
      ParityError: a name that only one side has, or two shapes; one line per fault.
    """
    faults = [f"parity: {name}: only one side gives it" for name in sorted(ours.keys() ^ theirs.keys())]
    comparisons = []
    for name in sorted(ours.keys() & theirs.keys()):
        a, b = (np.atleast_1d(side[name]) for side in (ours, theirs))
        if a.shape != b.shape:
            faults.append(f"parity: {name}: ours has shape {a.shape}, the other side's {b.shape}")
            continue
        exact, a, b = a.dtype.kind in "iu", a.astype(np.float64), b.astype(np.float64)
        top, difference = np.abs(b).max(initial=0), np.abs(a - b).max(initial=0)
        error = difference / top if top else float(difference and np.inf)
        lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        with np.errstate(invalid="ignore"):  # a value that is not finite fails by its error
            cosine = ((a * b).sum(-1) / np.where(lengths == 0, 1, lengths)).min(initial=1)
        comparisons.append(Comparison(name, float(error), float(cosine), 0.0 if exact else tolerance))
    if faults:
        raise ParityError("\n".join(faults))
    return comparisons


def prove(
    model: config_lib.Model,
    params: Any,
    other_side: str,
    packages: Sequence[str],
    outputs_of_other: Callable[[Inputs], dict[str, np.ndarray]],
    more: Mapping[str, np.ndarray] = {},
    has_texts: bool = True,
) -> Report:
    """Compares our model with another side; NOT PROVEN if a package is missing.

    Args:
      model, params: ours.
      other_side: its name.
      packages: that run the other side; the report has their versions.
      outputs_of_other: gives all outputs of `outputs_of`; maybe `logits`, [images, texts], too.
      more: further outputs of ours.
      has_texts: False if the text tower is a placeholder.
    """
    batch = inputs_of(model)
    try:
        versions = [f"{package} {metadata.version(package)}" for package in packages]
        theirs = outputs_of_other(batch)
    except ImportError as error:
        reason = str(error).strip().partition("\n")[0]
        return not_proven(f"{reason}; pip install 'grain_jax[interop]'")
    ours = outputs_of(inference.Predictor(model, params), batch)
    if "logits" in theirs:
        scale, bias = np.exp(params["logit_scale"]), params.get("logit_bias", 0)
        ours["logits"] = scale * ours["image_embed"] @ ours["text_embed"].T + bias
    if not has_texts:
        del ours["text_embed"]
    compared = compare({**ours, **more}, theirs, tolerance=tolerance(model))
    return report(compared, ", ".join([other_side, *versions]), batch)


def clip_outputs(module: Any, batch: Inputs) -> dict[str, np.ndarray]:
    """The outputs of a class of transformers that is called as CLIPModel; our modeling file's is one."""
    import torch

    images, ids = for_torch(batch)
    with torch.no_grad():
        is_tips = module.config.model_type == "tipsv2"  # whose padding is 0
        masks = dict(attention_mask=ids.sign()) if is_tips else {}
        out = module(input_ids=ids, pixel_values=images, **masks)
        theirs = dict(image_embed=out.image_embeds, text_embed=out.text_embeds)
        theirs["logits"] = out.logits_per_image
        if out.get("region_embeds") is not None and out.region_embeds.shape[1]:
            theirs |= dict(region_embed=out.region_embeds, boxes_xyxy=out.boxes_xyxy)
            if out.get("region_priors") is not None:
                theirs["region_prior"] = out.region_priors
        if hasattr(module, "decoder") and module.decoder.boxes is not None:
            boxes = images.new_tensor(BOXES).expand(len(images), -1, -1)
            theirs["box_embed"] = module.get_boxes(images, boxes)
    return {name: value.numpy() for name, value in theirs.items()}


def for_torch(batch: Inputs) -> tuple[Any, Any]:
    """The images [N, 3, S, S] and the token ids as tensors."""
    import torch

    images = torch.from_numpy(batch.images.transpose(0, 3, 1, 2).copy())
    return images, torch.from_numpy(batch.token_ids).long()


def report(comparisons: list[Comparison], other_side: str, batch: Inputs | None = None) -> Report:
    """The table of at least one comparison with `other_side`; the verdict is its last line."""
    counts = f", {len(batch.images)} images and {len(batch.token_ids)} texts" if batch else ""
    lines = [
        f"parity: our outputs against {other_side}{counts}",
        f"{'output':20} {'max|a-b|/max|b|':>15} {'cosine':>12} {'tolerance':>10}",
    ]
    for c in comparisons:
        mark = "" if c.ok else "  FAILED"
        lines.append(f"{c.name:20} {c.error:15.2e} {c.cosine:12.9f} {c.tolerance:10.1e}{mark}")
    failed = [c.name for c in comparisons if not c.ok]
    verdict = "FAILED" if failed else PROVEN
    lines.append(f"parity: {verdict}{': ' if failed else ''}{', '.join(failed)}")
    return Report("\n".join(lines), not failed, verdict, tuple(comparisons))


def not_proven(why: str) -> Report:
    """The report without another side, for a reason."""
    return Report(f"parity: {NOT_PROVEN}. {why}", True, NOT_PROVEN)
