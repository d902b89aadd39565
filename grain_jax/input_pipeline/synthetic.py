"""The data source "synthetic": random batches, for benchmarks and for machines without TensorFlow or data.

Texts are as long as web captions and region descriptions.
"""

import numpy as np

from grain_jax.config import Config
from grain_jax.core.schema import Batch
from grain_jax.input_pipeline import assemble, order, sources
from grain_jax.input_pipeline.tokenizer import TokenizedTexts

NUM_EXAMPLES = 1 << 20  # per epoch
CAPTION_TOKENS = (10, 20)  # lowest and highest number, start and end tokens included
DESCRIPTION_TOKENS = (4, 12)
MAX_REGIONS = 5


class Synthetic(sources.LaneSource):
    """Random images, texts and boxes; a function of the config."""

    def num_examples(self, config: Config) -> int:
        """Examples that count as one epoch."""
        del config
        return NUM_EXAMPLES

    def lane_batch(self, config: Config, lane: int, step: int) -> Batch:
        """As LaneSource.lane_batch."""
        key = int(order.hash_key(config.seed, lane, step)[0])
        rng = np.random.Generator(np.random.Philox(key=key))
        images = config.batch_size // sources.num_lanes(config)
        regions = config.input.max_regions
        count = rng.integers(0, min(MAX_REGIONS, regions), size=images, endpoint=True)
        mask = np.arange(regions) < count[:, None]
        wide = rng.uniform(0.1, 0.6, (images, regions, 2))
        centre = rng.uniform(wide / 2, 1 - wide / 2)
        size = config.model.image.image_size
        pixels = np.frombuffer(rng.bytes(images * size * size * 3), np.uint8)
        caption_lengths = _caption_lengths(rng, mask, config)
        captions = _texts(rng, caption_lengths[caption_lengths > 0], config)
        lengths = rng.integers(*DESCRIPTION_TOKENS, size=int(mask.sum()), endpoint=True)
        descriptions = _texts(rng, lengths, config)
        scores = rng.uniform(0.3, 1.0, mask.shape).astype(np.float32)
        negative_lengths = _negative_lengths(rng, mask, config)
        negative_mask = negative_lengths > 0
        return assemble.assemble(
            image=pixels.reshape(images, size, size, 3),
            captions=captions,
            caption_mask=caption_lengths > 0,
            descriptions=descriptions,
            region_boxes_cxcywh=np.concatenate([centre, wide], axis=-1).astype(np.float32),
            region_mask=mask,
            region_scores=scores,
            negatives=_texts(rng, negative_lengths[negative_mask], config),
            negative_mask=negative_mask,
            config=config,
        )


batches = Synthetic().batches


def _negative_lengths(rng: np.random.Generator, region_mask: np.ndarray, config: Config) -> np.ndarray:
    """Tokens of the negatives of each region, int32 [B, R, H]: 0 to H of them, 0 behind them."""
    most = config.input.negatives_per_region
    if not most:  # draws nothing
        return np.zeros((*region_mask.shape, 0), np.int32)
    count = np.where(region_mask, rng.integers(0, most, region_mask.shape, endpoint=True), 0)
    lengths = rng.integers(*DESCRIPTION_TOKENS, size=(*region_mask.shape, most), endpoint=True)
    return np.where(np.arange(most) < count[..., None], lengths, 0).astype(np.int32)


def _caption_lengths(rng: np.random.Generator, region_mask: np.ndarray, config: Config) -> np.ndarray:
    """Tokens of each caption, [B, C]; the third is as long as the joined descriptions, 0 without any."""
    images, number = len(region_mask), config.input.captions_per_image
    lengths = rng.integers(*CAPTION_TOKENS, size=(images, min(number, 2)), endpoint=True)
    if number < 3:
        return lengths
    described = region_mask[:, : config.input.descriptions_in_captions or None]
    parts = rng.integers(*DESCRIPTION_TOKENS, size=described.shape, endpoint=True)
    # Without start and end, with a comma between two.
    joined = np.where(described, parts - 1, 0).sum(axis=1)
    return np.column_stack([lengths, np.where(joined, 1 + joined, 0)])


def _texts(rng: np.random.Generator, lengths: np.ndarray, config: Config) -> TokenizedTexts:
    """Random texts of so many tokens; the last two ids of the vocabulary are start and end."""
    text = config.model.text
    lengths = lengths.clip(max=config.text_length)
    ids = rng.integers(1, text.vocab_size - 2, size=lengths.sum(), dtype=np.int32)
    ends = np.cumsum(lengths) - 1
    ids[ends] = text.vocab_size - 1
    ids[ends - lengths + 1] = text.vocab_size - 2
    text_ids = rng.integers(1, 2**31 - 1, size=len(lengths), dtype=np.int32)
    return TokenizedTexts(ids, lengths.astype(np.int32), np.zeros(len(lengths), bool), text_ids)
