"""Perturbed weights and comparisons for the models of other projects."""

from typing import Any

import numpy as np

from grain_jax import inference
from tests import perturbed

SMALL: Any = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
VISION = SMALL | dict(image_size=40, patch_size=8)


def perturb(module, seed: int = 0):
    """Adds noise to every parameter: zeros and ones would hide parameters that are not read."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = 0.5 * parameter.std() if parameter.numel() > 1 else 0.0
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (spread if spread > 0 else 0.1))
    return module.eval()


def torch_images(images):
    import torch

    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def close_to_ours(model, params, images, ids, theirs):
    """Our image and text embeddings are theirs; with the programs that the parity report has compiled."""
    predictor = inference.Predictor(model, params)
    image = predictor.encode_image(images, normalized=True)
    for ours, other in zip((image, predictor.encode_text(ids)), theirs):
        close(ours, other)


def close(ours, theirs, tolerance=1e-5):
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert ours.shape == theirs.shape and error <= tolerance, error


def published(kind, folder):
    """A small random model of transformers in a folder, with the tokenizer of its kind."""
    import transformers

    family = "CLIP" if kind == "clip" else "Siglip"
    text = dict(vocab_size=49408 if kind == "clip" else 300, max_position_embeddings=20, **SMALL)
    joint = dict(projection_dim=32) if kind == "clip" else dict(projection_size=32)
    text |= joint | (dict(eos_token_id=49407) if kind == "clip" else {})
    config: Any = getattr(transformers, f"{family}Config")(text_config=text, vision_config=VISION)
    if kind == "clip":
        config.projection_dim = 32
    perturb(getattr(transformers, f"{family}Model")(config)).save_pretrained(folder)
    if kind == "siglip":
        perturbed.write_sentencepiece(folder)
        (folder / "siglip.model").rename(folder / "spiece.model")
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "SiglipTokenizer"}')
    if kind == "siglip2":
        pieces = [*"<pad> <eos> <bos> <unk> <mask>".split(), *map("<0x{:02X}>".format, range(256))]
        vocab = {x: i for i, x in enumerate([*pieces, *"\u2581awrenol", "wr", "ow"])}
        merges: Any = [("w", "r"), ("o", "w")]
        transformers.GemmaTokenizer(vocab=vocab, merges=merges).save_pretrained(folder)
