"""Mixtures of record sets: exact shares, each set's own epochs, a stream that is a function of the step."""

import tempfile

import numpy as np
import pytest

from grain_jax.core import errors
from grain_jax.input_pipeline import order, record_files, records
from tests import record_sets
from tests.record_sets import numbers, take

pytestmark = [pytest.mark.filterwarnings("ignore:label:DeprecationWarning"), pytest.mark.long]

COUNTS = {"birds": 24, "stones": 8, "trees": 16}
FIRST = {"birds": 0, "stones": 24, "trees": 32}  # number of each set's first image
WEIGHTS = {"birds": 0.5, "stones": 0.3, "trees": 0.2}
LANES, PER_LANE = 4, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    lines = record_sets.write_annotations(folder / "in", sum(COUNTS.values()), size=(16, 16))
    for name, count in COUNTS.items():
        chosen = range(FIRST[name], FIRST[name] + count)
        text = (folder / "in" / "A.jsonl").read_text().splitlines(keepends=True)
        (folder / "in" / f"{name}.jsonl").write_text("".join(text[i] for i in chosen))
        options = dict(name=name, lines=f"{name}.jsonl")
        assert record_sets.build_set(folder / "in", folder, "--num-shards=8", **options) == 0
    assert len(lines) == 48
    return folder


def entries(folder, weights=WEIGHTS):
    return [dict(name=n, data_dir=str(folder), weight=w) for n, w in weights.items()]


