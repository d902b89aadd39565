"""Fine-tuning on your own images: of your own run, or of a published model with a new region decoder.

COMMAND   grain-jax train --config finetune:FROM --workdir runs/finetuned \
              --config.input.data_dir=records --config.input.name=mine
FROM      your own run, e.g. runs/own, or aviary-tiny: towers and decoder are loaded. Or a folder of grain-jax
          convert, or a model of the Hugging Face Hub, e.g. hf://openai/clip-vit-base-patch32: its towers,
          pooling and logit scale are loaded, the decoder is new. configs/regions.py leaves it as it is.
FREEZE    --config.optim.frozen="('image/.*',)" freezes the image tower, "('image/.*', 'text.*')" both.
LORA      --config.optim.lora.rank=8 trains low-rank factors of the towers, without layer_decay.
HARDWARE  one GPU; grain-jax plan says what fits.
"""

import json

from grain_jax.config import shares_rows
from grain_jax.config.recipe import with_pointer
from grain_jax.configs.own import own_images


def get_config(source="aviary-tiny"):
    c = own_images()
    c.update(batch_size=128, total_epochs=10.0)
    c.optim.warmup_epochs = 1.0
    # Learning rate of the new parts (decoder and heads). The last layer of a tower has 0.75 of it, and each
    # layer below 0.75 of the one above.
    c.optim.learning_rate = 2e-4
    c.optim.layer_decay = 0.75
    take_folder(c, source)
    return c


def take_folder(c, source):
    """The model of a run or of a folder of grain-jax convert, and its weights as the start."""
    from grain_jax.checkpoint import pretrained  # slow to import

    folder = pretrained.folder_of(source)
    file = folder / "config.json"
    content = json.loads(file.read_text()) if file.exists() else {}
    model, has_texts = content.get("model"), content.get("has_texts", True)
    if model is None:
        command = pretrained.conversion(folder)
        raise ValueError(
            f"got {source!r}, expected a run of yours, a folder that grain-jax convert wrote, hf://ORG/NAME,"
            f" or one of {', '.join(pretrained.NAMES)}{f'; {command}' if command else ''}"
        )
    decoder = model.pop("decoder")
    model["image"].pop("keep", None)  # of the training before
    c.init.image = source
    if has_texts:
        c.model.update(model)
        c.init.text = source
    else:  # DINOv3: --config.init.text=FOLDER takes texts of open_clip
        c.model.image.update(model["image"])
        c.model.text.activation = "gelu"
    tokenizer = folder / c.model.text.tokenizer
    if tokenizer.exists():  # it came with the weights
        c.model.text.tokenizer = str(tokenizer)
    c.text.packing = shares_rows(c.model.text)
    if decoder is not None:
        c.model.decoder.update(decoder)
        c.input.max_regions = c.model.decoder.queries
        c.init.decoder = source
    elif has_texts:  # two towers, which go on to pool and score whole images
        c.model.decoder.image_pool = "tower"
    else:
        c.model.image.pool, c.model.image.projection = "none", "matrix"
    if c.model.logit_bias_init is not None:
        c.loss.contrast = "sigmoid"
    if decoder is None:
        with_pointer(c)
    c.loss.agreement = c.model.boxes.kind != "none"
    c.loss.box_description = float(c.loss.agreement)
