"""Downloads models from the Hugging Face Hub, by huggingface_hub."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from etils import epath

from grain_jax.core import errors

SCHEME = "hf://"
_REFERENCE = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@(.+))?")
# What a reader of a model opens. Code and pickles of a stranger are not even downloaded.
_READ = (
    "config.json",
    "open_clip_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "params/*",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "*.model",
)


_LOGIN = "hf auth login, or HF_TOKEN"
_REASONS = {  # class in huggingface_hub.errors: what to tell
    "GatedRepoError": f"access has to be asked for on its page, with your account ({_LOGIN})",
    "RepositoryNotFoundError": f"no such model on the Hub; a private one needs a token ({_LOGIN})",
    "RevisionNotFoundError": "the model has no such revision; expected a branch, a tag or a commit",
    "HFValidationError": "not a name of the Hub ({said})",
    "LocalEntryNotFoundError": "the Hub cannot be reached ({cause}) and the cache has no copy; check the net",
}  # fmt: skip


class HubError(errors.UserError):
    """The Hub cannot be asked, or refuses; the message is one line."""


def is_reference(path: str) -> bool:
    """Whether a path is a name on the Hub."""
    return path.startswith(SCHEME)


def download(reference: str) -> epath.Path:
    """The folder in huggingface_hub's cache of `hf://ORG/NAME[@REVISION]`; downloads what it lacks.

    Raises:
      HubError: wrong form, no such model or revision, no access, no network, no model in it, or no
        huggingface_hub.
    """
    match = _REFERENCE.fullmatch(reference)
    if not match:
        raise HubError(f"{reference}: expected hf://ORG/NAME or hf://ORG/NAME@REVISION")
    with _asking(reference) as library:
        folder = epath.Path(
            library.snapshot_download(match[1], revision=match[2], allow_patterns=list(_READ))
        )
    if not any((folder / name).exists() for name in ("config.json", "open_clip_config.json")):
        raise HubError(f"{reference}: has no config.json, expected a folder of to-hf or another conversion")
    return folder


def local(path: str) -> epath.Path:
    """A path as it is, or the downloaded folder of a name on the Hub."""
    return download(path) if is_reference(path) else epath.Path(path)


@contextlib.contextmanager
def _asking(asker: str) -> Iterator[Any]:
    """Gives huggingface_hub; whatever goes wrong inside is a HubError that begins with `asker`."""
    try:
        import huggingface_hub
    except ImportError:
        raise HubError(f"{asker}: needs the package huggingface_hub; pip install 'grain_jax[hub]'") from None
    try:
        yield huggingface_hub
    except HubError:
        raise
    except Exception as error:  # of its own kinds, of its HTTP client, of the disk
        raise HubError(f"{asker}: {_reason(error, huggingface_hub.errors)}") from error


def _reason(error: Exception, kinds: Any) -> str:
    """What to tell of an error of huggingface_hub; `kinds` is its module of errors."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:200]
    said = f"{type(error).__name__}: {said}" if said else type(error).__name__
    for kind, text in _REASONS.items():
        if isinstance(error, getattr(kinds, kind)):
            return text.format(said=said, cause=type(error.__cause__ or error).__name__)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the Hub refuses it (status {status}); it needs a token with that right ({_LOGIN})"
    if status is not None:
        return f"the Hub answers with status {status} ({said}); try again later"
    return f"failed ({said}); check the network and the disk, and try again"
