"""The site: links of documents lead to its pages, and its page of config keys has all of them."""

import functools
import http.server
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
import write

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    "link,file,page,expected",
    [
        ("../data/SCHEMA.md", "docs/inspect.md", "inspect.md", "schema.md"),
        ("../data/SCHEMA.md#shards", "docs/inspect.md", "inspect.md", "schema.md#shards"),
        ("../../examples/README.md", "docs/howto/README.md", "howto/README.md", "../examples/README.md"),
        ("#where-it-differs", "docs/method.md", "method.md", "#where-it-differs"),
    ],
)
def test_a_link_leads_to_a_page(link, file, page, expected):
    assert hook.with_links_of_site(f"see [it]({link}), x", file, page) == f"see [it]({expected}), x"


def test_files_of_the_repository_that_have_pages_exist():
    assert [file for file in hook.PAGES if not (ROOT / file).is_file()] == []


def test_the_page_of_config_keys_has_every_key():
    text = config_keys.markdown()
    assert [i.name for i in listed(Config) if f"#### `{i.name}` {{ #" not in text] == []
    assert "`float` · default `1` · 0.01 to 1 · role *numbers*\n{ .facts }" in text
    assert "#### `evals.NAME.descriptions` { #zeroshot.evals.NAME.descriptions }" in text


def test_a_page_of_every_command_has_every_flag():
    pages = commands.pages()
    assert {f"commands/{name}.md" for name in COMMANDS} == set(pages)
    for name, parser in parsers(COMMANDS).items():
        text = pages[f"commands/{name.split()[0]}.md"]
        flags = [flag.name for flags in parser.groups.values() for flag in flags]
        assert [flag for flag in flags if flag not in text] == []


def test_the_texts_for_readers_on_github_are_up_to_date():
    old = [str(file) for file, text in write.texts().items() if file.read_text() != text]
    assert not old, f"{old}: run python docs/site/write.py"
    assert set((ROOT / "docs").rglob("*.txt")) == set(write.texts())


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
    "page", ["index", "commands/train", "config_keys", "api/losses", "howto/evaluator", "diagnostics"]
)
def test_a_page_in_a_browser(address, page, width, dark):
    with browser.opened(f"{address}/{page}.html", width=width, dark=dark) as opened:
        assert opened.complaints() == [] and opened.broken_pictures() == []
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert opened.page.evaluate(wide) == 0
        background = "getComputedStyle(document.body).backgroundColor"
        assert (opened.page.evaluate(background) == "rgb(255, 255, 255)") is not dark
