"""Models that a name stands for: those of the package, and those of the Hugging Face Hub.

A model of the package is a converted folder beside this file, with its card (README.md), which tells the commands that
made it. `hf://ORG/NAME[@REVISION]` is a model of the Hub (`hub`). Imports no JAX.
"""

import difflib

from etils import epath

from grain_jax.pretrained import hub

NAMES = ("aviary-tiny",)
_FOLDER = epath.Path(__file__).parent


def folder_of(path: epath.PathLike) -> epath.Path:
    """The folder that `path` stands for; one that is not a name is returned as it is, also where it does not exist.

    Args:
      path: a folder, local or remote; one of NAMES, where no folder has that name; or a name on the Hub, which is
        downloaded into the cache of huggingface_hub.

    Raises:
      hub.HubError: it cannot be downloaded.
    """
    text = str(path)
    if hub.is_reference(text):
        return hub.download(text)
    path = epath.Path(path)
    return _FOLDER / text if text in NAMES and not path.is_dir() else path


def no_such(path: epath.PathLike) -> str:
    """The line for a path that is neither a folder nor a name."""
    near = difflib.get_close_matches(str(path), NAMES, n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    return (
        f"{path}: no such folder; {meant}expected a workdir, a checkpoint, a converted model,"
        f" {', '.join(NAMES)} (comes with the package), or hf://ORG/NAME (of the Hugging Face Hub)"
    )
