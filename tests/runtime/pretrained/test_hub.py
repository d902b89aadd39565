"""`hf://ORG/NAME` and `convert to-hf --push`, by the real client, against a Hub on loopback."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

import grain_jax
from grain_jax.convert.__main__ import main
from grain_jax.runtime import checkpoint, pretrained
from grain_jax.runtime.pretrained import hub
from tests import perturbed
from tests.paths import ROOT
from tests.runtime.pretrained import stand_in

# Reads actions, runs each, prints what became of it.
CLIENT = """
import json, sys
import grain_jax
from grain_jax.core import errors
from grain_jax.convert.__main__ import main
from grain_jax.runtime.pretrained import hub
for kind, *arguments in json.loads(sys.argv[1]):
    try:
        if kind == "load":
            model = grain_jax.load(*arguments)
            said = model.encode_text(__import__("numpy").array([[1, 2, 31]], "int32")).tolist()
        elif kind == "convert":
            said = main(arguments)
        else:
            said = hub.check_push(*arguments)
    except errors.UserError as error:
        said = f"{type(error).__name__}: {error}"
    print("SAID", json.dumps(said), flush=True)
"""


def run_client(actions, home, endpoint, token=stand_in.TOKEN):
    environment = dict(os.environ, HF_ENDPOINT=endpoint, HF_HOME=str(home), PYTHONPATH=str(ROOT))
    environment |= {"HF_TOKEN": token} if token else {}
    environment |= dict(HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_ETAG_TIMEOUT="5")
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, json.dumps(actions)],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = [json.loads(line) for line in re.findall(r"^SAID (.*)$", done.stdout, re.M)]
    return dict(zip(map(tuple, actions), said, strict=True)), done.stdout + done.stderr


def _with(folder, **changes):
    """The files of a folder, with another config.json; None takes a key out."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    content = json.loads(files["config.json"])
    for key, value in changes.items():
        *parents, name = key.split("__")
        place = content
        for parent in parents:
            place = place[parent]
        place[name] = value
        if value is None:
            del place[name]
    return files | {"config.json": json.dumps(content).encode()}


CASES = {
    "hf://org/none": "no such model on the Hub; a private one needs a token",
    "hf://org/ours@v2": "the model has no such revision; expected a branch, a tag or a commit",
    "hf://org/gated": "access has to be asked for on its page",
    "hf://org/broken": "the Hub cannot be reached (HfHubHTTPError) and the cache has no copy",
    "hf://ours": "expected hf://ORG/NAME or hf://ORG/NAME@REVISION",
    "hf://org/a--b": "not a name of the Hub",
    "hf://org/empty": "has no config.json, expected a folder of to-hf or another conversion",
    "hf://org/changed": "damaged: model: not what config.json has the digest of",
    "hf://org/code": "a stored config imports no code",
    "hf://org/outside": "hf://org/outside: failed",
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(the Hub, what became of each action, the embedding that the model gives, all that was printed)."""
    root = tmp_path_factory.mktemp("hub")
    config = perturbed.tiny()
    checkpoint.save_model(root / "ours", config, perturbed.params(config))
    expected = grain_jax.load(root / "ours").encode_text(np.array([[1, 2, 31]], np.int32))
    with stand_in.serving() as (there, address):
        for name in ("ours", "private", "gated", "broken", "a--b"):
            there.put_folder(f"org/{name}", root / "ours")
        there.private |= {"org/private"}
        there.gated |= {"org/gated"}
        there.broken |= {"org/broken"}
        marker = root / "ran"
        hostile = f"open({str(marker)!r}, 'w').close()".encode()
        there.files["org/ours"] |= {"modeling_grain.py": hostile, "weights.pkl": b"cos\nsystem\n"}
        there.files["org/empty"] = {"README.md": b"# nothing"}
        there.files["org/changed"] = _with(root / "ours", model__image__norm_eps=0.1)
        there.files["org/code"] = _with(
            root / "ours", model__image__tower="antigravity:geohash", digests=None
        )
        there.files["org/outside"] = {"../../../../outside/model.safetensors": b"x"}
        actions = [
            ["load", "hf://org/ours"],
            ["load", f"hf://org/ours@{there.revision('org/ours')}"],
            ["load", "hf://org/private"],
            *(["load", name] for name in CASES),
            ["convert", "to-hf", "--input", "hf://org/ours", "--output", "out", "--push", "org/new"]
            + ["--private"],
            ["load", "hf://org/new"],
            ["convert", "from-hf", "--input", "hf://org/new", "--output", "back"],
            ["load", "back"],
        ]
        home = root / "home"
        home.mkdir()
        said, printed = run_client(actions, home, address)
        assert not marker.exists() and not list(root.rglob("outside"))
        yield there, said, expected, printed


def test_a_folder_of_ours_is_read(ran):
    there, said, expected, _ = ran
    for action, result in said.items():
        if action[0] == "load" and action[1] not in CASES:
            np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6, err_msg=str(action))


def test_code_and_pickles_are_not_downloaded(ran):
    asked = " ".join(ran[0].asked)
    assert "/params/manifest.ocdbt" in asked
    assert "/modeling_grain.py" not in asked and "weights.pkl" not in asked


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_read_is_one_line(ran, name):
    line = ran[1]["load", name]
    assert isinstance(line, str) and CASES[name] in line and "\n" not in line, line


def test_a_folder_of_to_hf_is_pushed_with_its_card(ran):
    there, said, _, printed = ran
    assert [x for action, x in said.items() if action[0] == "convert"] == [0, 0]
    assert re.search(r"^pushed to http://127\.0\.0\.1:\d+/org/new$", printed, re.M)
    assert there.private == {"org/private", "org/new"}
    assert set(there.files["org/new"]) == {
        "README.md",
        "config.json",
        "configuration_grain.py",
        "model.safetensors",
        "modeling_grain.py",
        "preprocessor_config.json",
        "processing_grain.py",
        "processor_config.json",
    }
    card = there.files["org/new"]["README.md"].decode()
    assert 'AutoModel.from_pretrained("org/new", trust_remote_code=True)' in card
    assert 'grain_jax.load("hf://org/new")' in card and "parity: PROVEN" in card


def test_no_network_and_no_token(tmp_path):
    actions = [["load", "hf://org/ours"], ["check_push", "org/new"], ["check_push", "new"]]
    said, _ = run_client(actions, tmp_path, "http://127.0.0.1:9", token=None)
    assert list(said.values()) == [
        "HubError: hf://org/ours: the Hub cannot be reached (ConnectError) and the cache has no copy; check"
        " the network",
        "HubError: --push org/new: no token; run hf auth login, or set HF_TOKEN",
        "HubError: --push new: expected ORG/NAME",
    ]


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(hub.HubError, match=r"hf://a/b: needs .* pip install 'grain_jax\[hub\]'"):
        pretrained.folder_of("hf://a/b")


@pytest.mark.parametrize(
    "arguments,line",
    [
        (["pack", "--push", "org/new"], "grain-jax convert pack: --push: no such flag"),
        (["to-hf", "--private"], "--private: expected --push ORG/NAME with it"),
    ],
)
def test_flags(capsys, arguments, line):
    assert main([*arguments, "--input", "in", "--output", "out"]) == 2
    assert line in capsys.readouterr().err
