"""Padding of packed texts, by the number of images a group.

    python -m benchmarks.packing [--json OUT.json] [--batch 2048] [--batches 32] [--row-length 77]

Lengths are simulated like Conceptual Captions with region descriptions: captions of 10-20 tokens, 0-5 descriptions of
4-12, special tokens included, all uniform; `--description-tokens 6 14` are the lengths if 4-12 counted words alone. For
every group size the table has the smallest number of rows at which at most 0.1% of the texts are dropped or cut.
"""

from typing import Any

import numpy as np

from benchmarks import harness
from grain_jax.input_pipeline import derived, packing

GROUP_SIZES = (1, 8, 16, 32, 64, 128)
REGIONS = 5


def draw(rng: np.random.Generator, images: int, ends: list[int]) -> dict[str, np.ndarray]:
    """Text lengths of `images` images: arguments of `packing.pack`."""
    mask = np.arange(REGIONS) < rng.integers(0, REGIONS + 1, size=(images, 1))
    scores = rng.random(mask.shape, dtype=np.float32)
    captions = rng.integers(10, 21, size=(images, 1)).astype(np.int32)
    described = rng.integers(ends[0], ends[1] + 1, size=mask.shape)
    return dict(
        caption_lengths=captions,
        description_lengths=np.where(mask, described, 0).astype(np.int32),
        region_mask=mask,
        region_scores=scores,
    )


def of_group(batches: list[dict[str, np.ndarray]], **sizes: int) -> dict[str, Any]:
    """The smallest number of rows within the limit of misfits, with padding and misfits."""
    joined = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    fixed = sizes["pack_group"], sizes["row_length"]
    rows, _ = derived.smallest_rows([joined], *fixed, derived.MISFITS)
    layouts = [packing.pack(**lengths, **sizes, rows=rows) for lengths in batches]
    room = sum(len(x.caption_at) // x.pack_group * x.rows * x.row_length for x in layouts)
    kept = sum(int(x.caption_lengths.sum() + x.description_lengths.sum()) for x in layouts)
    misfits = sum(x.texts_dropped + x.captions_cut for x in layouts)
    return {
        "pack_group": sizes["pack_group"],
        "rows": rows,
        "padding_share": 1 - kept / room,
        "misfit_share": misfits / (joined["caption_lengths"].size + joined["region_mask"].sum()),
    }


def main() -> None:
    """Prints the table; writes it as JSON on request."""
    args = harness.arguments(
        __doc__,
        batch=(2048, dict(help="images a batch")),
        batches=(32, dict(help="batches simulated")),
        row_length=77,
        description_tokens=([4, 12], dict(nargs=2, metavar=("MIN", "MAX"))),
        seed=0,
    )
    rng = np.random.default_rng(args.seed)
    batches = [draw(rng, args.batch, args.description_tokens) for _ in range(args.batches)]
    columns = dict(pack_group=">10", rows=">5", padding_share=">14.1%", misfit_share=">13.3%")
    table = harness.Table(columns)
    for pack_group in GROUP_SIZES:
        table.add(**of_group(batches, pack_group=pack_group, row_length=args.row_length))
    harness.write(args.json, dict(settings=vars(args), table=table.rows))


if __name__ == "__main__":
    main()
