"""Regions for a published model: its towers stay as they are, and a decoder and a box head learn beside them.

COMMAND   grain-jax train --config regions:START --workdir runs/regions \
              --config.input.data_dir=records --config.input.name=mine
START     a model with two towers: of the Hugging Face Hub, e.g. hf://google/siglip2-base-patch16-224, of
          grain-jax convert, or a run of yours. START and the run score whole images alike, at every step.
NEGATIVES --config.input.negatives_per_region=4 --config.loss.hard_negative=1 if the dataset has some.
TOWERS    --config.optim.lora.rank=8 trains low-rank factors of the towers, --config.optim.frozen="()" all.
          With either, --config.loss.image_caption=1 keeps the scores of whole images up.
HARDWARE  one GPU; a step costs less than half of one that trains everything.
"""

from grain_jax.configs import finetune


def get_config(start=""):
    c = finetune.get_config(start) if start else None
    if c is None or c.init.decoder is not None or c.init.text is None:
        raise ValueError(
            f"got regions:{start}, expected regions:START, a model with two towers and no region decoder,"
            " such as hf://google/siglip2-base-patch16-224; finetune:START trains others"
        )
    c.optim.frozen = (r"(image|text)(_\w+)?/(?!.*/lora_[ab]$).*", "logit_(scale|bias)")
    c.optim.layer_decay = 1.0
    c.optim.learning_rate = 1e-3
    c.optim.clip_norm = 1.0
    c.loss.image_caption = 0.0
    c.model.decoder.class_score = "mean"  # most class images show one object, whose parts are the regions
    return c
