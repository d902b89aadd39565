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

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from benchmarks import harness
from grain_jax import config as config_lib
from grain_jax.input_pipeline import derived, packing, text_lengths
from grain_jax.training import flops

GROUP_SIZES = (1, 8, 16, 32, 64, 128)
REGIONS = 5
GROUP, FIXED, EPOCHS = 64, 34, 16  # of the cases


class Lengths(NamedTuple):
    """Simulated text lengths of B images; the fields are arguments of `packing.pack`."""

    caption_lengths: np.ndarray
    description_lengths: np.ndarray
    region_mask: np.ndarray
    region_scores: np.ndarray

    def pack(self, **sizes: int) -> packing.TextPlaces:
        """The texts in rows."""
        return packing.pack(**self._asdict(), **sizes)


def uniform(low: int, high: int) -> Callable:
    """Lengths from `low` to `high`."""
    return lambda rng, shape: rng.integers(low, high + 1, size=shape)


def long_tail(rng: np.random.Generator, shape) -> np.ndarray:
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


CASES = (
    Case("captions 10-20, 5 descriptions of 4-12", uniform(10, 20), uniform(4, 12)),
    Case("captions of mean 30, long tail; 0-5 of 4-12", long_tail, uniform(4, 12), 0),
    Case("captions 12-30, 5 descriptions of 5-12", uniform(12, 30), uniform(5, 12)),
    Case("the first, all scores equal", uniform(10, 20), uniform(4, 12), equal_scores=True),
)


def make_config(rows: int | None = None) -> config_lib.Config:
    """B/16 with groups of GROUP images."""
    return harness.config("B/16", {"text.pack_group": GROUP, "text.pack_rows": rows})


def tokens(layout: packing.TextPlaces) -> int:
    """Tokens that were kept."""
    return int(layout.caption_lengths.sum() + layout.description_lengths.sum())


def num_texts(batches: list[Lengths]) -> int:
    """Captions and descriptions together."""
    return sum(b.caption_lengths.size + int(b.region_mask.sum()) for b in batches)


def derived_rows(texts: Lengths) -> int:
    """The rows that the trainer derives for a data set with these texts."""
    lengths = text_lengths.TextLengths(
        name="these",
        tokenizer="clip",
        records=len(texts.caption_lengths),
        captions=texts.caption_lengths,
        synthetic=np.zeros(len(texts.caption_lengths), np.int32),
        descriptions=texts.description_lengths,
    )
    return derived.rows_of(make_config(), GROUP, [lengths]).rows


def compare_cases(images: int) -> list[dict]:
    """Prints losses and costs of the cases, in FIXED and in derived rows."""
    print(
        f"{images} images a case, {EPOCHS} epochs, groups of {GROUP}, rows of 77; GFLOPs: text tower forward, an image"
    )
    columns = dict(case="44", rows=">5", regions_lost=">13.2%", captions_cut=">13.2%")
    columns |= dict(images_lose_all=">16.2%", padding=">8.1%", text_gflops=">12.2f")
    table = harness.Table(columns)
    for case in CASES:
        rng = np.random.default_rng(0)
        one = case.draw(rng, images)
        order = np.concatenate([rng.permutation(images) for _ in range(EPOCHS)])
        texts = Lengths(*(field[order] for field in one))
        for rows in (FIXED, derived_rows(one)):
            layout = texts.pack(pack_group=GROUP, rows=rows, row_length=77)
            had, has = texts.region_mask.any(axis=1), layout.region_mask.any(axis=1)
            table.add(
                case=case.name,
                rows=rows,
                regions_lost=layout.texts_dropped / int(texts.region_mask.sum()),
                captions_cut=layout.captions_cut / len(order),
                images_lose_all=float((had & ~has).sum() / had.sum()),
                padding=1 - tokens(layout) / (len(order) // GROUP * rows * 77),
                text_gflops=flops.per_image(make_config(rows)).text / 1e9,
            )
    return table.rows


def of_group(batches: list[Lengths], **sizes: int) -> dict[str, float]:
    """The smallest number of rows within the limit of misfits, with padding, misfits, and ms a batch."""
    together = Lengths(*(np.concatenate(column) for column in zip(*batches)))
    fixed = sizes["pack_group"], sizes["row_length"]
    rows, _ = derived.smallest_rows([together._asdict()], *fixed, derived.MISFITS)
    layouts = [lengths.pack(**sizes, rows=rows) for lengths in batches]
    room = sum(len(x.caption_at) // x.pack_group * x.rows * x.row_length for x in layouts)
    misfits = sum(x.texts_dropped + x.captions_cut for x in layouts)
    return {
        "pack_group": sizes["pack_group"],
        "rows": rows,
        "padding_share": 1 - sum(map(tokens, layouts)) / room,
        "misfit_share": misfits / num_texts(batches),
    } | time_batch(batches[0], **sizes, rows=rows)


def time_batch(lengths: Lengths, **sizes: int) -> dict[str, float]:
    """Returns the median milliseconds of `pack` and of `fill` for one batch."""
    regions = np.where(lengths.region_mask, lengths.description_lengths, 0)
    of_kinds = lengths.caption_lengths, regions, np.zeros((*regions.shape, 0), np.int32)
    ids = np.ones(sum(of.sum() for of in of_kinds), np.int32)
    times = []
    for _ in range(9):
        begin = time.perf_counter()
        layout = lengths.pack(**sizes)
        packed = time.perf_counter()
        packing.fill(layout, ids, of_kinds)
        times.append((packed - begin, time.perf_counter() - packed))
    pack_ms, fill_ms = np.median(times, axis=0) * 1e3
    return {"pack_ms": float(pack_ms), "fill_ms": float(fill_ms)}


def main() -> None:
    """Prints the table; writes it as JSON on request."""
    args = harness.arguments(
        __doc__,
        batch=(2048, dict(help="images a batch")),
        batches=(32, dict(help="batches simulated")),
        row_length=77,
        description_tokens=([4, 12], dict(nargs=2, metavar=("MIN", "MAX"))),
        seed=0,
        cases=(False, dict(help="other text lengths, in fixed and in derived rows")),
    )
    if args.cases:
        found = compare_cases(args.batch)
    else:
        case = Case("", uniform(10, 20), uniform(*args.description_tokens), 0)
        rng = np.random.default_rng(args.seed)
        batches = [case.draw(rng, args.batch) for _ in range(args.batches)]
        print(
            f"{args.batch * args.batches} images, {num_texts(batches)} texts, "
            f"descriptions of {args.description_tokens} tokens, rows of {args.row_length}"
        )
        columns = dict(pack_group=">10", rows=">5", padding_share=">14.1%", misfit_share=">13.3%")
        table = harness.Table(columns | dict(pack_ms=">9.2f", fill_ms=">9.2f"))
        for pack_group in GROUP_SIZES:
            table.add(**of_group(batches, pack_group=pack_group, row_length=args.row_length))
        found = table.rows
    harness.write(args.json, dict(settings=vars(args), table=found))


if __name__ == "__main__":
    main()
