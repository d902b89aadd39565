"""An online data source of one's own: images of coloured rectangles, drawn while the model trains.

In a config file:

    c.input.source = "examples.data_source.shapes:Shapes"
    c.input.options = dict(colours=("red", "green", "blue"))

A lane's part of a batch is a function of (seed, lane, step): a run resumes to the bit, on any processes.
"""

import dataclasses
import functools

import numpy as np

from grain_jax.config import Config, TextTower
from grain_jax.core.schema import Batch
from grain_jax.input_pipeline import assemble, order, sources, text_lengths, tokenizer

_COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 70, 220), "yellow": (230, 210, 40)}


@dataclasses.dataclass(frozen=True)
class Options:
    """The keys of `input.options`."""

    colours: tuple[str, ...] = tuple(_COLOURS)
    examples: int = 4096  # per epoch

    def __post_init__(self):
        unknown = sorted(set(self.colours) - set(_COLOURS))
        if unknown:
            raise ValueError(f"colours: got {unknown}, expected some of {', '.join(_COLOURS)}")


class Shapes(sources.LaneSource):
    """A grey image with one to three coloured rectangles; the caption names all, a description each one."""

    Options = Options

    def num_examples(self, config: Config) -> int:
        """As the options say: the images do not run out."""
        return config.input.options.examples

    def lane_batch(self, config: Config, lane: int, step: int) -> Batch:
        """The lane's images of that step."""
        rng = np.random.default_rng(order.hash_key(config.seed, lane, step))
        images = config.batch_size // sources.num_lanes(config)
        examples = [_draw(config, rng) for _ in range(images)]
        return assemble.of_examples(examples, config, _tokenizer(config.model.text))

    def text_lengths(self, config: Config) -> list[text_lengths.TextLengths]:
        """The lengths in some hundred images, so that `text.pack_rows` can be derived."""
        drawn = [_draw(config, np.random.default_rng(i)) for i in range(256)]
        return [
            text_lengths.of_texts(
                [text_lengths.ImageTexts([x.caption], "", x.descriptions) for x in drawn],
                _tokenizer(config.model.text),
                name="rectangles",
                records=self.num_examples(config),
            )
        ]


@functools.lru_cache(maxsize=1)
def _tokenizer(tower: TextTower) -> tokenizer.Tokenizer:
    return tokenizer.of_tower(tower)


def _draw(config: Config, rng: np.random.Generator) -> assemble.Example:
    size, colours = config.model.image.image_size, config.input.options.colours
    image = rng.integers(100, 140, (size, size, 3), np.uint8)
    boxes, descriptions = [], []
    for _ in range(rng.integers(1, 1 + min(3, config.input.max_regions))):
        colour = colours[rng.integers(len(colours))]
        width, height = rng.integers(size // 8, size // 2, 2)
        left, top = rng.integers(0, size - width), rng.integers(0, size - height)
        image[top : top + height, left : left + width] = _COLOURS[colour]
        boxes.append(np.array([left + width / 2, top + height / 2, width, height]) / size)
        descriptions.append(f"a {'wide' if width > height else 'tall'} {colour} rectangle")
    return assemble.Example(image, " and ".join(descriptions), descriptions, boxes)
