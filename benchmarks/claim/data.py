"""Data sets of `benchmarks.claim`: drawn or the user's own, split into validation and test classes."""

import contextlib
import fcntl
import json
import pathlib
from collections.abc import Iterator, Mapping

from benchmarks.claim import design
from benchmarks.claim.results import ClaimError
from grain_jax.data import build, example

PARTS = "A.jsonl seen unseen unseen.json test/A.jsonl test/seen.jsonl test/unseen.jsonl".split()


def prepare(data: str, source: pathlib.Path | None, work: pathlib.Path) -> pathlib.Path:
    """Makes the data set `data` unless it exists; returns its folder.

    Args:
      source: the user's own main data set, or None to draw one.
      work: folder for all output.
    """
    records = work / "records"
    if source is None:
        main = work / data
        draw(main, records, data, {**design.AVIARY, **design.AVIARIES[data]})
    else:
        main = source
        missing = [part for part in PARTS if not (main / part).exists()]
        if missing:
            raise ClaimError(
                f"{main}: has no {', '.join(missing)}; expected the files that python -m benchmarks.claim --help lists"
            )
        if not (records / data / example.VERSION).exists():  # moved there when it is complete
            arguments = ["--annotations", main / "A.jsonl", "--images", main, "--output", records]
            if build.main([*map(str, arguments), "--name", data]):
                raise ClaimError(f"{main}: could not be built")
    make_views(main, work / "views" / data)
    return main


@contextlib.contextmanager
def alone(data: str, work: pathlib.Path) -> Iterator[None]:
    """Holds a lock, so that one process at a time makes the data set."""
    locks = work / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / f"data-{data}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def draw(
    output: pathlib.Path, records: pathlib.Path, name: str, options: Mapping[str, object]
) -> None:
    """Draws an aviary with these options of `grain-jax aviary` and builds its records, unless they exist."""
    from grain_jax.data.aviary import __main__ as aviary

    places = [f"--output={output}", f"--records={records}", f"--name={name}"]
    if aviary.main([*places, *aviary_flags(options)]):
        raise ClaimError(f"{output}: could not be drawn")


def aviary_flags(options: Mapping[str, object]) -> list[str]:
    """The options as flags of `grain-jax aviary`."""
    return [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]


def make_views(main: pathlib.Path, views: pathlib.Path) -> None:
    """Links seen images (alternately) and unseen classes (by halves) into folders for validation and test."""
    if (views / "sentences.json").exists():
        return
    described = json.loads((main / "unseen.json").read_text())
    names = list(described)  # the order of the file keeps related classes together
    halves = {"validation": names[: len(names) // 2], "test": names[len(names) // 2 :]}
    for split, classes in halves.items():
        for name in classes:
            link(main / "unseen" / name, views / f"unseen_{split}" / name)
    for folder in sorted((main / "seen").iterdir()):
        for i, image in enumerate(sorted(folder.iterdir())):
            split = ("validation", "test")[i % 2]
            link(image, views / f"seen_{split}" / folder.name / image.name)
    sentences = {name: [", ".join(words)] for name, words in described.items()}
    (views / "sentences.json").write_text(json.dumps(sentences, indent=1) + "\n")


def link(target: pathlib.Path, place: pathlib.Path) -> None:
    """Makes a symbolic link, and the folders above it, unless there is one."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.is_symlink():
        place.symlink_to(target.resolve())
