"""Parses the classes that a user types or loads from a file, and checks their number and length."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from grain_jax.core import annotations, errors, regular_file
from grain_jax.evaluate import class_names
from grain_jax.runtime import checkpoint

# Upper bounds of the input:
MANY = 1000  # classes
MANY_DESCRIPTIONS = 100  # of a class, and phrases to find
MANY_IN_ALL = 5000  # descriptions
LONG = 500  # characters of a name, description or phrase
LARGE = 1 << 20  # bytes of a file of classes
ELSEWHERE = "for more use grain_jax.evaluate"
_JSON = '{"class name": ["description", ...]}'

Classes = dict[str, tuple[str, ...]]  # name -> descriptions; without any: names alone


class DemoError(errors.UserError):
    """Bad input from the user; the message is one line."""


def _evals(folder: epath.PathLike) -> list[dict[str, Any]]:
    """The evaluations in the config of a checkpoint; a converted model has none."""
    if not (epath.Path(folder) / "config").is_dir():
        return []
    return list((checkpoint.read_json(folder, "config").get("evals") or {}).values())


def images_of_run(folder: epath.PathLike) -> str | None:
    """The first folder of images that the run of a checkpoint is evaluated on and that is on this machine."""
    folders = (entry.get("images") or "://" for entry in _evals(folder))
    return next((x for x in folders if "://" not in x and epath.Path(x).is_dir()), None)


def of_run(folder: epath.PathLike) -> Classes | None:
    """The classes that a run is evaluated on: the first descriptions of its config, in JSON, that can be read here.

    Args:
      folder: of the checkpoint. None: it has no config, as a converted model, or names no such local file.
    """
    for entry in _evals(folder):
        path = entry.get("descriptions") or "://"
        if "://" not in path:
            with contextlib.suppress(errors.UserError, UnicodeDecodeError):
                text = regular_file.read(path, LARGE, _JSON).decode()
                if text.lstrip().startswith("{"):  # a stored config may name any file
                    return parse(text)
    return None


def parse(text: str) -> Classes:
    """Parses classes: lines `name: description; description`, lines with a name each, or JSON.

    Blank lines and lines that begin with `#` are skipped. JSON is {"name": ["description", ...]} or
    ["name", ...].

    Raises:
      DemoError: no class, one given twice, JSON of another form, only some have descriptions, or too
        many or too long texts.
    """
    if text.lstrip().startswith(("{", "[")):
        pairs = _from_json(text)
    else:
        pairs = []
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            name, _, rest = line.partition(":")
            if not name.strip():
                raise DemoError(
                    f"line {number}: got {line.strip()!r}, expected a name before the :"
                )
            pairs.append((name, rest.split(";")))
    classes: Classes = {}
    for name, descriptions in pairs:
        name = class_names.composed(name.strip())
        if name in classes:
            raise DemoError(f"class {name!r}: given twice, expected once; remove one")
        classes[name] = tuple(d.strip() for d in descriptions if d.strip())
    if not classes or "" in classes:
        raise DemoError("no class name; type one a line, e.g. robin: a red breast; a short beak")
    if len(classes) > MANY:
        raise DemoError(f"got {len(classes)} classes, expected at most {MANY}; {ELSEWHERE}")
    for name, descriptions in classes.items():
        if len(descriptions) > MANY_DESCRIPTIONS:
            got = f"class {name[:40]!r}: got {len(descriptions)} descriptions"
            raise DemoError(f"{got}, expected at most {MANY_DESCRIPTIONS}")
        check_lengths([name, *descriptions])
    total = sum(map(len, classes.values()))
    if total > MANY_IN_ALL:
        raise DemoError(f"got {total} descriptions, expected at most {MANY_IN_ALL}; {ELSEWHERE}")
    bare = [name for name, descriptions in classes.items() if not descriptions]
    if bare and len(bare) < len(classes):
        raise DemoError(
            f"class {bare[0]!r}: no description, but others have some; describe all classes or none"
        )
    return classes


def check_lengths(texts: Sequence[str]) -> None:
    """Raises DemoError for a text of more than LONG characters."""
    for text in texts:
        if len(text) > LONG:
            got = f"got a text of {len(text)} characters ({text[:30]!r}...)"
            raise DemoError(f"{got}, expected at most {LONG}")


def _from_json(text: str) -> list[tuple[str, Sequence[str]]]:
    try:
        # Pairs, so that a name given twice is seen.
        value = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
        raise DemoError(f"not JSON: {' '.join(str(error).split())}; expected {_JSON}") from None
    named: list[tuple[str, Sequence[str]]] = []
    for item in value:
        name, texts = item if isinstance(item, tuple) else (item, [])
        if not (isinstance(texts, list) and all(isinstance(text, str) for text in [name, *texts])):
            raise DemoError(f"at {annotations.show(name)}: expected {_JSON}")
        named.append((name, texts))
    return named


def format(classes: Mapping[str, Sequence[str]]) -> str:
    """The inverse of `parse`: lines, or JSON if a name holds a character with a meaning, such as `:`."""
    lines = "\n".join(
        f"{name}: {'; '.join(descriptions)}" if descriptions else name
        for name, descriptions in classes.items()
    )
    try:
        if parse(lines) == classes:
            return lines
    except DemoError:
        pass
    described = any(classes.values())
    return json.dumps(classes if described else list(classes), ensure_ascii=False, indent=1)


def read(path: epath.PathLike) -> Classes:
    """Reads the classes in a file, JSON or lines as in `parse`. Raises DemoError, which names the file."""
    expected = f"{_JSON} or a class a line; {ELSEWHERE}"
    try:
        text = regular_file.read_text(path, expected, LARGE)
    except regular_file.FileError as error:
        raise DemoError(str(error)) from None
    try:
        return parse(text)
    except DemoError as error:
        raise DemoError(f"{epath.Path(path).name}: {error}") from None
