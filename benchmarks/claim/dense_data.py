"""Data of the fourth design: an aviary or clothes, and the halves of their classes and test images."""

import json
import pathlib
from collections.abc import Mapping

from benchmarks.claim import data, dense
from grain_jax.data.aviary import generate, masks
from grain_jax.data.aviary.arguments import Aviary
from grain_jax.data.aviary.species import species_of

DIVIDED = "divided"  # an empty file, written when the test images are divided


def prepare(name: str, clothes: pathlib.Path | None, work: pathlib.Path) -> pathlib.Path:
    """Makes the data set `name` and its views, unless they exist; returns its folder.

    Args:
      name: `dense.MAIN` or `dense.CLOTHES`.
      clothes: folder that `python -m benchmarks.fetch fashion` made.
      work: folder for all output.
    """
    views = work / "views" / name
    if name == dense.CLOTHES:
        main = data.prepare(name, clothes, work)
        for ours, theirs in {"both_test": "A", "unseen_test": "unseen"}.items():
            data.link(main / "test" / f"{theirs}.jsonl", views / f"{ours}.jsonl")
        return main
    return prepare_aviary(name, dense.AVIARY, work)


def prepare_aviary(name: str, aviary: Mapping[str, object], work: pathlib.Path) -> pathlib.Path:
    """Draws an aviary with these options of `grain-jax aviary` and divides it, unless it is there; returns its folder."""
    main, views = work / name, work / "views" / name
    data.draw(main, work / "records", name, aviary)
    data.make_views(main, views)
    divide_tests(main, views, aviary)
    return main


def divide_tests(main: pathlib.Path, views: pathlib.Path, aviary: Mapping[str, object]) -> None:
    """Divides the test images of an aviary in two: those of unseen species as `data.make_views` does, others in turn.

    Writes both_SPLIT.jsonl and unseen_SPLIT.jsonl, and links GROUP_SPLIT_masks, folders for `evaluate segmentation`.
    """
    if (views / DIVIDED).exists():
        return
    halves = halves_of(main, aviary)
    lines = (main / "test" / "A.jsonl").read_text().splitlines(keepends=True)
    of_half: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        image = json.loads(line)["image"]
        of_half.setdefault(halves[image], []).append(line)
        group, split = halves[image]
        _link_masks(main, views / f"{group}_{split}_masks", group, pathlib.PurePath(image))
    for split in dense.SPLITS:
        seen, unseen = (of_half.get((group, split), []) for group in masks.GROUPS)
        (views / f"both_{split}.jsonl").write_text("".join([*seen, *unseen]))
        (views / f"unseen_{split}.jsonl").write_text("".join(unseen))
    (views / DIVIDED).touch()


def halves_of(main: pathlib.Path, aviary: Mapping[str, object]) -> dict[str, tuple[str, str]]:
    """Test image -> its group of species and its split."""
    settings = Aviary.parse([f"--output={main}", *data.aviary_flags(aviary)]).settings
    names = [one.name for one in species_of(settings).held_out]  # in the order of unseen.json
    validation = set(names[: len(names) // 2])
    halves, seen = {}, 0
    for task in generate.tasks_of(settings):
        if task.split != "test":
            continue
        group = generate.group_of(settings, task.species)
        is_validation = task.species.name in validation
        if group == "seen":
            is_validation, seen = seen % 2 == 0, seen + 1
        halves[task.image] = group, dense.SPLITS[not is_validation]
    return halves


def _link_masks(main, folder, group, image) -> None:
    source = main / masks.FOLDER / group
    data.link(source / "images" / image.name, folder / "images" / image.name)
    for kind, classes in masks.FILES.items():
        data.link(source / kind / f"{image.stem}.png", folder / kind / f"{image.stem}.png")
        data.link(source / classes, folder / classes)
