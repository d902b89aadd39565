"""What MkDocs does beside its own work: pages from files outside docs/, and pages made from the code.

Documents link to files of the repository, as GitHub wants it; on the site they lead to the pages of `PAGES`.
"""

import pathlib
import posixpath
import re
import tempfile

import commands
import config_keys
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parents[2]
BESIDE = ("configs", "data", "launch")
# File of the repository -> its page, without the ending.
_PAGES = {
    "README.md": "index",
    "data/SCHEMA.md": "schema",
    "grain_jax/checkpoint/pretrained/aviary-tiny/README.md": "aviary_tiny",
    "CONTRIBUTING.md": "contributing",
    "CHANGELOG.md": "changelog",
    "SECURITY.md": "security",
    "examples/README.md": "examples/README",
    "examples/loss/phrases.py": "examples/loss",
    "examples/loss/smoothness.py": "examples/local_loss",
    "examples/evaluator/groups.py": "examples/evaluator",
    "examples/tower/mixer.py": "examples/tower",
    "examples/tower/windows.py": "examples/tower",
    "examples/data_source/shapes.py": "examples/data_source",
    "examples/source/csv_boxes.py": "examples/source",
}
PAGES = {file: f"{page}.md" for file, page in _PAGES.items()}
SOURCES = {page: file for file, page in PAGES.items()}
# Mark in a document -> what makes the text in its place.
MADE = {"<!-- config keys -->": config_keys.markdown, "<!-- commands -->": commands.index}
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[#)])")
IMAGE = re.compile(r"^(!\[[^\]]*\]\((\S+\.png)\))$", re.M)
FENCE = re.compile(r"(^```.*?^```$)", re.M | re.S)

_TREE = tempfile.TemporaryDirectory()  # the package as the wheel has it; goes with the process


@event_priority(100)  # before mkdocstrings reads its settings
def on_config(config):
    """Lets the reference find grain_jax.data and its kin, which lie beside grain_jax/ in a checkout."""
    package = pathlib.Path(_TREE.name, "grain_jax")
    package.mkdir(exist_ok=True)
    parts = [*(ROOT / "grain_jax").iterdir(), *(ROOT / name for name in BESIDE)]
    for part in parts:
        link = package / part.name
        if not link.exists():
            link.symlink_to(part)
    config.plugins["mkdocstrings"].config["handlers"]["python"]["paths"] = [_TREE.name]


def on_files(files, *, config):
    """Adds the pages of files outside docs/, and of the commands."""
    for page, file in SOURCES.items():
        text = (ROOT / file).read_text()
        if file.endswith(".py"):
            text = f"# {file}\n\n```python\n{text}```\n"
        files.append(File.generated(config, page, content=text))
    for page, text in commands.pages().items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, *, page, config, files):
    """Leads links out of docs/, or into it from outside, to pages of the site."""
    here = page.file.src_uri
    for mark, made in MADE.items():
        if mark in markdown:
            markdown = markdown.replace(mark, made())
    markdown = with_links_of_site(markdown, SOURCES.get(here, f"docs/{here}"), here)
    markdown = markdown.replace('src="docs/', 'src="')
    return IMAGE.sub(r"[\1](\2)", markdown)  # a click shows it whole


def with_links_of_site(markdown: str, file: str, page: str) -> str:
    """The text of a file of the repository with the links that it has on the site.

    Args:
      markdown: the text.
      file: its path in the repository, which its links start from.
      page: its path on the site.
    """

    def moved(link: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(file), link[0]))
        inside = target.removeprefix("docs/")
        target = PAGES.get(target) or (inside if inside != target else None)
        return link[0] if target is None else posixpath.relpath(target, posixpath.dirname(page))

    parts = FENCE.split(markdown)  # text and blocks of code in turn
    return "".join(part if i % 2 else LINK.sub(moved, part) for i, part in enumerate(parts))
