"""The command merge: the factors of LoRA folded into their matrices."""

from etils import epath

from grain_jax.checkpoint import saved_model
from grain_jax.convert import output, parity
from grain_jax.convert.faults import ConvertError
from grain_jax.core import low_rank
from grain_jax.models import lora


def merge(source: epath.PathLike, folder: epath.PathLike) -> parity.Report:
    """merge: a run with LoRA -> a model without factors, for `grain_jax.load`.

    Args:
      source: a workdir or a checkpoint of a run with `optim.lora`.
      folder: new, or an older conversion.

    Returns:
      The comparison of the outputs with the outputs of the factors beside their matrices.

    Raises:
      ConvertError: there are no factors; the folder holds something else, or cannot be written.
      checkpoint.CheckpointError: `source` cannot be read.
    """
    folder = output.check_free(folder)
    stored = saved_model.load_stored(source)
    if not stored.lora.rank:
        raise ConvertError(
            f"{source}: got optim.lora.rank 0, expected a run with factors to merge; every other command takes this one"
        )
    merged, inputs = stored.merged(), parity.inputs_of(stored.model)
    with lora.beside(stored.lora):
        apart = parity.outputs(stored.model, stored.params, inputs)
    comparisons = parity.compare(parity.outputs(stored.model, merged, inputs), apart)
    proof = parity.report(
        comparisons, f"{stored.folder} with its factors beside the matrices", inputs
    )
    output.save(folder, stored.model, merged, source, proof, stored.folder)
    count = len(list(low_rank.maps_in(stored.params)))
    return proof.after(
        f"merge: {stored.folder} -> {folder}",
        f"{count} maps, of all layers each; rank {stored.lora.rank}, alpha {stored.lora.alpha:g}",
    )
