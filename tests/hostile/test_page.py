"""What a hostile user does to the interactive page: a status 4xx and one line, no script, no traceback, no full disk."""

import http.client
import json
import os
import pathlib
import subprocess
import sys
import time
import urllib.parse
from typing import NamedTuple

import numpy as np
import pytest

from grain_jax.demo import analysis, class_lists, guard
from tests.hostile import page_server
from tests.paths import ROOT

pytest.importorskip("gradio")
TEXT = "wren: a short tail\nkite: long wings"
BOUNDARY = "boundary"
FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
SCRIPT = b"<script>localStorage.owned = 1; fetch('/owned')</script>"


class Served(NamedTuple):
    """A page that runs."""

    port: int
    uploads: str
    log: pathlib.Path

    def call(self, method, path, body=None, headers=None, timeout=20):
        """The status, the body and the headers of the response."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.read(), response.headers
        finally:
            connection.close()

    def upload(self, name, content):
        """As the page uploads a file."""
        return self.call("POST", "/gradio_api/upload", form(name, content), FORM)

    def join(self, event, values, **more):
        """As the page calls a function."""
        call = {"fn_index": event, "data": values, "session_hash": "s"} | more
        body = json.dumps(call)
        return self.call(
            "POST", "/gradio_api/queue/join", body, {"Content-Type": "application/json"}
        )


def form(name, content, field="files"):
    """The body of an upload."""
    head = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'
    )
    return head.encode() + content + f"\r\n--{BOUNDARY}--\r\n".encode()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    uploads, examples = folder / "uploads", folder / "examples"
    uploads.mkdir()
    examples.mkdir()
    command = [sys.executable, "-m", "tests.hostile.page_server", uploads, examples]
    with (folder / "log.txt").open("a") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log)
        with process:
            address = process.stdout.readline().decode()
            assert address.startswith("http"), (folder / "log.txt").read_text()
            yield Served(
                urllib.parse.urlsplit(address.strip()).port, str(uploads), folder / "log.txt"
            )
            process.kill()


@pytest.fixture
def served(server):
    """The page, of which no test has said anything yet."""
    server.log.write_text("")
    return server


def picture(**values):
    """An image as a call names it."""
    return {"meta": {"_type": "gradio.FileData"}, **values}


def inputs(first=None, text=TEXT, alpha=0.5, softmax=False, chosen="", most=3, threshold=-1):
    """What the page sends to its largest function."""
    return [first, text, alpha, softmax, chosen, most, threshold]


JSON = {"Content-Type": "application/json"}
ELSEWHERE, NONE = "an image that was uploaded here", "the page makes no such call"
JOINS = [
    ("a path outside", 1, inputs(picture(path="/etc/passwd")), ELSEWHERE),
    ("a path with ..", 1, inputs(picture(path="{uploads}/../../x")), ELSEWHERE),
    ("the folder itself", 1, inputs(picture(path="{uploads}")), ELSEWHERE),
    ("a folder with the same start", 1, inputs(picture(path="{uploads}2/x")), ELSEWHERE),
    ("a file that is not there", 1, inputs(picture(path="{uploads}/x.png")), ELSEWHERE),
    ("a NUL", 1, inputs(picture(path="{uploads}/\0")), ELSEWHERE),
    ("a URL as path", 1, inputs(picture(path="http://169.254.169.254/latest")), ELSEWHERE),
    ("a URL", 1, inputs(picture(path="x.png", url="http://127.0.0.1:1/x.png")), ELSEWHERE),
    ("a URL alone", 1, inputs(picture(url="http://127.0.0.1:1/x.png")), ELSEWHERE),
    ("a data URL", 1, inputs(picture(path=None, url="data:image/png;base64,AAAA")), ELSEWHERE),
    ("no meta", 1, inputs({"path": "{uploads}/real.png"}), ELSEWHERE),
    ("a number as meta", 1, inputs(picture(path="{uploads}/real.png", meta=1)), ELSEWHERE),
    ("another meta", 1, inputs(picture(path="{uploads}/real.png", meta={"_type": []})), ELSEWHERE),
    ("a list as size", 1, inputs(picture(path="{uploads}/real.png", size=[1])), ELSEWHERE),
    ("a number as name", 1, inputs(picture(path="{uploads}/real.png", orig_name=1)), ELSEWHERE),
    ("an object as stream", 1, inputs(picture(path="{uploads}/real.png", is_stream={})), ELSEWHERE),
    ("a path as text", 1, inputs("/etc/passwd"), ELSEWHERE),
    ("a number as picture", 1, inputs(3), ELSEWHERE),
    ("a number as text", 1, inputs(text=3), "data[1]: got 3, expected a text"),
    ("no text", 1, inputs(text=None), "data[1]: got null, expected a text"),
    ("an object as text", 1, inputs(text={"a": 1}), "expected a text"),
    ("a text as number", 1, inputs(alpha="x"), 'data[2]: got "x", expected a number'),
    ("a list as number", 1, inputs(alpha=[1]), "expected a number"),
    ("a number beyond all", 1, inputs(most=10**400), "expected a number"),
    ("an infinite number", 1, inputs(threshold=float("inf")), "got Infinity, expected JSON"),
    ("no number", 1, inputs(threshold=float("nan")), "got NaN, expected JSON"),
    ("a text as tick", 1, inputs(softmax="yes"), "data[3]: got \\\"yes\\\", expected true or false"),
    ("a list as class", 1, inputs(chosen=["x"]), "data[4]: got"),
    ("too few", 1, [None], "data: expected a list of 7 values"),
    ("too many", 1, [None] * 50, "data: expected a list of 7 values"),
    ("no values", 1, None, "data: expected a list of 7 values"),
    ("an object as values", 1, {"a": 1}, "data: expected a list of 7 values"),
    ("no such function", 99, [], "fn_index: got 99, expected a number of the page"),
    ("a function below zero", -1, [], "fn_index: got -1"),
    ("a function by name", "everything", [], "fn_index: got"),
    ("a function of a list", [1], [], "fn_index: got [1]"),
    ("true as function", True, [], "fn_index: got true"),
    ("no example of that number", 0, [99], "data[0]: got 99, expected the number of an example"),
    ("an example below zero", 0, [-1], "expected the number of an example"),
    ("a path as example", 0, ["/etc/passwd"], "expected the number of an example"),
    ("a file that is none", 7, [None], "expected a file that was uploaded here"),
    ("a file outside", 7, [picture(path="/etc/passwd")], "expected a file that was uploaded here"),
    ("a phrase of a number", 4, [None, 3], "data[1]: got 3, expected a text"),
    ("a box of numbers", 9, [None, TEXT, [1, 2, 3, 4]], "data[2]: got [1, 2, 3, 4], expected a text"),
    ("a box of an object", 9, [None, TEXT, {"x": 1}], 'data[2]: got {\\"x\\": 1}, expected a text'),
    ("no box", 9, [None, TEXT, None], "data[2]: got null, expected a text"),
    ("a box in an image outside", 9, [picture(path="/etc/passwd"), TEXT, "1 2 3 4"], ELSEWHERE),
    ("a box and more", 9, [None, TEXT, "1 2 3 4", {}], "data: expected a list of 3 values"),
    ("an image to draw on", 6, ["/etc/passwd"], ELSEWHERE),
    ("an image to write about", 11, [picture(path="/etc/passwd")], ELSEWHERE),
    ("no such function of a page that writes", 12, [], "fn_index: got 12"),
]  # fmt: skip


@pytest.mark.parametrize("name,event,values,expected", JOINS, ids=[row[0] for row in JOINS])
def test_values_that_the_page_would_not_send(served, name, event, values, expected):
    (pathlib.Path(served.uploads) / "real.png").touch()
    values = json.loads(json.dumps(values).replace("{uploads}", served.uploads))
    status, said, _ = served.join(event, values)
    said = json.loads(said)["detail"]
    assert status == 400 and expected.replace('\\"', '"') in said and said.isprintable()
    assert served.log.read_text() == ""


EVENT = json.dumps({"data": inputs(), "fn_index": 1, "session_hash": "s"}).encode()
CALLS = [
    ("broken JSON", "POST", "/gradio_api/queue/join", b"{", 400, "line 1 column 2"),
    ("nothing", "POST", "/gradio_api/queue/join", b"", 400, "Expecting value"),
    ("a list", "POST", "/gradio_api/queue/join", b"[]", 400, "expected an object"),
    ("deep", "POST", "/gradio_api/queue/join", b"[" * 200_000, 400, "recursion"),
    ("not UTF-8", "POST", "/gradio_api/queue/join", b"\xff\xfe\xfd", 400, ""),
    ("digits", "POST", "/gradio_api/queue/join", b"9" * 9999, 400, "4300 digits"),
    ("2 MB", "POST", "/gradio_api/queue/join", b" " * 2_000_000, 413, "at most 1 MiB"),
    ("cancel", "POST", "/gradio_api/cancel", b"[]", 400, "expected an object"),
    ("reset", "POST", "/gradio_api/reset", b'{"a": NaN}', 400, "got NaN"),
    ("values", "POST", "/gradio_api/run/predict", b'{"data": [9], "fn_index": 0}', 400, "got 9"),
    ("around the queue", "POST", "/gradio_api/run/predict", EVENT, 404, "queue"),
    ("run", "POST", "/gradio_api/run/everything", b'{"data": []}', 404, NONE),
    ("api", "POST", "/gradio_api/api/everything", b'{"data": []}', 404, NONE),
    ("call", "POST", "/gradio_api/call/everything", b'{"data": []}', 404, NONE),
    ("stream", "POST", "/gradio_api/stream/x", b'{"data": []}', 404, NONE),
    ("component_server", "POST", "/gradio_api/component_server", b"{}", 404, NONE),
    ("vibe-edit", "POST", "/gradio_api/vibe-edit", b'{"prompt": "x"}', 404, NONE),
    ("recording", "POST", "/gradio_api/process_recording", b"{}", 404, NONE),
    ("login", "POST", "/login", b"username=a&password=b", 404, NONE),
    ("PUT", "PUT", "/config", b"{}", 404, NONE),
    ("DELETE", "DELETE", "/config", None, 404, NONE),
    ("a file outside", "GET", "/gradio_api/file=/etc/passwd", None, 403, "not allowed"),
    ("a path with ..", "GET", "/gradio_api/file={uploads}/../../../../etc/passwd", None, 403, ""),
    ("a relative path", "GET", "/gradio_api/file=pyproject.toml", None, 404, "uploaded here"),
    ("the folder", "GET", "/gradio_api/file={uploads}", None, 403, "not allowed"),
    ("a URL", "GET", "/gradio_api/file=https://example.com/", None, 404, "uploaded here"),
    ("a URL after a space", "GET", "/gradio_api/file=%20https://example.com/", None, 404, ""),
    ("a file URL", "GET", "/gradio_api/file=file:///etc/passwd", None, 404, "uploaded here"),
    ("a proxy", "GET", "/gradio_api/proxy=https://example.com/", None, 404, "uploaded here"),
    ("a deep link", "GET", "/gradio_api/deep_link?session_hash=s", None, 404, "uploaded here"),
    ("a long path", "GET", "/gradio_api/file=/" + "a" * 5000, None, 403, "not allowed"),
    ("a NUL", "GET", "/gradio_api/file=/%00", None, 403, "not allowed"),
    ("static", "GET", "/static/%2e%2e/%2e%2e/etc/passwd", None, 403, ""),
]  # fmt: skip


@pytest.mark.parametrize("name,method,path,body,status,expected", CALLS, ids=[x[0] for x in CALLS])
def test_calls_that_the_page_would_not_make(served, name, method, path, body, status, expected):
    found, said, _ = served.call(method, path.format(uploads=served.uploads), body, JSON)
    said = json.loads(said)["detail"]
    assert (found, expected in said, "\n" in said) == (status, True, False)
    assert served.log.read_text() == ""


def test_what_gradio_cannot_read_is_one_line(served):
    without_file = form("x", b"x").replace(b'; filename="x"', b"")
    status, said, _ = served.call("POST", "/gradio_api/upload", without_file, FORM)
    assert status == 400 and b"this cannot be served: TypeError" in said
    path = json.loads(served.upload("a.png", b"x" * 99)[1])[0]
    for asked in ("bytes=\u00b2-3", "bytes=1-2-3", "bytes=0-0,5-6"):
        headers = {"Range": asked.encode("latin-1")}
        status, said, _ = served.call("GET", f"/gradio_api/file={path}", headers=headers)
        assert status == 400 and b"\n" not in said
    status, *_ = served.call("GET", "/gradio_api/queue/data?session_hash=nobody")
    assert status == 200
    said = served.log.read_text()
    assert "Traceback" not in said and len(said.splitlines()) == 5


@pytest.mark.parametrize(
    "name", ["evil.html", "evil.svg", "evil.xml", "evil.js", "evil.pdf", "evil"]
)
def test_an_upload_is_offered_for_download_alone(served, name):
    (path,) = json.loads(served.upload(name, SCRIPT)[1])
    _, content, headers = served.call("GET", f"/gradio_api/file={path}")
    assert content == SCRIPT
    assert headers["Content-Disposition"].startswith("attachment;")
    assert headers["Content-Type"] == "application/octet-stream"


def test_examples_and_uploaded_pictures_are_shown(served):
    config = json.loads(served.call("GET", "/config")[1])
    (sample,) = [x["props"]["samples"] for x in config["components"] if x["type"] == "dataset"]
    _, _, headers = served.call("GET", f"/gradio_api/file={sample[0][0]['path']}")
    assert headers["Content-Type"] == "image/png"
    body = json.dumps({"data": [1], "fn_index": 0, "session_hash": "s"})
    status, said, _ = served.call("POST", "/gradio_api/run/predict", body, JSON)
    assert status == 200 and json.loads(said)["data"][0]["value"]["path"].endswith(".png")


def test_a_large_upload_is_refused_and_nothing_of_it_stays(served):
    before = guard._stored(served.uploads)
    status, said, _ = served.upload("large.png", bytes(guard.MAX_FILE + (1 << 20)))
    assert status == 413 and "at most 32 MiB a file" in json.loads(said)["detail"]
    assert guard._stored(served.uploads) == before
    assert served.upload("fits.png", bytes(1 << 20))[0] == 200


@pytest.mark.parametrize("count", [guard.MAX_FILES, guard.MAX_FILES + 1, 990])
def test_an_upload_has_few_files(served, count):
    part = form("", b"").removesuffix(f"--{BOUNDARY}--\r\n".encode())
    body = part * count + f"--{BOUNDARY}--\r\n".encode()
    before = guard._stored(served.uploads)
    status, said, _ = served.call("POST", "/gradio_api/upload", body.replace(b'""', b'"a"'), FORM)
    if count == guard.MAX_FILES:
        assert status == 200 and len(json.loads(said)) == count
    else:
        assert status == 413 and json.loads(said)["detail"] == "expected at most 8 files"
        assert guard._stored(served.uploads) == before


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "multipart/form-data", f"{FORM['Content-Type']}; boundary=x"]
)
def test_an_upload_is_a_form(served, kind):
    headers = {"Content-Type": kind} if kind else {}
    status, said, _ = served.call("POST", "/gradio_api/upload", form("a.png", b"1"), headers)
    assert status == 400 and json.loads(said)["detail"] == "expected a form with a file"


def test_uploads_do_not_fill_the_disk(served):
    large = pathlib.Path(served.uploads) / "sparse"
    with large.open("wb") as file:
        file.truncate(guard.MAX_STORED + 1)
    status, said, _ = served.upload("two.png", b"2" * 9)
    assert status == 413 and "too many uploads are stored" in json.loads(said)["detail"]
    large.unlink()
    assert served.upload("two.png", b"2" * 9)[0] == 200


def test_what_an_upload_that_was_cut_off_left_is_deleted(tmp_path):
    (tmp_path / "whole").mkdir()
    for path in (tmp_path / "tmpold", tmp_path / "tmpnew", tmp_path / "whole" / "a.png"):
        path.write_bytes(b"12345")
    for path in (tmp_path / "tmpold", tmp_path / "whole" / "a.png"):
        os.utime(path, (0, time.time() - 2 * guard._ABANDONED))
    assert guard._stored(str(tmp_path)) == 2 * guard._LEAST
    assert not (tmp_path / "tmpold").exists()


@pytest.mark.parametrize(
    "text,expected",
    [
        ("a: " + "b;" * 20_000, "got 20000 descriptions, expected at most 100"),
        (
            "\n".join(f"{i}: " + "b;" * 100 for i in range(51)),
            "5100 descriptions, expected at most",
        ),
        ("a: " + "b" * 501, "got a text of 501 characters ('bbb"),
        ("a" * 501, "got a text of 501 characters"),
        (json.dumps({"a": ["b" * 10**6]}), "got a text of 1000000 characters"),
        (json.dumps({"a": ["b"] * 101}), "got 101 descriptions"),
        ("[" * 950 + "]" * 950, "expected {"),
        ("{" * 200_000, "not JSON"),
        ('{"a": [' + "9" * 5000 + "]}", "not JSON"),
        ('{"a": [NaN]}', "at "),
    ],
    ids=lambda value: value[:30],
)
def test_classes_are_bounded(text, expected):
    start = time.monotonic()
    with pytest.raises(class_lists.DemoError) as told:
        class_lists.parse(text)
    assert expected in str(told.value) and len(str(told.value)) < 300
    assert time.monotonic() - start < 2


def test_phrases_and_files_of_classes_are_bounded(tmp_path):
    analyst = page_server.Analyst()
    with pytest.raises(class_lists.DemoError, match="got 101 phrases, expected at most 100"):
        analyst.find(None, ["a"] * 101)
    with pytest.raises(class_lists.DemoError, match="got a text of 501 characters"):
        analyst.find(None, ["a" * 501])
    (tmp_path / "D.json").write_bytes(b"a\n" * (1 << 20))
    with pytest.raises(
        class_lists.DemoError, match="D.json: got 2,097,152 bytes, .*; for more use"
    ):
        class_lists.read(tmp_path / "D.json")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(class_lists.DemoError, match="pipe: got a folder, pipe or device"):
        class_lists.read(tmp_path / "pipe")


NO_BOXES = ["1 2 3", "1 2 3 4 5", "3 2 1 4", "1 4 3 4", "-1 0 50 50", "0 0 100 100.1", "0 0 nan 50"]
NO_BOXES += ["0 0 50 inf", "-inf -inf inf inf", "1e999 0 2e999 1", "0 0 5j 50", "0x1 0 50 50"]
NO_BOXES += ["[1,2,3,4]", "\0 \0 \0 \0", "<script> a b c", "9" * 10**6 + " 1 2 3"]
NO_BOXES += ["1 " * 10**5, "\n" * 10**6]


@pytest.mark.parametrize("text", NO_BOXES, ids=lambda text: repr(text[:20]))
def test_a_box_is_four_numbers(text):
    start = time.monotonic()
    with pytest.raises(class_lists.DemoError, match="expected x1 y1 x2 y2 in percent") as told:
        analysis.read_box(text)
    assert len(str(told.value)) < 200 and str(told.value).isprintable()
    assert time.monotonic() - start < 2


def test_classes_that_take_too_long_are_given_up(monkeypatch):
    class Slow:
        def class_features(self, classes):
            time.sleep(0.05)
            return analysis.inference.ClassFeatures(
                tuple(classes), np.zeros((len(classes), 4)), None
            )

    analyst = page_server.Analyst()
    analyst.predictor = Slow()
    classes = dict.fromkeys(map(str, range(100)), ())
    found = analyst._encode_classes(classes)
    assert found.names == tuple(classes) and found.features.shape == (100, 4)
    monkeypatch.setattr(analysis, "SECONDS", 0.08)
    with pytest.raises(class_lists.DemoError, match="32 of 100 classes took 0.08 s; give fewer"):
        analyst._encode_classes(classes)


@pytest.mark.slow  # a browser, which CI has not
@pytest.mark.parametrize("name", ["evil.html", "evil.svg"])
def test_the_script_of_an_uploaded_page_does_not_run(served, name):
    playwright = pytest.importorskip("playwright.sync_api")
    from tests import browser

    content = SCRIPT
    if name.endswith(".svg"):
        content = b'<svg xmlns="http://www.w3.org/2000/svg">' + SCRIPT + b"</svg>"
    (path,) = json.loads(served.upload(name, content)[1])
    with browser.opened(f"http://127.0.0.1:{served.port}/") as found:
        asked = []
        found.page.on("request", lambda request: asked.append(request.url))
        with pytest.raises(playwright.Error, match="Download is starting"):
            found.page.goto(f"http://127.0.0.1:{served.port}/gradio_api/file={path}")
        found.page.wait_for_timeout(500)
        found.page.goto(f"http://127.0.0.1:{served.port}/")
        assert found.page.evaluate("localStorage.owned") is None
        assert not [url for url in asked if url.endswith("/owned")]
