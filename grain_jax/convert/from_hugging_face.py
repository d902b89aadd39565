"""from-hf: CLIP, MetaCLIP, SigLIP, SigLIP 2, TIPS v2 and DINOv3 of transformers, and folders of to-hf.

The class of transformers (for folders of to-hf our own, in `hf_files/`) reads config and weights; no code of
the folder runs. Its module is the other side of the parity.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from grain_jax import config as config_lib
from grain_jax.checkpoint.pretrained import hub
from grain_jax.convert import archives, formats, output, parity, towers
from grain_jax.convert.exits import needs, tokenizers
from grain_jax.convert.faults import ConvertError, needing, prefixed, raise_any
from grain_jax.convert.reference import names
from grain_jax.core import regular_file
from grain_jax.input_pipeline import clip_tokenizer, tokenizer
from grain_jax.models import grain

# model_type of config.json -> how the classes of transformers begin.
_FAMILIES = {
    **{"clip": "CLIP", "metaclip_2": "MetaClip2", "siglip": "Siglip"},
    **{"tipsv2": "Tipsv2", "dinov3_vit": "DINOv3ViT"},
}
_INSTEAD_OF_NAFLEX = "take a fixed size such as hf://google/siglip2-base-patch16-224"
# Keys of config.json that send transformers to code of the Hub, quantized arrays, or outputs without names.
_STEERING = (
    *("attn_implementation", "_attn_implementation", "experts_implementation"),
    *("_experts_implementation", "quantization_config", "return_dict"),
)
_MASK_TOKEN, _REGISTERS = "embeddings.mask_token", "embeddings.register_tokens"  # of DINOv3 and TIPS v2
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
_IMAGENET = config_lib.ImageTower.pixel_mean, config_lib.ImageTower.pixel_std
_UNCHANGED = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
_DINOV3_GRID = 14  # patches a side; no array depends on it


# Our keys of a tower -> keys of the configs of transformers.
SIZES = dict(
    width="hidden_size",
    depth="num_hidden_layers",
    heads="num_attention_heads",
    mlp_dim="intermediate_size",
    norm_eps="layer_norm_eps",
)


def from_hf(source: epath.PathLike, folder: epath.PathLike) -> parity.Report:
    """from-hf: a folder or hf://ORG/NAME to a folder for `grain_jax.load`.

    Raises:
      ConvertError: config or weights that are missing, damaged, unknown or of another shape, or `folder`
        holds something else; one line per fault.
      config.ConfigError: sizes that no model has, such as heads that do not divide the width.
    """
    path, target = hub.local(str(source)), output.check_free(folder)
    expected = "the config.json of transformers"
    stated = regular_file.read_json(path / "config.json", dict[str, Any], expected)
    with needing("transformers", path):
        import transformers  # noqa: F401
    if stated.get("model_type") == "grain":
        kind, (imported, module) = "GrainModel", _read_grain(path, stated)
    else:
        kind, imported, module = _read(path, stated)

    def run(inputs: parity.Inputs) -> dict[str, np.ndarray]:
        if imported.has_texts:
            return parity.clip_outputs(module, inputs)
        pooled = module(parity.for_torch(inputs)[0]).pooler_output.detach()
        return dict(image_embed=(pooled / pooled.norm(dim=-1, keepdim=True)).numpy())

    model, params, has_texts = imported
    proof = parity.prove(model, params, kind, ("transformers", "torch"), run, has_texts=has_texts)
    return towers.write("from-hf", path, target, imported, proof)


def _read(path: epath.Path, stated: Mapping[str, Any]) -> tuple[str, towers.Imported, Any]:
    """The class of transformers for a config.json, the model and its module."""
    import transformers

    file, model_type = path / "config.json", stated.get("model_type")
    family = _FAMILIES.get(str(model_type))
    if family is None:
        naflex = f"; {_INSTEAD_OF_NAFLEX}" if model_type == "siglip2" else ""
        known = f"expected one of {', '.join(_FAMILIES)}, grain{naflex}"
        raise ConvertError(f"{file}: model_type: got {model_type!r}, {known}")
    with archives.reading(file, f"a config that {family}Config of transformers takes"):
        config = getattr(transformers, f"{family}Config").from_dict(_without_steering(stated))
        read = {"DINOv3ViT": _dinov3, "Tipsv2": _tips}.get(family, _two_towers)
        stated_towers = read(path, family, config)
    model = towers.model_of(stated_towers)
    module = _load(path, model, getattr(transformers, f"{family}Model"), config)
    state = {name: x.numpy() for name, x in module.state_dict().items()}
    state = {name: x for name, x in state.items() if x.size and not name.endswith(_MASK_TOKEN)}
    if family == "Tipsv2":
        name, words = "text_model.embeddings.{}_embedding.weight", module.text_model.embeddings
        state[name.format("token")] = state[name.format("token")] * words.embed_scale
        state[name.format("position")] = words.position_embedding.weights.numpy()
        state["logit_scale"] = -np.log(state.pop("temperature"))
    with prefixed(f"{path}: "):
        return f"{family}Model", towers.build(stated_towers, state), module


def _without_steering(stated: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_steering(value) if isinstance(value, dict) else value
        for key, value in stated.items()
        if key not in _STEERING
    }


def _load(path: epath.Path, model: config_lib.Model, kind: Any, config: Any) -> Any:
    """The module of a class of transformers with the weights in a folder, in float32.

    Raises ConvertError: weights are missing, unknown, damaged or of another shape; or the config has more
    values than the files have bytes.
    """
    values = sum(math.prod(shape) for shape in grain.parameter_shapes(model).values())
    length = sum(regular_file.length(x) or 0 for x in path.iterdir())
    if values > length:
        raise ConvertError(f"{path}: its config describes {values:,} values, its files have {length:,} bytes")
    with output.on_disk(path) as local, archives.reading(path, f"what {kind.__name__} takes"):
        module, loading = kind.from_pretrained(
            local,
            config=config,
            dtype="float32",
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported below
        )
    faults = [(problem, key) for problem, keys in loading.items() for key in sorted(map(str, keys or ()))]
    faults = [pair for pair in faults if _MASK_TOKEN not in pair[1] and _REGISTERS not in pair[1]]
    raise_any([f"{path}: {key}: {problem.replace('_', ' ')}" for problem, key in faults])
    return module.eval()


def _two_towers(path: epath.Path, family: str, config: Any) -> towers.Towers:
    """What the config of a CLIP or SigLIP says of its towers."""
    vision, text_config = config.vision_config, config.text_config
    siglip = family == "Siglip"
    mean, std = _pixels(path, towers.SIGLIP_PIXELS if siglip else towers.CLIP_PIXELS)
    image = config_lib.ImageTower(
        **_sizes(vision),
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        qk_norm=False,
        class_token=not siglip,
        patch_bias=siglip,
        pre_norm=not siglip,
        pool="map" if siglip else "class",
        projection="none" if siglip else "matrix",
        pixel_mean=mean,
        pixel_std=std,
    )
    end = text_config.eos_token_id  # with 2, CLIPModel takes the highest id
    is_highest = siglip or (end == 2 and family == "CLIP") or end == text_config.vocab_size - 1
    end_id = end if isinstance(end, int) and not is_highest and end < text_config.vocab_size else None
    fields = towers.text_fields(path, text_config.vocab_size, siglip=siglip, end_id=end_id)
    if end_id is not None and isinstance(text_config.pad_token_id, int):
        fields["pad_id"] = text_config.pad_token_id
    if fields["tokenizer"] == "clip" and not _has_clips_tokenizer(path):
        fields |= dict(tokenizer="tokenizer.json", cleaning="none")
    text = config_lib.TextTower(
        **_sizes(text_config),
        **fields,
        vocab_size=text_config.vocab_size,
        context_length=text_config.max_position_embeddings,
        causal=not siglip,
        pool="last" if siglip else "end",
        projection="affine" if siglip else "matrix",
    )
    rows = formats.hf_image() + formats.hf_text("text_model.head" if siglip else "text_projection")
    embed_dim = vision.hidden_size if siglip else config.projection_dim
    return towers.Towers(embed_dim, image, text, (*rows, *towers.SCALARS))


def _has_clips_tokenizer(path: epath.Path) -> bool:
    """Whether the tokenizer in a folder, if there is one, gives CLIP's ids.

    Raises:
      ConvertError: only a vocab.json, and it differs from CLIP's.
      UserError: the tokenizer.json cannot be read.
    """
    file, vocabulary = path / "tokenizer.json", path / "vocab.json"
    if regular_file.is_one(file):
        encode = lambda library: library.encode(tokenizers.TEXTS, 77).ids.tolist()
        return encode(tokenizer.FileTokenizer(file, "none")) == encode(tokenizer.ClipTokenizer())
    if regular_file.is_one(vocabulary):
        ids = regular_file.read_json(vocabulary, dict[str, int], "token ids by token")
        if ids != {token: i for i, token in enumerate(clip_tokenizer.tokens_and_merges()[0])}:
            raise ConvertError(
                f"{vocabulary}: differs from CLIP's, expected a tokenizer.json beside it;"
                f" transformers.AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained writes one"
            )
    return True


def _tips(path: epath.Path, family: str, config: Any) -> towers.Towers:
    """What the config of a TIPS v2 says of its towers; its second class token is a register."""
    vision, text_config = config.vision_config, config.text_config
    if not vision.qkv_bias:
        raise ConvertError(f"{path / 'config.json'}: vision_config.qkv_bias: got False, expected True")
    mean, std = _pixels(path, _UNCHANGED)
    gated, hidden = vision.use_swiglu_ffn, int(vision.hidden_size * vision.mlp_ratio)
    sizes = _sizes(vision)
    sizes["mlp_dim"] = hidden
    if gated:  # two thirds, in eights
        sizes |= dict(mlp_dim=-(-int(hidden * 2 / 3) // 8) * 8, activation="silu")
    image = config_lib.ImageTower(
        **sizes,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        qk_norm=False,
        registers=vision.num_register_tokens,
        layer_scale=True,
        mlp="gated" if gated else "plain",
        pool="class",
        projection="none",
        pixel_mean=mean,
        pixel_std=std,
    )
    text = config_lib.TextTower(
        **_sizes(text_config),
        vocab_size=text_config.vocab_size,
        context_length=text_config.max_position_embeddings,
        causal=False,
        pool="mean",
        mask_padding=True,
        projection="none",
        tokenizer="tokenizer.json",
        cleaning="none",
        end_id=-1,
    )
    rows = formats.hf_tips(gated)
    return towers.Towers(image.width, image, text, (*rows, *towers.SCALARS))


def _sizes(config: Any) -> dict[str, Any]:
    sizes = {ours: getattr(config, theirs, 0) for ours, theirs in SIZES.items()}
    activation = _ACTIVATIONS.get(config.hidden_act, config.hidden_act)
    return sizes | dict(activation=activation, unroll=1)


def _dinov3(path: epath.Path, family: str, config: Any) -> towers.Towers:
    """What the config of a DINOv3 says of its tower."""
    mean, std = _pixels(path, _IMAGENET)
    image = config_lib.ImageTower(
        **_sizes(config),
        image_size=_DINOV3_GRID * config.patch_size,
        patch_size=config.patch_size,
        qk_norm=False,
        positions=False,
        rope="centres",
        rope_theta=float(config.rope_theta),
        registers=config.num_register_tokens,
        layer_scale=True,
        mlp="gated" if config.use_gated_mlp else "plain",
        key_bias=config.key_bias,
        pool="class",
        projection="none",
        pixel_mean=mean,
        pixel_std=std,
    )
    return towers.Towers(image.width, image, None, formats.hf_dinov3("model."))


def _pixels(path: epath.Path, default: Any) -> Any:
    """Mean and standard deviation of the pixels, by the processor beside the weights."""
    for file in (path / "preprocessor_config.json", path / "processor_config.json"):
        if regular_file.is_one(file):
            stated = regular_file.read_json(file, dict[str, Any], "a processor of transformers")
            stated = stated.get("image_processor") or stated
            if stated.get("do_normalize") is False:
                return _UNCHANGED
            mean, std = stated.get("image_mean"), stated.get("image_std")
            return (tuple(mean), tuple(std)) if mean and std else default
    return default


def _read_grain(path: epath.Path, stated: Mapping[str, Any]) -> tuple[towers.Imported, Any]:
    """The model in a folder of to-hf, and its module."""
    from grain_jax.convert.hf_files import configuration_grain, modeling_grain

    sizes, file = stated.get("towers"), path / "config.json"
    if not isinstance(sizes, dict):
        raise ConvertError(f"{file}: got no sizes under towers, expected the config.json of to-hf")
    with prefixed(f"{file}: "):
        model = config_lib.model_from_dict(sizes)
        raise_any(needs.MODELING.faults(model))
    name = model.text.tokenizer  # our folder has a config.json, too
    if name != epath.Path(name).name or name == "config.json":
        raise ConvertError(
            f"{file}: model.text.tokenizer: got {name!r}, expected clip or the name of a file beside it"
        )
    config = configuration_grain.GrainConfig(towers=dataclasses.asdict(model))
    module = _load(path, model, modeling_grain.GrainModel, config)
    state = {name: x.numpy() for name, x in module.state_dict().items()}
    with prefixed(f"{path}: "):
        params = names.to_params(state, model)
    return towers.Imported(model, params, True), module
