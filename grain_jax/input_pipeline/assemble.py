"""Images, texts and boxes -> Batch: tokenises all texts at once and lays them out in rows.

Every data source makes its batches with this; numpy only.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from grain_jax.config import Config
from grain_jax.core.schema import Batch
from grain_jax.input_pipeline import packing, tokenizer
from grain_jax.input_pipeline.text_cleaning import Texts

_NO_TEXTS = Texts(*(np.zeros(0, np.int32) for _ in Texts._fields))


def tokenize(
    texts: Sequence[str | bytes], text_tokenizer: tokenizer.Tokenizer, context_length: int
) -> Texts:
    """Tokenises all texts in one call."""
    return text_tokenizer.encode(texts, context_length) if len(texts) else _NO_TEXTS


class Example(NamedTuple):
    """An image with its texts and boxes, as a data source has them."""

    image: np.ndarray  # uint8 [S, S, 3], S = model.image.image_size
    caption: str | Sequence[str]  # or several, at most `input.captions_per_image`; () for none
    descriptions: Sequence[str] = ()  # of its regions, at most `input.max_regions`, the best first
    boxes_cxcywh: Sequence[Sequence[float]] = ()  # a box for each, in [0, 1]
    # Of each description, at most `input.negatives_per_region`; () where no description has any.
    negatives: Sequence[Sequence[str]] = ()


def of_examples(
    examples: Sequence[Example], config: Config, text_tokenizer: tokenizer.Tokenizer
) -> Batch:
    """A Batch of the examples, in their order: texts tokenised and laid out as `config.text` says.

    Args:
      examples: B, a multiple of `text.pack_group`.
      config: the run's, with numbers for the rows.
      text_tokenizer: `tokenizer.of_tower(config.model.text)`.

    Raises:
      ValueError: an image of another shape or type, other numbers of boxes than descriptions, or too many texts.
    """
    size, most = config.model.image.image_size, config.input.max_regions
    most_captions = config.input.captions_per_image
    captions: list[str] = []
    caption_mask = np.zeros((len(examples), most_captions), bool)
    boxes = np.zeros((len(examples), most, 4), np.float32)
    mask = np.zeros((len(examples), most), bool)
    most_negatives = config.input.negatives_per_region
    negatives: list[str] = []
    negative_mask = np.zeros((len(examples), most, most_negatives), bool)
    for i, example in enumerate(examples):
        count = len(example.descriptions)
        shape = example.image.shape
        if shape != (size, size, 3) or example.image.dtype != np.uint8:
            got = f"{example.image.dtype} {list(shape)}"
            raise ValueError(f"example {i}: image is {got}, expected uint8 [{size}, {size}, 3]")
        if count != len(example.boxes_cxcywh) or count > most:
            raise ValueError(
                f"example {i}: got {count} descriptions and {len(example.boxes_cxcywh)} boxes, expected as"
                f" many of both, at most input.max_regions = {most}"
            )
        of_image = [example.caption] if isinstance(example.caption, str) else example.caption
        if len(of_image) > most_captions:
            raise ValueError(
                f"example {i}: got {len(of_image)} captions, expected at most input.captions_per_image = {most_captions}"
            )
        if example.negatives and (
            len(example.negatives) != count or max(map(len, example.negatives)) > most_negatives
        ):
            raise ValueError(
                f"example {i}: got {list(map(len, example.negatives))} negatives of {count} descriptions, expected a"
                f" list for each, of at most input.negatives_per_region = {most_negatives}"
            )
        for j, texts in enumerate(example.negatives):
            negatives += texts
            negative_mask[i, j, : len(texts)] = True
        captions += of_image
        caption_mask[i, : len(of_image)] = True
        mask[i, :count] = True
        boxes[i, :count] = np.reshape(example.boxes_cxcywh, (count, 4))
    text_length = config.text_length
    descriptions = [text for example in examples for text in example.descriptions]
    return assemble(
        image=np.stack([example.image for example in examples]),
        captions=tokenize(captions, text_tokenizer, text_length),
        caption_mask=caption_mask,
        descriptions=tokenize(descriptions, text_tokenizer, text_length),
        region_boxes_cxcywh=boxes,
        region_mask=mask,
        # The last ones are dropped first.
        region_scores=np.broadcast_to(-np.arange(most, dtype=np.float32), mask.shape),
        negatives=tokenize(negatives, text_tokenizer, text_length),
        negative_mask=negative_mask,
        config=config,
    )


def assemble(
    *,
    image: np.ndarray,
    captions: Texts,
    caption_mask: np.ndarray,
    descriptions: Texts,
    region_boxes_cxcywh: np.ndarray,
    region_mask: np.ndarray,
    region_scores: np.ndarray,
    config: Config,
    negatives: Texts | None = None,
    negative_mask: np.ndarray | None = None,
) -> Batch:
    """Lays out the texts of consecutive images, packed or one per row as `config.text` says.

    Args:
      image: uint8 [B, H, W, 3].
      captions: a text for each real caption, in the order of `caption_mask`, row by row.
      caption_mask: bool [B, C], C = `input.captions_per_image`.
      descriptions: a text for each real region, in the order of `region_mask`, row by row.
      region_boxes_cxcywh: float32 [B, R, 4]; ignored where masked.
      region_mask: bool [B, R].
      region_scores: float32 [B, R]; where a packing group overflows, low scores are dropped first.
      config: `text` and `row_length` are used.
      negatives: a text for each real negative, in the order of `negative_mask`, row by row; None: there are none. One
        that the tokenizer takes for the description itself is left out.
      negative_mask: bool [B, R, H], H = `input.negatives_per_region`; False where the region is not real.
    """
    description_id = _at(region_mask, descriptions.text_ids)
    if negatives is None or negative_mask is None:
        negatives = _NO_TEXTS
        negative_mask = np.zeros((*region_mask.shape, config.input.negatives_per_region), bool)
    negatives, negative_mask = _without_descriptions(negatives, negative_mask, description_id)
    kinds = ((captions, caption_mask), (descriptions, region_mask), (negatives, negative_mask))
    lengths = [_at(mask, texts.lengths) for texts, mask in kinds]
    given: dict[str, Any] = dict(
        caption_lengths=lengths[0],
        description_lengths=lengths[1],
        negative_lengths=lengths[2],
        region_mask=region_mask,
        row_length=config.row_length,
    )
    if config.text.packing:
        group, rows = config.text_layout
        places = packing.pack(**given, region_scores=region_scores, pack_group=group, rows=rows)
    else:
        places = packing.one_text_per_row(**given)
    ids = np.concatenate([texts.ids for texts, _ in kinds])
    tokens, positions, segments = packing.fill(places, ids, lengths)
    left = places.caption_lengths, places.description_lengths, places.negative_lengths
    too_long = [_at(mask, texts.too_long) for texts, mask in kinds]
    counts = [
        _in_groups(len(tokens), parts)
        for parts in (
            [now < before for now, before in zip(left, lengths)],
            [mask for _, mask in kinds],
            too_long,
        )
    ]
    kept = places.region_mask
    has_negatives = config.input.negatives_per_region > 0
    return Batch(
        image=image,
        text_tokens=tokens,
        text_positions=positions,
        text_segments=segments,
        caption_at=places.caption_at,
        caption_id=_at(caption_mask, captions.text_ids),
        caption_mask=caption_mask,
        description_at=places.description_at,
        description_id=np.where(kept, description_id, 0),
        region_boxes_cxcywh=np.where(kept[..., None], region_boxes_cxcywh, np.float32(0)),
        region_mask=kept,
        texts_dropped=counts[0],
        text_counts=np.stack(counts[1:], axis=1),
        negative_at=places.negative_at if has_negatives else None,
        negative_mask=places.negative_mask if has_negatives else None,
    )


def _in_groups(groups: int, masks: Sequence[np.ndarray]) -> np.ndarray:
    """How many are True in all masks [B, ...] together, int32 [groups]."""
    counts = [mask.reshape(groups, -1).sum(axis=1) for mask in masks]
    return np.sum(counts, axis=0).astype(np.int32)


def _without_descriptions(
    texts: Texts, mask: np.ndarray, description_id: np.ndarray
) -> tuple[Texts, np.ndarray]:
    """The negatives whose text is not that of their own description, and their mask [B, R, H]."""
    other = _at(mask, texts.text_ids) != description_id[..., None]
    if (other | ~mask).all():
        return texts, mask
    kept = other[mask]
    ids = texts.ids[np.repeat(kept, texts.lengths)]
    return Texts(ids, *(of[kept] for of in texts[1:])), mask & other


def _at(mask: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The values in the places of the mask, row by row; 0 elsewhere."""
    out = np.zeros(mask.shape, values.dtype)
    out[mask] = values
    return out
