"""What documents, docstrings, comments and messages cite is there: files, functions, links, commands."""

import ast
import functools
import pathlib
import re
import shlex

import pytest

from grain_jax.__main__ import COMMANDS
from grain_jax.cli import commands
from grain_jax.config import loading
from grain_jax.core import errors
from tests.paths import ROOT

pytestmark = pytest.mark.quick

WIDTH = 120  # columns of a document's line, tables and lines with a URL apart
FOLDERS = ".ci .github grain_jax configs data launch tests benchmarks examples docs".split()
SUFFIXES = "py md sh js css yaml yml toml sbatch".split()
# Names in a command that stand for a file of the user's.
PLACEHOLDERS = {
    "X.py",
    "Y.py",
    "configs/NAME.py",
    "configs/X.py",
    "configs/sweeps/Y.py",
    "data/sources/NAME.py",
    "grain_jax/evaluate/classes/NAME.txt",
    "my_config.py",
    "my_evaluator.py",
    "my_loss.py",
    "my_suite.py",
    "path/to/it.py",
}
# Files of other projects that a source names, and files that a command writes.
ELSEWHERE = {
    "beit/optim_factory.py",  # microsoft/unilm
    "clip/custom_models.py",  # the reference
    "data/data.md",  # 360CVGroup/FG-CLIP
    "datasets/flickr_eval.py",  # ashkamath/mdetr
    "datasets/refexp.py",  # ashkamath/mdetr
    "eval_utils.py",  # djiajunustc/TransVG
    "evaluation/ranks.py",  # lorebianchi98/FG-OVD
    "fgclip2/train/train_fgclip2.py",  # 360CVGroup/FG-CLIP
    "flickr30k_entities_utils.py",  # BryanPlummer/flickr30k_entities
    "lib/models/eval_dets_utils.py",  # lichengunc/MAttNet
    "models/proj/image_text/text_transformer.py",  # google-research/big_vision
    "our_eval.py",  # the reference
    "util/lr_decay.py",  # facebookresearch/mae
    "DIR/README.md",  # data.aviary
    "WORKDIR/results.md",  # examples.coco
}

PATH = re.compile(rf"(?<![\w/.{{}}<>*-])((?:[\w.-]+/)*[\w-]+\.(?:{'|'.join(SUFFIXES)}))\b(?!\()")
FOLDER = re.compile(r"(?<![\w/.{}<>*-])((?:grain_jax|configs|launch|benchmarks|tests|docs)/[\w./-]*\w)")
FUNCTION = re.compile(r"`((?!configs)\w+/[\w/]+\.py):([A-Za-z_][\w.]*)`")
MODULE = re.compile(r"python3? -m ((?:grain_jax|data|launch|benchmarks|tests)(?:\.\w+)*)")
LINK = re.compile(r"(?<!\\)\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.M | re.S)
PARSERS = commands.parsers(COMMANDS)


@functools.cache
def tracked() -> tuple[str, ...]:
    """Paths of the repository's files, without caches and hidden files."""
    found = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in FOLDERS:
        found += (path for path in (ROOT / folder).rglob("*") if path.is_file())
    names = (path.relative_to(ROOT).as_posix() for path in found)
    return tuple(sorted(name for name in names if "__pycache__" not in name))


@functools.cache
def text_of(name: str) -> str:
    return (ROOT / name).read_text()


def documents() -> list[str]:
    return [name for name in tracked() if name.endswith(".md")]


@functools.cache
def sources() -> tuple[str, ...]:
    """Files that speak to readers: no tests, and no results."""
    kinds = {f".{x}" for x in SUFFIXES} | {".cff"}
    return tuple(
        name
        for name in tracked()
        if (pathlib.PurePath(name).suffix in kinds or name in (".ci/run", "launch/Dockerfile"))
        and not name.startswith(("tests/", "docs/claim/"))
        and name != "mkdocs.yml"  # a strict build checks its menu
    )


def cited(pattern: re.Pattern) -> list[tuple[str, re.Match]]:
    """(place "file:line", match) of every match in the `sources`."""
    return [
        (f"{name}:{1 + text_of(name).count(chr(10), 0, match.start())}", match)
        for name in sources()
        for match in pattern.finditer(text_of(name))
    ]


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@functools.cache
def headings(name: str) -> tuple[str, ...]:
    return tuple(re.findall(r"^#+ (.*)$", FENCE.sub("", text_of(name)), re.M))


def names_in(path: str) -> set[str]:
    """Dotted names of the functions, classes, methods and constants that a module defines."""
    found = set()

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + child.name)
                visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.Assign):
                found.update(prefix + t.id for t in child.targets if isinstance(t, ast.Name))
            elif isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
                found.add(prefix + child.target.id)

    visit(ast.parse(text_of(path)), "")
    return found


@functools.cache
def ends() -> set[tuple[str, ...]]:
    """The last parts of each path that may be cited."""
    found = {tuple(x.split("/")[-n:]) for x in tracked() for n in range(1, x.count("/") + 2)}
    found |= {tuple(name.split("/")[-n:]) for name in ELSEWHERE for n in (1, 2, 3, 4)}
    return found | {tuple(name.split("/")) for name in PLACEHOLDERS}


