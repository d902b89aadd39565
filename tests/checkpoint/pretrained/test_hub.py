"""`hf://ORG/NAME`, with a Hub in memory behind huggingface_hub."""

import json
import pathlib
import re
import sys
import types

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors as hub_errors
from huggingface_hub import utils

import grain_jax
from grain_jax.checkpoint import pretrained, saved_model
from grain_jax.checkpoint.pretrained import hub
from grain_jax.convert.__main__ import main
from grain_jax.core import errors
from tests import perturbed

OURS, TEXT = "hf://org/ours", np.array([[1, 2, 31]], np.int32)


class Hub:
    """Repositories, their files, and what was downloaded; its methods stand in for huggingface_hub's."""

    def __init__(self, cache: pathlib.Path):
        self.cache, self.files, self.downloaded = cache, {}, []

    def snapshot_download(self, repo, *, revision, allow_patterns):
        utils.validate_repo_id(repo)
        asked = types.SimpleNamespace(status_code=404, headers={}, request=None)
        if repo == "org/broken":
            raise hub_errors.LocalEntryNotFoundError("nothing there") from ConnectionError()
        for wrong, kind in (
            (repo == "org/gated", hub_errors.GatedRepoError),
            (repo not in self.files, hub_errors.RepositoryNotFoundError),
            (revision not in (None, "v1"), hub_errors.RevisionNotFoundError),
        ):
            if wrong:
                raise kind("no", response=asked)
        for name in utils.filter_repo_objects(self.files[repo], allow_patterns=allow_patterns):
            if ".." in name:
                raise OSError("outside")
            self.downloaded.append(name)
            (self.cache / repo / name).parent.mkdir(parents=True, exist_ok=True)
            (self.cache / repo / name).write_bytes(self.files[repo][name])
        return str(self.cache / repo)


def _files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _with(files, change):
    """The files with another config.json."""
    content = json.loads(files["config.json"])
    change(content)
    return files | {"config.json": json.dumps(content).encode()}


def _of_stranger(content):
    content["model"]["image"]["tower"] = "antigravity:geohash"
    del content["digests"]


CASES = {
    "hf://org/none": "no such model on the Hub; a private one needs a token",
    "hf://org/ours@v2": "the model has no such revision; expected a branch, a tag or a commit",
    "hf://org/gated": "access has to be asked for on its page",
    "hf://org/broken": "the Hub cannot be reached (ConnectionError) and the cache has no copy",
    "hf://org/empty": "has no config.json, expected a folder of to-hf or another conversion",
    "hf://org/changed": "damaged: model: not what config.json has the digest of",
    "hf://org/code": "a stored config imports no code",
    "hf://org/outside": "hf://org/outside: failed",
}


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """The Hub, with our model in org/ours."""
    root = tmp_path_factory.mktemp("hub")
    config = perturbed.tiny()
    saved_model.save_model(root / "ours", config, perturbed.params(config))
    found, ours = Hub(root / "cache"), _files(root / "ours")
    extra = {"modeling_grain.py": b"raise SystemExit", "weights.pkl": b"cos\nsystem\n"}
    found.files = {
        "org/ours": ours | extra,
        "org/empty": {"README.md": b"# nothing"},
        "org/changed": _with(ours, lambda x: x["model"]["image"].update(norm_eps=0.1)),
        "org/code": _with(ours, _of_stranger),
        "org/outside": {"../../../../outside/model.safetensors": b"x"},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub, "snapshot_download", found.snapshot_download)
        patch.setenv("XDG_CACHE_HOME", str(root))
        yield found


def test_a_folder_of_ours_is_read_without_its_code_and_pickles(there):
    expected = grain_jax.load(OURS).encode_text(TEXT)
    np.testing.assert_array_equal(grain_jax.load(f"{OURS}@v1").encode_text(TEXT), expected)
    assert "params/manifest.ocdbt" in there.downloaded
    assert not {"modeling_grain.py", "weights.pkl"} & set(there.downloaded)


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_read_is_one_line(there, name):
    with pytest.raises(errors.UserError, match=re.escape(CASES[name])) as error:
        grain_jax.load(name)
    assert "\n" not in str(error.value)


def test_a_folder_of_to_hf_on_the_hub_loads(there, tmp_path):
    out, back = str(tmp_path / "out"), str(tmp_path / "back")
    assert main(["to-hf", "--input", OURS, "--output", out]) == 0
    there.files["org/new"] = _files(tmp_path / "out")
    code = {f"{kind}_grain.py" for kind in ("configuration", "modeling", "processing")}
    settings = {f"{kind}config.json" for kind in ("", "preprocessor_", "processor_")}
    written = code | settings | {"converted_from.json", "README.md", "model.safetensors"}
    assert set(there.files["org/new"]) == written
    card = there.files["org/new"]["README.md"].decode()
    assert 'AutoModel.from_pretrained("FOLDER", trust_remote_code=True)' in card and "parity: PROVEN" in card
    assert main(["from-hf", "--input", "hf://org/new", "--output", back]) == 0
    expected = grain_jax.load(OURS).encode_text(TEXT)
    for name in ("hf://org/new", back, out):  # the folder of transformers is converted into the cache
        np.testing.assert_allclose(grain_jax.load(name).encode_text(TEXT), expected, atol=1e-6)


def test_no_package(there, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(hub.HubError, match=r"hf://a/b: needs .* pip install 'grain_jax\[hub\]'"):
        pretrained.folder_of("hf://a/b")
