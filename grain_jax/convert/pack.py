"""The command pack: a small copy of a trained model, to be given away.

Weights are rounded to bfloat16. In a checkpoint of a run, embeddings of tokens that training never met are still the
random numbers that they began as: they become zeros, which compress to nothing. Of a small model with the vocabulary of
CLIP that is most of the file. Those of a run that starts from another text tower stay as they are.
"""

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from grain_jax import config as config_lib
from grain_jax.checkpoint import files, saved_model
from grain_jax.convert import output, parity

TOLERANCE = 0.05  # of max|b|: bfloat16 keeps 8 bits of each weight
_TOKENS = "token_embed"


def pack(source: epath.PathLike, folder: epath.PathLike) -> parity.Report:
    """pack: a model that `grain_jax.load` reads to a folder that it reads too, in fewer bytes.

    Args:
      source: a workdir, a checkpoint or a converted folder; the last tells not which tokens were trained.
      folder: new, or an older conversion.

    Returns:
      The comparison of the outputs with those of the float32 model, on texts of trained tokens.

    Raises:
      ConvertError: the folder holds something else, or cannot be written.
      checkpoint.CheckpointError: `source` cannot be read.
    """
    folder = output.check_free(folder)
    model, params, read_from = saved_model.load_model(source)
    trained = _trained_tokens(epath.Path(read_from), model)
    packed = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), params)
    of_text = packed["text"][_TOKENS]
    of_text["embedding"] = _of_trained(of_text["embedding"], trained)
    given = _inputs(model, trained)
    rounded = jax.tree.map(lambda x: x.astype(np.float32), packed)
    found = parity.compare(
        parity.outputs(model, rounded, given),
        parity.outputs(model, params, given),
        tolerance=TOLERANCE,
    )
    proof = parity.report(found, f"{read_from} in float32", given)
    output.save(folder, model, packed, source, proof, read_from)
    return proof.after(
        f"pack: {read_from} -> {folder}",
        f"{trained.sum():,} of {len(trained):,} tokens were trained; the embeddings of the others are zeros",
        f"{sum(x.size for x in jax.tree.leaves(packed)):,} values, bfloat16",
    )


def _of_trained(embedding: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """Rows of tokens with zeros for those that were not trained; rows after the tokenizer's stay as they are."""
    kept = np.ones(len(embedding), bool)
    kept[: len(trained)] = trained
    return np.where(kept[:, None], embedding, np.zeros_like(embedding))


def _trained_tokens(folder: epath.Path, model: config_lib.Model) -> np.ndarray:
    """bool [V]: tokens whose embedding ever had a gradient, by the second moments of AdamW.

    All where none had, where they are not stored, as of a frozen tower, and where the run began from another text tower
    (`init.text`).
    """
    trained = np.zeros(model.text.vocab_size, bool)
    if (folder / "state").is_dir() and not _starts_from_text(folder):
        state = files.read_arrays(folder, only="opt_state")
        for path, moments in jax.tree_util.tree_leaves_with_path(state):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if name.endswith(f"nu/text/{_TOKENS}/embedding"):
                trained |= np.any(np.asarray(moments, np.float32) != 0, axis=1)
    return trained if trained.any() else np.ones_like(trained)


def _starts_from_text(folder: epath.Path) -> bool:
    """Whether the embeddings of a checkpoint began as those of another one."""
    return config_lib.from_dict(files.read_items(folder).config).init.text is not None


def _inputs(model: config_lib.Model, trained: np.ndarray) -> parity.Inputs:
    """The inputs of a parity report, with words of trained tokens alone; where no word was trained, of ends."""
    given = parity.inputs_of(model)
    end = model.text.vocab_size - 1 if model.text.end_id is None else model.text.end_id
    words = np.setdiff1d(np.flatnonzero(trained), [0, end])
    words = words if words.size else np.array([end])
    ids = given.token_ids
    is_kept = trained[ids] | (ids == 0) | (ids == end)
    return given._replace(
        token_ids=np.where(is_kept, ids, words[ids % len(words)]).astype(np.int32)
    )
