"""Scenes to train and measure on: cut-outs of things, with phrases, on photographs of places.

    python -m examples.scenes --cutouts DIR --places DIR --output mine

--cutouts  PNGs with transparency; beside NAME.png, the first line of NAME.txt is a phrase
--kinds    JSON {"folder of cut-outs": "a kind"}: what captions say of things whose phrase is quiet

Captions name some things of a scene, some by their kind, and 10% describe another scene; region descriptions
name all. Quiet phrases stand in region descriptions only. Test scenes have other places, one cut-out of each
phrase that has three or more, and pairs of things that training never shows together.

    train/A.jsonl, train/images        captions, and regions with box and phrase, for `grain-jax build`
    train/detected.jsonl               the same, with boxes as a detector makes them
    test/                              the same; four lines in a row differ in one thing (evaluator/groups.py)
    test/masks, test/classes.txt       for `grain-jax evaluate segmentation`
    test/instances.json                for `grain-jax evaluate detection`
    quiet/CLASS, seen/CLASS            images of a thing among others, for `grain-jax evaluate zeroshot`
    validation/                        other images of all this, to choose settings on
    quiet.json, seen.json              their phrases
"""

import argparse
import itertools
import json
import pathlib
import random
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from examples.scenes import things
from grain_jax.core import progress

GROUP = 4  # test scenes that differ in one thing
IMAGES_PER_CLASS = 10
PAIRS_HELD_OUT = 0.1
OTHER_SCENE = 0.1  # captions that describe another scene
KIND = 0.2  # things that a caption calls by their kind though their phrase is loud
MOVED, OF_ANOTHER, MISSED = 0.2, 0.2, 0.1  # boxes of a detector
MOST_MOVED = 0.25  # of an edge, as a share of the side
WEB = ("{}", "{} here", "photo: {}", "we saw {} today", "{}, for sale", "{} (5)", "DSC_0{n} {}")
SYNTHETIC = ("an image of {}", "there is {} in this image", "this shows {}")


