"""The configuration of a GRAIN model: sizes of its towers, weights and options of its losses."""

from transformers import PreTrainedConfig


class GrainConfig(PreTrainedConfig):
    """The contents of `config.json`.

    Args:
      towers: sizes and options of the image tower, the text tower and the region decoder.
      losses: weights and options of the training losses.
    """

    model_type = "grain"

    def __init__(self, towers=None, losses=None, **kwargs):
        self.towers = towers
        self.losses = losses
        super().__init__(**kwargs)
