"""A chat model behind an endpoint: what is sent, how much at a time, and what happens when it does not answer."""

import asyncio
import socket

import PIL.Image
import pytest

from grain_jax.data.annotate import answers, chat, endpoint_chat
from grain_jax.data.annotate.arguments import Annotate
from tests.data.annotate import endpoint

PICTURE = PIL.Image.new("RGB", (60, 40), (200, 30, 30))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Waits between tries that a test can wait for."""
    monkeypatch.setattr(endpoint_chat, "FIRST_WAIT", 0.02)


def _client(url, **args):
    args = Annotate(images="", output="", endpoint=url, chat="tiny", **args)
    return endpoint_chat.EndpointChat(args)


def _sequence(*replies):
    """Replies in this order, the last one over and over."""
    left = list(replies)
    return lambda asked: left.pop(0) if len(left) > 1 else left[0]


def test_answers_come_in_order_with_their_tokens():
    with endpoint.serve() as server:
        client = _client(server.url, concurrency=4)
        prompts = ["Subject:", "List.", "Subject:"] * 4
        result = client.answer([PICTURE] * 12, prompts)
    for prompt, answer in zip(prompts, result, strict=True):
        parse = answers.parse_caption if prompt == "Subject:" else answers.parse_descriptions
        assert not isinstance(parse(answer.text), answers.Refused)
        assert (answer.prompt_tokens, answer.cut_off) == (100, False)
        assert answer.answer_tokens == len(answer.text.split())
    assert {asked.prompt for asked in server.asked} == {"Subject:", "List."}


def test_what_is_sent(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret\n")
    large = PIL.Image.new("CMYK", (3000, 1500))
    with endpoint.serve() as server:
        client = _client(server.url)
        client.answer([PICTURE], ["Subject:"])
        client.answer([large], ["List."])
        monkeypatch.delenv("OPENAI_API_KEY")
        _client(server.url).answer([PICTURE], ["List."])
    first, second, third = server.asked
    expected = {"model": "tiny", "max_tokens": 256, "temperature": 0}
    assert first.body | {"messages": None} == expected | {"messages": None}
    assert first.headers["Authorization"] == "Bearer secret"
    assert "Authorization" not in third.headers
    result = first.picture
    assert (result.format, result.mode, result.size) == ("JPEG", "RGB", (60, 40))
    assert max(abs(a - b) for a, b in zip(first.picture.getpixel((30, 20)), (200, 30, 30))) < 4
    assert second.picture.size == (1344, 672)
    assert large.size == (3000, 1500) and PICTURE.size == (60, 40)  # the caller's stay as they are


def test_no_more_requests_at_a_time_than_allowed():
    with endpoint.serve(lambda asked: endpoint.Reply("a", seconds=0.1)) as server:
        assert len(_client(server.url, concurrency=3).answer([PICTURE] * 12, ["List."] * 12)) == 12
        assert server.busiest == 3


@pytest.mark.parametrize(
    "reply",
    [
        endpoint.Reply("overloaded", status=500),
        endpoint.Reply("overloaded", status=503),
        endpoint.Reply("slow down", status=429),
        endpoint.Reply(body=b"<html>a proxy's page</html>"),
        endpoint.Reply(hang_up=True),
        endpoint.Reply("too late", seconds=0.8),
    ],
)
def test_what_passes_is_tried_again(reply):
    good = endpoint.Reply("a beak")
    with endpoint.serve(_sequence(reply, reply, good)) as server:
        (result,) = _client(server.url, request_seconds=0.4).answer([PICTURE], ["List."])
    assert result.text == "a beak" and len(server.asked) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_a_request_that_is_refused_is_not_repeated(status):
    def choose(asked):
        good = asked.prompt == "List."
        return endpoint.Reply("a beak") if good else endpoint.Reply("no\nsuch", status=status)

    with endpoint.serve(choose) as server:
        client = _client(server.url, concurrency=1)
        prompts = ["List.", "bad", *["List."] * 20]
        if status in endpoint_chat._FATAL:  # it concerns every request
            with pytest.raises(endpoint_chat.EndpointError, match=f"'tiny'.*status {status}: "):
                client.answer([PICTURE] * 22, prompts)
            assert len(server.asked) < 10
        else:
            good, bad, *others = client.answer([PICTURE] * 22, prompts)
            assert {x.text for x in [good, *others]} == {"a beak"}
            assert bad.cause == "request rejected" and f"status {status}: " in bad.detail
            assert "\n" not in bad.detail and len(server.asked) == 22


def test_retry_after_holds_for_all_requests():
    replies = _sequence(
        endpoint.Reply("slow down", status=429, retry_after="1"), endpoint.Reply("a beak")
    )
    with endpoint.serve(replies) as server:
        client = _client(server.url, concurrency=1)
        assert [x.text for x in client.answer([PICTURE] * 3, ["List."] * 3)] == ["a beak"] * 3
    moments = [asked.time for asked in server.asked]
    assert len(moments) == 4
    assert 1.0 <= moments[1] - moments[0] < 3 and moments[3] - moments[1] < 1


def test_waits_grow_between_tries(monkeypatch):
    waits = []
    sleep = asyncio.sleep
    monkeypatch.setattr(endpoint_chat, "FIRST_WAIT", 1.0)
    monkeypatch.setattr(asyncio, "sleep", lambda s: waits.append(s) or sleep(0))
    address = _closed_port()
    (result,) = _client(address, tries=9).answer([PICTURE], ["List."])
    assert result.cause == "no connection" and "ConnectionRefusedError" in result.detail
    waits = [wait for wait in waits if wait]
    bounds = [1, 2, 4, 8, 16, 32, 60, 60]
    assert len(waits) == 8
    assert all(bound / 2 <= wait <= bound for wait, bound in zip(waits, bounds))


def test_the_limit_of_tokens_is_told_and_a_server_need_not_count_them():
    body = b'{"choices": [{"message": {"content": "a beak"}, "finish_reason": "length"}]}'
    with endpoint.serve(lambda asked: endpoint.Reply(body=body)) as server:
        (result,) = _client(server.url).answer([PICTURE], ["List."])
    assert result == chat.Answer("a beak", 0, 0, cut_off=True)


def _closed_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/v1"
