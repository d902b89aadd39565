"""The other side of the parity: the model of the checkpoint's own package, with its weights loaded strictly."""

import functools
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from grain_jax import config as config_lib
from grain_jax.convert import archives, parity
from grain_jax.convert.faults import ConvertError, prefixed, raise_any
from grain_jax.convert.open_clip.checkpoint import SCALARS, Checkpoint, group

# Keys of the configs that say what the arrays have.
_SIZES = {
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_channels"),
    *("image_size", "patch_size", "vocab_size", "max_position_embeddings", "context_length"),
    *("width", "layers", "mlp_ratio", "num_register_tokens"),
}
# Keys of config.json that send transformers to code of the Hub, to arrays of another kind, or to outputs without names.
_STEERING = (
    *("attn_implementation", "_attn_implementation", "experts_implementation"),
    *("_experts_implementation", "quantization_config", "return_dict"),
)
# Of DINOv3 we read neither the token of its pretraining nor registers that are none.
_OF_DINOV3 = {"embeddings.mask_token", "embeddings.register_tokens"}


class Built(NamedTuple):
    """The other side."""

    package: str
    module: Any  # of torch
    encode: Callable  # (module, images, ids) -> both embeddings


def prove(
    checkpoint: Checkpoint, model: config_lib.Model, params: dict, has_texts: bool = True
) -> parity.Report:
    """Our model against the architecture of the checkpoint's own package, with the same weights.

    Raises:
      ConvertError: the config beside the weights has other sizes, or its package refuses config or weights.
    """
    given = parity.inputs_of(model)
    _check_sizes(checkpoint, model)
    try:
        import torch

        with archives.reading(
            checkpoint.path, "what its own package takes, by the config beside it"
        ):
            build = _build_hf if checkpoint.is_hf else _build_open_clip
            built = (build if has_texts else _build_dinov3)(checkpoint, model)
    except ImportError as error:
        return parity.not_proven(
            params, f"{error.name or error} is not installed, so nothing could be compared."
        )
    if has_texts:
        _load(checkpoint, built.package, built.module)
    images = torch.from_numpy(given.images.transpose(0, 3, 1, 2).copy())
    module, ours = built.module.eval(), parity.outputs(model, params, given)
    with torch.no_grad():
        image, text = built.encode(module, images, torch.from_numpy(given.token_ids).long())
        theirs = dict(image_embed=image.numpy(), text_embed=text.numpy())
    if not has_texts:
        del ours["text_embed"], theirs["text_embed"]
    return parity.report(parity.compare(ours, theirs), built.package, given)


def _load(checkpoint: Checkpoint, package: str, module: Any) -> None:
    """Loads the arrays strictly. Raises ConvertError."""
    import torch

    state = {k: torch.from_numpy(np.array(v)) for k, v in checkpoint.state.items()}
    own = module.state_dict()
    scalar = {k: v.reshape(own[k].shape) for k, v in state.items() if k in own and k in SCALARS}
    try:
        module.load_state_dict(state | scalar)
    except RuntimeError as error:
        fault = str(error).splitlines()[1].strip()
        raise ConvertError(
            f"{checkpoint.path}: does not fit {package} of its config ({fault})"
        ) from None


def _check_sizes(checkpoint: Checkpoint, model: config_lib.Model) -> None:
    """Raises ConvertError where the config beside the weights has other sizes, or names another model.

    The other side is built by that config: 10^6 layers would take all memory, and the name of a model would
    be looked up on the internet.
    """
    vision_cfg, text_cfg = open_clip_config(model)
    timm = group(checkpoint.open_clip, "vision_cfg").get("timm_model_name")
    if timm:  # the name decides the sizes
        vision_cfg = {}
    ours = hf_config(model) | dict(vision_cfg=vision_cfg, text_cfg=text_cfg)
    ours["vision_config"] |= dict(num_register_tokens=model.image.registers)
    faults = []
    for name in ("vision_config", "text_config", "vision_cfg", "text_cfg"):
        said = group(checkpoint.hf if name.endswith("config") else checkpoint.open_clip, name)
        if name == "vision_config" and checkpoint.is_dinov3:  # no array depends on its image_size
            said = {key: value for key, value in checkpoint.hf.items() if key != "image_size"}
        for key in _SIZES & said.keys() & ours[name].keys():
            got, size = said[key], ours[name][key]
            fits = isinstance(got, int | float) and abs(got - size) <= 0.01
            if not fits and got not in ([size, size], None):
                faults.append(f"{name}.{key}: got {str(got)[:100]}, but the arrays have {size:g}")
        if said.get("hf_model_name") is not None:
            faults.append(f"{name}.hf_model_name: got one, expected a tower of open_clip's own")
    if timm is not None and not (isinstance(timm, str) and re.fullmatch(r"[\w.]+", timm)):
        faults.append(
            f"vision_cfg.timm_model_name: got {str(timm)[:100]!r}, expected a name of timm's"
        )
    with prefixed(f"{checkpoint.path}: "):
        raise_any(sorted(faults))