class Scenes:
    """All that one seed draws."""

    def __init__(self, args: argparse.Namespace):
        self.args, rng = args, random.Random(f"{args.seed} split")
        every = things.cutouts(args.cutouts, args.exclude_cutouts, args.least_colours)
        places = list(things.read(args.places, args.exclude_places).values())
        if len(every) < 10 or len(places) < 2:
            sys.exit(f"got {len(every)} phrases and {len(places)} places, expected 10 and 2 or more")
        kinds = json.loads(args.kinds.read_text())
        self.kinds = {}
        for phrase, images in every.items():  # the kind of the deepest folder that has one
            folders = map(str, pathlib.PurePath(min(images)).parents)
            self.kinds[phrase] = next((kinds[x] for x in folders if x in kinds), "")
        self.quiet = sorted(things.quiet_phrases(self.kinds, args.quiet, rng))
        self.loud = [x for x in every if x not in self.quiet]
        pairs = list(itertools.combinations(every, 2))
        self.held_out = {frozenset(x) for x in rng.sample(pairs, int(PAIRS_HELD_OUT * len(pairs)))}
        self.images: dict[str, dict[str, list[Image.Image]]] = {"train": {}, "test": {}}
        for phrase, images in every.items():
            cut = -1 if len(images) > 2 else None
            self.images["train"][phrase] = list(images.values())[:cut]
            self.images["test"][phrase] = list(images.values())[cut:]
        rng.shuffle(places)
        cut = max(1, len(places) // 5)
        self.places = {"train": places[cut:], "test": places[:cut]}

    def draw(self, rng: random.Random, split: str, *scenes: Sequence[str]) -> list[things.Scene]:
        """Scenes of these phrases, which share the place, the squares and the looks of common things."""
        ground = things.background(rng, rng.choice(self.places[split]), self.args.size)
        spots = things.layout(rng, len(scenes[0]), self.args.sides)
        chosen = {x: rng.choice(self.images[split][x]) for phrases in scenes for x in phrases}
        seed = rng.random()
        return [
            things.scene(random.Random(seed), ground, [chosen[x] for x in phrases], spots)
            for phrases in scenes
        ]

    def training_line(self, number: int) -> dict[str, Any]:
        """Draws a scene of train/; returns its line of A.jsonl."""
        rng, pairs = random.Random(f"{self.args.seed} train {number}"), self.held_out
        while pairs & self.held_out:
            phrases = rng.sample(sorted(self.kinds), rng.randint(*self.args.objects))
            pairs = {*map(frozenset, itertools.combinations(phrases, 2))}
        (scene,) = self.draw(rng, "train", phrases)
        names = [self.named(rng, x) for x in phrases]
        web = rng.sample(names, rng.randint(1, min(2, len(names))))
        if rng.random() < OTHER_SCENE:
            web = [self.named(rng, rng.choice(self.loud))]
        caption = rng.choice(WEB).format(things.listed(web), n=rng.randint(100, 999))
        synthetic = rng.choice(SYNTHETIC).format(things.listed(rng.sample(names, len(names))))
        texts = dict(caption=caption, synthetic_caption=synthetic)
        return self.line("train", number, phrases, scene) | texts

    def named(self, rng: random.Random, phrase: str) -> str:
        """How a caption names it."""
        by_kind = phrase in self.quiet or rng.random() < KIND
        return by_kind and self.kinds[phrase] or phrase

    def line(self, split: str, number: int, phrases: Sequence[str], scene: things.Scene) -> dict:
        """Saves the image; returns its line of A.jsonl, without captions."""
        name = f"images/{number:06}.jpg"
        save(scene.image, self.args.output / split / name)
        boxed = zip(phrases, scene.boxes_xyxy)
        regions = [dict(box=box, description=phrase, score=1.0) for phrase, box in boxed]
        return {"image": name, "regions": regions}

    def write_test(self, split: str) -> None:
        """Writes test/ or validation/: groups whose first two things are a pair that training never shows."""
        folder, lines, objects = self.args.output / split, [], []
        ids = {x: i for i, x in enumerate(self.loud, 1)}
        pairs = {x: [y for y in self.loud if frozenset((x, y)) in self.held_out] for x in self.loud}
        common = [x for x, partners in pairs.items() if len(partners) >= GROUP + self.args.objects[1]]
        if not common:
            sys.exit(f"got {len(self.loud)} loud phrases, expected more: test scenes need held-out pairs")
        for group in range(self.args.test // GROUP):
            rng = random.Random(f"{self.args.seed} {split} {group}")
            second, more = rng.choice(common), max(0, rng.randint(*self.args.objects) - 2)
            firsts = rng.sample(pairs[second], GROUP)
            rest = [x for x in self.loud if x not in (second, *firsts)]
            others = [second, *rng.sample(rest, more)]
            scenes = [[x, *others] for x in firsts]
            for phrases, scene in zip(scenes, self.draw(rng, "test", *scenes)):
                number, caption = len(lines), SYNTHETIC[0].format(things.listed(phrases))
                lines.append(self.line(split, number, phrases, scene) | dict(caption=caption))
                id_of = np.array([0, *(ids[x] for x in phrases)], np.uint16)
                save(Image.fromarray(id_of[scene.mask]), folder / "masks" / f"{number:06}.png")
                for x, (x1, y1, x2, y2) in zip(phrases, scene.boxes_xyxy):
                    of = dict(id=len(objects) + 1, image_id=number, category_id=ids[x])
                    objects.append(of | dict(bbox=[x1, y1, x2 - x1, y2 - y1], iscrowd=0))
        images = [dict(id=i, file_name=x["image"]) for i, x in enumerate(lines)]
        names = [dict(id=i, name=x) for x, i in ids.items()]
        write(folder / "instances.json", dict(images=images, annotations=objects, categories=names))
        (folder / "classes.txt").write_text("\n".join(["a place", *self.loud]) + "\n")
        write(folder / "A.jsonl", *lines)

    def write_classes(self) -> None:
        """Writes quiet/, seen/ and their phrases, each among things that are no class; and validation/."""
        rng, output = random.Random(f"{self.args.seed} classes"), self.args.output
        seen = rng.sample(self.loud, min(len(self.quiet), len(self.loud) // 2))
        others = [x for x in self.loud if x not in seen]
        for part in ("", "validation"):
            for name, phrases in (("quiet", self.quiet), ("seen", seen)):
                write(output / part / f"{name}.json", {x: [x] for x in phrases})
                for phrase, number in itertools.product(phrases, range(IMAGES_PER_CLASS)):
                    shown = [phrase, *rng.sample(others, self.args.objects[1] - 1)]
                    path = output / part / name / phrase / f"{number}.jpg"
                    save(self.draw(rng, "test", shown)[0].image, path)


def detected(line: dict[str, Any], size: int, rng: random.Random) -> dict[str, Any]:
    """A line of A.jsonl with boxes as an open-vocabulary detector makes them, of an image of `size` pixels.

    A share MISSED of the regions is left out, OF_ANOTHER have the box of another region, and the edges of
    MOVED are moved by up to MOST_MOVED of the box.
    """
    regions, boxes = [], [x["box"] for x in line["regions"]]
    for i, region in enumerate(line["regions"]):
        others = boxes[:i] + boxes[i + 1 :]
        box = rng.choice(others) if others and rng.random() < OF_ANOTHER else boxes[i]
        if rng.random() < MOVED:
            sides = [box[2] - box[0], box[3] - box[1]] * 2
            moved = (x + side * rng.uniform(-1, 1) * MOST_MOVED for x, side in zip(box, sides))
            box = [round(min(max(0, x), size), 1) for x in moved]
        if rng.random() >= MISSED:
            regions.append(region | dict(box=box))
    return line | dict(regions=regions)


def save(image: Image.Image, path: pathlib.Path) -> None:
    """Saves it, and makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=95)


def write(path: pathlib.Path, *contents: Any) -> None:
    """Writes JSON, a line each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(x) + "\n" for x in contents))


def parse() -> argparse.Namespace:
    """The command line."""
    pair = lambda kind: lambda text: tuple(map(kind, text.split(",")))
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m examples.scenes", None, __doc__, formatter_class=raw)
    add, here = parser.add_argument, pathlib.Path(__file__).parent
    for name in ("cutouts", "places", "output"):
        add(f"--{name}", type=pathlib.Path, required=True, metavar="DIR")
    add("--kinds", type=pathlib.Path, default=here / "kinds.json", metavar="FILE")
    for name in ("cutouts", "places"):
        add(f"--exclude-{name}", default="", metavar="REGEX", help="paths to leave out")
    add("--least-colours", type=int, default=250, metavar="N", help="a drawing has fewer")
    for name, default in dict(train=8000, test=600, quiet=60, size=96, seed=0).items():
        add(f"--{name}", type=int, default=default, metavar="N")
    for name, kind, default in (("objects", int, (2, 3)), ("sides", float, (0.35, 0.6))):
        add(f"--{name}", type=pair(kind), default=default, metavar="LEAST,MOST")
    return parser.parse_args()


def main() -> None:
    """Writes everything."""
    scenes = Scenes(parse())
    print(f"{len(scenes.loud)} loud and {len(scenes.quiet)} quiet phrases")
    scenes.write_classes()
    scenes.write_test("test")
    scenes.write_test("validation")
    numbers = progress.over(range(scenes.args.train), total=scenes.args.train, what="scenes")
    lines = [scenes.training_line(number) for number in numbers]
    write(scenes.args.output / "train" / "A.jsonl", *lines)
    rng = random.Random(f"{scenes.args.seed} detected")
    lines = [detected(line, scenes.args.size, rng) for line in lines]
    write(scenes.args.output / "train" / "detected.jsonl", *lines)


if __name__ == "__main__":
    main()