def test_nothing_is_left_among_temporary_files(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert take(mixture(folder), 1)
    record_files.digest_of_split(sorted(folder.glob("birds/*/*.tfrecord*")), negatives=False)
    assert not list(tmp_path.iterdir())


def mixture(folder, weights=WEIGHTS, **values):
    return record_sets.config("", name="", datasets=entries(folder, weights), **values)


def lane_streams(batches):
    """The images' numbers of each lane, in order: int [LANES, len(batches) * PER_LANE]."""
    return np.stack([numbers(b).reshape(LANES, PER_LANE) for b in batches], axis=1).reshape(LANES, -1)


def mixed_lanes(weights, lanes=8, seed=0):
    sets = [
        order.make_lanes(
            [order.ShardFile(f"{k}/{i}", 5) for i in range(lanes)],
            name=str(k),
            lanes=lanes,
            shards_per_block=1,
            seed=order.seed_of_set(seed, k),
        )
        for k in range(len(weights))
    ]
    return order.mix(sets, weights, seed=seed)


@pytest.mark.parametrize(
    "weights,bound",
    [
        ([0.9, 0.1], 1),
        ([0.123456789, 3.0], 1),
        ([0.39, 0.01, 0.6], 2),
        ([12423374.0, 3318333.0, 5e6, 9e4], 2.5),
    ],
)
def test_shares_are_exact_in_every_window(weights, bound):
    share = np.array(weights) / sum(weights)
    for lane in mixed_lanes(weights):
        for start in (0, 10**15):
            stands = np.array([lane.positions(start + p) for p in range(1001)])
            assert (np.diff(stands, axis=0).sum(axis=1) == 1).all()
            assert np.diff(stands, axis=0).min() == 0
            assert (lane.choices(start, start + 1000) == np.diff(stands, axis=0).argmax(1)).all()
            error = stands - stands[0] - np.arange(1001)[:, None] * share
            # The largest error of any window is at its ends, against each other.
            assert (error.max(axis=0) - error.min(axis=0)).max() < bound
    assert lane.positions(0) == [0] * len(weights)


def test_mixed_order_never_changes():
    # Written down once: another value would reorder every run that resumes.
    lane = mixed_lanes([0.2, 0.7, 0.31], lanes=4, seed=7)[2]
    assert lane.positions(10**12) == [165289256198, 578512396694, 256198347108]
    assert lane.choices(0, 12).tolist() == [2, 1, 2, 1, 1, 0, 1, 2, 1, 0, 1, 1]


def test_each_set_is_walked_once_an_epoch_of_its_own(folder):
    config = mixture(folder)
    assert records.num_examples(config) == 48
    streams = lane_streams(take(config, 50))  # 100 records a lane
    for name, count in COUNTS.items():
        seen = []
        for stream in streams:
            part = stream[(stream >= FIRST[name]) & (stream < FIRST[name] + count)]
            assert abs(len(part) - 100 * WEIGHTS[name]) < 2
            length = count // LANES
            epochs = part[: len(part) // length * length].reshape(-1, length)
            assert (np.sort(epochs) == np.sort(epochs[0])).all() and len(epochs) >= 5
            assert len({tuple(epoch) for epoch in epochs}) > 1
            seen += epochs[0].tolist()
        assert sorted(seen) == list(range(FIRST[name], FIRST[name] + count))


def test_a_set_is_walked_as_it_is_alone(folder):
    """The first set has the order of a run on it alone, and a mixture of one set is that run."""
    flipped = record_sets.config(folder, name="birds", flip_rate=0.5)
    single = mixture(folder, {"birds": 3.0}, flip_rate=0.5)
    for got, expected in zip(take(single, 10), take(flipped, 10), strict=True):
        record_sets.assert_batches_equal(got, expected)
    alone = record_sets.config(folder, name="birds")
    mixed = lane_streams(take(mixture(folder), 20))
    for got, expected in zip(mixed, lane_streams(take(alone, 20)), strict=True):
        part = got[got < COUNTS["birds"]]
        assert len(part) >= 19 and part.tolist() == expected[: len(part)].tolist()


def test_a_batch_is_a_function_of_step_and_lane(folder):
    """Not of the processes, nor of the step that a run resumed from."""
    config = mixture(folder, flip_rate=0.5, crop_min_area=0.5, shards_per_block=2)
    whole = take(config, 24)
    parts = [take(config, 6, start_step=5, lanes=lanes) for lanes in ([0], [1, 2, 3])]
    for expected, *of_lanes in zip(whole[5:11], *parts, strict=True):
        record_sets.assert_batches_equal(record_sets.join(of_lanes), expected)
    record_sets.assert_batches_equal(take(config, 1, start_step=23)[0], whole[23])
    for got, expected in zip(take(config, 5, start_step=13), whole[13:18], strict=True):
        record_sets.assert_batches_equal(got, expected)


def test_resuming_opens_only_its_blocks(folder, monkeypatch):
    config = mixture(folder, lanes=1)
    with record_sets.opened_shards(monkeypatch) as opened:
        take(config, 1, start_step=20)
    sets = record_files.find(config)
    keys = dict(name="x", lanes=1, shards_per_block=1)
    lanes = [
        order.make_lanes(x.shards, seed=order.seed_of_set(config.seed, i), **keys) for i, x in enumerate(sets)
    ]
    (mixed_lane,) = order.mix(lanes, list(WEIGHTS.values()), seed=config.seed)
    for record_set, stream, position in zip(sets, mixed_lane.streams, mixed_lane.positions(160), strict=True):
        mine = [path for path in opened if f"/{record_set.source.name}/" in path]
        first = stream.ordinal(position)
        # From the block of the step on, without a gap: nothing before it is touched.
        assert mine and mine == [stream.block(first + i).shards[0].path for i in range(len(mine))]


def test_a_set_of_few_shards_and_a_missing_one_are_named(folder):
    with pytest.raises(errors.UserError) as error:
        records.batches(mixture(folder, batch_size=16, pack_group=1, lanes=16))
    assert str(error.value).startswith(
        "input.lanes: got 16, expected at most 8, the number of shards of 'birds'; set input.lanes=8"
    )
    values = entries(folder)
    values[1]["split"] = "validation"
    with pytest.raises(
        record_files.DataError, match="stones/1.0.0 has no split 'validation', expected one of train"
    ):
        records.batches(record_sets.config("", name="", datasets=values))
