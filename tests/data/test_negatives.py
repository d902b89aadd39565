import pytest

from grain_jax.data import negatives


@pytest.mark.parametrize(
    "description, expected, never",
    [
        ("a long orange beak", ["a short orange beak", "a long red beak", "a long orange wing"], ""),
        ("a red cup", ["an orange cup", "a blue cup"], ""),
        ("the LEFT Front wheel", ["the RIGHT Front wheel", "the LEFT Rear wheel"], ""),
        ("upper leaves", ["lower leaves", "upper branches"], ""),
        ("a scarlet crest", ["a blue crest"], "a red crest"),  # the same colour
        ("black and white bars", ["black and red bars"], "white and white bars"),
        ("a bright light", [], "a bleft light"),
        ("a large pot", ["a small pot"], "a huge pot"),
    ],
)
def test_one_word_is_exchanged_and_nothing_is_true_or_nonsense(description, expected, never):
    made = negatives.make(description, 100)
    assert set(expected) <= set(made) and len(set(made)) == len(made) and never not in made
    for text in made:
        pairs = zip(description.split(), text.split(), strict=True)
        assert sum(a != b and {a.lower(), b.lower()} != {"a", "an"} for a, b in pairs) == 1


def test_the_result_is_a_function_of_the_arguments():
    said = "a long orange beak"
    made = negatives.make(said, 6)
    assert len(made) == 6 and made == negatives.make(said, 6)
    assert made[:3] == negatives.make(said, 3)
    assert made[0] not in negatives.make(said, 100, others=[made[0].upper()])
    assert negatives.make("something", 5) == []
