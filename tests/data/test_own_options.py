"""Options of a source's own: typed by the class's fields, with one line for what is wrong."""

import dataclasses

import pytest
from grain_jax.data.sources import own_options, staged
from grain_jax.data.sources.base import SourceError


@dataclasses.dataclass(frozen=True)
class Numbers(staged.ListedSource):
    count: int = 1
    rate: float = 0.5
    strict: bool = False
    name: str = "a"

    def __post_init__(self):
        if self.count < 0:
            raise ValueError(f"count: got {self.count}, expected at least 0")

    def entries(self, options):
        return iter(())


class Without:
    images_are_files = True


def test_values_have_the_types_of_the_fields():
    given = {"count": "3", "rate": "1e-1", "strict": "True", "name": "b=c"}
    assert own_options.make("x", Numbers, given) == Numbers(3, 0.1, True, "b=c")
    assert own_options.make("x", Numbers, {}) == Numbers()


@pytest.mark.parametrize(
    "cls, given, line",
    [
        (
            Numbers,
            {"conut": "3"},
            "--option conut of data source 'x': no such key; did you mean count?",
        ),
        (Numbers, {"zzz": "3"}, "no such key; there are: count, rate, strict, name"),
        (Numbers, {"count": "3.5"}, "--option count: got '3.5', expected a whole number"),
        (Numbers, {"rate": "much"}, "--option rate: got 'much', expected a number"),
        (Numbers, {"strict": "1"}, "--option strict: got '1', expected true or false"),
        (Numbers, {"count": "-1"}, "data source 'x': count: got -1, expected at least 0"),
        (Without, {}, "data source 'x': got a class without shards, read, expected one as"),
        (len, {}, "data source 'x': got no class, expected one as data/sources/base.py: Source"),
    ],
)
def test_what_is_wrong_is_one_line(cls, given, line):
    with pytest.raises(SourceError) as error:
        own_options.make("x", cls, given)
    assert line in str(error.value) and "\n" not in str(error.value)
