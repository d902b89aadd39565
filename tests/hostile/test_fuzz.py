"""A few cases of every kind of the fuzzer, in every run of the tests."""

import pytest

from tests.hostile import fuzz


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    return fuzz.Fuzzer(tmp_path_factory.mktemp("fuzzer"))


def test_damaged_input_of_every_kind_is_read_or_refused_in_plain_lines(fuzzer):
    outcomes, failures = fuzz.fuzz(fuzzer, fuzz.KINDS, seed=7000, cases=6 * len(fuzz.KINDS))
    assert not failures, "\n".join(failures)
    assert {kind for kind, _ in outcomes} == set(fuzz.KINDS)
    assert sum(n for (_, outcome), n in outcomes.items() if outcome == "refused") > 10


def test_damaged_images_are_read_or_refused(fuzzer):
    outcomes, failures = fuzz.fuzz(fuzzer, ("images",), seed=0, cases=900)
    assert not failures and 0.1 < outcomes["images", "read"] / 900 < 0.9


@pytest.mark.parametrize(
    "kind,seed,outcome",
    [
        ("workdirs", 200527, "read"),  # an integer in metrics.jsonl that is larger than any float
        ("sources", 4007517, "refused"),  # features of a record set that do not fit each other
    ],
)
def test_what_the_fuzzer_has_found_stays_mended(fuzzer, kind, seed, outcome):
    outcomes, failures = fuzz.fuzz(fuzzer, (kind,), seed=seed, cases=1)
    assert not failures and outcomes[kind, outcome] == 1


def test_the_fuzzer_notices_what_it_is_there_for():
    def differ(rng):
        raise fuzz.SilentDifference("params")

    assert fuzz.run_case(lambda rng: [][rng.randrange(3)], 0)[0] == "traceback"
    assert fuzz.run_case(lambda rng: "read", 0) == ("read", None)
    assert fuzz.run_case(differ, 0) == ("silent difference", "params")
