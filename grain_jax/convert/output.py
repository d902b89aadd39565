"""Where a conversion writes: a folder is made beside its place and takes it as a whole."""

import contextlib
import dataclasses
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import filelock
from etils import epath

from grain_jax import config as config_lib
from grain_jax.checkpoint import saved_model
from grain_jax.convert import parity
from grain_jax.convert.faults import ConvertError
from grain_jax.core import atomic, errors, metrics_file
from grain_jax.input_pipeline import tokenizer

# Files that conversions and exports write. Those of an older conversion go; whatever else lies there stays.
_WRITTEN = re.compile(
    r"params|README\.md|\w+_grain\.py|\w+\.stablehlo|.+\.(json|model|npz|safetensors|onnx|onnx\.data)"
)


def check_free(path: epath.PathLike, mark: str = "params") -> epath.Path:
    """The folder to write to, where this process may write: commands ask before they work for minutes.

    Every conversion of this kind has a file or folder `mark`; a folder with it may be overwritten.

    Raises:
      ConvertError: `path` is neither new, nor empty, nor an older conversion; it is the current folder,
        cannot be written, or another process writes it.
    """
    path = epath.Path(path)
    if path.exists() and not (path.is_dir() and (path / mark).exists()):
        if not path.is_dir() or any(path.iterdir()):
            is_run = (path / metrics_file.FILE).exists()
            holder = "is a run of grain-jax train" if is_run else "is in use by something else"
            raise ConvertError(f"{path}: {holder}; expected a new folder")
    if "://" not in str(path) and os.path.realpath(path) == os.path.realpath("."):
        raise ConvertError(f"{path}: is the current folder, expected another one to write")
    if "://" not in str(path):
        with errors.storage_faults_as_one_line(path), _locked(_work(path)):
            pass
    return path


@contextlib.contextmanager
def replacing(folder: epath.Path, mark: str = "params") -> Iterator[epath.Path]:
    """Gives an empty local folder, which takes the place of `folder` after the block.

    An error, a kill or a full disk leaves the old folder whole. Between the two renames neither is in place;
    the next call puts the old one back. Object stores cannot rename: a kill leaves part of the new folder.

    An object store gets the `mark` given to `check_free` first, so that the command can run again.

    Raises:
      ConvertError: it cannot be written, or another process writes it.
    """
    if "://" in str(folder):
        with errors.storage_faults_as_one_line(folder), tempfile.TemporaryDirectory() as scratch:
            yield epath.Path(scratch)
            if folder.exists():
                folder.rmtree()
            folder.mkdir(parents=True)
            for path in sorted(epath.Path(scratch).iterdir(), key=lambda path: path.name != mark):
                _copy(path, folder / path.name)
        return
    target, work = epath.Path(os.path.realpath(folder)), _work(folder)
    # transformers caches the code of a folder under the folder's name, so the new one needs the same name.
    old, new = work / "old" / target.name, work / "new" / target.name
    with errors.storage_faults_as_one_line(folder), _locked(work):
        try:
            _clear(old, new, target)
            old.parent.mkdir()
            new.mkdir(parents=True)
            yield new
            for path in target.iterdir() if target.exists() else ():
                if not _WRITTEN.fullmatch(path.name) and not (new / path.name).exists():
                    _copy(path, new / path.name)
            atomic.replace(new, target, old)
        finally:
            _clear(old, new, target)


def _work(folder: epath.Path) -> epath.Path:
    """The folder beside `folder`, links followed, in which a conversion is made."""
    target = epath.Path(os.path.realpath(folder))
    return target.with_name(f"{target.name}.incomplete")


def _clear(old: epath.Path, new: epath.Path, target: epath.Path) -> None:
    """Undoes an exchange that was interrupted between its two renames, and removes what it left."""
    if old.exists() and not target.exists():
        old.rename(target)
    for folder in (old.parent, new.parent):
        folder.rmtree(missing_ok=True)


@contextlib.contextmanager
def _locked(work: epath.Path) -> Iterator[None]:
    """Makes the folder `work`, keeps other processes of this machine out of it, and removes it at the end."""
    path = f"{tempfile.gettempdir()}/grain_jax-{atomic.digest(str(work).encode())[:16]}.lock"
    try:
        lock = filelock.FileLock(path, mode=0o666).acquire(timeout=0)
    except filelock.Timeout:
        raise ConvertError(f"{work.with_suffix('')}: another process writes it; wait for it") from None
    with lock:
        work.mkdir(parents=True, exist_ok=True)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # an old folder that could not be put back
                work.rmdir()


def _copy(path: epath.Path, target: epath.Path) -> None:
    """Copies a file, or a folder with all that is below."""
    if not path.is_dir():
        path.copy(target)
        return
    target.mkdir(parents=True, exist_ok=True)
    for each in path.iterdir():
        _copy(each, target / each.name)


@contextlib.contextmanager
def on_disk(folder: epath.Path) -> Iterator[str]:
    """The path of a local folder, or of a local copy of a remote one, which other packages cannot open."""
    if "://" not in str(folder):
        yield str(folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        for path in folder.iterdir():
            path.copy(epath.Path(scratch) / path.name)
        yield scratch


def save(
    folder: epath.Path,
    model: config_lib.Model,
    params: Any,
    source: epath.PathLike,
    proof: parity.Report,
    model_folder: epath.PathLike | None = None,
    files: Mapping[str, bytes] = {},
    has_texts: bool = True,
) -> None:
    """Writes a model for `grain_jax.load`.

    config.json names the `source`, keeps the verdict of the `proof`, and says if the text tower is a
    placeholder. A tokenizer's file is copied from `model_folder`; `files` are other contents by name.

    Raises:
      ConvertError: the folder cannot be written.
    """
    if model_folder is not None and model.text.tokenizer != "clip":
        if path := tokenizer.own_file(model.text, model_folder):
            text = dataclasses.replace(model.text, tokenizer=path.name)
            model = dataclasses.replace(model, text=text)
            files = {**files, path.name: tokenizer.content_of(path)}
    with replacing(folder) as new:
        notes: dict[str, Any] = dict(source=str(source), parity=proof.verdict)
        notes |= {} if has_texts else {"has_texts": False}
        saved_model.save_model(new, model, params, **notes)
        for name, content in files.items():
            (new / name).write_bytes(content)
