"""The settings that the files of `grain-jax fetch fashion` depend on."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Settings:
    """`grain-jax fetch fashion --help` explains each."""

    seed: int = 0
    images: int = 16000
    seen_per_class: int = 100
    unseen_per_kind: int = 150
    test_images: int = 400
    caption_parts: int = 2


DEFAULT = Settings()
