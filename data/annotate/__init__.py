"""Images in, grounded descriptions out: a chat model's captions and descriptions, a detector's boxes."""

from typing import Any

LINES = "A.jsonl"  # the annotations of a job, in its output folder
PASSES = ("caption", "describe", "ground", "negatives")  # in their order


def annotated_by(annotations: str) -> dict[str, dict[str, Any]]:
    """The settings of each pass, with its model, that wrote an A.jsonl; empty if no job wrote it."""
    from grain_jax.core import regular_file  # slow, and `grain-jax --help` imports this module
    from grain_jax.data import job

    folder, _, name = f"./{annotations}".rpartition("/")
    if name != LINES:
        return {}
    try:
        settings = job.Output(folder.removeprefix("./")).read_json(job.SETTINGS)
    except regular_file.FileError:  # the settings of something else
        return {}
    return {name: settings[name] for name in PASSES if name in settings}
