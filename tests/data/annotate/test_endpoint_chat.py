"""A chat model behind an endpoint: what is sent, how much at a time, and what a silent one leads to."""

import asyncio
import socket

import PIL.Image
import pytest

from grain_jax.core import errors
from grain_jax.data.annotate import chat, endpoint_chat
from tests.data.annotate import endpoint


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Waits between tries that a test can wait for."""
    monkeypatch.setattr(endpoint_chat, "FIRST_WAIT", 0.02)


def test_what_is_sent_and_that_answers_come_in_order(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret\n")
    large = PIL.Image.new("CMYK", (3000, 1500))

    def reply(asked):
        if asked.prompt == "List.":
            return endpoint.Reply("a beak")
        number = int(asked.prompt)
        seconds = 0.1 if number < 6 else 0.0
        return endpoint.Reply(asked.prompt, seconds=seconds, finish_reason="length" * (number > 9))

    with endpoint.serve(reply) as server:
        with endpoint.client(server.url, concurrency=3) as client:
            results = client.answer([endpoint.PICTURE] * 11 + [large], list(map(str, range(12))))
        assert server.busiest == 3  # no more requests at a time than allowed
        monkeypatch.delenv("OPENAI_API_KEY")
        assert endpoint.ask(server.url).text == "a beak"
    assert results == [chat.Answer(str(number), number > 9) for number in range(12)]
    asked = {request.prompt: request for request in server.asked[:12]}
    expected = {"model": "tiny", "max_tokens": 256, "temperature": 0}
    assert asked["3"].body | {"messages": None} == expected | {"messages": None}
    assert asked["3"].headers["Authorization"] == "Bearer secret"
    assert "Authorization" not in server.asked[12].headers
    sent = asked["3"].picture
    assert (sent.format, sent.mode, sent.size) == ("JPEG", "RGB", (60, 40))
    assert max(abs(a - b) for a, b in zip(sent.getpixel((30, 20)), (200, 30, 30))) < 4
    assert asked["11"].picture.size == (1344, 672)
    assert large.size == (3000, 1500) and endpoint.PICTURE.size == (60, 40)  # the caller's stay as they are


@pytest.mark.parametrize(
    "reply",
    [
        endpoint.Reply("overloaded", status=503),
        endpoint.Reply("slow down", status=429),
        endpoint.Reply(body=b"<html>a proxy's page</html>"),
        endpoint.Reply(hang_up=True),
        endpoint.Reply("too late", seconds=0.8),
    ],
)
def test_what_passes_is_tried_again(reply):
    left = [reply, reply, endpoint.Reply("a beak")]
    with endpoint.serve(lambda asked: left.pop(0)) as server:
        result = endpoint.ask(server.url, request_seconds=0.4)
    assert result.text == "a beak" and len(server.asked) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_request_that_is_refused_is_not_repeated(status):
    def choose(asked):
        good = asked.prompt == "List."
        return endpoint.Reply("a beak") if good else endpoint.Reply("no\nsuch", status=status)

    with endpoint.serve(choose) as server, endpoint.client(server.url, concurrency=1) as client:
        prompts = ["List.", "bad", *["List."] * 20]
        if status in endpoint_chat._FATAL:  # it concerns every request
            with pytest.raises(errors.UserError, match=f"'tiny'.*status {status}: "):
                client.answer([endpoint.PICTURE] * 22, prompts)
            assert len(server.asked) < 10
        else:
            good, bad, *others = client.answer([endpoint.PICTURE] * 22, prompts)
            assert {x.text for x in [good, *others]} == {"a beak"}
            assert bad.cause == "request rejected" and f"status {status}: " in bad.detail
            assert "\n" not in bad.detail and len(server.asked) == 22


def test_waits_between_tries_grow_and_retry_after_holds_for_all_requests(monkeypatch):
    waits, sleep = [], asyncio.sleep
    monkeypatch.setattr(endpoint_chat, "FIRST_WAIT", 1.0)
    waiting = lambda seconds: (waits.append(seconds) if seconds else None) or sleep(0)
    monkeypatch.setattr(asyncio, "sleep", waiting)
    replies = [endpoint.Reply("slow down", status=429, retry_after="20")]
    with endpoint.serve(lambda _: replies.pop() if replies else endpoint.Reply("a")) as server:
        with endpoint.client(server.url, concurrency=1) as client:
            assert [x.text for x in client.answer([endpoint.PICTURE] * 3, ["List."] * 3)] == ["a"] * 3
    assert len(waits) == 3 and all(19 < wait <= 20 for wait in waits)
    waits.clear()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    result = endpoint.ask(url, tries=9)
    assert result.cause == "no connection" and "ConnectionRefusedError" in result.detail
    bounds = [1, 2, 4, 8, 16, 32, 60, 60]
    assert len(waits) == 8
    assert all(bound / 2 <= wait <= bound for wait, bound in zip(waits, bounds))
