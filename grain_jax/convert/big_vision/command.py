"""The command from-big-vision, and its parity against big_vision's own model."""

from typing import Any

import numpy as np
from etils import epath

from grain_jax import config as config_lib
from grain_jax.convert import output, parity, tables, towers
from grain_jax.convert.big_vision import checkpoint as files
from grain_jax.convert.big_vision.towers import import_tower
from grain_jax.convert.faults import prefixed


def from_big_vision(
    source: epath.PathLike, folder: epath.PathLike, settings: towers.Settings
) -> parity.Report:
    """from-big-vision: a two_towers .npz to a model in `folder`.

    Raises:
      ConvertError: the checkpoint cannot be converted, or the folder holds something else.
    """
    folder = output.check_free(folder)
    checkpoint = files.read(source)
    image, text = (import_tower(which, checkpoint, settings) for which in towers.TOWERS)
    with prefixed(f"{checkpoint.path}: "):
        model, params = towers.two_tower_model(checkpoint.state, image, text, files.SCALARS)
    proof = prove(checkpoint, model, params)
    output.save(folder, model, params, source, proof)
    return proof.after(
        f"from-big-vision: {source} -> {folder}",
        *towers.describe(model, {"image": image.assumed, "text": text.assumed}),
        f"tokenizer not in a .npz; copy the tower's to {folder / model.text.tokenizer}, or set"
        " model.text.tokenizer in config.json",
    )


def sizes_of(model: config_lib.Model) -> dict[str, Any]:
    """The arguments of big_vision's two_towers.Model for a two-tower model."""
    kinds = {"map": "map", "class": "tok", "mean": "gap", "last": "last"}

    def sizes(tower: Any) -> dict[str, Any]:
        shared = dict(width=tower.width, depth=tower.depth, mlp_dim=tower.mlp_dim)
        return shared | dict(num_heads=tower.heads, pool_type=kinds[tower.pool])

    return dict(
        image=sizes(model.image) | dict(patch_size=(model.image.patch_size,) * 2),
        text=sizes(model.text) | dict(vocab_size=model.text.vocab_size),
        out_dim=tuple(
            model.embed_dim if t.projection != "none" else None for t in (model.image, model.text)
        ),
        bias_init=model.logit_bias_init,
    )


def prove(checkpoint: files.Checkpoint, model: config_lib.Model, params: Any) -> parity.Report:
    """Our model against big_vision's two_towers, loaded by its own code, if big_vision is on the path."""
    try:  # not a package of an index: it is on the path where its repository is
        from big_vision.models import vit  # pyright: ignore[reportMissingImports]
        from big_vision.models.proj.image_text import (  # pyright: ignore[reportMissingImports]
            text_transformer,
            two_towers,
        )
    except ImportError:
        return parity.not_proven(
            params, "big_vision is not on the path, so nothing could be compared."
        )
    path = checkpoint.path if "/" in checkpoint.path else f"./{checkpoint.path}"
    of = lambda tower: f"{path}/{tower}" if ".npz:" in path else f"{path}:{tower}"
    tree = tables.nested({name: x for name, x in checkpoint.state.items() if "/" not in name})
    tree["img"] = vit.load(None, of("img"), {})
    tree["txt"] = text_transformer.load(None, of("txt"), {})
    stated = sizes_of(model)
    for name, encoder in (
        ("image", tree["img"]["Transformer"]),
        ("text", tree["txt"]["Encoder_0"]),
    ):
        stated[name]["scan"] = "encoderblock" in encoder
    theirs = two_towers.Model(**stated)
    given = parity.inputs_of(model)
    image, text, _ = theirs.apply({"params": tree}, given.images, given.token_ids)
    embeds = dict(image_embed=np.asarray(image), text_embed=np.asarray(text))
    found = parity.compare(parity.outputs(model, params, given), embeds)
    return parity.report(found, "big_vision's two_towers", given)
