"""GRAIN on the aviary, the embedded dataset: a small model that learns birds' parts in minutes.

COMMAND   grain-jax train --config demo --workdir runs/demo
          (draws the dataset first, into runs/aviary; ends in a table and report.html)
HARDWARE  two CPU cores
"""

from grain_jax.config.recipe import base, with_pointer
from grain_jax.evaluate.kinds import evaluator


def get_config():
    c = with_pointer(base("tiny"))
    data = "runs/aviary"
    c.total_steps = 500
    c.batch_size = 64
    c.dtype = "float32"
    c.log_every = 10
    c.checkpoint_every = 200
    c.report_images = 12
    c.input.data_dir = f"{data}/records"
    c.input.name = "aviary"
    c.input.prepare = f"grain_jax.data.aviary --output {data} --records {{data_dir}} --name {{name}}"
    # A model this small needs these to leave the plateau within minutes. Weights scale with the width (0.02
    # is for wide towers), position waves fit a grid of 8 x 8, and the decoder's attention starts sharper.
    c.model.image.block_init = "torch"
    c.model.image.position_init = "sincos2d"
    c.model.image.position_period = 16.0
    c.model.decoder.qkv_init_gain = 2.5
    c.model.decoder.dropout = 0.0
    # docs/claim.md measures these. Each part of a bird gets a query. L_id, two captions per image and the sum
    # of all queries bring words into the global embedding.
    c.model.decoder.queries = 8
    c.model.decoder.image_pool = "all"
    c.model.boxes.proposals = False  # on birds, whose parts have places, queries find as much as all patches
    c.loss.image_description = 1.0
    c.loss.agreement = False  # no detector drew these boxes
    c.input.captions_per_image = 2
    c.optim.clip_norm = 1.0
    c.optim.learning_rate = 2e-3
    c.optim.warmup_steps = 50
    # Evaluators of birds are skipped if the data of birds is missing.
    birds = dict(missing="skip", get=f"grain-jax aviary --output {data}")
    test = dict(annotations=f"{data}/test/A.jsonl", **birds)
    c.evals.seen = evaluator("zeroshot", f"{data}/seen", **birds)
    c.evals.unseen = evaluator(
        "zeroshot",
        f"{data}/unseen",
        descriptions=f"{data}/unseen.json",
        names=False,
        alphas=(1.0, 0.75, 0.5, 0.25, 0.0),
        **birds,
    )
    c.evals.retrieval = evaluator("retrieval", f"{data}/test", **test)
    c.evals.grounding = evaluator("grounding", f"{data}/test", **test)
    c.evals.parts = evaluator(
        "segmentation",
        f"{data}/segmentation/unseen",
        templates=f"{data}/segmentation/templates.txt",
        background_threshold=0.5,
        **birds,
    )
    return c
