"""The keys in which SigLIP differs from the defaults of the towers."""

IMAGE = dict(
    qk_norm=False,
    class_token=False,
    activation="gelu_tanh",
    pixel_mean=(0.5, 0.5, 0.5),
    pixel_std=(0.5, 0.5, 0.5),
)
TEXT = dict(
    vocab_size=32000,
    context_length=64,
    width=768,
    heads=12,
    mlp_dim=3072,
    norm_eps=1e-6,
    causal=False,
    activation="gelu_tanh",
    pool="last",
    projection="affine",
    tokenizer="siglip.model",
    cleaning="canonical",
    pad_id=1,
)
