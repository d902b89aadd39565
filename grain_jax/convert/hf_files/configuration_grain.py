"""The configuration of a GRAIN model: sizes of its towers."""

from transformers import PreTrainedConfig


class GrainConfig(PreTrainedConfig):
    """The contents of `config.json`.

    Args:
      towers: sizes and options of the image tower, the text tower and the region decoder.
    """

    model_type = "grain"

    def __init__(self, towers=None, **kwargs):
        self.towers = towers
        super().__init__(**kwargs)
