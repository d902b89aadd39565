"""What a hostile user does to the page: no file but the uploads is read, and no upload runs as a page."""

import contextlib
import http.client
import json
import os
import subprocess
import sys
import urllib.parse

import pytest

from grain_jax.checkpoint import saved_model
from tests import tiny
from tests.evaluate.report import workdirs
from tests.paths import ROOT

pytest.importorskip("gradio")
FORM = {"Content-Type": "multipart/form-data; boundary=b"}


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """Calls the page that runs: method, path, body, headers -> status, body, headers."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "secret.txt").write_text("hidden words")
    model = tiny.config().model
    saved_model.save_model(folder / "model", model, workdirs.parameters(model), source="test")
    command = [sys.executable, "-m", "grain_jax.demo", "--checkpoint", str(folder / "model")]
    options = dict(cwd=ROOT, env=os.environ | {"TMPDIR": str(folder)}, stdout=subprocess.PIPE)
    with subprocess.Popen(command, **options) as server:
        netloc = urllib.parse.urlsplit(server.stdout.readline().decode().split()[0]).netloc

        def call(method, path, body=None, headers=None):
            with contextlib.closing(http.client.HTTPConnection(netloc, timeout=60)) as connection:
                connection.request(method, path, body, headers or {})
                response = connection.getresponse()
                return response.status, response.read(), response.headers

        yield call, folder
        server.kill()


def _upload(call, name, content):
    head = f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    body = head.encode() + content + b"\r\n--b--\r\n"
    return call("POST", "/gradio_api/upload", body, FORM)


@pytest.mark.parametrize("path", ["{}/secret.txt", "{}/examples/../secret.txt", "/etc/passwd"])
def test_no_other_file_is_served(call, path):
    call, folder = call
    status, body, _ = call("GET", f"/gradio_api/file={path.format(folder)}")
    assert status in (403, 404) and b"hidden" not in body and b"root:" not in body


def test_no_upload_is_a_page(call):
    call, _ = call
    for name in ("x.html", "x.svg"):
        status, body, _ = _upload(call, name, b"<script>alert(1)</script>")
        assert status == 200
        (path,) = json.loads(body)
        _, _, headers = call("GET", f"/gradio_api/file={path}")
        assert "attachment" in headers["Content-Disposition"]


def test_an_event_names_no_other_file(call):
    call, folder = call
    image = {"path": str(folder / "secret.txt"), "meta": {"_type": "gradio.FileData"}}
    event = {"fn_index": 0, "data": [image, "wren", 0.5], "session_hash": "s"}
    headers = {"Content-Type": "application/json"}
    status, body, _ = call("POST", "/gradio_api/queue/join", json.dumps(event), headers)
    if status == 200:
        status, body, _ = call("GET", "/gradio_api/queue/data?session_hash=s")
    assert b"hidden" not in body
    assert status != 200 or json.loads(body.split(b"data: ")[-2])["success"] is False


def test_an_upload_that_is_too_large_is_refused(call):
    call, folder = call
    status, body, _ = _upload(call, "x.png", bytes(33 << 20))
    assert status == 413 and b"maximum allowed size" in body.lower()
    kept = [os.path.getsize(x) for x in folder.glob("grain_jax_demo_*/uploads/**/*") if x.is_file()]
    assert sum(kept) < 1 << 20
