"""The demo with the decoder as a further loss term: `config.py:FOLDER`, of an aviary and its tokenizer.

`python -m examples.captioner` makes the folder and runs this config.
"""

import json
import pathlib

from grain_jax.config.recipe import ConfigDict
from grain_jax.configs import demo

TOKENIZER = "tokenizer.json"
SPECIALS = ("[PAD]", "[UNKNOWN]", "[START]", "[END]")


def get_config(folder: str = "runs/captioner/aviary"):
    """For 1,200 steps; evaluated by the command afterwards."""
    c = demo.get_config()
    c.total_steps = 1200
    c.report_images = 0
    c.input.captions_per_image, c.input.synthetic_caption_rate = 1, 1.0  # they tell what is seen
    c.input.prepare = None
    c.input.data_dir, c.input.name = f"{folder}/records", "aviary"
    c.evals = ConfigDict()
    # Its ids are the data's words, some 300. CLIP's 49,408 ids would make most of a small decoder a table.
    tokenizer = pathlib.Path(folder) / TOKENIZER
    c.model.text.tokenizer = str(tokenizer)
    c.model.text.vocab_size = len(json.loads(tokenizer.read_text())["model"]["vocab"])
    c.model.text.pad_id, c.model.text.end_id = SPECIALS.index("[PAD]"), SPECIALS.index("[END]")
    c.loss.terms.words = {"term": "examples.captioner.term:Words", "weight": 3.0}
    return c
