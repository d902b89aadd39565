"""Padding and cost of packed texts, by the number of images a group.

    python -m benchmarks.packing [--json OUT.json] [--batch 2048] [--row-length 77] ...
    python -m benchmarks.packing --cases [--json OUT.json]

Lengths are simulated like Conceptual Captions with region descriptions: captions of 10-20 tokens, 0-5 descriptions of
4-12, special tokens included, all uniform; `--description-tokens 6 14` are the lengths if 4-12 counted words alone. For
every group size the table has the smallest number of rows at which at most 0.1% of the texts are dropped or cut.

`--cases`: for other distributions of lengths, the share of texts that groups of 64 drop or cut with FIXED rows (which
suit the lengths above) and with the rows that the trainer derives (grain_jax/input_pipeline/derived.py), and the
padding and FLOPs of the B/16 text tower.
"""

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from benchmarks import side_by_side
from grain_jax import config as config_lib
from grain_jax import recipe
from grain_jax.input_pipeline import derived, packing, text_lengths
from grain_jax.training import flops

GROUP_SIZES = (1, 8, 16, 32, 64, 128)
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
        return self.caption_lengths.size + int(self.region_mask.sum())


def simulate(rng: np.random.Generator, images: int, shortest: int, longest: int) -> Lengths:
    """Draws the text lengths of `images` images; description lengths are between the two bounds."""
    mask = np.arange(REGIONS) < rng.integers(0, REGIONS + 1, size=(images, 1))
    return Lengths(
        caption_lengths=rng.integers(10, 21, size=(images, 1), dtype=np.int32),
        description_lengths=np.where(
            mask, rng.integers(shortest, longest + 1, size=mask.shape, dtype=np.int32), 0
        ),
        region_mask=mask,
        region_scores=rng.random(mask.shape, dtype=np.float32),
    )


def _uniform(low: int, high: int):
    return lambda rng, shape: rng.integers(low, high + 1, size=shape)


def _long_tail(rng, shape):
    """Log-normal with a mean of about 30 tokens, at most a row of 77."""
    return np.round(rng.lognormal(np.log(30) - 0.18, 0.6, size=shape)).clip(4, 77)


class Case(NamedTuple):
    """Distributions of text lengths to simulate."""

    name: str
    captions: Callable
    descriptions: Callable
    fewest_regions: int = REGIONS
    equal_scores: bool = False

    def draw(self, rng: np.random.Generator, images: int) -> Lengths:
        """Draws the text lengths of `images` images."""
        count = rng.integers(self.fewest_regions, REGIONS + 1, size=(images, 1))
        mask = np.arange(REGIONS) < count
        scores = rng.random(mask.shape, dtype=np.float32)
        return Lengths(
            self.captions(rng, (images, 1)).astype(np.int32),
            np.where(mask, self.descriptions(rng, mask.shape), 0).astype(np.int32),
            mask,
            np.where(self.equal_scores, np.float32(0.5), scores),
        )


GROUP, FIXED, EPOCHS = 64, 34, 16
CASES = (
    Case("captions 10-20, 5 descriptions of 4-12", _uniform(10, 20), _uniform(4, 12)),
    Case("captions of mean 30, long tail; 0-5 of 4-12", _long_tail, _uniform(4, 12), 0),
    Case("captions 12-30, 5 descriptions of 5-12", _uniform(12, 30), _uniform(5, 12)),
    Case("the first, all scores equal", _uniform(10, 20), _uniform(4, 12), equal_scores=True),
)


def derived_rows(texts: Lengths, config: config_lib.Config) -> int:
    """The rows that the trainer derives for a data set with these texts."""
    lengths = text_lengths.TextLengths(
        name="these",
        tokenizer="clip",
        records=len(texts.caption_lengths),
        captions=texts.caption_lengths,
        synthetic=np.zeros(len(texts.caption_lengths), np.int32),
        descriptions=texts.description_lengths,
    )
    return derived.rows_of(config, GROUP, [lengths]).rows


