"""The flags of `grain-jax convert KIND`."""

from grain_jax.cli.parser import KindsParser, Parser
from grain_jax.cli.values import CHECKPOINT, positive
from grain_jax.config import ACTIVATIONS

# Kind -> (what it does, what it reads, what it writes, an example of each).
KINDS = {
    "from-torch": (
        "the PyTorch reference's .pth.tar -> a folder for grain_jax.load",
        "the .pth.tar",
        "folder to write",
        ("checkpoint.pth.tar", "model"),
    ),
    "to-torch": (
        "a checkpoint -> the PyTorch reference's .pth.tar",
        "",
        "file to write",
        ("runs/demo", "demo.pth.tar"),
    ),
    "to-hf": (
        "a checkpoint -> a folder for transformers' AutoModel",
        "",
        "folder to write",
        ("runs/demo", "demo_hf"),
    ),
    "from-hf": (
        "a folder of to-hf, or hf://ORG/NAME -> a folder for grain_jax.load",
        "folder that to-hf wrote, or hf://ORG/NAME",
        "folder to write",
        ("demo_hf", "model"),
    ),
    "from-open-clip": (
        "CLIP or SigLIP weights (OpenAI, open_clip, Hugging Face) -> a two-tower model for grain_jax.load",
        "file or folder of weights",
        "folder to write",
        ("ViT-B-32.safetensors", "towers"),
    ),
    "from-big-vision": (
        "a two_towers .npz of big_vision (FILE.npz:sub-tree) -> a two-tower model for grain_jax.load",
        "FILE.npz, or FILE.npz:sub-tree",
        "folder to write",
        ("lit.npz:params", "towers"),
    ),
    "pack": (
        "a checkpoint -> a small folder for grain_jax.load, in bfloat16",
        "",
        "folder to write",
        ("runs/demo", "packed"),
    ),
}
_TOWERS = {
    "from-torch": ("image", "text", "decoder"),
    "from-open-clip": ("image", "text"),
    "from-big-vision": ("image", "text"),
}


def parser() -> KindsParser:
    """The parser of `grain-jax convert`."""
    return KindsParser(
        "grain-jax convert",
        [_kind(name) for name in KINDS],
        example="grain-jax convert to-hf --checkpoint runs/demo --output demo_hf",
    )


def _kind(name: str) -> Parser:
    about, reads, writes, (source, target) = KINDS[name]
    flag = "--input" if reads else "--checkpoint"
    out = Parser(
        f"grain-jax convert {name}",
        about,
        more="Ends with a parity report. Exit status: 0; 1 if parity failed; 2 for wrong input.",
        example=f"grain-jax convert {name} {flag} {source} --output {target}",
    )
    add = out.add_argument_group("what is converted").add_argument
    if reads:
        add("--input", metavar="PATH", required=True, help=reads)
        out.older(checkpoint="--input")
    else:
        add(
            "--checkpoint",
            dest="input",
            metavar="DIR",
            required=True,
            help=CHECKPOINT,
        )
        out.older(input="--checkpoint")
    add(
        "--output", metavar="PATH", required=True, help=f"{writes}; an older conversion is replaced"
    )
    if name == "to-hf":
        _add_push(out)
    if name in _TOWERS:
        add = out.add_argument_group("where the checkpoint does not state it").add_argument
        for tower in _TOWERS[name]:
            add(
                f"--{tower}-heads",
                metavar="N",
                type=positive,
                help=f"attention heads of the {tower} tower",
            )
        for tower in _TOWERS[name] if name != "from-torch" else ():
            add(
                f"--{tower}-activation",
                choices=ACTIVATIONS,
                metavar="NAME",
                help=f"of the {tower} tower: {', '.join(ACTIVATIONS)}",
            )
    return out


def _add_push(out: Parser) -> None:
    group = out.add_argument_group("the Hugging Face Hub")
    group.add_argument(
        "--push",
        metavar="ORG/NAME",
        help="upload the folder to this repository, which is made if it is not there",
    )
    out.switch("--private", to=group, help="a new repository is a private one")
