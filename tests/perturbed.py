"""Very small models for conversions; `params` gives them weights of which every one counts."""

import tokenizers
from tokenizers import models, pre_tokenizers

from benchmarks.random_weights import perturbed as params
from grain_jax import config as config_lib
from grain_jax.config import recipe
from grain_jax.runtime import checkpoint

__all__ = ["params", "saved", "tiny", "write_words"]


def tiny(**changes) -> config_lib.Model:
    """A very small model, no two of its sizes alike; keys as flattened paths with `__` for `.`."""
    c = recipe.model("tiny")
    c.embed_dim = 28
    c.image.update(image_size=40, patch_size=8, width=48, depth=2, heads=4, mlp_dim=96)
    c.text.update(width=40, depth=2, heads=5, mlp_dim=80, vocab_size=300, context_length=32)
    c.decoder.update(width=36, depth=2, heads=3, mlp_dim=64, queries=3)
    c.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config_lib.model_from_dict(c.to_dict())


def saved(folder, **changes) -> str:
    """The folder of a saved model of depth 1."""
    model = tiny(image__depth=1, text__depth=1, **changes)
    checkpoint.save_model(folder, model, params(model), source="test")
    return str(folder)


def write_words(folder, words: str) -> None:
    """A tokenizer.json of these words, the first for unknown ones."""
    vocabulary = {word: i for i, word in enumerate(words.split())}
    library = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=words.split()[0]))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.save(f"{folder}/tokenizer.json")
