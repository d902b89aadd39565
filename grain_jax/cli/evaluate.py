"""The flags of `grain-jax evaluate KIND`."""

import argparse

from grain_jax.cli.flags import flag, many
from grain_jax.cli.parser import Command, Processes
from grain_jax.config.evals import MOST_DRAWS, ORIENTATIONS, REGION_ORDERS, STANDALONE


class _Kind(Processes):
    """What all kinds have.

    what is measured:
      --checkpoint DIR    workdir, checkpoint or converted folder; or aviary-tiny, hf://ORG/NAME
      --output OUT.json   file to write; the result is printed as a table, too
      --batch-size N      images at a time
      --cache DIR         folder of text embeddings, computed once; "": none
    """

    checkpoint: str
    output: str
    batch_size: int = STANDALONE.batch_size
    cache: str = "~/.cache/grain_jax/text_features"


class _Labelled(_Kind):
    """Kinds on images with classes.

    the images:
      --images DIR        folder with one sub-folder of images a class
      --orientation exif|file  exif turns images as viewers do; file takes the pixels as they are stored
    """

    images: str
    orientation: str = flag(ORIENTATIONS[0], choices=ORIENTATIONS)


class _Annotated(_Kind):
    """Kinds on images with annotations.

    the images:
      --images DIR           folder that the annotations' paths start from
      --annotations A.jsonl  one JSON object a line
      --orientation exif|file  exif turns images as viewers do, and boxes are of those pixels; file takes the pixels as
        they are stored
    """

    images: str
    annotations: str
    orientation: str = flag(ORIENTATIONS[0], choices=ORIENTATIONS)


def _alphas(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected a number from 0 to 1, or several with commas between"
        ) from None


class ZeroShot(_Labelled, name="evaluate zeroshot"):
    """Classifies a folder with one sub-folder a class.

    Example:
      grain-jax evaluate zeroshot --checkpoint runs/demo --images runs/aviary/unseen \\
          --descriptions runs/aviary/unseen.json --output zeroshot.json

    classes:
      --descriptions D.json   {class name: [description, ...]}: classes by descriptions too
      --alpha A               share of the global score, 0 to 1, also several (0.5,1); default 1, with descriptions 1,0.5
      --[no-]names            use the classes' names; --no-names: a class is its descriptions alone (for names that mean
        nothing)
      --region-order ORDER    what the region score is averaged over: queries, descriptions; queries is the paper's
        (default)
      --[no-]unit-features    class features have unit length, as in CLIP; --no-unit-features: the mean, as in the
        paper's code
      --templates FILE        prompts, one a line, with {} for the name
      --predictions FILE      file to write: a line of JSON an image
    """

    descriptions: str | None = None
    alpha: list[list[float]] = many(parse=_alphas)
    names: bool = True
    region_order: str = flag("queries", choices=REGION_ORDERS)
    unit_features: bool = False
    templates: str | None = None
    predictions: str | None = None


def _shots(text: str) -> list[int]:
    parts = ["0" if part == "all" else part for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected images a class, or all, or several with commas between (1,5,all)"
        )
    return list(map(int, parts))


class LinearProbe(_Labelled, name="evaluate linear-probe"):
    """Classifies by a logistic regression on image embeddings, also of few shots.

    Example:
      grain-jax evaluate linear-probe --checkpoint runs/demo --images runs/aviary/seen \\
          --shots 1,5,all --output probe.json

    the probe:
      --train DIR   class folders to train on; default: a share of each class of --images
      --shots N,N   training images a class, a probe each: 1,5,all; default all
      --seeds N     draws of few shots, which are averaged
    """

    train: str | None = None
    shots: tuple[int, ...] = flag((0,), parse=_shots)
    seeds: int = flag(5, high=MOST_DRAWS)


class Retrieval(_Annotated, name="evaluate retrieval"):
    """R@1, R@5, R@10 between images and captions, both ways.

    Example:
      grain-jax evaluate retrieval --checkpoint runs/demo --annotations runs/aviary/test/A.jsonl \\
          --images runs/aviary/test --output retrieval.json
    """


class Grounding(_Annotated, name="evaluate grounding"):
    """Box IoU, Acc@0.5, region-to-description R@1.

    Example:
      grain-jax evaluate grounding --checkpoint runs/demo --annotations runs/aviary/test/A.jsonl \\
          --images runs/aviary/test --output grounding.json
    """


class Boxes(_Annotated, name="evaluate boxes"):
    """Classes of given boxes, by the box head and by the nearest region.

    Example:
      grain-jax evaluate boxes --checkpoint runs/demo --annotations lvis/A.jsonl --classes lvis \\
          --images coco/val2017 --output boxes.json

    classes:
      --classes FILE     file of class names, or the name of one of the package; default: the distinct descriptions
      --templates FILE   prompts, one a line, with {} for the name
    """

    classes: str | None = None
    templates: str | None = None


class NearMisses(_Annotated, name="evaluate near-misses"):
    """The right description of given boxes among hard negatives.

    Example:
      grain-jax evaluate near-misses --checkpoint runs/demo --annotations runs/aviary/test/A.jsonl \\
          --images runs/aviary/test --output near-misses.json

    negatives:
      --negatives N   negatives of a box; boxes with fewer are left out
    """

    negatives: int = 10


class Maps(_Annotated, name="evaluate maps"):
    """Where similarity maps of phrases are high, against their boxes.

    Example:
      grain-jax evaluate maps --checkpoint runs/demo --annotations runs/aviary/test/A.jsonl \\
          --images runs/aviary/test --output maps.json
    """


class Suite(_Kind, name="evaluate suite"):
    """All entries of a config such as eval; --config.KEY=VALUE changes it.

    Example:
      grain-jax evaluate suite --checkpoint runs/demo --config eval --config.data_dir=DIR \\
          --output suite.json

    the suite:
      --config FILE|NAME[:ARG]  a Python file with get_config, or a config of the package, such as eval; ARG goes to
        get_config
      --config.KEY VALUE   changes a key; the file has the keys
      --only NAMES         names of entries, with commas between
      --[no-]again         measure what OUT.json has already, too
    """

    config: str
    overrides: list[str] = many(name="config.key")
    only: str | None = None
    again: bool = False


_KINDS = (ZeroShot, LinearProbe, Retrieval, Grounding, Boxes, NearMisses, Maps, Suite)


class Evaluate(Command, name="evaluate", kinds=_KINDS):
    """Measures a checkpoint: classification, retrieval, grounding.

    Example:
      grain-jax evaluate zeroshot --checkpoint runs/demo --images runs/aviary/unseen \\
          --descriptions runs/aviary/unseen.json --output zeroshot.json
    """
