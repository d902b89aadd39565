"""Text embeddings on disk, so that e.g. 1000 classes x 20 templates are encoded once per checkpoint.

The name of a file is a digest of everything that its embeddings depend on, so a file never goes out of date.
"""

import functools
import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from grain_jax import __version__, inference
from grain_jax.core import atomic, errors
from grain_jax.input_pipeline import tokenizer


class CachedTexts:
    """Wraps an `inference.Predictor`: `encode_text` reads stored embeddings if there are any; all else is passed on.

    Args:
      predictor: the model; its parameters must not change.
      folder: folder of the stored embeddings, local or remote; it is created if needed.
    """

    def __init__(self, predictor: inference.Predictor, folder: epath.PathLike):
        self._predictor, self._folder = predictor, epath.Path(folder).expanduser()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._predictor, name)

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """As `inference.Predictor.encode_text`, for strings only; a damaged file is replaced.

        Raises:
          errors.UserError: the folder cannot be written.
        """
        digest = hashlib.sha256(self._tower)
        digest.update(json.dumps(list(texts)).encode())
        path = self._folder / f"{digest.hexdigest()[:40]}.npz"
        embed = _read(path, len(texts))
        if embed is None:
            embed = self._predictor.encode_text(texts)
            file = io.BytesIO()
            np.savez(file, embed=embed)
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                atomic.write_bytes(path, file.getvalue())
            except OSError as error:
                raise errors.UserError(
                    f"--cache: {self._folder}: {error.strerror or error}, expected a folder to write to;"
                    ' --cache "" does without'
                ) from None
        return embed

    @functools.cached_property
    def _tower(self) -> bytes:
        """A digest of the text tower, its tokenizer, the dtype and backend, and the version of this package."""
        model, folder = self.model, self._predictor.folder
        words = __version__, jax.default_backend(), self.dtype, model.embed_dim
        digest = hashlib.sha256("".join(f"{word};" for word in words).encode())
        digest.update(repr(model.text).encode())
        if model.text.tokenizer != "clip":
            digest.update(tokenizer.content_of(tokenizer.file_of(model.text, folder)))
        of_text = {k: v for k, v in self.params.items() if k.startswith("text")}
        digest.update(digest_of(of_text).encode())
        return digest.digest()


def digest_of(params: Any) -> str:
    """A digest of a tree of arrays: their names, shapes, types and bytes; 40 hexadecimal digits."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        value = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {value.dtype} {value.shape};".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()[:40]


def _read(path: epath.Path, count: int) -> np.ndarray | None:
    """The embeddings in a file; None if the file is missing or damaged."""
    try:
        with np.load(io.BytesIO(path.read_bytes())) as arrays:
            embed = arrays["embed"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return embed if len(embed) == count and np.isfinite(embed).all() else None
