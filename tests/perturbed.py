"""Very small models for conversions; `params` gives them weights of which every one counts."""

from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from grain_jax import config as config_lib
from grain_jax.checkpoint import saved_model
from grain_jax.config import recipe
from grain_jax.convert import tables
from grain_jax.inference import scores
from grain_jax.models import grain

# Queries that point, regions that read the box head, and classes by their best query.
POINTER = dict(
    boxes__kind="roi_align", decoder__boxes="pointer", decoder__reads_box=True, decoder__class_score="best"
)
_PROPOSALS = dict(boxes__kind="roi_align", boxes__proposals=True, boxes__object_weight=0.3)
PROPOSALS: dict[str, dict[str, Any]] = {  # models whose regions are the boxes of patches
    "pointer": _PROPOSALS
    | dict(decoder__boxes="pointer", decoder__reads_box=True, decoder__image_pool="all"),
    "no decoder": _PROPOSALS | dict(decoder=None, image__pool="map"),
}
REGIONS = {"queries": POINTER, **PROPOSALS}  # every sort of regions


def tiny(**changes) -> config_lib.Model:
    """A very small model, no two of its sizes alike; keys as flattened paths with `__` for `.`."""
    c = recipe.model("tiny")
    c.embed_dim = 28
    c.image.update(image_size=40, patch_size=8, width=48, depth=2, heads=4, mlp_dim=96)
    c.text.update(width=40, depth=2, heads=5, mlp_dim=80, vocab_size=300, context_length=32)
    c.decoder.update(width=36, depth=2, heads=3, mlp_dim=64, queries=3)
    c.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config_lib.model_from_dict(c.to_dict())


def params(model: config_lib.Model, seed: int = 0) -> Any:
    """Random parameters as NumPy arrays, without the zeros and ones of an initialisation, which hide errors.

    Their scale keeps activations in bounds and makes texts and queries differ.
    """
    rng = np.random.default_rng(seed)

    def draw(name, shape):
        noise = rng.standard_normal(shape, np.float32)
        if name == "logit_scale":
            return np.float32(2.5)
        if name.endswith("/scale"):
            return 1 + noise / 5
        if name.endswith("/kernel"):
            layer = shape[1:] if "/blocks/" in name else shape
            inputs = np.prod(layer[:-1]) if name.endswith("out/kernel") else layer[0]
            return noise / np.float32(np.sqrt(inputs))
        return noise if name.endswith("query_embed") else noise / 5

    shapes = grain.parameter_shapes(model)
    return tables.nested({name: draw(name, shape) for name, shape in shapes.items()})


def saved(folder, **changes) -> str:
    """The folder of a saved model of depth 1."""
    model = tiny(image__depth=1, text__depth=1, **changes)
    saved_model.save_model(folder, model, params(model), source="test")
    return str(folder)


def same_detections(predictor, expected, boxes_xyxy, embed, prior, features, atol=1e-5) -> None:
    """Asserts that regions of B images by another library give Detections: in order, boxes and scores."""
    score = predictor.text_scores(embed, features, prior)
    for ours, row, boxes in zip(expected, score, boxes_xyxy, strict=True):
        region, label = scores.best_pairs(row, boxes, len(ours.scores))
        assert len(label) >= 2 and label.tolist() == ours.labels.tolist()
        np.testing.assert_allclose(row[region, label], ours.scores, rtol=0, atol=atol)
        np.testing.assert_allclose(boxes[region], ours.boxes_xyxy, rtol=0, atol=atol)


def write_words(folder, vocabulary: str) -> None:
    """A tokenizer.json of these words, the first for unknown ones."""
    ids = {word: i for i, word in enumerate(vocabulary.split())}
    library = tokenizers.Tokenizer(models.WordLevel(ids, unk_token=vocabulary.split()[0]))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.save(f"{folder}/tokenizer.json")


def write_sentencepiece(folder) -> None:
    """A siglip.model with the words of a few texts: id 0 pads, 1 ends, 2 is unknown."""
    import sentencepiece

    texts = ["a photo of a wren", "two dogs and a cat s bowl 1998", "x long long words"] * 9
    options: Any = dict(vocab_size=60, hard_vocab_limit=False, bos_id=-1, unk_id=2, eos_id=1, pad_id=0)
    options |= dict(model_prefix=f"{folder}/siglip", minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), **options)
