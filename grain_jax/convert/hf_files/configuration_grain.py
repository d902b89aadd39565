"""The configuration of a GRAIN model: sizes of its towers, weights and options of its losses."""

from transformers import PreTrainedConfig


class GrainConfig(PreTrainedConfig):
    """The contents of `config.json`.

    Args:
      towers: sizes and options of the image tower, the text tower and the region decoder.
      losses: weights and options of the training losses.
      text_decoder: sizes of the text decoder; None: the model has none.
      sequence_lengths: patches an image that the model was trained with, in its own shape; None: squares.
    """

    model_type = "grain"

    def __init__(
        self, towers=None, losses=None, text_decoder=None, sequence_lengths=None, **kwargs
    ):
        self.towers = towers
        self.losses = losses
        self.text_decoder = text_decoder
        self.sequence_lengths = sequence_lengths
        super().__init__(**kwargs)


# <text_decoder>
class GrainTextDecoderConfig(PreTrainedConfig):
    """The text decoder alone, as `generate` of transformers asks for it.

    Args:
      sizes: `GrainConfig.text_decoder`.
      texts: ids of the tokenizer; END, MASK (which pads, too), three tasks and the location tokens come after them.
      memory_width: width of a patch.
    """

    model_type = "grain_text_decoder"

    def __init__(self, sizes=None, texts=0, memory_width=0, **kwargs):
        sizes = sizes or {}
        self.sizes, self.texts, self.memory_width = sizes, texts, memory_width
        self.end, self.pad, self.first_bin = texts, texts + 1, texts + 5
        self.tasks = {
            name: texts + 2 + i for i, name in enumerate(("caption", "describe", "point"))
        }
        self.vocab_size = self.first_bin + sizes.get("bins", 0)
        self.hidden_size, self.num_hidden_layers = sizes.get("width", 0), sizes.get("depth", 0)
        self.num_attention_heads = sizes.get("heads", 0)
        super().__init__(**kwargs)


# </text_decoder>
