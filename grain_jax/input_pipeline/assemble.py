"""Images, texts and boxes -> Batch: lays out the tokens of all texts in rows.

Every data source makes its batches with this; numpy only.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from grain_jax.config import Config
from grain_jax.core.schema import Batch
from grain_jax.input_pipeline import packing, tokenizer
from grain_jax.input_pipeline.tokenizer import TokenizedTexts

# The kinds of texts, and the mask of each that says which texts exist.
MASKS = {"captions": "caption_mask", "descriptions": "region_mask", "negatives": "negative_mask"}


class Example(NamedTuple):
    """An image with its texts and boxes, as a data source has them."""

    image: np.ndarray  # uint8 [S, S, 3], S = model.image.image_size
    caption: str | Sequence[str]  # or several, at most `input.captions_per_image`; () for none
    descriptions: Sequence[str] = ()  # of its regions, at most `input.max_regions`, the best first
    boxes_cxcywh: Sequence[Sequence[float]] = ()  # a box for each, in [0, 1]
    # For each description, at most `input.negatives_per_region`; () if no description has any.
    negatives: Sequence[Sequence[str]] = ()


def of_examples(examples: Sequence[Example], config: Config, text_tokenizer: tokenizer.Tokenizer) -> Batch:
    """A Batch of the examples, in their order: texts tokenised and laid out as `config.text` says.

    Args:
      examples: B, a multiple of `text.pack_group`.
      config: the run's, with numbers for the rows.
      text_tokenizer: `tokenizer.of_tower(config.model.text)`.

    Raises:
      ValueError: images of several shapes, other numbers of boxes than descriptions, or too many texts.
    """
    batch, regions = len(examples), config.input.max_regions
    shapes = {
        "captions": (batch, config.input.captions_per_image),
        "descriptions": (batch, regions),
        "negatives": (batch, regions, config.input.negatives_per_region),
    }
    columns: dict[str, Any] = {name: np.zeros(shape, object) for name, shape in shapes.items()}
    columns |= {MASKS[name]: np.zeros(shape, bool) for name, shape in shapes.items()}
    boxes = np.zeros((batch, regions, 4), np.float32)

    def put(name: str, texts: Sequence[str], *place: int) -> None:
        columns[name][place][: len(texts)] = texts
        columns[MASKS[name]][place][: len(texts)] = True

    for i, example in enumerate(examples):
        captions = [example.caption] if isinstance(example.caption, str) else example.caption
        put("captions", captions, i)
        put("descriptions", example.descriptions, i)
        for j, texts in enumerate(example.negatives):
            put("negatives", texts, i, j)
        if count := len(example.descriptions):
            boxes[i, :count] = np.array(example.boxes_cxcywh).reshape(count, 4)
    return of_columns(
        columns,
        text_tokenizer,
        image=np.stack([example.image for example in examples]),
        region_boxes_cxcywh=boxes,
        # The last ones are dropped first.
        region_scores=np.broadcast_to(-np.arange(regions, dtype=np.float32), (batch, regions)),
        config=config,
    )


def of_columns(
    columns: dict[str, Any], text_tokenizer: tokenizer.Tokenizer, *, config: Config, **arguments: Any
) -> Batch:
    """`assemble` of columns whose texts, in the shapes of their masks, are not tokenised yet."""
    for name, mask in MASKS.items():
        texts = columns[name][columns[mask]]
        arguments[name] = text_tokenizer.encode(texts, config.text_length)
    return assemble(**columns | arguments, config=config)


def assemble(
    *,
    image: np.ndarray,
    captions: TokenizedTexts,
    caption_mask: np.ndarray,
    descriptions: TokenizedTexts,
    region_boxes_cxcywh: np.ndarray,
    region_mask: np.ndarray,
    region_scores: np.ndarray,
    negatives: TokenizedTexts,
    negative_mask: np.ndarray,
    config: Config,
) -> Batch:
    """Lays out the texts of consecutive images, packed or one per row as `config.text` says.

    Args:
      image: uint8 [B, H, W, 3].
      captions: a text for each real caption, in the order of `caption_mask`, row by row.
      caption_mask: bool [B, C], C = `input.captions_per_image`.
      descriptions: a text for each real region, in the order of `region_mask`, row by row.
      region_boxes_cxcywh: float32 [B, R, 4]; ignored if masked.
      region_mask: bool [B, R].
      region_scores: float32 [B, R]; if a packing group overflows, low scores are dropped first.
      negatives: a text for each real negative, in the order of `negative_mask`, row by row. One that the
        tokenizer takes for the description itself is left out.
      negative_mask: bool [B, R, H], H = `input.negatives_per_region`; False if the region is not real.
      config: `text` and `row_length` are used.
    """
    description_id = _scatter(region_mask, descriptions.text_ids)
    negatives, negative_mask = _without_descriptions(negatives, negative_mask, description_id)
    texts = (captions, descriptions, negatives)
    masks = packing.TextArrays(caption_mask, region_mask, negative_mask)
    lengths = packing.TextArrays(*(_scatter(m, t.lengths) for m, t in zip(masks, texts)))
    if config.text.packing:
        group, rows = config.text_layout
        layout = packing.pack(
            lengths, region_scores, pack_group=group, rows=rows, row_length=config.row_length
        )
    else:
        layout = packing.one_text_per_row(lengths, row_length=config.row_length)
    tokens, positions, segments = packing.fill(layout, np.concatenate([t.ids for t in texts]), lengths)
    too_long = packing.TextArrays(*(_scatter(m, t.too_long) for m, t in zip(masks, texts)))
    misfits, texts_there, cut = (
        x.slots().reshape(len(tokens), -1).sum(axis=1, dtype=np.int32)
        for x in (layout.misfits, masks, too_long)
    )
    kept = layout.lengths.descriptions > 0
    has_negatives = config.input.negatives_per_region > 0
    return Batch(
        image=image,
        text_tokens=tokens,
        text_positions=positions,
        text_segments=segments,
        caption_at=layout.ends.captions,
        caption_id=_scatter(caption_mask, captions.text_ids),
        caption_mask=caption_mask,
        description_at=layout.ends.descriptions,
        description_id=np.where(kept, description_id, 0),
        region_boxes_cxcywh=np.where(kept[..., None], region_boxes_cxcywh, np.float32(0)),
        region_mask=kept,
        texts_dropped=misfits,
        text_counts=np.stack([texts_there, cut], axis=1),
        negative_at=layout.ends.negatives if has_negatives else None,
        negative_mask=layout.lengths.negatives > 0 if has_negatives else None,
    )


def _without_descriptions(
    texts: TokenizedTexts, mask: np.ndarray, description_id: np.ndarray
) -> tuple[TokenizedTexts, np.ndarray]:
    """The negatives that differ from their own description, and their mask [B, R, H]."""
    kept = (_scatter(mask, texts.text_ids) != description_id[..., None])[mask]
    if kept.all():
        return texts, mask
    ids = texts.ids[np.repeat(kept, texts.lengths)]
    return TokenizedTexts(ids, *(x[kept] for x in texts[1:])), _scatter(mask, kept)


def _scatter(mask: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The values in the layout of the mask, row by row; 0 elsewhere."""
    out = np.zeros(mask.shape, values.dtype)
    out[mask] = values
    return out