def _build_hf(checkpoint: Checkpoint, model: config_lib.Model) -> Built:
    """transformers' own class by config.json, or by our sizes where there is none."""
    import transformers

    kind = "CLIP" if model.image.pool == "class" else "Siglip"
    stated = checkpoint.hf or hf_config(model)
    if (stated.get("model_type") or "").startswith("metaclip_2"):
        kind = "MetaClip2"
    config = getattr(transformers, f"{kind}Config").from_dict(_without(stated, *_STEERING))
    module = getattr(transformers, f"{kind}Model")(config).float()

    def encode(module, images, ids):
        out = module(input_ids=ids, pixel_values=images)
        return out.image_embeds, out.text_embeds

    return Built(f"transformers {transformers.__version__}'s {kind}Model", module, encode)


def _build_dinov3(checkpoint: Checkpoint, model: config_lib.Model) -> Built:
    """transformers' DINOv3 by config.json, or by our sizes where there is none."""
    import torch
    import transformers

    image, kind = model.image, transformers.DINOv3ViTModel
    stated = checkpoint.hf or hf_config(model)["vision_config"] | dict(
        num_register_tokens=image.registers,
        use_gated_mlp=image.mlp == "gated",
        key_bias=image.key_bias,
        rope_theta=image.rope_theta,
    )
    both: Any = kind.from_pretrained(
        None,
        config=transformers.DINOv3ViTConfig.from_dict(_without(stated, *_STEERING)),
        state_dict={k: torch.from_numpy(np.array(v)) for k, v in checkpoint.state.items()},
        dtype="float32",
        output_loading_info=True,
    )
    module, loading = both
    wrong = sorted({str(x) for names in loading.values() for x in names or ()} - _OF_DINOV3)
    if wrong:
        raise ConvertError(f"{wrong[0]}: missing, unknown or of another shape for transformers")

    def encode(module, images, ids):
        x = module(images).pooler_output
        return x / x.norm(dim=-1, keepdim=True), ids

    return Built(f"transformers {transformers.__version__}'s DINOv3ViTModel", module, encode)


def _without(stated: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """config.json without these keys, in its parts too."""
    parts = {key: stated[key] for key in ("vision_config", "text_config") if stated.get(key)}
    left_in = lambda part: {key: value for key, value in part.items() if key not in keys}
    return left_in(stated) | {key: left_in(part) for key, part in parts.items()}


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
    words = dict(
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
        text_config=shared(text) | words,
    )


def _build_open_clip(checkpoint: Checkpoint, model: config_lib.Model) -> Built:
    """open_clip's own model by its config, or by our sizes where there is none."""
    import open_clip
    from open_clip import model as library

    image, stated = model.image, checkpoint.open_clip
    vision_cfg, text_cfg = open_clip_config(model)
    quick_gelu = image.activation == "quick_gelu"
    if stated:
        vision_cfg = {**group(stated, "vision_cfg"), "timm_model_pretrained": False}
        vision_cfg |= {"image_size": image.image_size}
        text_cfg, quick_gelu = group(stated, "text_cfg"), bool(stated.get("quick_gelu"))
    custom = "text.token_embedding.weight" in checkpoint.state
    module = (library.CustomTextCLIP if custom else library.CLIP)(
        model.embed_dim,
        library.CLIPVisionCfg(**vision_cfg),
        library.CLIPTextCfg(**text_cfg),
        quick_gelu=quick_gelu,
        init_logit_bias=model.logit_bias_init,
    )
    if "visual.trunk.patch_embed.proj.weight" in checkpoint.state and not stated:
        module.add_module("visual", _timm_trunk(image))

    def encode(module, images, ids):
        return module.encode_image(images, normalize=True), module.encode_text(ids, normalize=True)

    return Built(f"open_clip {open_clip.__version__}", module, encode)


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


def _timm_trunk(image: config_lib.ImageTower) -> Any:
    """timm's vision transformer by our sizes, since the checkpoint does not hold its name; as in open_clip."""
    import torch
    from timm.models.vision_transformer import VisionTransformer

    pools: dict[str, Any] = {"map": "map", "class": "token", "mean": "avg"}
    sizes: dict[str, Any] = dict(
        img_size=image.image_size, patch_size=image.patch_size, embed_dim=image.width
    )
    sizes |= dict(depth=image.depth, num_heads=image.heads, num_classes=0)
    trunk = VisionTransformer(
        **sizes,
        mlp_ratio=image.mlp_dim / image.width,
        qk_norm=image.qk_norm,
        class_token=image.class_token,
        pre_norm=image.pre_norm,
        global_pool=pools[image.pool],
        act_layer=image.activation,  # timm has our names
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=image.norm_eps),
    )
    return torch.nn.Sequential(OrderedDict(trunk=trunk))
