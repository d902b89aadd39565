import pytest

from grain_jax.data import negatives


@pytest.mark.parametrize(
    "description, expected",
    [
        ("a long orange beak", ["a short orange beak", "a long red beak", "a long orange wing"]),
        ("a red cup", ["an orange cup", "a blue cup"]),
        ("the LEFT Front wheel", ["the RIGHT Front wheel", "the LEFT Rear wheel"]),
        ("upper leaves", ["lower leaves", "upper branches"]),
    ],
)
def test_one_word_is_exchanged(description, expected):
    made = negatives.make(description, 100)
    assert set(expected) <= set(made) and len(set(made)) == len(made)
    for text in made:
        changed = [
            (a, b)
            for a, b in zip(description.split(), text.split(), strict=True)
            if a != b and {a.lower(), b.lower()} != {"a", "an"}
        ]
        assert len(changed) == 1


@pytest.mark.parametrize(
    "description, never",
    [
        ("a scarlet crest", "a red crest"),  # the same colour
        ("black and white bars", "white and white bars"),
        ("a bright light", "a bleft light"),
        ("a large pot", "a huge pot"),
    ],
)
def test_what_would_be_true_or_nonsense_is_left_out(description, never):
    assert never not in negatives.make(description, 100)


def test_the_result_is_a_function_of_the_arguments():
    said = "a long orange beak"
    made = negatives.make(said, 6)
    assert len(made) == 6 and made == negatives.make(said, 6)
    assert made[:3] == negatives.make(said, 3)
    other = made[0].upper()
    assert made[0] not in negatives.make(said, 100, others=[other])
    assert negatives.make("something", 5) == []
