"""The classes of the page: what a user types, or a file has, or a run is evaluated on."""

import contextlib
from collections.abc import Mapping, Sequence

from etils import epath

from grain_jax.checkpoint import files
from grain_jax.core import errors, regular_file

MANY, LONG = 5000, 500  # texts of the input, and characters of each, at most
Classes = dict[str, list[str]]  # name -> descriptions; without any: names alone


def parse(text: str) -> Classes:
    """Parses lines `name: description; description`, or names alone. Raises errors.UserError."""
    classes: Classes = {}
    for name, _, rest in (line.partition(":") for line in text.splitlines() if line.strip()):
        if not name.strip() or name.strip() in classes:
            raise errors.UserError(f"classes: got {name!r} twice or empty, expected a name once")
        classes[name.strip()] = [d.strip() for d in rest.split(";") if d.strip()]
    check([*classes, *(text for texts in classes.values() for text in texts)])
    return classes


def check(texts: Sequence[str]) -> None:
    """Raises errors.UserError for no text, or too many or too long ones."""
    longest = max(map(len, texts), default=0)
    if not 0 < len(texts) <= MANY or longest > LONG:
        got = f"{len(texts)} texts, the longest of {longest} characters"
        raise errors.UserError(f"got {got}, expected 1 to {MANY}, of {LONG} characters at most")


def format(classes: Mapping[str, Sequence[str]]) -> str:
    """The inverse of `parse`."""
    return "\n".join(f"{name}: {'; '.join(d)}" if d else name for name, d in classes.items())


def read(path: epath.PathLike) -> Classes:
    """Reads {"class name": ["description", ...]} of a .json, else lines as of `parse`. Raises UserError."""
    if epath.Path(path).suffix == ".json":
        return regular_file.read_json(epath.Path(path), Classes, "descriptions of classes")
    return parse(regular_file.read_text(path, "a class a line"))


def evaluated(folder: epath.PathLike) -> tuple[Classes, str | None]:
    """The first classes (a .json) and local folder of images that the run of a checkpoint is evaluated on."""
    is_run = (epath.Path(folder) / "state").is_dir()
    evals = files.read_items(folder).config.get("evals") if is_run else None
    classes, images = {}, None
    for entry in (evals or {}).values():
        described, image_folder = (entry.get(key) or "://" for key in ("descriptions", "images"))
        if images is None and "://" not in image_folder and epath.Path(image_folder).is_dir():
            images = image_folder
        if not classes and "://" not in described and described.endswith(".json"):
            with contextlib.suppress(errors.UserError):
                classes = read(described)
    return classes, images
