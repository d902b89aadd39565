"""The command pack: a small copy of a trained model, to be given away.

Weights are rounded to bfloat16. Embeddings of tokens that a run never met are still random: they become
zeros, which compress to nothing. In a small model with the vocabulary of CLIP they are most of the file.
A run that starts from another text tower keeps them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from grain_jax import config as config_lib
from grain_jax import inference
from grain_jax.checkpoint import files, saved_model
from grain_jax.convert import output, parity

TOLERANCE = 0.05  # largest max|a-b| / max|b|: bfloat16 keeps 8 bits of each weight
_TOKENS = "token_embed"


def pack(source: epath.PathLike, folder: epath.PathLike) -> parity.Report:
    """pack: a model that `grain_jax.load` reads to a folder that it reads too, in fewer bytes.

    A converted folder as `source` does not say which tokens were trained.

    Returns:
      The comparison with the outputs of the float32 model, on texts of trained tokens.

    Raises:
      ConvertError: the folder holds something else, or cannot be written.
      checkpoint.CheckpointError: `source` cannot be read.
    """
    folder = output.check_free(folder)
    model, params, read_from = saved_model.load_model(source)
    trained = _trained_tokens(epath.Path(read_from), model)
    packed = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), params)
    embedding = packed["text"][_TOKENS]["embedding"]  # may have more rows than the tokenizer
    embedding[: len(trained)][~trained] = 0
    inputs = _inputs(model, trained)
    rounded = jax.tree.map(lambda x: x.astype(np.float32), packed)
    ours, expected = (parity.outputs_of(inference.Predictor(model, x), inputs) for x in (rounded, params))
    comparisons = parity.compare(ours, expected, tolerance=TOLERANCE)
    proof = parity.report(comparisons, f"{read_from} in float32", inputs)
    output.save(folder, model, packed, source, proof, read_from)
    return proof.after(
        f"pack: {read_from} -> {folder}",
        f"{trained.sum():,} of {len(trained):,} tokens were trained; the embeddings of the others are zeros",
    )


def _trained_tokens(folder: epath.Path, model: config_lib.Model) -> np.ndarray:
    """bool [V]: tokens whose embedding ever had a gradient, by the second moments of AdamW.

    All tokens if none had, if the moments are not stored, as for a frozen tower, or if the run began from
    another text tower (`init.text`).
    """
    trained, is_run = np.zeros(model.text.vocab_size, bool), (folder / "state").is_dir()
    if is_run and config_lib.from_dict(files.read_items(folder).config).init.text is None:
        state = files.read_arrays(folder, only="opt_state")
        for path, moments in jax.tree_util.tree_leaves_with_path(state):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if name.endswith(f"nu/text/{_TOKENS}/embedding"):
                trained |= np.any(np.asarray(moments, np.float32) != 0, axis=1)
    return trained if trained.any() else np.ones_like(trained)


def _inputs(model: config_lib.Model, trained: np.ndarray) -> parity.Inputs:
    """The inputs of a parity report, with words of trained tokens alone; with ends if no word was trained."""
    inputs = parity.inputs_of(model)
    end = model.text.end_id
    end = model.text.vocab_size - 1 if end is None or end < 0 else end
    known = np.setdiff1d(np.flatnonzero(trained), [0, end])
    known, ids = known if known.size else np.array([end]), inputs.token_ids
    is_kept = trained[ids] | (ids == 0) | (ids == end)
    return inputs._replace(token_ids=np.where(is_kept, ids, known[ids % len(known)]).astype(np.int32))
