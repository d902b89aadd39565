"""What the package says of itself: metadata, one version, the Pythons, the files that GitHub reads."""

import email
import re
import subprocess
import sys
import tomllib

import pytest
import yaml

import grain_jax
from tests.paths import ROOT

PREPARE = "import sys, setuptools.build_meta as b; b.prepare_metadata_for_build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of metadata that a wheel of this checkout has."""
    folder = tmp_path_factory.mktemp("metadata")
    subprocess.run([sys.executable, "-c", PREPARE, folder], cwd=ROOT, check=True, capture_output=True)
    (found,) = folder.glob("*.dist-info")
    return found


@pytest.fixture(scope="module")
def metadata(built):
    return email.message_from_string((built / "METADATA").read_text())


def _pythons(metadata):
    """Versions that the classifiers name, "3.11" first."""
    found = [re.fullmatch(r".* :: (3\.\d+)", c) for c in metadata.get_all("Classifier")]
    return [match[1] for match in found if match]


def test_the_metadata_and_the_licence(metadata, built):
    assert (metadata["Name"], metadata["License-Expression"]) == ("grain_jax", "Apache-2.0")
    assert metadata["Author"] == "grain_jax contributors"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    text = (built / "licenses" / metadata["License-File"]).read_text()
    assert text == (ROOT / "LICENSE").read_text() and "Apache License" in text


def test_one_version(metadata):
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", grain_jax.__version__)
    assert metadata["Version"] == grain_jax.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == grain_jax.__version__
    first = re.search(r"^## \[(.*?)\] - (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert first[1] == grain_jax.__version__
    assert re.fullmatch(r"unreleased|\d{4}-\d\d-\d\d", first[2])


def test_the_oldest_python_is_that_of_the_tools(metadata):
    oldest = _pythons(metadata)[0]
    assert metadata["Requires-Python"] == f">={oldest}"
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert tools["ruff"]["target-version"] == "py" + oldest.replace(".", "")
    assert tools["pyright"]["pythonVersion"] == oldest


def test_the_workflow_runs_ci_on_every_python(metadata):
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML 1.1 reads `on` as true
    (job,) = workflow["jobs"].values()
    assert 25 < job["timeout-minutes"] <= 90
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
    (setup,) = (s["with"] for s in job["steps"] if "setup-python" in s.get("uses", ""))
    # The action makes the last one python3, which .ci/run takes for the whole of the tests.
    assert setup["python-version"].split() == _pythons(metadata)[::-1]
    for pattern in setup["cache-dependency-path"].split():
        assert list(ROOT.glob(pattern)), pattern


def test_the_hooks_are_the_checks_of_ci():
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local"
    checks = [" ".join(hook["entry"].split()[:2]) for hook in local["hooks"]]
    assert checks == ["ruff check", "ruff format", "pyright"]
    for hook, check in zip(local["hooks"], checks, strict=True):
        assert hook["language"] == "system"
        assert re.search(rf"^{check}\b", (ROOT / ".ci/run").read_text(), re.M)
