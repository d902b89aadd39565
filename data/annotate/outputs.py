"""The files that a job writes per shard; each is written atomically, and the last one marks the shard as done.

OUTPUT/failed/SHARD.jsonl       faults with their causes
OUTPUT/shards/SHARD.json        counters
OUTPUT/annotations/SHARD.jsonl  lines of A.jsonl
OUTPUT/passes/PASS/SHARD.jsonl  results of a pass; its presence marks the shard as done
"""

import collections
import json
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from etils import epath

from grain_jax.core import errors, regular_file
from grain_jax.data.annotate.arguments import PASSES

LINES, SETTINGS = "A.jsonl", "settings.json"
_Settings = dict[str, dict[str, Any]]  # part -> key -> value


class OutputError(errors.UserError):
    """The output cannot be used for this job; the message is one line."""


class Output(NamedTuple):
    """The files of a job; plain, so that it goes to workers."""

    folder: str

    def path(self, *names: str) -> epath.Path:
        """A file or folder below the output."""
        return epath.Path(self.folder).joinpath(*names)

    def read(self, kind: str, shard: str) -> list[dict[str, Any]]:
        """The lines that a shard has there; none if it has no such file."""
        try:
            content = self.path(kind, f"{shard}.jsonl").read_bytes()
        except FileNotFoundError:
            return []
        # Of bytes, since a text's splitlines() also cuts at U+2028, which web captions have.
        return list(map(json.loads, content.splitlines()))

    def write(self, kind: str, shard: str, lines: Iterable[dict[str, Any]]) -> None:
        """Replaces the lines of the shard."""
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        self.put(text, kind, f"{shard}.jsonl")

    def put(self, content: str | bytes, *names: str) -> None:
        """Writes a file atomically; a worker that the runner has abandoned cannot leave part of one."""
        path, new = self.path(*names), self._new()
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            # Half surrogates (a file's name that is not UTF-8) become \udc80, which JSON reads back.
            content = content.encode("utf-8", "backslashreplace")
        try:
            new.write_bytes(content)
            new.replace(path)
        except OSError as error:
            error.filename = str(path)  # those of `write` name no file
            new.unlink(missing_ok=True)
            raise

    def _new(self) -> epath.Path:
        """The place of a file that is not complete yet."""
        new = self.path("incomplete", uuid.uuid4().hex)
        new.parent.mkdir(parents=True, exist_ok=True)
        return new

    def put_tally(self, shard: str, tally: dict[str, Any]) -> None:
        """Replaces the counters of the shard: a nested dict of numbers."""
        self.put(json.dumps(tally, indent=1) + "\n", "shards", f"{shard}.json")

    def tally(self, shard: str) -> dict[str, Any]:
        """The shard's counters; empty if it has none."""
        try:
            return json.loads(self.path("shards", f"{shard}.json").read_text())
        except FileNotFoundError:
            return {}

    def finished(self, passes: Sequence[str]) -> set[str]:
        """Names of the shards that all of `passes` have done; without passes, that have annotations."""
        found = []
        for folder in map(self.path, _kinds(passes)):
            paths = folder.iterdir() if folder.exists() else ()
            found.append({path.stem for path in paths if path.suffix == ".jsonl"})
        return set.intersection(*found)

    def is_finished(self, shard: str, passes: Sequence[str]) -> bool:
        """Whether `finished` has the shard."""
        return all(self.path(kind, f"{shard}.jsonl").exists() for kind in _kinds(passes))

    def agree(self, settings: dict[str, dict[str, Any]]) -> None:
        """Notes the settings of the source and of each pass. Raises OutputError if others are there."""
        path, expected = self.path(SETTINGS), "the settings of grain-jax annotate"
        known = regular_file.read_json(path, _Settings, expected) if path.exists() else {}
        for part, values in settings.items():
            for key, value in values.items():
                old = known.get(part, {}).get(key, value)
                if old != value:
                    raise OutputError(
                        f"--output {self.folder}: was begun with {part} {key} {json.dumps(old)}, got"
                        f" {json.dumps(value)}; give another --output, or delete this one"
                    )
        self.put(json.dumps(known | settings, indent=1) + "\n", SETTINGS)

    def join(self, shards: Iterable[str]) -> None:
        """Writes A.jsonl and failed.jsonl by joining those of the shards."""
        for kind, name in (("annotations", LINES), ("failed", "failed.jsonl")):
            new = self._new()
            with new.open("wb") as file:
                for shard in shards:
                    file.write(self.path(kind, f"{shard}.jsonl").read_bytes())
            new.replace(self.path(name))

    def clear(self) -> None:
        """Deletes the unfinished files of killed writers."""
        self.path("incomplete").rmtree(missing_ok=True)

    def summary(self, shards: Iterable[str]) -> dict[str, Any]:
        """The shards' counters, added."""
        total: dict[str, Any] = {}
        for shard in shards:
            total = add(total, self.tally(shard))
        return total


def annotated_by(annotations: epath.PathLike) -> dict[str, dict[str, Any]]:
    """The settings of each pass, with its model, that wrote an A.jsonl; empty where no job wrote it."""
    path = epath.Path(annotations)
    beside = path.parent / SETTINGS
    if path.name != LINES or not beside.exists():
        return {}
    try:
        known = regular_file.read_json(beside, _Settings, "the settings of grain-jax annotate")
    except regular_file.FileError:  # of something else
        return {}
    return {name: known[name] for name in PASSES if name in known}


def _kinds(passes: Sequence[str]) -> list[str]:
    """The folders whose files say that the passes are done."""
    return [f"passes/{name}" for name in passes] or ["annotations"]


def add(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """The sums of two nested dicts of numbers."""
    out = collections.defaultdict(int, a)
    for key, value in b.items():
        out[key] = add(a.get(key, {}), value) if isinstance(value, dict) else out[key] + value
    return dict(out)
