"""The configuration of a GRAIN model: its towers' sizes and the switches of its losses."""

from transformers import PreTrainedConfig


class GrainConfig(PreTrainedConfig):
    """What `config.json` holds.

    Args:
      towers: sizes and switches of the image tower, the text tower and the region decoder.
      losses: weights and switches of the training loss.
    """

    model_type = "grain"

    def __init__(self, towers=None, losses=None, **kwargs):
        self.towers = towers
        self.losses = losses
        super().__init__(**kwargs)
