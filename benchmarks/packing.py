"""How much padding packing leaves, against the number of images a group, and what it costs.

    python benchmarks/packing.py [--json OUT.json] [--batch 2048] [--row-length 77] ...

Lengths are simulated after Conceptual Captions with region descriptions: captions of 10-20 tokens,
0-5 descriptions of 4-12, specials included, each uniform. Two more tokens a description
(`--description-tokens 6 14`) is the case of words counted without specials. For every group size: the smallest
number of rows a group at which at most 0.1% of the texts are dropped or cut.
"""

import argparse
import json
import time
from typing import NamedTuple

import numpy as np
from etils import epath

from grain_jax.input_pipeline import packing

GROUP_SIZES = (1, 8, 16, 32, 64, 128)
MISFIT_SHARE = 1e-3
REGIONS = 5


class Lengths(NamedTuple):
    """Simulated text lengths of B images; the fields are arguments of `packing.pack`."""

    caption_lengths: np.ndarray
    description_lengths: np.ndarray
    region_mask: np.ndarray
    region_scores: np.ndarray

    @property
    def num_texts(self) -> int:
        """Captions and descriptions together."""
        return len(self.caption_lengths) + int(self.region_mask.sum())


def simulate(rng: np.random.Generator, images: int, shortest: int, longest: int) -> Lengths:
    """Draws the lengths of `images` images, of descriptions between the two bounds."""
    mask = np.arange(REGIONS) < rng.integers(0, REGIONS + 1, size=(images, 1))
    return Lengths(
        caption_lengths=rng.integers(10, 21, size=images, dtype=np.int32),
        description_lengths=np.where(
            mask, rng.integers(shortest, longest + 1, size=mask.shape, dtype=np.int32), 0
        ),
        region_mask=mask,
        region_scores=rng.random(mask.shape, dtype=np.float32),
    )


def pack_all(batches: list[Lengths], **sizes: int) -> tuple[float, float]:
    """Returns the padding's share of all rows and the share of texts dropped or cut."""
    layouts = [packing.pack(**lengths._asdict(), **sizes) for lengths in batches]
    tokens = sum(int(x.caption_lengths.sum() + x.description_lengths.sum()) for x in layouts)
    room = sum(len(x.caption_at) // x.pack_group * x.rows * x.row_length for x in layouts)
    misfits = sum(x.texts_dropped + x.captions_cut for x in layouts)
    return 1 - tokens / room, misfits / sum(lengths.num_texts for lengths in batches)


def smallest_rows(batches: list[Lengths], pack_group: int, row_length: int) -> dict[str, float]:
    """Returns rows, padding and misfits of the first number of rows that fits well enough."""
    tokens = np.mean([x.caption_lengths + x.description_lengths.sum(axis=1) for x in batches])
    rows = max(1, int(tokens * pack_group / row_length))
    while True:
        padding, misfits = pack_all(
            batches, pack_group=pack_group, rows=rows, row_length=row_length
        )
        if misfits <= MISFIT_SHARE:
            return {
                "pack_group": pack_group,
                "rows": rows,
                "padding_share": padding,
                "misfit_share": misfits,
            }
        rows += 1


def time_batch(
    lengths: Lengths, pack_group: int, rows: int, row_length: int, repeats: int = 9
) -> dict[str, float]:
    """Returns the median milliseconds of `pack` and of `fill` for one batch."""
    description_lengths = lengths.description_lengths[lengths.region_mask]
    caption_ids = np.ones(lengths.caption_lengths.sum(), dtype=np.int32)
    description_ids = np.ones(description_lengths.sum(), dtype=np.int32)
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        layout = packing.pack(
            **lengths._asdict(), pack_group=pack_group, rows=rows, row_length=row_length
        )
        packed = time.perf_counter()
        packing.fill(
            layout,
            caption_ids=caption_ids,
            caption_lengths=lengths.caption_lengths,
            description_ids=description_ids,
            description_lengths=description_lengths,
            region_mask=lengths.region_mask,
        )
        times.append((packed - begin, time.perf_counter() - packed))
    pack_ms, fill_ms = np.median(times, axis=0) * 1e3
    return {"pack_ms": float(pack_ms), "fill_ms": float(fill_ms)}


def main() -> None:
    """Prints the table and writes it as JSON when asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="file to write the table to")
    parser.add_argument("--batch", type=int, default=2048, help="images a batch")
    parser.add_argument("--batches", type=int, default=32, help="batches simulated")
    parser.add_argument("--row-length", type=int, default=77)
    parser.add_argument(
        "--description-tokens", type=int, nargs=2, default=(4, 12), metavar=("MIN", "MAX")
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    batches = [simulate(rng, args.batch, *args.description_tokens) for _ in range(args.batches)]
    print(
        f"{args.batch * args.batches} images, {sum(b.num_texts for b in batches)} texts, "
        f"descriptions of {args.description_tokens} tokens, rows of {args.row_length}"
    )
    print("group  rows  rows/image  padding  dropped or cut   pack ms   fill ms   (a batch)")
    table = []
    for pack_group in GROUP_SIZES:
        entry = smallest_rows(batches, pack_group, args.row_length)
        entry |= time_batch(batches[0], pack_group, entry["rows"], args.row_length)
        table.append(entry)
        print(
            f"{pack_group:5d}  {entry['rows']:4d}  {entry['rows'] / pack_group:10.3f}"
            f"  {entry['padding_share']:7.1%}  {entry['misfit_share']:14.3%}"
            f"  {entry['pack_ms']:8.2f}  {entry['fill_ms']:8.2f}"
        )
    if args.json:
        epath.Path(args.json).write_text(
            json.dumps({"settings": vars(args), "table": table}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
