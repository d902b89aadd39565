"""Models by name: in the package, or on the Hugging Face Hub.

A model of the package is a converted folder beside this file, with its card (README.md), which tells the
commands that made it. `hf://ORG/NAME[@REVISION]` is a model of the Hub (`hub`). Imports no JAX.
"""

import difflib
import re

from etils import epath

from grain_jax import config as config_lib
from grain_jax.checkpoint import importers
from grain_jax.checkpoint.pretrained import hub
from grain_jax.core import errors

NAMES = ("aviary-tiny",)
# Other libraries' weights, by the last suffix: the kind of `grain-jax convert` that reads them.
_CONVERSIONS = {
    **dict.fromkeys((".safetensors", ".pt", ".pth", ".bin"), "from-open-clip"),
    ".tar": "from-torch",
    ".npz": "from-big-vision",
}
_FOREIGN = r"(vit|rn\d|convnext|eva|coca|siglip|clip).*"  # as models of open_clip and OpenAI are named
_FOLDER = epath.Path(__file__).parent


def folder_of(path: epath.PathLike) -> epath.Path:
    """The folder that `path` stands for; what is no name is returned as it is, also if it does not exist.

    Args:
      path: a folder, local or remote; one of NAMES, where no folder has that name; or a name on the Hub. A
        model on the Hub is downloaded into the cache of huggingface_hub. Folders of other libraries' weights
        are converted into our own cache.

    Raises:
      errors.UserError: it cannot be downloaded or converted.
    """
    text = str(path)
    if hub.is_reference(text):
        folder = hub.download(text)
        return folder if (folder / "params").is_dir() else importers.import_weights(text, folder)
    path = epath.Path(path)
    if not path.is_dir():
        return _FOLDER / text if text in NAMES else path
    is_ours = any((path / part).is_dir() for part in ("params", "state", "checkpoints"))
    return path if is_ours or not conversion(path) else importers.import_weights(text, path)


def is_packaged(path: epath.PathLike) -> bool:
    """Whether a folder is a model of the package, whose files nothing changes."""
    return epath.Path(path).parent == _FOLDER


def check(init: config_lib.Init) -> None:
    """Raises UserError if a folder that `init` names is not there; none is read, and the Hub is not asked."""
    for part in ("image", "text", "decoder"):
        path = getattr(init, part)
        if path and not hub.is_reference(path) and not folder_of(path).is_dir():
            raise errors.UserError(f"init.{part}: {no_such(path)}")


def conversion(path: epath.PathLike) -> str:
    """The command that converts the weights in a file or folder for `load`; or "" if none does."""
    path = epath.Path(path)
    kind = _CONVERSIONS.get(path.suffix)
    if path.is_dir() and any(_CONVERSIONS.get(x.suffix) == "from-open-clip" for x in path.iterdir()):
        kind = "from-hf" if (path / "config.json").exists() else "from-open-clip"
    if not kind:
        return ""
    return f"grain-jax convert {kind} --input {path} --output DIR makes a folder of it that loads"


def no_such(path: epath.PathLike) -> str:
    """The line for a path that is neither a folder nor a name."""
    if command := conversion(path):
        got = "got a file" if epath.Path(path).exists() else "no such file"
        return f"{path}: {got}, expected a folder; {command}"
    if re.fullmatch(_FOREIGN, str(path), re.IGNORECASE):
        return (
            f"{path}: no such folder; CLIP of OpenAI is hf://openai/clip-vit-base-patch32; of open_clip get"
            " the weights, then grain-jax convert from-open-clip --input WEIGHTS --output DIR makes a folder"
            " of them that loads"
        )
    near = difflib.get_close_matches(str(path), NAMES, n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    return (
        f"{path}: no such folder; {meant}expected a workdir, a checkpoint, a converted model,"
        f" {', '.join(NAMES)} (comes with the package), or hf://ORG/NAME (of the Hugging Face Hub)"
    )
