"""Class names and descriptions as the sentences that the text tower reads (docs/method.md, Zero-shot)."""

import re
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from etils import epath

from grain_jax.core import errors, regular_file
from grain_jax.inference import scores

Encode: TypeAlias = Callable[[list[str]], np.ndarray]  # N texts -> [N, D]
DEFAULT_TEMPLATES = epath.Path(__file__).parent / "templates.txt"

# Beginning of the clause -> first words of descriptions that take it; other words take "which has".
_CLAUSE = {"which is": ("a", "an", "used"), "which": ("has", "often", "typically", "may", "can")}
_BEGINNING = {word: clause for clause, firsts in _CLAUSE.items() for word in firsts}
_PARENT = re.compile(r"(?<=\w\w)/(?=\w\w)")  # between PARENT and CLASS


def load_templates(path: epath.PathLike | None = None) -> list[str]:
    """Reads templates, one per line, each with one `{}`; blank lines and `#` lines are skipped.

    Raises errors.UserError: no such file, a line without exactly one `{}`, or no template at all.
    """
    path = DEFAULT_TEMPLATES if path is None else epath.Path(path).expanduser()
    text, templates, faults = regular_file.read_text(path, "templates, one a line"), [], []
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if line.count("{}") == 1 and not line.startswith("#"):
            templates.append(line)
        elif line and not line.startswith("#"):
            faults.append(f"{path}:{number}: got {line!r}, expected one {{}} for the class name")
    if not templates and not faults:
        faults.append(f"{path}: holds no template; expected lines such as 'a photo of a {{}}'")
    if faults:
        raise errors.UserError("\n".join(faults))
    return templates


def descriptor_clause(description: str) -> str:
    """A description as a clause: "long tail" -> "which has long tail", "can swim" -> "which can swim".

    The rule of Menon & Vondrick, applied to whole words and without case: "antlers" does not begin with "a".
    """
    text = re.sub(r"\s+", " ", description).strip(" .,;")
    first, _, rest = text.partition(" ")
    if first.lower() in _BEGINNING:
        return " ".join(filter(None, (_BEGINNING[first.lower()], first.lower(), rest)))
    return f"which has {text}"


def class_texts(name: str, templates: Sequence[str], descriptions: Sequence[str] | None = None) -> list[str]:
    """The texts of a class: every template, or each with every description (templates in the inner loop).

    In names `_` stands for a space, and "dog/poodle" is PARENT/CLASS: "a photo of a poodle, a kind of dog".
    The last of several parents is used. A `/` between single letters or beside a space is part of the name.

    DIFFERS: the reference says "a poodle, of a dog", and fails where the parent is one letter (quirk 19).
    """
    *parents, name = _PARENT.split(name.replace("_", " ").strip())
    filled = [template.replace("{}", name) for template in templates]
    if parents:
        filled = [f"{text.rstrip(' ,.')}, a kind of {parents[-1]}" for text in filled]
    if descriptions is None:
        return filled
    return [
        f"{text.rstrip(' ,.')}, {descriptor_clause(description)}"
        for description in descriptions
        for text in filled
    ]


def distinct(texts: Sequence[str], key: Callable[[str], str] = str) -> tuple[list[str], np.ndarray]:
    """The first of each set of texts with one `key`, and for each text the position of its set, int [N]."""
    first: dict[str, tuple[int, str]] = {}
    position = [first.setdefault(key(text), (len(first), text))[0] for text in texts]
    return [text for _, text in first.values()], np.array(position, int)


def encode_lists(encode: Encode, lists: Sequence[Sequence[str]]) -> list[np.ndarray]:
    """For each list of texts the embeddings [n, D]; `encode`, texts -> [N, D], gets each text once."""
    texts, position = distinct([text for each in lists for text in each])
    ends = np.cumsum([len(each) for each in lists])
    return np.split(encode(texts)[position], ends[:-1])


def embed_classes(
    encode: Encode,
    names: Sequence[str],
    templates: Sequence[str],
    descriptions: Sequence[Sequence[str] | None] | None = None,
    unit_length: bool = False,
) -> np.ndarray:
    """Classes as `class_texts` -> `scores.class_features`, float32 [C, D].

    A class without `descriptions` is described by its name.
    """
    described = descriptions or [None] * len(names)
    texts = [class_texts(name, templates, its_own or None) for name, its_own in zip(names, described)]
    return scores.class_features(encode_lists(encode, texts), unit_length)
