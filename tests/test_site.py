"""The site: links of documents lead to its pages, and its page of config keys has all of them."""

import sys

import pytest

from grain_jax.config import listing
from tests.paths import ROOT

sys.path.insert(0, str(ROOT / "docs/site"))
import config_keys  # noqa: E402
import hook  # noqa: E402


@pytest.mark.parametrize(
    "link,file,page,expected",
    [
        ("../data/SCHEMA.md", "docs/inspect.md", "inspect.md", "schema.md"),
        ("../data/SCHEMA.md#shards", "docs/inspect.md", "inspect.md", "schema.md#shards"),
        ("../../examples/README.md", "docs/howto/README.md", "howto/README.md")
        + ("../examples/README.md",),
        ("docs/method.md#losses", "CONTRIBUTING.md", "contributing.md", "method.md#losses"),
        ("examples/tower/mixer.py", "CONTRIBUTING.md", "contributing.md", "examples/tower.md"),
        ("scaling.md", "docs/launch.md", "launch.md", "scaling.md"),
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
    missing = [key.name for key in listing.keys() if f"#### `{key.name}` {{" not in text]
    assert missing == []
    heading, comment, facts = text[text.index("#### `optim.layer_decay`") :].split("\n\n")[:3]
    assert heading == "#### `optim.layer_decay` { #optim.layer_decay }"
    assert comment.startswith("Factor per layer of the learning rates of the towers")
    assert facts == "`float` · default `1` · 0.01 to 1 · role *numbers*\n{ .facts }"
    assert "#### `evals.NAME.descriptions` { #zeroshot.evals.NAME.descriptions }" in text
