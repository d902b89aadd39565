"""Writes the dataset: images by several processes, annotations in the order of the images."""

import dataclasses
import functools
import io
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from grain_jax.core import ahead, atomic, errors, progress
from grain_jax.data import aviary as package
from grain_jax.data.aviary import annotations, drawing, masks
from grain_jax.data.aviary.annotations import EXACT
from grain_jax.data.aviary.settings import DEFAULT, TEST_NEGATIVES, Settings
from grain_jax.data.aviary.species import Species, species_of


@dataclasses.dataclass(frozen=True)
class Task:
    """One image to draw, number `index` of `split`: the file `image` below `folder` of the dataset."""

    split: str
    index: int
    species: Species
    folder: str
    image: str


def drawing_of(settings: Settings, split: str, index: int, species: Species) -> drawing.Drawing:
    """Image `index` of `split` ("training", "seen", "unseen" or "test")."""
    rng = random.Random(f"aviary {settings.seed}/{split}/{index}")
    return drawing.draw(species, rng=rng, size=settings.size, pose=settings.pose)


def record_of(settings: Settings, task: Task, drawn: drawing.Drawing) -> dict | None:
    """The annotation of a training image (noisy) or a test image (exact), None for others."""
    key = f"aviary {settings.seed}/{task.split}/{task.index}"
    if task.split not in ("training", "test"):
        return None
    exact = task.split == "test"
    noise, num_parts = (EXACT, 4) if exact else (settings.noise, settings.caption_parts)
    synthetic = annotations.synthetic_caption(task.species, drawn, key, noise, parts=num_parts)
    texts = {"caption": synthetic}
    if not exact:
        others = tuple(species for species in species_of(settings).training if species != task.species)
        web = annotations.web_caption(task.species, others, drawn, key, noise)
        texts = {"caption": web, "synthetic_caption": synthetic}
    parts = {"least": settings.least_parts, "most": settings.most_parts}
    regions = annotations.regions(task.species, drawn, key, noise, **parts)
    number = TEST_NEGATIVES if exact else settings.negatives
    for region in regions:
        if exact:
            region["score"] = 1.0
        if number:
            said = region["description"]
            region["negatives"] = annotations.negatives(task.species, said, key, number)
    return {"image": task.image, **texts, "regions": regions, "id": f"{task.split}-{task.index}"}


def write(output: epath.PathLike, settings: Settings = DEFAULT, *, processes: int = 1) -> bool:
    """Writes the dataset to the folder `output` (local or remote); its README.md describes the files.

    With more than one process the main module of the caller must be importable (they are spawned). Returns
    False if `output` holds the complete dataset of these settings. Raises UserError: it holds another.
    """
    output = epath.Path(output)
    aviary = species_of(settings)
    values = _json(dataclasses.asdict(settings))
    stamp, complete = output / "settings.json", (output / "A.jsonl").exists()  # written first, and last
    if stamp.read_text() != values if stamp.exists() else complete:
        raise errors.UserError(
            f"{output}: holds another dataset, expected an empty folder or one made with the same settings;"
            " remove it or choose another --output"
        )
    if complete:
        return False
    output.mkdir(parents=True, exist_ok=True)
    atomic.write_text(stamp, values)
    tasks = list(tasks_of(settings))
    for folder in sorted({(task.folder + "/" + task.image).rpartition("/")[0] for task in tasks}):
        (output / folder).mkdir(parents=True, exist_ok=True)
    if groups := {group_of(settings, task.species) for task in tasks if task.split == "test"}:
        masks.begin(output, groups)
    make = functools.partial(_make, str(output), settings)
    made = ahead.in_processes(make, tasks, processes if processes > 1 else 0)
    records = progress.over(made, total=len(tasks), what="aviary")
    lines: dict[str, list[dict]] = {"training": [], "seen": [], "unseen": []}
    for task, record in zip(tasks, records, strict=True):
        if record is not None:
            group = "training" if task.split == "training" else group_of(settings, task.species)
            lines[group].append(record)
    both = sorted(lines["seen"] + lines["unseen"], key=lambda line: line["image"])
    _write_lines(output / "test" / "A.jsonl", both)
    for name, group in (("seen", aviary.training), ("unseen", aviary.held_out)):
        _write_lines(output / "test" / f"{name}.jsonl", lines[name])
        descriptions = {species.name: species.descriptions for species in group}
        (output / f"{name}.json").write_text(_json(descriptions))
    made_by = f"# Aviary\n\nMade by `grain-jax aviary`, seed {settings.seed}."
    made_by += " CC0 1.0 (drawn by a program; no rights reserved).\n\n"
    (output / "README.md").write_text(made_by + package.__doc__)
    _write_lines(output / "A.jsonl", lines["training"])
    return True


def group_of(settings: Settings, species: Species) -> str:
    """The group of a species: `unseen` if it is held out, else `seen`."""
    return "unseen" if species.genus >= settings.genera else "seen"


def tasks_of(settings: Settings) -> Iterator[Task]:
    """All images of the dataset. In "training" and "test" the species take turns, in an order
    drawn anew for each round; every second test image is of an unseen species."""
    aviary = species_of(settings)
    suffix = "png" if settings.size <= 128 else "jpg"
    for split, groups, count, folder in (
        ("training", (aviary.training,), settings.images, "."),
        ("test", (aviary.training, aviary.held_out), settings.test_images, "test"),
    ):
        groups = tuple(filter(None, groups))
        for index in range(count):
            turn, which = divmod(index, len(groups))
            group = groups[which]
            order = _order(f"{settings.seed}/{split}/{which}/{turn // len(group)}", len(group))
            species = group[order[turn % len(group)]]
            yield Task(split, index, species, folder, f"images/{index:06d}.{suffix}")
    for split, group, each in (
        ("seen", aviary.training, settings.seen_per_species),
        ("unseen", aviary.held_out, settings.unseen_per_species),
    ):
        for number, species in enumerate(group):
            for turn in range(each):
                image = f"{species.name}/{turn:04d}.{suffix}"
                yield Task(split, turn * len(group) + number, species, split, image)


@functools.lru_cache(maxsize=4)
def _order(key, count):
    return random.Random(f"aviary order {key}").sample(range(count), count)


def _make(output, settings, task):
    """Draws and writes one image, with label images if it is a test image; returns its annotation."""
    drawn = drawing_of(settings, task.split, task.index, task.species)
    encoded = io.BytesIO()
    if task.image.endswith(".png"):
        drawn.image.save(encoded, "PNG", compress_level=6)
    else:
        drawn.image.save(encoded, "JPEG", quality=95, subsampling=0)
    output = epath.Path(output)
    (output / task.folder / task.image).write_bytes(encoded.getvalue())
    if task.split == "test":
        group, name = group_of(settings, task.species), task.image.rpartition("/")[2]
        masks.save(output, group, name, encoded.getvalue(), drawn)
    return record_of(settings, task, drawn)


def _json(value):
    return json.dumps(value, indent=1) + "\n"


def _write_lines(path: epath.Path, records: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, "".join(json.dumps(record) + "\n" for record in records))
