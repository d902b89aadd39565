import collections

import numpy as np
import pytest

from grain_jax.evaluate import cider

REFERENCES = [
    ["a bird with a spotted brown wing on a branch", "a brown bird sits on a branch"],
    ["a blue bird with a long tail", "the bird has a long blue tail and a blue crest"],
    ["two birds on a wire", "two black birds sit on a wire next to each other", "birds"],
    ["a red fox in the snow"],
]
CAPTIONS = [
    "a bird with a brown wing on a branch",
    "a blue bird with a blue blue blue tail and a long long crest and a green beak of a parrot",
    "birds",
    "a red fox in the snow",
]
# Of pycocoevalcap 1.2: its Cider().compute_score(references, captions)[1].
PUBLISHED = [4.895940875607577, 0.42082129226575016, 1.2717964131112638, 10.0]


def _scored(references, captions):
    split = [[cider.words(text) for text in own] for own in references]
    return cider.Scorer(split)([cider.words(text) for text in captions])


def _replica(references, captions):
    """CIDEr-D as section 6 of the paper writes it, with dense float64 vectors."""
    grams = lambda text, n: [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
    references = [[text.split() for text in own] for own in references]
    captions = [text.split() for text in captions]
    total = np.zeros(len(captions))
    for n in range(1, 5):
        every = sorted(
            {g for own in [*references, captions] for text in own for g in grams(text, n)}
        )
        place = {gram: i for i, gram in enumerate(every)}
        images_with = np.zeros(len(every))
        for own in references:
            for gram in {gram for text in own for gram in grams(text, n)}:
                images_with[place[gram]] += 1
        rarity = np.log(len(references) / np.maximum(images_with, 1))

        def vector(text):
            counts = np.zeros(len(every))
            for gram, count in collections.Counter(grams(text, n)).items():
                counts[place[gram]] = count
            return counts * rarity

        for i, (own, caption) in enumerate(zip(references, captions)):
            for text in own:
                c, s = vector(caption), vector(text)
                norm = np.linalg.norm(c) * np.linalg.norm(s)
                gauss = np.exp(-((len(caption) - len(text)) ** 2) / (2 * 6**2))
                if norm:
                    total[i] += 10 / 4 / len(own) * gauss * (np.minimum(c, s) @ s) / norm
    return total


def test_equals_the_published_code_and_the_paper():
    found = _scored(REFERENCES, CAPTIONS)
    np.testing.assert_allclose(found, PUBLISHED, rtol=1e-9)
    np.testing.assert_allclose(found, _replica(REFERENCES, CAPTIONS), rtol=1e-12)
    assert found[3] == pytest.approx(10)  # the only reference, and all of its n-grams are rare


def test_of_one_image_and_of_no_words():
    assert _scored([["a bird"]], ["a bird"]).tolist() == [0]
    assert _scored([["a bird"], ["!"]], ["...", "a bird"]).tolist() == [0, 0]


def test_words_and_what_holds_them():
    assert cider.words("A  Bird's wing,, well-known & \u201cred\u201d - it's 2.") == (
        "a bird's wing well-known red it's 2".split()
    )
    assert cider.words("हिन्दी") == ["हिन्दी"]  # vowel signs are part of a word
    text = cider.words("a bird with a blue wing and a red tail")
    assert cider.holds(text, ["a", "blue", "wing"]) and cider.holds(text, ["a"])
    assert not cider.holds(text, ["blue", "red"]) and not cider.holds(
        text, ["a", "red", "tail", "x"]
    )
    assert not cider.holds(text, [])
