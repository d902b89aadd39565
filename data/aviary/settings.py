"""What the data set is made of: the settings that its files depend on."""

import dataclasses

TEST_NEGATIVES = 10  # of each region of a test image


@dataclasses.dataclass(frozen=True)
class Pose:
    """How freely birds stand: scale from/to, turn (degrees either way), shift (share of the
    image either way), share of mirrored birds, and how far colours vary (share of 255)."""

    scale_from: float = 0.8
    scale_to: float = 1.1
    turn: float = 6.0
    shift: float = 0.04
    mirrored: float = 0.5
    colour_variation: float = 0.03


@dataclasses.dataclass(frozen=True)
class Noise:
    """Rates of the errors in annotations. Shares are in [0, 1].

    Attributes:
        misses: share of the chosen parts that the detector does not report.
        jitter: each edge of a box moves by a normal amount of this share of the box's side.
        wrong_descriptions: share of regions described by a trait that the bird does not have.
        paraphrased: share of descriptions in other words than the plain ones.
        score_noise: standard deviation of the random part of scores.
        wrong_names: share of web captions with the name of another training species.
        missing_names: share of web captions without any name.
        caption_errors: share of the parts in synthetic captions that the bird does not have.
        synthetic_paraphrased: the share of paraphrases in synthetic captions.
    """

    misses: float = 0.2
    jitter: float = 0.05
    wrong_descriptions: float = 0.05
    paraphrased: float = 0.3
    score_noise: float = 0.06
    wrong_names: float = 0.03
    missing_names: float = 0.02
    caption_errors: float = 0.05
    synthetic_paraphrased: float = 0.3


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings that the files depend on; `grain-jax aviary --help` explains each.

    Image i of a split depends on the seed, the species and i, not on how many there are.
    """

    seed: int = 0
    size: int = 64
    images: int = 16000
    seen_per_species: int = 5
    unseen_per_species: int = 15
    test_images: int = 400
    genera: int = 24
    species_per_genus: int = 5
    held_out_genera: int = 10
    held_out_species_per_genus: int = 4
    parts_changed: int = 3
    least_parts: int = 3
    most_parts: int = 5
    caption_parts: int = 2
    negatives: int = 0
    pose: Pose = Pose()
    noise: Noise = Noise()


DEFAULT = Settings()
