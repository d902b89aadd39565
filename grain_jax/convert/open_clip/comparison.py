"""The other side of the parity: the model of the checkpoint's own package, with its weights loaded strictly."""

import functools
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from grain_jax import config as config_lib
from grain_jax.convert import parity
from grain_jax.convert.faults import ConvertError, prefixed, raise_any
from grain_jax.convert.open_clip.checkpoint import SCALARS, Checkpoint, group

Built = tuple[str, Any, Callable]  # package, torch module, (module, images, ids) -> both embeddings


def prove(checkpoint: Checkpoint, model: config_lib.Model, params: dict) -> parity.Report:
    """Our model against the architecture of the checkpoint's own package, with the same weights.

    Raises:
      ConvertError: the config beside the weights has other sizes, or its package refuses config or weights.
    """
    given = parity.inputs_of(model)
    is_hf = "text_model.embeddings.token_embedding.weight" in checkpoint.state
    _check_sizes(checkpoint, model)
    try:
        import torch

        package, module, encode = (_build_hf if is_hf else _build_open_clip)(checkpoint, model)
    except ImportError as error:
        return parity.not_proven(
            params, f"{error.name} is not installed, so nothing could be compared."
        )
    except ConvertError:
        raise
    except Exception as error:  # the packages raise many kinds for a faulty config
        reason = " ".join(str(error).split())[:200]
        raise ConvertError(
            f"{checkpoint.path}: its own package does not take the config beside it"
            f" ({type(error).__name__}: {reason})"
        ) from None
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
    images = torch.from_numpy(given.images.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        image, text = encode(module.eval(), images, torch.from_numpy(given.token_ids).long())
    theirs = dict(image_embed=image.numpy(), text_embed=text.numpy())
    return parity.report(
        parity.compare(parity.outputs(model, params, given), theirs), package, given
    )


def _check_sizes(checkpoint: Checkpoint, model: config_lib.Model) -> None:
    """Raises ConvertError where the config beside the weights has other sizes, or names another model.

    The other side is built by that config: 10^6 layers would take all memory, and the name of a model would
    be looked up on the internet.
    """
    faults = [
        f"{group_name}.{key}: got {str(said[key])[:100]}, but the arrays have {size}"
        for group_name, said, sizes in _expected_sizes(checkpoint, model)
        for key, size in sizes.items()
        if said.get(key, size) not in (size, [size, size], None)
    ]
    timm = group(checkpoint.open_clip, "vision_cfg").get("timm_model_name")
    for name, tower in (("vision_cfg", model.image), ("text_cfg", model.text)):
        ratio = group(checkpoint.open_clip, name).get("mlp_ratio")
        ours = tower.mlp_dim / tower.width
        fits = isinstance(ratio, int | float) and abs(ratio - ours) <= 0.01
        if ratio is not None and not timm and not fits:
            faults.append(f"{name}.mlp_ratio: got {str(ratio)[:100]}, but the arrays have {ours:g}")
    if timm is not None and not (isinstance(timm, str) and re.fullmatch(r"[\w.]+", timm)):
        faults.append(
            f"vision_cfg.timm_model_name: got {str(timm)[:100]!r}, expected a name of timm's"
        )
    for name in ("vision_cfg", "text_cfg"):
        if group(checkpoint.open_clip, name).get("hf_model_name") is not None:
            faults.append(f"{name}.hf_model_name: got one, expected a tower of open_clip's own")
    with prefixed(f"{checkpoint.path}: "):
        raise_any(faults)


def _expected_sizes(
    checkpoint: Checkpoint, model: config_lib.Model
) -> list[tuple[str, Mapping[str, Any], dict[str, int]]]:
    """(name of a config group, the group, the sizes that it may state), of every group."""
    image, text = model.image, model.text
    hf_sizes = lambda t: dict(
        hidden_size=t.width, intermediate_size=t.mlp_dim, num_hidden_layers=t.depth
    )
    grid = image.image_size // image.patch_size
    pixels = dict(
        image_size=image.image_size,
        patch_size=image.patch_size,
        num_channels=3,
        num_patches=grid * grid,
    )
    words = dict(vocab_size=text.vocab_size, max_position_embeddings=text.context_length)
    vision_cfg = group(checkpoint.open_clip, "vision_cfg")
    vision = dict(width=image.width, layers=image.depth, patch_size=image.patch_size)
    if vision_cfg.get("timm_model_name"):  # the name decides the sizes
        vision = {}
    return [
        ("vision_config", group(checkpoint.hf, "vision_config"), hf_sizes(image) | pixels),
        ("text_config", group(checkpoint.hf, "text_config"), hf_sizes(text) | words),
        ("vision_cfg", vision_cfg, vision),
        (
            "text_cfg",
            group(checkpoint.open_clip, "text_cfg"),
            dict(
                width=text.width,
                layers=text.depth,
                vocab_size=text.vocab_size,
                context_length=text.context_length,
            ),
        ),
    ]


def _build_hf(checkpoint: Checkpoint, model: config_lib.Model) -> Built:
    """transformers' own class by config.json, or by our sizes where there is none."""
    import transformers

    image = model.image
    flat_patches = checkpoint.state["vision_model.embeddings.patch_embedding.weight"].ndim == 2
    kind = "CLIP" if image.pool == "class" else "Siglip2" if flat_patches else "Siglip"
    stated = checkpoint.hf or _hf_config_of(model, flat_patches)
    config = getattr(transformers, f"{kind}Config").from_dict(dict(stated))
    module = getattr(transformers, f"{kind}Model")(config).float()
    grid = image.image_size // image.patch_size

    def encode(module, images, ids):
        inputs = dict(pixel_values=images)
        if flat_patches:
            import torch

            p = image.patch_size
            x = images.unfold(2, p, p).unfold(3, p, p)  # [N, 3, grid, grid, p, p]
            x = x.permute(0, 2, 3, 4, 5, 1).reshape(len(x), grid * grid, -1)
            inputs = dict(
                pixel_values=x,
                pixel_attention_mask=torch.ones(x.shape[:2], dtype=torch.int32),
                spatial_shapes=torch.tensor([[grid, grid]] * len(x)),
            )
        out = module(input_ids=ids, **inputs)
        return out.image_embeds, out.text_embeds

    return f"transformers {transformers.__version__}'s {kind}Model", module, encode


def _hf_config_of(model: config_lib.Model, flat_patches: bool) -> dict[str, Any]:
    image, text = model.image, model.text
    shared = lambda t: dict(
        hidden_size=t.width,
        intermediate_size=t.mlp_dim,
        num_hidden_layers=t.depth,
        num_attention_heads=t.heads,
        hidden_act={"gelu_tanh": "gelu_pytorch_tanh"}.get(t.activation, t.activation),
        layer_norm_eps=t.norm_eps,
        projection_dim=model.embed_dim,
    )
    grid = image.image_size // image.patch_size
    return dict(
        projection_dim=model.embed_dim,
        vision_config=dict(shared(image), patch_size=image.patch_size)
        | (dict(num_patches=grid * grid) if flat_patches else dict(image_size=image.image_size)),
        text_config=dict(
            shared(text),
            vocab_size=text.vocab_size,
            max_position_embeddings=text.context_length,
            projection_size=model.embed_dim,
            bos_token_id=text.vocab_size - 2,
            eos_token_id=text.vocab_size - 1,
            pad_token_id=text.pad_id,
        ),
    )


def _build_open_clip(checkpoint: Checkpoint, model: config_lib.Model) -> Built:
    """open_clip's own model by its config, or by our sizes where there is none."""
    import open_clip
    from open_clip import model as library

    image, stated = model.image, checkpoint.open_clip
    vision_cfg, text_cfg = _open_clip_config_of(model)
    quick_gelu = image.activation == "quick_gelu"
    if stated:
        vision_cfg = {
            **group(stated, "vision_cfg"),
            "image_size": image.image_size,
            "timm_model_pretrained": False,
        }
        text_cfg = {**group(stated, "text_cfg")}
        quick_gelu = bool(stated.get("quick_gelu"))
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
    return (
        f"open_clip {open_clip.__version__}",
        module,
        lambda module, images, ids: (
            module.encode_image(images, normalize=True),
            module.encode_text(ids, normalize=True),
        ),
    )


def _open_clip_config_of(model: config_lib.Model) -> tuple[dict[str, Any], dict[str, Any]]:
    image, text = model.image, model.text
    vision_cfg: dict[str, Any] = dict(
        image_size=image.image_size,
        layers=image.depth,
        width=image.width,
        head_width=image.width // image.heads,
        mlp_ratio=image.mlp_dim / image.width,
        patch_size=image.patch_size,
        no_ln_pre=not image.pre_norm,
        pool_type="avg" if image.pool == "mean" else "tok",
    )
    text_cfg: dict[str, Any] = dict(
        context_length=text.context_length,
        vocab_size=text.vocab_size,
        width=text.width,
        heads=text.heads,
        layers=text.depth,
        mlp_ratio=text.mlp_dim / text.width,
        no_causal_mask=not text.causal,
        proj_bias=text.projection == "affine",
        pool_type="argmax" if text.pool == "end" else text.pool,
        norm_kwargs=dict(eps=text.norm_eps),
    )
    for tower, cfg in ((image, vision_cfg), (text, text_cfg)):
        if tower.activation == "gelu_tanh":
            cfg["act_kwargs"] = dict(approximate="tanh")
    return vision_cfg, text_cfg


def _timm_trunk(image: config_lib.ImageTower):
    """timm's vision transformer by our sizes, since the checkpoint does not hold its name; as in open_clip."""
    import torch
    from timm.models.vision_transformer import VisionTransformer

    pools: dict[str, Literal["map", "token", "avg"]] = {
        "map": "map",
        "class": "token",
        "mean": "avg",
    }
    trunk = VisionTransformer(
        img_size=image.image_size,
        patch_size=image.patch_size,
        embed_dim=image.width,
        depth=image.depth,
        num_heads=image.heads,
        mlp_ratio=image.mlp_dim / image.width,
        qk_norm=image.qk_norm,
        class_token=image.class_token,
        pre_norm=image.pre_norm,
        global_pool=pools[image.pool],
        num_classes=0,
        act_layer=image.activation,  # timm has our names
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=image.norm_eps),
    )
    return torch.nn.Sequential(OrderedDict(trunk=trunk))
