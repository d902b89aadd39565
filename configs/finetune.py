"""Fine-tuning on your own images: of your own run, or of pretrained towers with a new region decoder.

COMMAND   grain-jax train --config finetune:FROM --workdir runs/finetuned \
              --config.input.data_dir=records --config.input.name=mine
FROM      your own run, e.g. runs/own, or aviary-tiny: towers and decoder are loaded. Or a folder that grain_jax.convert wrote, or
          e.g. hf://openai/clip-vit-base-patch32: the towers are loaded, the decoder is new. Or a family of towers, with
          --config.init.image=FOLDER --config.init.text=FOLDER: openai, open_clip (:B/16, :B/32, :L/14), siglip,
          siglip2 (:B/16, :L/16), dinov3 (:S/16, :B/16, :L/16; texts of open_clip), e.g. open_clip:L/14.
FREEZE    --config.optim.frozen="('image/.*',)" freezes the image tower, "('image/.*', 'text.*')" both.
LORA      --config.optim.lora.rank=8 --config.optim.layer_decay=1 trains low-rank factors beside the towers' matrices.
HARDWARE  one GPU; docs/own_images.md lists what fits where.
"""

import json

from grain_jax.config import shares_rows
from grain_jax.config.recipe import own_images, towers_of

_LARGE = dict(width=1024, depth=24, heads=16, mlp_dim=4096)
# Family -> size -> (width of the joint space, image tower, text tower), beyond the keys that `towers_of` sets.
CLIP = {
    "B/16": (512, {}, {}),
    "B/32": (512, dict(patch_size=32), {}),
    "L/14": (768, dict(patch_size=14, **_LARGE), dict(width=768, heads=12, mlp_dim=3072)),
}
SIGLIP = {
    "B/16": (768, {}, {}),
    "L/16": (1024, dict(image_size=256, **_LARGE), _LARGE),
}
DINOV3 = {  # with the text tower of open_clip's B/16 or L/14
    "S/16": (512, dict(width=384, heads=6, mlp_dim=1536), {}),
    "B/16": CLIP["B/16"],
    "L/16": (768, _LARGE, CLIP["L/14"][2]),
}
FAMILIES = {
    "openai": CLIP,
    "open_clip": CLIP,
    "siglip": SIGLIP,
    "siglip2": SIGLIP,
    "dinov3": DINOV3,
}


def get_config(source="open_clip"):
    c = own_images()
    c.batch_size = 128
    c.total_epochs = 10.0
    c.optim.warmup_epochs = 1.0
    # Learning rate of the new parts (decoder and heads). The last layer of a tower has 0.75 of it, and each layer
    # below 0.75 of the one above.
    c.optim.learning_rate = 2e-4
    c.optim.layer_decay = 0.75
    family, _, size = source.partition(":")
    if family in FAMILIES:
        take_towers(c, family, size or "B/16")
    else:
        take_folder(c, source)
    return c


def take_towers(c, family, size):
    """The model with two towers of that family."""
    if size not in FAMILIES[family]:
        sizes = ", ".join(FAMILIES[family])
        raise ValueError(f"size of {family} towers: got {size!r}, expected one of {sizes}")
    if family == "dinov3":
        towers_of(c, "dinov3", ("image",))
        towers_of(c, "clip", ("text",))
    else:
        towers_of(c, family if family in ("siglip", "siglip2") else "clip")
    if family == "open_clip":  # of most of its models; OpenAI's have quick_gelu
        c.model.image.activation = "gelu"
    if family in ("open_clip", "dinov3"):
        c.model.text.activation = "gelu"
    c.model.embed_dim, image, text = FAMILIES[family][size]
    c.model.image.update(image)
    c.model.text.update(text)
    if size.startswith("L"):
        c.microbatches = 4  # with 1, it needs more than 40 GB of GPU memory
    c.init.resize = "bilinear" if family.startswith("siglip") else "bicubic"


def take_folder(c, folder):
    """The model of a run or of a folder of grain_jax.convert, and its weights as the start."""
    from grain_jax.checkpoint import pretrained  # slow to import, and needed for a folder only

    place = pretrained.folder_of(folder)
    file = place / "config.json"
    content = json.loads(file.read_text()) if file.exists() else {}
    model, has_texts = content.get("model"), content.get("has_texts", True)
    if model is None:
        command = pretrained.conversion(place)
        raise ValueError(
            f"got {folder!r}, expected a run of yours, a folder that grain_jax.convert wrote, hf://ORG/NAME, or one of"
            f" {', '.join((*pretrained.NAMES, *FAMILIES))}{f'; {command}' if command else ''}"
        )
    decoder = model.pop("decoder")
    model["image"].pop("keep", None)  # of that training
    c.init.image = folder
    if has_texts:
        c.model.update(model)
        c.init.text = folder
    else:  # DINOv3: --config.init.text=FOLDER takes texts of open_clip
        c.model.image.update(model["image"])
        towers_of(c, "clip", ("text",))
        c.model.text.activation = "gelu"
    tokenizer = place / c.model.text.tokenizer
    if tokenizer.exists():  # it came with the weights
        c.model.text.tokenizer = str(tokenizer)
    c.text.packing = shares_rows(c.model.text)
    if decoder is not None:
        c.model.decoder.update(decoder)
        c.input.max_regions = c.model.decoder.queries
        c.init.decoder = folder
    else:  # two towers, whose pooling the decoder replaces
        c.model.image.pool, c.model.image.projection = "none", "matrix"
        c.model.logit_bias_init = None
    if c.model.logit_bias_init is not None:
        c.loss.contrast = "sigmoid"
