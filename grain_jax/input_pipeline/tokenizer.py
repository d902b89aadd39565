"""The tokenizer of a text tower, as `model.text.tokenizer` names it, and where its file is."""

import os
from collections.abc import Iterator

from etils import epath

from grain_jax import config as config_lib
from grain_jax.core import regular_file
from grain_jax.input_pipeline.clip_tokenizer import PAD, VOCAB_SIZE, ClipTokenizer
from grain_jax.input_pipeline.file_tokenizer import FileTokenizer
from grain_jax.input_pipeline.text_cleaning import TokenizerError
from grain_jax.input_pipeline.text_cleaning import clean as clean

Tokenizer = ClipTokenizer | FileTokenizer


def file_of(tower: config_lib.TextTower, folder: epath.PathLike | None = None) -> epath.Path:
    """The file that `model.text.tokenizer` names, whether it exists or not.

    Args:
      tower: a text tower whose tokenizer is a file.
      folder: of the model. A relative path is looked for there first, then, for a checkpoint, as the copy that
        the trainer keeps in the workdir.
    """
    there = (path for path in _copies(tower, folder) if path.exists())
    return next(there, epath.Path(tower.tokenizer))


def _copies(tower: config_lib.TextTower, folder: epath.PathLike | None) -> Iterator[epath.Path]:
    """Where the file lies if it came with the model."""
    if folder is None:
        return
    path, folder = epath.Path(tower.tokenizer), epath.Path(folder)
    if not path.is_absolute():
        yield folder / path
    if folder.parent.name == "checkpoints":
        yield folder.parent.parent / path.name


def own_file(tower: config_lib.TextTower, folder: epath.PathLike | None) -> epath.Path | None:
    """The file that `model.text.tokenizer` names, where it lies in the folder of the model or its workdir.

    For what copies it: the config may be a stranger's, and name a file or an object store of the reader's.

    Args:
      tower: a text tower whose tokenizer is a file.
      folder: of the model.

    Returns:
      The file; None where there is none, or one elsewhere, which nothing asks for.
    """
    for path in (*_copies(tower, folder), epath.Path(tower.tokenizer)):
        if _is_inside(path, folder) and regular_file.is_one(path):
            return path
    return None


def _is_inside(path: epath.Path, folder: epath.PathLike | None) -> bool:
    """Whether `path`, with links followed, is below the folder of the model, or its workdir."""
    if folder is None:
        return False
    folder = epath.Path(folder)
    if folder.parent.name == "checkpoints":
        folder = folder.parent.parent
    if regular_file.is_remote(path) or regular_file.is_remote(
        folder
    ):  # object stores have no links
        return path.is_relative_to(folder) and ".." not in path.parts
    roots = [folder]
    repository = folder.parent.parent
    if folder.parent.name == "snapshots" and repository.name.startswith("models--"):
        roots.append(repository / "blobs")  # what huggingface_hub's folders link to
    # etils' own resolve() follows no links.
    real = epath.Path(os.path.realpath(path))
    return any(real.is_relative_to(os.path.realpath(root)) for root in roots)


def keep_copy(tower: config_lib.TextTower, workdir: epath.Path) -> None:
    """Copies the file of the tokenizer into the workdir, so that its checkpoints need no file outside.

    Raises:
      regular_file.FileError: there is something else than a file.
    """
    if tower.tokenizer == "clip":
        return
    path = file_of(tower)
    copy = workdir / path.name
    if path.exists():
        content = content_of(path)
        if not (copy.exists() and content_of(copy) == content):
            copy.write_bytes(content)


def content_of(path: epath.Path) -> bytes:
    """The bytes of a tokenizer's file. Raises regular_file.FileError."""
    return regular_file.read(path, regular_file.MAX_JSON, "a tokenizer")


def of_tower(tower: config_lib.TextTower, folder: epath.PathLike | None = None) -> Tokenizer:
    """The tokenizer of a text tower, as `model.text.tokenizer` names it.

    Args:
      tower: `model.text`.
      folder: of the model (`file_of`).

    Raises:
      TokenizerError: it cannot be read, or has an id beyond the tower's embeddings.
    """
    if tower.tokenizer == "clip":
        tokenizer, vocabulary = ClipTokenizer(), VOCAB_SIZE
        if tower.pad_id != PAD:
            raise TokenizerError(
                f"model.text.pad_id: got {tower.pad_id}, expected {PAD}, CLIP's tokenizer's"
            )
    else:
        tokenizer = FileTokenizer(file_of(tower, folder), tower.cleaning, tower.pad_id)
        vocabulary = tokenizer.vocab_size
    if vocabulary > tower.vocab_size:
        raise TokenizerError(
            f"model.text.tokenizer: {tower.tokenizer} has ids up to {vocabulary - 1}, but model.text.vocab_size"
            f" is {tower.vocab_size}; name the tokenizer that the tower was trained with"
        )
    return tokenizer
