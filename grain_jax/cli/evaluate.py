"""The flags of `grain-jax evaluate KIND`."""

import argparse

from grain_jax.cli.config_parser import ConfigParser
from grain_jax.cli.parser import KindsParser, Parser
from grain_jax.cli.train import add_compilation_cache, add_processes
from grain_jax.cli.values import CHECKPOINT, add_orientation, number, positive
from grain_jax.config.evals import MOST_DRAWS, REGION_ORDERS, STANDALONE

CACHE = "~/.cache/grain_jax/text_features"
KINDS = {
    "zeroshot": "classifies a folder with one sub-folder a class",
    "linear-probe": "classifies by a logistic regression on image embeddings, also of few shots",
    "retrieval": "R@1, R@5, R@10 between images and captions, both ways",
    "grounding": "box IoU, Acc@0.5, region-to-description R@1",
    "boxes": "classes of given boxes, by the box head and by the nearest region",
    "near-misses": "the right description of given boxes among hard negatives",
    "maps": "where similarity maps of phrases are high, against their boxes",
    "suite": "all entries of a config such as eval; --config.KEY=VALUE changes it",
}
_MORE = "Prints the result as a table and writes it as JSON."
_EXAMPLES = {
    "zeroshot": "--images runs/aviary/unseen \\\n    --descriptions runs/aviary/unseen.json",
    "linear-probe": "--images runs/aviary/seen --shots 1,5,all",
    "retrieval": "--annotations runs/aviary/test/A.jsonl \\\n    --images runs/aviary/test",
    "grounding": "--annotations runs/aviary/test/A.jsonl \\\n    --images runs/aviary/test",
    "boxes": "--annotations lvis/A.jsonl --classes lvis \\\n    --images coco/val2017",
    "near-misses": "--annotations runs/aviary/test/A.jsonl \\\n    --images runs/aviary/test",
    "maps": "--annotations runs/aviary/test/A.jsonl \\\n    --images runs/aviary/test",
    "suite": "--config eval --config.data_dir=DIR",
}
ANNOTATED = ("retrieval", "grounding", "boxes", "near-misses", "maps")  # these read an A.jsonl


def parser() -> KindsParser:
    """The parser of `grain-jax evaluate`."""
    return KindsParser(
        "grain-jax evaluate",
        [_kind(name) for name in KINDS],
        example=f"grain-jax evaluate zeroshot --checkpoint runs/demo {_EXAMPLES['zeroshot']} --output zeroshot.json",
    )


def _kind(name: str) -> Parser:
    prog = f"grain-jax evaluate {name}"
    example = f"{prog} --checkpoint runs/demo {_EXAMPLES[name]} \\\n    --output {name}.json"
    if name == "suite":
        out = ConfigParser(prog, KINDS[name], keys=False, more=_MORE, example=example)
    else:
        out = Parser(prog, KINDS[name], more=_MORE, example=example)
    measured = out.add_argument_group("what is measured")
    add = measured.add_argument
    add("--checkpoint", metavar="DIR", required=True, help=CHECKPOINT)
    if isinstance(out, ConfigParser):
        group = out.add_argument_group("the suite")
        out.add_config(group, "eval")
        group.add_argument("--only", metavar="NAMES", help="names of entries, with commas between")
        out.needs = ("--config",)
        out.switch("--again", to=group, help="measure what OUT.json has already, too")
    else:
        add(
            "--images",
            metavar="DIR",
            required=True,
            help="folder that the annotations' paths start from"
            if name in ANNOTATED
            else "folder with one sub-folder of images a class",
        )
        add_orientation(measured)
    if name in ANNOTATED:
        add("--annotations", metavar="A.jsonl", required=True, help="one JSON object a line")
    if name == "near-misses":
        add(
            "--negatives",
            metavar="N",
            type=number(int, 1),
            default=10,
            help="negatives of a box; boxes with fewer are left out (default: 10)",
        )
    if name == "boxes":
        add(
            "--classes",
            metavar="FILE",
            help="file of class names, or the name of one of the package; default: the distinct descriptions",
        )
        add("--templates", metavar="FILE", help="prompts, one a line, with {} for the name")
    add("--output", metavar="OUT.json", required=True, help="file to write")
    if name == "zeroshot":
        _add_zeroshot(out)
    if name == "linear-probe":
        _add_linear_probe(out)
    add = out.add_argument_group("how").add_argument
    add(
        "--batch-size",
        metavar="N",
        type=positive,
        default=STANDALONE.batch_size,
        help="images at a time",
    )
    add(
        "--cache",
        metavar="DIR",
        default=CACHE,
        help='folder of text embeddings, computed once; "": none',
    )
    add_compilation_cache(out)
    add_processes(out)
    return out


def _add_zeroshot(out: Parser) -> None:
    group = out.add_argument_group("classes")
    add = group.add_argument
    add(
        "--descriptions",
        metavar="D.json",
        help="{class name: [description, ...]}: classes by descriptions too",
    )
    add(
        "--alpha",
        type=_alphas,
        action="append",
        metavar="A",
        help="share of the global score, 0 to 1, also several (0.5,1); default 1, with descriptions 1,0.5",
    )
    out.switch(
        "--names",
        default=True,
        to=group,
        help="use the classes' names; --no-names: a class is its descriptions alone (for names that mean nothing)",
    )
    add("--use-names", dest="names", type=_yes_or_no, help=argparse.SUPPRESS)
    add(
        "--region-order",
        choices=REGION_ORDERS,
        default="queries",
        metavar="ORDER",
        help=f"what the region score is averaged over: {', '.join(REGION_ORDERS)}; queries is the paper's (default)",
    )
    out.switch(
        "--unit-features",
        default=False,
        to=group,
        help="class features have unit length, as in CLIP; --no-unit-features: the mean, as in the paper's code",
    )
    add("--templates", metavar="FILE", help="prompts, one a line, with {} for the name")
    add("--predictions", metavar="FILE", help="file to write: a line of JSON an image")


def _add_linear_probe(out: Parser) -> None:
    add = out.add_argument_group("the probe").add_argument
    add(
        "--train",
        metavar="DIR",
        help="class folders to train on; default: a share of each class of --images",
    )
    add(
        "--shots",
        type=_shots,
        default=[0],
        metavar="N,N",
        help="training images a class, a probe each: 1,5,all; default all",
    )
    add(
        "--seeds",
        metavar="N",
        type=number(int, 1, MOST_DRAWS),
        default=5,
        help="draws of few shots, which are averaged",
    )


def _alphas(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected a number from 0 to 1, or several with commas between"
        ) from None


def _shots(text: str) -> list[int]:
    parts = ["0" if part == "all" else part for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected images a class, or all, or several with commas between (1,5,all)"
        )
    return list(map(int, parts))


def _yes_or_no(text: str) -> bool:
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected yes or no")
    return text == "yes"
