"""Images in, grounded descriptions out: a chat model's captions and descriptions, a detector's boxes."""

from typing import Any

from etils import epath

from grain_jax.data import job

LINES = "A.jsonl"  # the annotations of a job, in its output folder
PASSES = ("caption", "describe", "ground", "negatives")  # in their order


def annotated_by(annotations: epath.PathLike) -> dict[str, dict[str, Any]]:
    """The settings of each pass, with its model, that wrote an A.jsonl; empty if no job wrote it."""
    path = epath.Path(annotations)
    if path.name != LINES:
        return {}
    try:
        settings = job.Output(str(path.parent)).read_json(job.SETTINGS)
    except job.regular_file.FileError:  # the settings of something else
        return {}
    return {name: settings[name] for name in PASSES if name in settings}
