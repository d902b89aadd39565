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
from grain_jax.checkpoint import files, saved_model
from grain_jax.convert import output, parity

TOLERANCE = 0.05  # largest max|a-b| / max|b|: bfloat16 keeps 8 bits of each weight
_TOKENS = "token_embed"


def pack(source: epath.PathLike, folder: epath.PathLike) -> parity.Report:
    """pack: a model that `grain_jax.load` reads to a folder that it reads too, in fewer bytes.

    Args:
      source: a workdir, a checkpoint or a converted folder; the last does not say which tokens were trained.
      folder: new, or an older conversion.

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
    expected = parity.outputs(model, params, inputs)
    comparisons = parity.compare(parity.outputs(model, rounded, inputs), expected, tolerance=TOLERANCE)
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
    trained = np.zeros(model.text.vocab_size, bool)
    is_run = (folder / "state").is_dir()
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
    end = model.text.vocab_size - 1 if model.text.end_id is None else model.text.end_id
    trained_words = np.setdiff1d(np.flatnonzero(trained), [0, end])
    trained_words = trained_words if trained_words.size else np.array([end])
    ids = inputs.token_ids
    is_kept = trained[ids] | (ids == 0) | (ids == end)
    ids = np.where(is_kept, ids, trained_words[ids % len(trained_words)]).astype(np.int32)
    return inputs._replace(token_ids=ids)
