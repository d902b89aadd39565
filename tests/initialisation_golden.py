"""Records what the reference's parameters start from: goldens/initialisation.json.

COMMAND   python -m tests.initialisation_golden CHECKOUT   (github.com/shaunak27/grain-clip, commit c6bf85e)

Builds the reference's own classes as its training script does, at ViT-B/16's widths; its two layers a tower
and 2,048 tokens are fewer. Needs torch and timm. No gradient and no data is involved: the classes are made,
and nothing else runs.
"""

import functools
import json
import sys

import jax
import numpy as np

from grain_jax import config as config_lib
from grain_jax.configs import grain_vitb16_cc12m
from grain_jax.convert.reference.names import to_params
from grain_jax.models import grain
from tests import paths

GOLDEN = paths.GOLDENS / "initialisation.json"
SMALL, DRAWS = 10_000, 25  # a parameter of fewer values is drawn so many times


def model(**image) -> config_lib.Model:
    """ViT-B/16 with two layers a tower and 2,048 tokens."""
    c = grain_vitb16_cc12m.get_config()
    c.model.image.update(depth=2, **image)
    c.model.text.update(depth=2, vocab_size=2048)
    c.model.decoder.depth = 2
    return config_lib.from_dict(c).model


def statistics(x: np.ndarray) -> dict[str, float]:
    """Of an array of any shape: values, mean, standard deviation, smallest, largest, share of zeros."""
    x = np.asarray(x, np.float64)
    moments = dict(mean=x.mean(), std=x.std(), min=x.min(), max=x.max(), zeros=np.mean(x == 0))
    return {"values": x.size} | {name: float(f"{v:.6g}") for name, v in moments.items()}


def _draw(qk_norm: bool) -> dict[str, np.ndarray]:
    """One initialisation of the reference, by our names; without qk_norm it keeps the blocks of timm."""
    import custom_models  # the checkout's, as tfm
    import tfm
    from torch import nn

    norm = functools.partial(nn.LayerNorm, eps=1e-6)
    sizes = dict(patch_size=16, embed_dim=768, depth=2, num_heads=12, mlp_ratio=4, qkv_bias=True)
    image = custom_models.VisionTransformer(qk_norm=qk_norm, num_classes=0, norm_layer=norm, **sizes)
    text = dict(transformer_width=512, transformer_heads=8, transformer_layers=2, vocab_size=2048)
    backbone = custom_models.CLIP(512, 768, image, context_length=77, **text)
    attention = tfm.Cross_Attention(num_decoder_layers=2, normalize_before=True, return_intermediate_dec=True)
    decoder = tfm.ObjDecoder(attention, num_classes=22047, num_queries=6, feature_dim=768, aux_loss=True)
    arrays = lambda module: {name: x.detach().numpy() for name, x in module.state_dict().items()}
    params = to_params(arrays(backbone), arrays(decoder), model(qk_norm=qk_norm))
    return {name: np.asarray(x) for name, x in grain.flat(params).items()}


def record(checkout: str) -> dict:
    """{"reference": {name: statistics}, "timm_blocks": the image tower's blocks without quirk 13}."""
    import torch

    sys.path[:0] = [f"{checkout}/clip", f"{checkout}/model"]
    torch.manual_seed(0)
    draws = [_draw(qk_norm=True) for _ in range(DRAWS)]

    def pooled(name):
        one = draws[0][name]
        return one if one.size >= SMALL else np.stack([d[name] for d in draws])

    blocks = {k: v for k, v in _draw(qk_norm=False).items() if k.startswith("image/blocks/")}
    return {
        "about": f"made by tests/initialisation_golden.py, torch {torch.__version__}",
        "reference": {name: statistics(pooled(name)) for name in sorted(draws[0])},
        "timm_blocks": {name: statistics(x) for name, x in sorted(blocks.items())},
    }


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    GOLDEN.write_text(json.dumps(record(sys.argv[1]), indent=1) + "\n")
