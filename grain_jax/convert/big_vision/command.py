"""The command from-big-vision, and its parity against big_vision's own model."""

import numpy as np
from etils import epath

from grain_jax import config as config_lib
from grain_jax.convert import layouts, output, parity, towers
from grain_jax.convert.big_vision import checkpoint as files
from grain_jax.convert.big_vision.towers import import_image, import_text
from grain_jax.convert.faults import prefixed, raise_any


def from_big_vision(
    source: epath.PathLike, folder: epath.PathLike, settings: towers.Settings
) -> parity.Report:
    """from-big-vision: a two_towers .npz to a model in `folder`.

    Raises:
      ConvertError: the checkpoint cannot be converted, or the folder holds something else.
    """
    folder = output.check_free(folder)
    checkpoint = files.read(source)
    image, text = import_image(checkpoint, settings), import_text(checkpoint, settings)
    with prefixed(f"{checkpoint.path}: "):
        left = set(files.unused(checkpoint, image, text)) - set(files.SCALARS.values())
        raise_any([f"{name}: unknown key" for name in sorted(left)])
        scalars = towers.scalars(checkpoint.tree, files.SCALARS)
        model, params = towers.two_tower_model(image, text, scalars)
    proof = _prove(checkpoint, model, params)
    output.save(folder, model, params, source, proof)
    lines = [
        f"from-big-vision: {source} -> {folder}",
        *towers.describe(model, image, text),
        f"tokenizer not in a .npz; copy the tower's to {folder / model.text.tokenizer}, or set"
        " model.text.tokenizer in config.json",
    ]
    return proof._replace(text="\n".join([*lines, "", proof.text]))


def _prove(checkpoint: files.Checkpoint, model: config_lib.Model, params: dict) -> parity.Report:
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
    image, text = model.image, model.text
    shared = lambda t: dict(width=t.width, depth=t.depth, mlp_dim=t.mlp_dim, num_heads=t.heads)
    pool = {"map": "map", "class": "tok", "mean": "gap", "last": "last"}
    tree: dict = {}
    for name, array in checkpoint.tree.items():
        layouts.put(tree, name, array)
    tree["img"] = vit.fix_old_checkpoints(tree["img"])
    path = checkpoint.path if "/" in checkpoint.path else f"./{checkpoint.path}"
    subtree = f"{path}/txt" if ".npz:" in path else f"{path}:txt"
    tree["txt"] = text_transformer.load(None, subtree, {})
    scan = "encoderblock" in tree["txt"]["Encoder_0"]
    theirs = two_towers.Model(
        image=dict(
            shared(image),
            patch_size=(image.patch_size, image.patch_size),
            pool_type=pool[image.pool],
            scan=True,
        ),
        text=dict(shared(text), vocab_size=text.vocab_size, pool_type=pool[text.pool], scan=scan),
        out_dim=tuple(model.embed_dim if t.projection != "none" else None for t in (image, text)),
        bias_init=model.logit_bias_init,
    )
    given = parity.inputs_of(model)
    image_embed, text_embed, _ = theirs.apply({"params": tree}, given.images, given.token_ids)
    return parity.report(
        parity.compare(
            parity.outputs(model, params, given),
            dict(image_embed=np.asarray(image_embed), text_embed=np.asarray(text_embed)),
        ),
        "big_vision's two_towers",
        given,
    )
