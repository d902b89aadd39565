"""A few cases of every kind of the fuzzer, in every run of the tests."""

import pytest

from tests.hostile import fuzz


def test_damaged_input_of_every_kind_is_read_or_refused_in_plain_lines():
    outcomes, failures = fuzz.fuzz(fuzz.KINDS, seed=7000, cases=10 * len(fuzz.KINDS))
    assert not failures, "\n".join(failures)
    assert {kind for kind, _ in outcomes} == set(fuzz.KINDS)
    assert sum(n for (_, outcome), n in outcomes.items() if outcome == "refused") > 10


@pytest.mark.parametrize(
    "kind,seed,outcome",
    [
        ("workdirs", 200527, "read"),  # an integer in metrics.jsonl that is larger than any float
        ("sources", 4007517, "refused"),  # features of a record set that do not fit each other
    ],
)
def test_what_the_fuzzer_has_found_stays_mended(kind, seed, outcome):
    outcomes, failures = fuzz.fuzz((kind,), seed=seed, cases=1)
    assert not failures and outcomes[kind, outcome] == 1


def test_the_fuzzer_notices_what_it_is_there_for():
    def crash(rng):
        return [][rng.randrange(3)]

    assert fuzz.run_case(crash, 0)[0] == "traceback"
    assert fuzz.run_case(lambda rng: "read", 0) == ("read", None)

    def differ(rng):
        raise fuzz.SilentDifference("params")

    assert fuzz.run_case(differ, 0) == ("silent difference", "params")


def test_a_hang_is_noticed(monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 0.05)

    def hang(rng):
        while True:
            pass

    assert fuzz.run_case(hang, 0) == ("hang", "no end after 0.05 s")
