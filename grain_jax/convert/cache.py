"""Other libraries' weights, of the Hugging Face Hub or a local folder: converted once, into the cache."""

import os
import re
import sys

import filelock
from etils import epath

from grain_jax.checkpoint import digests
from grain_jax.checkpoint.pretrained import hub
from grain_jax.convert import from_hugging_face, open_clip
from grain_jax.convert.faults import ConvertError
from grain_jax.core.version import __version__


def import_weights(reference: str, source: epath.Path) -> epath.Path:
    """The folder of our model for other weights, below `$XDG_CACHE_HOME/grain_jax` or ~/.cache/grain_jax.

    `reference` is hf://ORG/NAME[@REVISION] or a path. `source`, a downloaded folder, has its commit as name.

    Raises:
      ConvertError: it cannot be converted, or the outputs of the model differ from its own library's.
    """
    base = epath.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    name = re.sub(r"\W+", "-", reference.removeprefix(hub.SCHEME).partition("@")[0])
    version = source.name
    if not hub.is_reference(reference):
        files = sorted((x.name, x.stat().length, x.stat().mtime) for x in source.iterdir())
        name, version = source.name, digests.of_json([str(source.absolute()), files])[:12]
    folder = base / "grain_jax" / f"models-{__version__}" / f"{name}-{version}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{folder}.lock"):  # other processes wait until it is there
        if not (folder / "params").is_dir():
            is_hf = (source / "config.json").exists()
            convert = from_hugging_face.from_hf if is_hf else open_clip.from_open_clip
            report = convert(source, folder)
            if not report.ok:
                folder.rmtree()
                raise ConvertError(f"{reference}: the converted model gives other outputs\n{report.text}")
            print(f"{reference}: converted into {folder}, parity: {report.verdict}", file=sys.stderr)
    return folder
