"""Where the records of a set lie. Needs neither TensorFlow nor JAX."""

from etils import epath

from grain_jax.config import Dataset
from grain_jax.core import errors, nearest

VERSION = "1.0.0"  # of the record format, and the folder that TFDS looks for


def folder_of(source: Dataset) -> epath.Path | None:
    """The folder of the records of a set, or None if there is no complete one."""
    folder = epath.Path(source.data_dir) / source.name / VERSION
    return folder if source.name and (folder / "dataset_info.json").exists() else None


def existing_folder_of(source: Dataset) -> epath.Path:
    """The folder of a set's records. Raises MissingData: a name is not set, or no complete set is there."""
    if missing := [key for key in ("data_dir", "name") if not getattr(source, key)]:
        expected = "what grain-jax build --output DATA_DIR --name NAME was given"
        flag = f"--config.input.{missing[0]}=..."
        raise errors.MissingData(f"input.{missing[0]}: got '', expected {expected}: {flag}")
    if folder := folder_of(source):
        return folder
    root = epath.Path(source.data_dir)
    sets = sorted(x.parent.parent.name for x in root.glob(f"*/{VERSION}/dataset_info.json"))
    near = f"; {nearest.did_you_mean(source.name, sets)}" if sets else ""
    raise errors.MissingData(
        f"no record set {source.name!r} in {source.data_dir!r}{near} (looked for {root / source.name}/"
        f"{VERSION}; make it with: grain-jax build --annotations A.jsonl --images DIR --output {root} --name"
        f" {source.name})"
    )
