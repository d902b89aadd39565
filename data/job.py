"""A job over the shards of a data source; after a kill the same command does what is missing.

Its folder notes the settings that results depend on, and refuses a run with others. A worker writes the
files of a shard whole, and last the record that marks it as done, with their digests. One run at a time has
the folder. build, annotate and embed are such jobs.
"""

import contextlib
import hashlib
import json
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath

from grain_jax.core import atomic, errors, printable, progress, regular_file

SETTINGS = "settings.json"
_SECONDS_BETWEEN_LOOKS = 10.0  # at the output folder: each look lists all shards
_BLOCK = 16 << 20  # bytes of a file in memory


class Damaged(errors.UserError):
    """A file of a job is gone, or is not what was written; the message begins a line."""


class Output(NamedTuple):
    """The folder of a job, local or in an object store; a plain value, which can be sent to workers."""

    folder: str

    def path(self, *names: str) -> epath.Path:
        """A file or folder below the output."""
        return epath.Path(self.folder).joinpath(*names)

    def put(self, content: str | bytes, *names: str, lasting: bool = True) -> str:
        """Writes a file whole, as `atomic.write_bytes` does; returns its digest."""
        path = self.path(*names)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            # Half surrogates, of file names that are not UTF-8, become \udc80, which JSON reads back.
            content = content.encode("utf-8", "backslashreplace")
        atomic.write_bytes(path, content, lasting=lasting)
        return atomic.digest(content)

    def put_lines(self, lines: Iterable[dict[str, Any]], *names: str) -> str:
        """Writes a file with a JSON object per line; returns its digest."""
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        return self.put(text, *names)

    def put_record(self, record: dict[str, Any], *names: str) -> None:
        """Writes the record of a shard with its own digest; `record["digests"]` has those of the files."""
        content = json.dumps(record).encode()
        self.put(f"{atomic.digest(content)}\n".encode() + content, *names)

    def read_record(self, *names: str) -> dict[str, Any]:
        """What `put_record` wrote. Raises Damaged."""
        with _present(self.path(*names)):
            digest, _, content = self.path(*names).read_bytes().partition(b"\n")
        if atomic.digest(content).encode() != digest:
            raise Damaged(f"{self.path(*names)}: damaged, not what was written")
        return json.loads(content)

    def check(self, record: Mapping[str, Any]) -> None:
        """Compares the files of a shard with the digests in its record. Raises Damaged."""
        for name, expected in record["digests"].items():
            digest = hashlib.sha256()
            with _present(self.path(name)), self.path(name).open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
            if digest.hexdigest() != expected:
                raise Damaged(f"{self.path(name)}: damaged, not what was written")

    def whole(self, *names: str, check: bool = True) -> dict[str, Any] | None:
        """The record of a shard that is done, else None.

        With `check` its files are compared. A damaged shard is named on stderr, and its record is removed.
        """
        path = self.path(*names)
        try:
            if path.exists():
                record = self.read_record(*names)
                self.check(record if check else {"digests": {}})
                return record
        except Damaged as error:
            print(f"{error}; its shard is made again", file=sys.stderr)
            path.unlink()
        return None

    def done(self, *kinds: str) -> set[str]:
        """Names of the shards that have a file in each of these folders."""
        names = []
        for folder in map(self.path, kinds):
            paths = folder.iterdir() if folder.exists() else ()
            names.append({path.stem for path in paths if path.suffix != ".new"})
        return set.intersection(*names)

    def agree(self, settings: Mapping[str, Any]) -> None:
        """Notes the settings that results depend on; a key that no earlier run noted is added.

        Raises UserError: an earlier run noted another value.
        """
        path, settings = self.path(SETTINGS), json.loads(json.dumps(settings))
        known = regular_file.read_json(path, dict[str, Any], "settings of this job") if path.exists() else {}
        for key, new in settings.items():
            old = known.get(key, new)
            if isinstance(old, dict) and isinstance(new, dict):  # those of its keys that differ
                names = [name for name in old | new if old.get(name) != new.get(name)]
                old, new = ({name: x.get(name) for name in names} for x in (old, new))
            if old != new:
                raise errors.UserError(
                    f"--output {self.folder}: was begun with {key} {json.dumps(old)}, got"
                    f" {json.dumps(new)}; give another --output, or delete this one"
                )
        self.put(json.dumps(known | settings, indent=1) + "\n", SETTINGS)

    def join(self, kind: str, shards: Iterable[str], name: str) -> None:
        """Writes the file `name`, in which the files of the shards follow one another."""
        path = self.path(name)
        new = path.with_name(f"{name}.new") if "://" not in self.folder else path
        with new.open("wb") as file:
            for shard in shards:
                file.write(self.path(kind, f"{shard}.jsonl").read_bytes())
        if new != path:
            atomic.replace(new, path)


@contextlib.contextmanager
def _present(path: epath.Path) -> Iterator[None]:
    """Inside, it is Damaged that there is no such file."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise Damaged(f"{path}: {error.strerror or error}") from None


def check_faults(
    file: epath.PathLike, causes: Mapping[str, int], *, images: int, faulty: int, left: int, most: float
) -> None:
    """Prints how many images have each fault, by cause; `file` names them.

    Raises UserError: no image is left, or `faulty` of all `images` are more than the share `most`.
    """
    for cause, count in sorted(causes.items()):
        print(f"{file}: {count} {printable.plain(cause, 80)}", file=sys.stderr)
    if not left:
        raise errors.UserError(f"{file}: none of {images} images could be used")
    if faulty > most * images:
        raise errors.UserError(
            f"{file}: {faulty} of {images} images have a fault, more than --max-faults {most:g} allows;"
            " the results have the others"
        )


@contextlib.contextmanager
def watched(label: str, total: int, count: Callable[[], int]) -> Iterator[None]:
    """Shows the progress of workers in other processes; `count` counts the shards that are done."""
    ended, counter = threading.Event(), progress.Counter(label, total)

    def show() -> None:
        while not ended.wait(_SECONDS_BETWEEN_LOOKS):
            counter.add(count() - int(counter.done))
        counter.close()

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
