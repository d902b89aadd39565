"""The flags of `grain-jax embed`."""

from grain_jax.cli.parser import Parser
from grain_jax.cli.train import add_compilation_cache, add_processes
from grain_jax.cli.values import CHECKPOINT, add_orientation, positive, share

SHARD_SIZE = 4096


def parser() -> Parser:
    """The parser of `grain-jax embed`."""
    out = Parser(
        "grain-jax embed",
        more="""
SOURCE is a folder of images (sub-folders included), a .tar or a folder of them (webdataset), a record set, or an
A.jsonl. DIR/data gets Parquet files with the embedding of each image and of its regions; grain-jax search answers
texts and images over them. The same command again goes on after a kill.""",
        example="grain-jax embed images --checkpoint runs/demo --output embeddings\n"
        "grain-jax embed mine/A.jsonl --images mine --checkpoint runs/own --output embeddings \\\n"
        "    --store float16",
    )
    group = out.add_argument_group("what is embedded")
    add = group.add_argument
    add("source", metavar="SOURCE", help="a folder of images, tars, a record set, or an A.jsonl")
    add(
        "--images",
        metavar="DIR",
        help="of an A.jsonl, the folder that its paths start from (default: the folder of the file)",
    )
    add("--split", metavar="NAME", default="", help="of a record set (default: train)")
    add(
        "--boxes",
        choices=("queries", "given"),
        default="queries",
        help="regions: those that the model finds, or those of the A.jsonl or record set, by a model with a box head",
    )
    add_orientation(group)
    add("--checkpoint", metavar="DIR", required=True, help=CHECKPOINT)
    add("--output", metavar="DIR", required=True, help="all files; the same again to go on")
    add = out.add_argument_group("the files").add_argument
    add(
        "--shard-size",
        metavar="N",
        type=positive,
        default=SHARD_SIZE,
        help="images a Parquet file, which a kill loses at most; a tar makes one file",
    )
    add(
        "--store",
        choices=("float32", "float16"),
        default="float32",
        help="type of the embeddings in the files",
    )
    add(
        "--max-faults",
        metavar="SHARE",
        type=share,
        default=0.01,
        help="of the images that may have a fault, 0 to 1; they are left out and named in DIR/faults.jsonl",
    )
    add = out.add_argument_group("speed").add_argument
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the activations",
    )
    add(
        "--threads",
        metavar="N",
        type=positive,
        help="that read and decode images, of a process (default: one a core)",
    )
    add_compilation_cache(out)
    add_processes(out)
    return out
