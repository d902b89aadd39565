"""The site: links of documents lead to its pages, and its page of config keys has all of them."""

import functools
import http.server
import json
import subprocess
import sys
import threading

import pytest

from grain_jax.__main__ import COMMANDS
from grain_jax.cli.commands import parsers
from grain_jax.config.fields import Config
from grain_jax.config.keys import listed
from tests import browser
from tests.paths import ROOT

sys.path.insert(0, str(ROOT / "docs/site"))
import commands
import config_keys
import hook
import notebooks


@pytest.mark.parametrize(
    "link,file,page,expected",
    [
        ("../data/SCHEMA.md", "docs/inspect.md", "inspect.md", "schema.md"),
        ("../data/SCHEMA.md#shards", "docs/inspect.md", "inspect.md", "schema.md#shards"),
        (
            "../../examples/README.md",
            "docs/howto/README.md",
            "howto/README.md",
            "../examples/README.md",
        ),
        ("examples/tower/mixer.py", "CONTRIBUTING.md", "contributing.md", "examples/tower.md"),
        ("#where-it-differs", "docs/method.md", "method.md", "#where-it-differs"),
        ("https://arxiv.org/abs/2412.04429", "docs/method.md", "method.md")
        + ("https://arxiv.org/abs/2412.04429",),
    ],
)
def test_a_link_leads_to_a_page(link, file, page, expected):
    assert hook.with_links_of_site(f"see [it]({link}), x", file, page) == f"see [it]({expected}), x"


def test_code_stays_as_it_is():
    text = "```\n[a](../data/SCHEMA.md)\n```\n"
    assert hook.with_links_of_site(text, "docs/inspect.md", "inspect.md") == text


def test_files_of_the_repository_that_have_pages_exist():
    assert [file for file in hook.PAGES if not (ROOT / file).is_file()] == []


def test_the_page_of_config_keys_has_every_key():
    text = config_keys.markdown()
    anchors = [line.split("{ #")[1] for line in text.splitlines() if line.startswith("#### ")]
    assert len(anchors) == len(set(anchors))
    missing = [item.name for item in listed(Config) if f"#### `{item.name}` {{" not in text]
    assert missing == []
    heading, comment, facts = text[text.index("#### `optim.layer_decay`") :].split("\n\n")[:3]
    assert heading == "#### `optim.layer_decay` { #optim.layer_decay }"
    assert comment
    assert facts == "`float` · default `1` · 0.01 to 1 · role *numbers*\n{ .facts }"
    assert "#### `evals.NAME.descriptions` { #zeroshot.evals.NAME.descriptions }" in text


def test_a_notebook_is_a_page():
    cells = [
        dict(cell_type="markdown", source=["# Load\n", "a model"]),
        dict(
            cell_type="code",
            source=["x = 1\n", "x"],
            outputs=[
                dict(output_type="stream", name="stdout", text=["read\n", "done\n"]),
                dict(output_type="execute_result", data={"text/plain": ["1"]}),
                dict(
                    output_type="display_data", data={"image/png": "iVBO\nRw0K", "text/plain": "f"}
                ),
            ],
        ),
        dict(cell_type="code", source="y = 2", outputs=[]),
    ]
    assert notebooks.markdown(json.dumps(dict(cells=cells))).split("\n\n") == [
        "# Load\na model",
        "````python\nx = 1\nx\n````",
        "````text\nread\ndone\n````",
        "````text\n1\n````",
        "![What the cell above draws](data:image/png;base64,iVBORw0K)",
        "````python\ny = 2\n````",
    ]


def test_a_page_of_every_command_has_every_flag():
    pages = commands.pages()
    assert {f"commands/{name}.md" for name in COMMANDS} == set(pages)
    for name, parser in parsers(COMMANDS).items():
        text = pages[f"commands/{name.split()[0]}.md"]
        flags = [flag.name for flags in parser.groups.values() for flag in flags]
        assert [flag for flag in flags if flag not in text] == []


def test_the_menu_has_every_command():
    menu = (ROOT / "mkdocs.yml").read_text()
    assert [name for name in COMMANDS if f"- {name}: commands/{name}.md" not in menu] == []


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The built site behind a server on loopback."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    handler = functools.partial(_Silent, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class _Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("width, dark", [(1280, False), (400, True)])
@pytest.mark.parametrize(
    "page",
    ["index", "commands/train", "config_keys", "api/losses", "howto/evaluator", "diagnostics"],
)
def test_a_page_in_a_browser(address, page, width, dark):
    with browser.opened(f"{address}/{page}.html", width=width, dark=dark) as opened:
        assert opened.complaints() == [] and opened.broken_pictures() == []
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert opened.page.evaluate(wide) == 0
        background = "getComputedStyle(document.body).backgroundColor"
        assert (opened.page.evaluate(background) == "rgb(255, 255, 255)") is not dark


@pytest.mark.slow
def test_the_search_finds_a_key(address):
    with browser.opened(f"{address}/index.html") as opened:
        opened.page.click("input.md-search__input")
        opened.page.keyboard.type("layer_decay", delay=60)
        first = opened.page.locator(".md-search-result__item a").first
        first.wait_for()
        assert "config_keys.html" in first.get_attribute("href")
        assert opened.complaints() == []
