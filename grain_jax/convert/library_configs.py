"""The configs of transformers and open_clip for one of our two-tower models, for the exports."""

from typing import Any

from grain_jax import config as config_lib


def hf_config(model: config_lib.Model) -> dict[str, Any]:
    """The config.json of transformers' CLIP or SigLIP for a two-tower model, without the kind of model."""
    image, text = model.image, model.text
    shared = lambda tower: dict(
        hidden_size=tower.width,
        intermediate_size=tower.mlp_dim,
        num_hidden_layers=tower.depth,
        num_attention_heads=tower.heads,
        hidden_act={"gelu_tanh": "gelu_pytorch_tanh"}.get(tower.activation, tower.activation),
        layer_norm_eps=tower.norm_eps,
        projection_dim=model.embed_dim,
    )
    vision = dict(
        image_size=image.image_size,
        patch_size=image.patch_size,
        num_channels=3,
    )
    text_keys = dict(
        vocab_size=text.vocab_size,
        max_position_embeddings=text.context_length,
        projection_size=model.embed_dim,
        bos_token_id=text.vocab_size - 2,
        eos_token_id=2 if text.end_id is None else text.end_id,  # 2: CLIPModel takes the highest id
        pad_token_id=text.pad_id,
    )
    return dict(
        projection_dim=model.embed_dim,
        vision_config=shared(image) | vision,
        text_config=shared(text) | text_keys,
    )


def open_clip_config(model: config_lib.Model) -> tuple[dict[str, Any], dict[str, Any]]:
    """`vision_cfg` and `text_cfg` of open_clip's own towers for a two-tower model."""
    image, text = model.image, model.text
    shared = lambda tower: dict(
        width=tower.width,
        layers=tower.depth,
        mlp_ratio=tower.mlp_dim / tower.width,
        act_kwargs=dict(approximate="tanh") if tower.activation == "gelu_tanh" else {},
    )
    vision_cfg = shared(image) | dict(
        image_size=image.image_size,
        head_width=image.width // image.heads,
        patch_size=image.patch_size,
        no_ln_pre=not image.pre_norm,
        pool_type="avg" if image.pool == "mean" else "tok",
        qk_norm=image.qk_norm,
        norm_kwargs=dict(eps=image.norm_eps),
    )
    text_cfg = shared(text) | dict(
        context_length=text.context_length,
        vocab_size=text.vocab_size,
        heads=text.heads,
        no_causal_mask=not text.causal,
        proj_bias=text.projection == "affine",
        pool_type="argmax" if text.pool == "end" else text.pool,
        norm_kwargs=dict(eps=text.norm_eps),
    )
    if text.pool == "end" and text.end_id is not None:
        text_cfg |= dict(pool_type="eos", eos_id=text.end_id)
    return vision_cfg, text_cfg
