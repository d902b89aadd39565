"""The recipe of SigLIP 2 (arXiv 2502.14786) at B/16: sigmoid loss and text decoder, from 80% on self-distillation and
masked patches. What is published, what is ours: docs/howto/siglip2.md.

COMMAND   grain-jax train --config siglip2 --workdir gs://BUCKET/siglip2_b16 \
              --config.input.data_dir=gs://BUCKET/records --config.input.name=NAME \
              --config.model.text.tokenizer=FILE
FILE      tokenizer.json of google/siglip2-base-patch16-256, or another with --config.model.text.vocab_size=N
HARDWARE  any mesh that 32768 images divide over; 128 images a chip on v5e-256. Neither run nor planned by us.
"""

from grain_jax.config.recipe import base, towers_of

SHARE = 0.8  # of the steps, before the losses of patches and views come on
OF_B = 0.25  # factor of these two at B (section 2.3)


def get_config():
    c = base("B/16")
    towers_of(c, "siglip2")
    c.model.decoder = None
    c.model.embed_dim = 768
    c.model.image.update(image_size=256, pool="map", projection="none")
    c.model.logit_scale_init, c.model.logit_bias_init = 10.0, -10.0
    c.batch_size = 32768
    c.total_steps = 40_000_000_000 // c.batch_size
    c.optim.warmup_steps = 20_000
    c.optim.learning_rate = 1e-3
    c.optim.end_learning_rate = 0.0
    c.optim.b2 = 0.95  # SigLIP's
    c.optim.weight_decay = 1e-4
    c.optim.clip_norm = 1.0
    c.remat = "full"
    c.mesh.fsdp = 4
    c.input.synthetic_caption_rate = 0.0
    # The decoder alone reads descriptions, one an image, but all of a batch go through the text tower: the best one.
    c.input.max_regions = 1
    c.loss.contrast = "sigmoid"
    c.loss.region_description = c.loss.box = 0.0
    c.loss.terms.words = dict(
        term="text_decoder",
        weight=1.0,
        group=1,
        regions=1,
        parallel_rate=0.5,
        dropout=0.0,
        leading_specials=0,
    )
    c.teacher.kind = "ema"
    c.input.views.local = 8
    c.loss.terms.views = dict(term="self_distillation", weight={"end": 1.0 * OF_B, "from": SHARE})
    c.loss.terms.patches = dict(
        term="masked_patches",
        weight={"end": 0.25 * OF_B, "from": SHARE},
        mask="random",
        min_share=0.5,
        max_share=0.5,
    )
    return c
