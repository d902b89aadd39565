"""What documents, docstrings, comments and messages cite is there: files, functions, links, commands."""

import ast
import functools
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
# Names that stand for a file of the user's.
PLACEHOLDERS = {"my_config.py", "my_evaluator.py", "my_loss.py", "my_suite.py", "data/sources/NAME.py"}
# Files of other projects that a source names, and files that a command writes.
ELSEWHERE = {
    "beit/optim_factory.py",  # microsoft/unilm
    "clip/custom_models.py",  # the reference
    "data/data.md",  # 360CVGroup/FG-CLIP
    "datasets/flickr_eval.py",  # ashkamath/mdetr
    "eval_utils.py",  # djiajunustc/TransVG
    "evaluation/ranks.py",  # lorebianchi98/FG-OVD
    "fgclip2/train/train_fgclip2.py",  # 360CVGroup/FG-CLIP
    "flickr30k_entities_utils.py",  # BryanPlummer/flickr30k_entities
    "lib/models/eval_dets_utils.py",  # lichengunc/MAttNet
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
def sources() -> list[str]:
    """Files that speak to readers: no tests, and no results."""
    speaks = re.compile(
        rf"(?!tests/|docs/claim/|mkdocs).*\.({'|'.join(SUFFIXES)}|cff)|.ci/run|launch/Dockerfile"
    )
    return [name for name in tracked() if speaks.fullmatch(name)]  # a strict build checks mkdocs.yml


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


def defines(path: str, name: str) -> bool:
    """Whether the module has the function, class, constant or Class.method."""
    body: list[ast.stmt] = ast.parse(text_of(path)).body
    for part in name.split("."):
        found = [x for x in body if part in (getattr(x, "name", ""), ast.unparse(x).partition(" ")[0])]
        body = getattr(found[0], "body", []) if found else []
    return bool(found)


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
    "folder": (FOLDER, lambda x: (ROOT / x[1]).exists()),
    "function": (FUNCTION, lambda x: x[1] in tracked() and defines(x[1], x[2])),
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


def test_what_documents_install_is_constrained():
    lines = [f"{name}: {line}" for name in documents() for line in text_of(name).splitlines()]
    installs = [line for line in lines if "pip install" in line]
    assert len(installs) > 20
    loose = [line for line in installs if re.search(r"pip install(?! -c constraints\.txt )", line)]
    assert not loose, "\n".join(loose)


# The commands: fenced blocks of shell, where each line is one, and `grain-jax ...` in backticks.
SHELL = re.compile(r"^```(?:bash|console|sh)\n(.*?)^```", re.M | re.S)
MENTION = re.compile(r"`(grain-jax\s[^`]+\s[^`]+)`")
OPERATORS = {"&&", "||", ";", "|", ">", "<", "&"}
OPEN = {"...", "SUB", "COMMAND"}  # a command with one of them is not whole
# Configs whose argument is a model to load, and one with the same keys.
WITHOUT_MODEL = re.compile(r"(finetune|regions):.*")


def commands_of(name: str) -> list[list[str]]:
    """The words after each `grain-jax` of a document."""
    text = text_of(name)
    lines = "".join(SHELL.findall(text)).replace("\\\n", " ").splitlines()
    return [command for line in lines + MENTION.findall(FENCE.sub("", text)) for command in words_of(line)]


def words_of(line: str) -> list[list[str]]:
    """The words after each `grain-jax` of a line, without the brackets around what may be left out."""
    simple: list[list[str]] = [[]]
    for word in shlex.split(line, comments=True):
        if word in OPERATORS:
            simple.append([])
        else:
            simple[-1].append(word if "=" in word else word.strip("[]"))
    return [command[i + 1 :] for command in simple for i, word in enumerate(command) if word == "grain-jax"]


def fault_of(command: list[str]) -> str:
    """What the command says to its flags, and to its keys of a config of the package; "" for nothing."""
    name, *rest = command
    if OPEN & set(command):
        return ""
    if name not in COMMANDS:
        return f"{name}: no such command"
    if len(rest) == 1 and rest[0] in PARSERS[name].kinds:
        return ""  # the mention of a kind
    try:
        parsed = PARSERS[name].parse_args(rest)
        config = WITHOUT_MODEL.sub("finetune", getattr(parsed, "config", None) or "")
        if config.partition(":")[0] in loading.packaged():
            loading.load(config, parsed.overrides, resolve=lambda tree: tree)
    except SystemExit:  # --help
        return ""
    except errors.UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", documents())
def test_commands_take_their_flags(name):
    faults = [
        f"grain-jax {' '.join(command)}: {fault_of(command)}"
        for command in commands_of(name)
        if fault_of(command)
    ]
    assert not faults, "\n".join(faults)


def test_a_wrong_command_is_found():
    (command,) = words_of("srun -N4 grain-jax train --config demo --workdir R --config.batchsize=3 | tee log")
    assert command == ["train", "--config", "demo", "--workdir", "R", "--config.batchsize=3"]
    assert "did you mean batch_size?" in fault_of(command)
    assert "--work-dir: no such flag" in fault_of(["train", "--config", "demo", "--work-dir", "R"])
    assert "--pictures: no such flag" in fault_of(["report", "R", "--pictures", "3"])
    assert "no such command" in fault_of(["trian"])
    nested = words_of("grain-jax local --processes 2 -- grain-jax train --config demo && grain-jax export")
    assert [command[0] for command in nested] == ["local", "train", "export"]