def module_exists(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


CITED = {
    "file": (PATH, lambda x: tuple(p for p in x[1].split("/") if p not in (".", "..")) in ends()),
    "folder": (FOLDER, lambda x: x[1] in PLACEHOLDERS or (ROOT / x[1]).exists()),
    "function": (FUNCTION, lambda x: x[1] in tracked() and x[2] in names_in(x[1])),
    "module": (MODULE, lambda x: module_exists(x[1])),
}


@pytest.mark.parametrize("kind", CITED)
def test_what_is_cited_exists(kind):
    pattern, exists = CITED[kind]
    missing = [f"{place}: {match[0]}" for place, match in cited(pattern) if not exists(match)]
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("name", documents())
def test_links_lead_somewhere(name):
    dead = []
    text = FENCE.sub("", text_of(name))
    for target in LINK.findall(text) + re.findall(r'src="([^"]+)"', text):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        if not file.exists():
            dead.append(target)
        elif anchor and anchor not in map(slug, headings(str(file.resolve().relative_to(ROOT.resolve())))):
            dead.append(target)
    assert not dead, dead


def test_lines_of_documents_are_short():
    long = [
        f"{name}:{i}: {len(line)} columns"
        for name in documents()
        for i, line in enumerate(text_of(name).splitlines(), 1)
        if len(line) > WIDTH and not line.startswith("|") and "://" not in line
    ]
    assert not long, "\n".join(long)


# Blocks of shell, where each line is a command; `grain-jax ...` in backticks is one too.
SHELL = re.compile(r"^```(?:bash|console|sh)\n(.*?)^```", re.M | re.S)


def written_commands(name: str) -> list[tuple[str, list[str]]]:
    """(place, the words after `grain-jax`) of each command of a document."""
    text, found = text_of(name), []
    for block in SHELL.finditer(text):
        line = 1 + text.count("\n", 0, block.start(1))
        for command in re.findall(r"(?:.*\\\n)*.*\n", block[1]):
            words = words_of(command.replace("\\\n", " "))
            found += [(f"{name}:{line}", each) for each in words]
            line += command.count("\n")
    for match in re.finditer(r"`(grain-jax\s[^`]+)`", FENCE.sub("", text)):
        found += [(name, words) for words in words_of(match[1]) if len(words) > 1]
    return found


def words_of(line: str) -> list[list[str]]:
    """The words after `grain-jax` of each command in a line of shell, without brackets around what may be left out."""
    found: list[list[str]] = []
    inside = False
    for word in shlex.split(line, comments=True):
        if word == "grain-jax" and not (inside and "--" in found[-1]):
            found.append([])
            inside = True
        elif word in ("&&", "||", ";", "|", ">", "&", "<"):
            inside = False
        elif inside:
            found[-1].append(word if "=" in word else word.strip("[]"))
    return found


def flags_of(words: list[str]) -> list[str]:
    """The flags among the words, without keys of a config and what another command gets."""
    own = words[: words.index("--")] if "--" in words else words
    flags = [word.partition("=")[0] for word in own if word.startswith("--")]
    return [flag for flag in flags if not flag.startswith("--config.")]


def fault_of(words: list[str]) -> str:
    """What the parser of the command says to the words, and to the keys of a config of the package; "" for nothing."""
    name, *rest = words
    if name not in COMMANDS:
        return "" if name in ("SUB", "--version") else f"no such command: {name}"
    if {"...", "--help", "--help-config"} & set(rest):
        return ""
    rest = ["1" if word in ("N", "K", "P", "STEP") else word for word in rest]
    kinds = PARSERS[name].kinds
    if kinds and (rest[0].isupper() or rest[1:] == [] and rest[0] in kinds):
        return ""  # any kind, or a mention of one
    for flag in flags_of(rest):
        if flag not in PARSERS[f"{name} {rest[0]}" if kinds else name].flags():
            return f"{flag}: no flag, or an older name of one"
    try:
        found = PARSERS[name].parse_args(rest)
        config, _, argument = (getattr(found, "config", None) or "").partition(":")
        if config in loading.packaged():
            of_package = argument and not argument.isupper() and not argument.startswith(("runs/", "hf://"))
            config = "finetune" if config == "regions" else config  # the same keys; no model to load
            given = f"{config}:{argument}" if of_package else config
            loading.load(given, found.overrides, resolve=lambda tree: tree)
    except errors.UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", documents())
def test_commands_take_their_flags(name):
    faults = [f"{place}: {fault_of(words)}" for place, words in written_commands(name) if fault_of(words)]
    assert not faults, "\n".join(faults)


def test_a_wrong_command_is_found():
    (words,) = words_of("srun -N4 grain-jax train --config demo --workdir R --config.batchsize=3 | tee log")
    assert words == ["train", "--config", "demo", "--workdir", "R", "--config.batchsize=3"]
    assert "did you mean batch_size?" in fault_of(words)
    assert "--work-dir: no flag" in fault_of(["train", "--config", "demo", "--work-dir", "R"])
    assert "--pictures: no flag" in fault_of(["report", "R", "--pictures", "3"])
    assert "no such command" in fault_of(["trian"])
    nested = words_of("grain-jax local --processes 2 -- grain-jax train --config demo && grain-jax export")
    assert [words[0] for words in nested] == ["local", "export"]
