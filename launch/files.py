"""Copies the files that start runs on clusters, also out of a wheel: grain-jax launch-files DIR."""

from collections.abc import Sequence

from etils import epath

from grain_jax.core import errors
from grain_jax.launch.arguments import LaunchFiles

_SUFFIXES = (".sh", ".sbatch", ".yaml")


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes them to the folder, and prints their paths."""
    folder = epath.Path(LaunchFiles.parse(arguments).folder)
    source = epath.Path(__file__).parent
    paths = sorted(p for p in source.iterdir() if p.name == "Dockerfile" or p.suffix in _SUFFIXES)
    if there := [p.name for p in paths if (folder / p.name).exists()]:
        raise errors.UserError(
            f"{folder}: holds {', '.join(there)}, expected none of these; name another folder, or remove them"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in paths:
            print(path.copy(folder / path.name))
    except OSError as error:
        raise errors.UserError(f"{folder}: cannot be written ({error.strerror or error})") from None
