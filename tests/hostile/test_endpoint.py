"""What a hostile endpoint does to data.annotate: a fault with its cause, in time, and the key stays here."""

import gzip
import json
import time

import PIL.Image
import pytest

from grain_jax.core import errors
from grain_jax.data.annotate import __main__ as command
from grain_jax.data.annotate import chat, endpoint_chat
from tests.data.annotate import endpoint
from tests.hostile import sockets

PICTURE = PIL.Image.new("RGB", (20, 20), "teal")
SECONDS = 0.5  # --request-seconds
SLACK = 1.5  # of a busy machine
KEY = "sk-very-secret"


ANSWER, NO, CONNECTION = sockets.answer(), endpoint_chat.NO_ANSWER, endpoint_chat.CONNECTION
LATE, REJECTED = endpoint_chat.TIME_OUT, endpoint_chat.REJECTED
LONG = f"Content-Length: {len(ANSWER)}"
head, body, sent, dripping = sockets.head, sockets.body, sockets.sent, sockets.dripping
ROWS = [  # name; what the server does; the cause of the failure or the text of the answer; part of the detail
    ("5000 digits", body(sockets.answer(usage='{"prompt_tokens": %s}' % ("9" * 5000))), "a beak", ""),
    ("terminal codes", body(b"\x1b[2J\x1b]0;owned\x07"), NO, "\\x1b[2J"),
    ("a gzip bomb", body(gzip.compress(bytes(1 << 24)), "Content-Encoding: gzip"), NO, ""),
    ("a length of 1 TB", sent(head(f"Content-Length: {1 << 40}") + ANSWER), CONNECTION, ""),
    ("closed in the body", sent(head(LONG) + ANSWER[:20]), CONNECTION, "received 20 bytes"),
    ("an endless body", dripping(head(), b"x" * 65536, 0), NO, "more than 1048576 bytes"),
    ("continue for ever", dripping(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 999, 0), LATE, ""),
    ("an endless error", dripping(head(status="400 No"), b"x" * 65536, 0), REJECTED, ""),
    ("a dripping body", dripping(head(), b"x"), LATE, ""),
]  # fmt: skip


@pytest.mark.parametrize("behave, cause, detail", [x[1:] for x in ROWS], ids=[x[0] for x in ROWS])
def test_a_response_is_an_answer_or_a_failure_with_its_cause_in_time(behave, cause, detail):
    seconds = SECONDS if cause == LATE else 40 * SECONDS  # a busy machine: other bounds need more
    start = time.monotonic()
    with sockets.serve(behave) as server:
        result = endpoint.ask(server.url, request_seconds=seconds, tries=1)
    assert time.monotonic() - start < seconds + SLACK
    if isinstance(result, chat.Answer):
        assert result.text == cause
    else:
        assert result.cause == cause and detail in result.detail
        assert result.detail.isprintable() and len(result.detail) < 400
    json.dumps(result._asdict())


@pytest.mark.parametrize("status, location", [(302, "{}/chat/completions"), (307, "file:///etc/passwd")])
def test_the_key_goes_to_no_other_address(monkeypatch, status, location):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with sockets.serve(body(ANSWER)) as other:
        location = location.format(other.url)
        redirect = sent(head(f"Location: {location}", status=f"{status} Moved"))
        with sockets.serve(redirect) as server:
            with pytest.raises(errors.UserError) as refused:
                endpoint.ask(server.url, request_seconds=SECONDS, tries=3)
            assert len(server.requests) == 1 and KEY.encode() in server.requests[0]
        assert other.requests == []
    assert f"redirects to {location} (status {status})" in str(refused.value)
    assert "give it as --endpoint" in str(refused.value) and KEY not in str(refused.value)


REPEATED = f"the request had Authorization: Bearer {KEY}"
LATE_KEY = "x" * 176 + KEY  # a cut to 200 characters would leave its beginning


@pytest.mark.parametrize(
    "behave",
    [
        body(sockets.answer(f"Subject: a wren\nCaption: A wren and {KEY}")),
        sent(head(status="400 No") + LATE_KEY.encode()),
        sent(head(status="500 Oh") + REPEATED.replace("-", "\\u002d").encode()),
        sent(head(f"Location: http://x/?key={KEY.replace('-', '%2D')}", status="302 Found")),
    ],
)
def test_a_key_that_the_server_repeats_is_written_nowhere(tmp_path, monkeypatch, capfd, behave):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    (tmp_path / "images").mkdir()
    PICTURE.save(tmp_path / "images/0.png")
    (tmp_path / "images/0.txt").write_text("A wren.")
    with sockets.serve(behave) as server:
        args = [f"--images={tmp_path / 'images'}", f"--output={tmp_path / 'out'}", "--chat=tiny"]
        args += [f"--endpoint={server.url}", "--passes=caption", "--tries=1", "--max-faults=1"]
        command.main([*args, "--request-seconds=20"])
    texts = [*capfd.readouterr()]
    texts += [path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not any("sk-v" in text.lower() or "very" in text for text in texts)
    assert any("[OPENAI_" in text for text in texts)


def test_a_worker_has_one_client_whose_connection_serves_all_its_requests():
    made = []

    def connect(connection, stop):
        made.append(connection)
        for _ in range(2):
            connection.sendall(head(LONG) + ANSWER)
            sockets.request(connection)

    with sockets.serve(connect) as server, endpoint.client(server.url, concurrency=1) as client:
        for _ in range(2):
            (result,) = client.answer([PICTURE], ["List."])
            assert result.text == "a beak"
    assert len(made) == 1
