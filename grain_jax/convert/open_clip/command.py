"""The command from-open-clip."""

import numpy as np
from etils import epath

from grain_jax.convert import output, parity, towers
from grain_jax.convert.faults import prefixed
from grain_jax.convert.open_clip import checkpoint as files
from grain_jax.convert.open_clip import comparison
from grain_jax.convert.open_clip.towers import import_tower


def from_open_clip(
    source: epath.PathLike, folder: epath.PathLike, settings: towers.Settings
) -> parity.Report:
    """from-open-clip: the weights of CLIP or SigLIP to a two-tower model in `folder`.

    Raises:
      ConvertError: the checkpoint cannot be converted, or the folder holds something else.
    """
    folder = output.check_free(folder)
    checkpoint = files.read(source)
    image, text = (import_tower(which, checkpoint, settings) for which in towers.TOWERS)
    with prefixed(f"{checkpoint.path}: "):
        model, params = towers.two_tower_model(checkpoint.state, image, text, files.SCALARS)
    proof = comparison.prove(checkpoint, model, params)
    lengths = checkpoint.sequence_lengths
    name = model.text.tokenizer
    file = next((x for x in checkpoint.tokenizers if x.name == name), None)
    words = {} if file is None else {name: file.read_bytes()}
    output.save(folder, model, params, source, proof, sequence_lengths=lengths, files=words)
    lines = towers.describe(model, {"image": image.assumed, "text": text.assumed})
    if lengths:
        lines.append(f"images in their own shape: at most {lengths[0]} patches each")
    lines += checkpoint.notes
    if (scale := np.exp(params["logit_scale"])) > 100.5:  # CLIP stops near 100
        lines.append(
            f"logit scale {scale:.4g}; training clips it at 100 unless optim.frozen has it"
        )
    if not checkpoint.hf and not checkpoint.open_clip:
        lines.append(
            "The parity below cannot show whether heads and activations are right: there is no config, so the"
            " other side is built with those assumed or told above; check them"
        )
    if file is not None:
        lines.append(f"tokenizer {file}, copied")
    elif name != "clip":
        lines.append(f"tokenizer NOT FOUND; copy the tower's to {folder / name}")
    return proof.after(f"from-open-clip: {checkpoint.path} -> {folder}", *lines)
