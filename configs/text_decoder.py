"""A text decoder on a finished model: it writes captions, describes boxes and points; nothing else moves by a bit.

COMMAND   grain-jax train --config text_decoder:FROM --workdir runs/words \
              --config.input.data_dir=records --config.input.name=mine
FROM      your own run, e.g. runs/own, with or without a region decoder. Or a folder that grain_jax.convert wrote, such
          as from-open-clip of CLIP, SigLIP or a model of the Hub: all of it is taken, its temperature too. Or a family
          of towers with --config.init.image=FILE --config.init.text=FILE: openai, open_clip (:B/16, :B/32, :L/14),
          siglip, siglip2 (:B/16, :L/16; --config.model.text.tokenizer=FILE): without the temperature of the file.
TOWER     --config.optim.frozen="()" --config.loss.terms.words.stop_gradient=False
          --config.loss.image_caption=1 trains all of it.
HARDWARE  one GPU; the towers have no backward pass, and the text tower no forward pass either.
"""

from grain_jax.config.recipe import evaluator, own_images
from grain_jax.configs import finetune

# Family -> how its towers pool, and what they were trained with.
CLIP = dict(image=dict(pool="class"))
SIGLIP = dict(
    image=dict(pool="map", projection="none"), logit_scale_init=10.0, logit_bias_init=-10.0
)
FAMILIES = {"openai": CLIP, "open_clip": CLIP, "siglip": SIGLIP, "siglip2": SIGLIP}


def get_config(source="open_clip"):
    c = own_images()
    c.input.sequence_lengths = ()  # frozen towers see what they were trained on
    c.batch_size = 128
    c.total_epochs = 10.0
    c.optim.warmup_epochs = 0.5
    c.optim.learning_rate = 1e-3
    c.pictures = 0
    family, _, size = source.partition(":")
    if family in FAMILIES:
        finetune.take_towers(c, family, size or "B/16")
        c.microbatches = 1  # frozen towers keep nothing for a backward pass
        c.model.update(FAMILIES[family])
        c.model.decoder = None
    else:
        decoder = finetune.take_towers_of_folder(c, source, FAMILIES)
        c.init.decoder = source
        if decoder is None:
            c.model.decoder = None
        else:
            c.model.decoder.update(decoder)
    if c.model.decoder is None:
        del c.evals["grounding"]  # it needs a region decoder
    for kind in ("captions", "descriptions", "pointing"):
        how = f"--config.evals.{kind}.images=FOLDER --config.evals.{kind}.annotations=A.jsonl"
        c.evals[kind] = evaluator(kind, missing="skip", get=how)
    if c.model.logit_bias_init is not None:
        c.loss.contrast = "sigmoid"
    c.input.max_regions = 8
    c.loss.image_caption = c.loss.region_description = c.loss.box = 0.0
    c.loss.terms.words = dict(
        term="text_decoder",
        weight=1.0,
        stop_gradient=True,
        leading_specials=int(c.model.text.pool == "end"),  # SigLIP's tokenizer puts none
    )
    c.optim.frozen = ("(?!terms/).*",)
    return c
