"""What the dataset is made of: the settings that its files depend on, each with its flag."""

import dataclasses

from grain_jax.cli.flags import flag, share

TEST_NEGATIVES = 10  # of each region of a test image


@dataclasses.dataclass(frozen=True)
class Pose:
    """How freely birds stand.

    poses:
      --scale-from X         smallest bird
      --scale-to X           largest bird
      --turn X               birds lean up to so many degrees either way
      --shift X              birds stand off the middle by up to this share of the image
      --mirrored X           share of birds that look the other way
      --colour-variation X   colours vary by up to this share (of 255)
    """

    scale_from: float = flag(0.8, low=0.3, high=2.0)
    scale_to: float = flag(1.1, low=0.3, high=2.0)
    turn: float = flag(6.0, low=0.0, high=90.0)
    shift: float = flag(0.04, low=0.0, high=0.5)
    mirrored: float = share(0.0)
    colour_variation: float = share(0.03)


@dataclasses.dataclass(frozen=True)
class Noise:
    """Rates of the errors in annotations.

    annotations:
      --misses X              noise: share of parts that the detector misses
      --jitter X              noise: box edges move by this share of the box's side (standard deviation)
      --wrong-descriptions X  noise: share of regions with a wrong description
      --paraphrased X         share of descriptions in other words
      --score-noise X         noise: standard deviation of scores
      --wrong-names X         noise: share of web captions with another species' name
      --missing-names X       noise: share of web captions without a name
      --caption-errors X      noise: share of wrong parts in synthetic captions
      --synthetic-paraphrased X  share of parts in other words in synthetic captions
    """

    misses: float = share(0.1)
    jitter: float = flag(0.05, low=0.0, high=2.0)
    wrong_descriptions: float = share(0.0)
    paraphrased: float = share(0.3)
    score_noise: float = share(0.06)
    wrong_names: float = share(0.0)
    missing_names: float = share(0.0)
    caption_errors: float = share(0.0)
    synthetic_paraphrased: float = share(0.3)


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings that the files depend on.

    Image i of a split depends on the seed, the species and i, not on how many there are.

    what is drawn:
      --seed N                everything drawn and written follows from it
      --size N                side of the images in pixels; PNG up to 128, JPEG above
      --images N              training images
      --seen-per-species N    evaluation images of each training species
      --unseen-per-species N  evaluation images of each held-out species
      --test-images N         test images with exact boxes, seen and unseen species in turn
      --genera N              genera of training species
      --species-per-genus N   training species in each
      --held-out-genera N     genera of held-out species
      --held-out-species-per-genus N  held-out species in each
      --parts-changed N       parts of 8 in which a species departs from its genus (8: independent)
      --least-parts N         annotated parts of an image, at least
      --most-parts N          annotated parts of an image, at most
      --caption-parts N       parts that a synthetic caption tells
      --negatives N           hard negatives of each region of a training image; test images have 10
    """

    seed: int = flag(0, low=0, high=2**63)
    size: int = flag(64, low=32, high=4096)
    images: int = flag(5000, low=0, high=10**8)
    seen_per_species: int = flag(2, low=0, high=10**4)
    unseen_per_species: int = flag(8, low=0, high=10**4)
    test_images: int = flag(192, low=0, high=10**6)
    genera: int = flag(24, high=10**3)
    species_per_genus: int = flag(5, high=10**3)
    held_out_genera: int = flag(10, low=0, high=10**3)
    held_out_species_per_genus: int = flag(4, low=0, high=10**3)
    parts_changed: int = flag(3, high=8)
    least_parts: int = flag(3, low=0, high=8)
    most_parts: int = flag(5, high=8)
    caption_parts: int = flag(3, high=8)
    negatives: int = flag(0, low=0, high=TEST_NEGATIVES)
    pose: Pose = Pose()
    noise: Noise = Noise()


DEFAULT = Settings()
