"""Data sets of `benchmarks.claim`: drawn or the user's own, with added noise, split into validation and test classes."""

import json
import pathlib
import random
from collections.abc import Mapping

from grain_jax.data import build, example

from benchmarks.claim import design
from benchmarks.claim.results import ClaimError
from grain_jax.files import images

PARTS = "A.jsonl seen unseen unseen.json test/A.jsonl test/seen.jsonl test/unseen.jsonl".split()


def prepare(data: str, source: pathlib.Path | None, work: pathlib.Path) -> pathlib.Path:
    """Makes the data set `data` unless it exists: drawn, or the main one with noise; returns its folder.

    Args:
      source: the user's own main data set, or None to draw one.
      work: folder for all output.
    """
    records = work / "records"
    main = source or work / "main"
    if data in design.NOISE:
        prepare("main", source, work)
        annotations = work / f"{data}.jsonl"
        if not annotations.exists():
            degrade(main / "A.jsonl", annotations, **design.NOISE[data])
        _build(annotations, main, records, data)
        return main
    if source is None:
        main = work / data
        draw(main, records, data, {**design.AVIARY, **design.AVIARIES[data]})
    else:
        missing = [part for part in PARTS if not (main / part).exists()]
        if missing:
            raise ClaimError(
                f"{main}: has no {', '.join(missing)}; expected the files that python -m benchmarks.claim --help lists"
            )
        _build(main / "A.jsonl", main, records, data)
    make_views(main, work / "views" / data)
    return main


def draw(
    output: pathlib.Path, records: pathlib.Path, name: str, options: Mapping[str, object]
) -> None:
    """Draws an aviary with these options of `grain-jax aviary` and builds its records, unless they exist."""
    from grain_jax.data.aviary import __main__ as aviary

    flags = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    if aviary.main([f"--output={output}", f"--records={records}", f"--name={name}", *flags]):
        raise ClaimError(f"{output}: could not be drawn")


def _build(annotations, images, records, name):
    if (records / name / example.VERSION).exists():  # moved there when it is complete
        return
    arguments = ["--annotations", annotations, "--images", images, "--output", records]
    if build.main([*map(str, arguments), "--name", name]):
        raise ClaimError(f"{annotations}: could not be built")


def degrade(
    source: pathlib.Path,
    target: pathlib.Path,
    *,
    misses: float = 0.0,
    jitter: float = 0.0,
    wrong: float = 0.0,
) -> None:
    """Writes annotations with noise added to their regions (see `design.NOISE`); captions are copied."""
    records = [json.loads(line) for line in source.read_text().splitlines()]
    descriptions = [region["description"] for r in records for region in r.get("regions", [])]
    random_ = random.Random(f"{misses} {jitter} {wrong}")
    for record in records:
        kept = []
        for region in record.get("regions", []):
            if random_.random() < misses:
                continue
            x1, y1, x2, y2 = region["box"]
            if jitter:
                encoded = images.read_file(source.parent / record["image"])
                right, bottom = images.open_image(encoded, record["image"]).size
                width, height = (x2 - x1) * jitter, (y2 - y1) * jitter
                x1, x2 = sorted(min(max(0.0, random_.gauss(x, width)), right) for x in (x1, x2))
                y1, y2 = sorted(min(max(0.0, random_.gauss(y, height)), bottom) for y in (y1, y2))
            said = region["description"]
            if random_.random() < wrong:
                said = random_.choice(descriptions)
                region = {key: x for key, x in region.items() if key != "negatives"}
            if x2 - x1 > 0.5 and y2 - y1 > 0.5:  # of a pixel
                kept.append({**region, "box": [x1, y1, x2, y2], "description": said})
        record["regions"] = kept
    part = target.with_suffix(".part")
    part.write_text("".join(json.dumps(record) + "\n" for record in records))
    part.rename(target)


def make_views(main: pathlib.Path, views: pathlib.Path) -> None:
    """Links seen images (alternately) and unseen classes (by halves) into folders for validation and test."""
    if (views / "sentences.json").exists():
        return
    described = json.loads((main / "unseen.json").read_text())
    names = list(described)  # the order of the file keeps related classes together
    halves = {"validation": names[: len(names) // 2], "test": names[len(names) // 2 :]}
    for split, classes in halves.items():
        for name in classes:
            _link(main / "unseen" / name, views / f"unseen_{split}" / name)
    for folder in sorted((main / "seen").iterdir()):
        for i, image in enumerate(sorted(folder.iterdir())):
            split = ("validation", "test")[i % 2]
            _link(image, views / f"seen_{split}" / folder.name / image.name)
    sentences = {name: [", ".join(words)] for name, words in described.items()}
    (views / "sentences.json").write_text(json.dumps(sentences, indent=1) + "\n")


def _link(target: pathlib.Path, link: pathlib.Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(target.resolve())