def compare_cases(images: int) -> list[dict]:
    """Prints losses and costs of the cases, in FIXED and in derived rows."""
    values = recipe.base("B/16")
    values.total_steps, values.optim.warmup_steps = 1, 0
    values.text.pack_group = GROUP
    table = []
    print(
        f"{images} images a case, {EPOCHS} epochs, groups of {GROUP}, rows of 77; GFLOPs: text tower forward, an image"
    )
    print(
        f"{'':44}{'rows':>5}{'regions lost':>14}{'captions cut':>14}{'images lose all':>17}"
        f"{'padding':>9}{'GFLOPs':>8}"
    )
    for case in CASES:
        rng = np.random.default_rng(0)
        one = case.draw(rng, images)
        order = np.concatenate([rng.permutation(images) for _ in range(EPOCHS)])
        texts = Lengths(*(field[order] for field in one))
        for rows in (FIXED, derived_rows(one, config_lib.from_dict(values))):
            values.text.pack_rows = rows
            layout = packing.pack(**texts._asdict(), pack_group=GROUP, rows=rows, row_length=77)
            had, has = texts.region_mask.any(axis=1), layout.region_mask.any(axis=1)
            tokens = int(layout.caption_lengths.sum() + layout.description_lengths.sum())
            entry = {
                "case": case.name,
                "rows": rows,
                "regions_lost": layout.texts_dropped / int(texts.region_mask.sum()),
                "captions_cut": layout.captions_cut / len(order),
                "images_lose_all": float((had & ~has).sum() / had.sum()),
                "padding": 1 - tokens / (len(order) // GROUP * rows * 77),
                "text_gflops": flops.per_image(config_lib.from_dict(values)).text / 1e9,
            }
            values.text.pack_rows = None
            table.append(entry)
            print(
                f"{case.name if rows == FIXED else '':44}{rows:5d}{entry['regions_lost']:14.2%}"
                f"{entry['captions_cut']:14.2%}{entry['images_lose_all']:17.2%}{entry['padding']:9.1%}"
                f"{entry['text_gflops']:8.2f}"
            )
    return table


def pack_all(batches: list[Lengths], **sizes: int) -> tuple[float, float]:
    """Returns the share of padding in all rows and the share of texts dropped or cut."""
    layouts = [packing.pack(**lengths._asdict(), **sizes) for lengths in batches]
    tokens = sum(int(x.caption_lengths.sum() + x.description_lengths.sum()) for x in layouts)
    room = sum(len(x.caption_at) // x.pack_group * x.rows * x.row_length for x in layouts)
    misfits = sum(x.texts_dropped + x.captions_cut for x in layouts)
    return 1 - tokens / room, misfits / sum(lengths.num_texts for lengths in batches)


def smallest_rows(batches: list[Lengths], pack_group: int, row_length: int) -> dict[str, float]:
    """Returns the smallest number of rows within the limit of misfits, with padding and misfits."""
    together = Lengths(*(np.concatenate(column) for column in zip(*batches)))
    rows, _ = derived.smallest_rows([together._asdict()], pack_group, row_length, derived.MISFITS)
    padding, misfits = pack_all(batches, pack_group=pack_group, rows=rows, row_length=row_length)
    return {
        "pack_group": pack_group,
        "rows": rows,
        "padding_share": padding,
        "misfit_share": misfits,
    }


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
    """Prints the table; writes it as JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="file to write the table to")
    parser.add_argument("--batch", type=int, default=2048, help="images a batch")
    parser.add_argument("--batches", type=int, default=32, help="batches simulated")
    parser.add_argument("--row-length", type=int, default=77)
    parser.add_argument(
        "--description-tokens", type=int, nargs=2, default=(4, 12), metavar=("MIN", "MAX")
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cases", action="store_true", help="other text lengths, in fixed and in derived rows"
    )
    args = parser.parse_args()
    if args.cases:
        table = compare_cases(args.batch)
        side_by_side.write(args.json, dict(settings=vars(args), table=table))
        return
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
    side_by_side.write(args.json, dict(settings=vars(args), table=table))


if __name__ == "__main__":
    main()
