"""An OpenAI-compatible endpoint on loopback: real HTTP, answers that a test chooses, and faults on demand."""

import base64
import contextlib
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import PIL.Image

from grain_jax.data.annotate import chat, endpoint_chat
from grain_jax.data.annotate.arguments import Annotate
from tests.hostile import sockets

PICTURE = PIL.Image.new("RGB", (60, 40), (200, 30, 30))
SUBJECT = "Subject: a small bird\n"
CAPTION = "Caption: a small bird with a red wing sits on a branch."
DESCRIPTIONS = ("a short orange beak\n", "red wing feathers\n", "a white belly\n", "thin grey legs")


class Asked(NamedTuple):
    """A request as it came in."""

    prompt: str
    picture: PIL.Image.Image
    body: dict[str, Any]
    headers: dict[str, str]


class Reply(NamedTuple):
    """What the server does; by default it answers with `text`."""

    text: str = ""
    status: int = 200
    retry_after: str | None = None
    seconds: float = 0.0  # that it waits first
    body: bytes | None = None  # sent as it is, whatever `text` says
    finish_reason: str = "stop"
    hang_up: bool = False  # closes the connection instead of answering

    def encode(self) -> bytes:
        """The response."""
        choice = {"message": {"content": self.text}, "finish_reason": self.finish_reason}
        value = {"choices": [choice]} if self.status == 200 else {"error": {"message": self.text}}
        data = json.dumps(value).encode() if self.body is None else self.body
        lines = [f"Content-Length: {len(data)}", "Connection: close"]  # else a quick retry meets a closed one
        if self.retry_after is not None:
            lines.append(f"Retry-After: {self.retry_after}")
        return sockets.head(*lines, status=f"{self.status} Told") + data


def annotator(asked: Asked) -> Reply:
    """Answers in the form that the prompts ask for."""
    if "Subject:" in asked.prompt:
        return Reply(SUBJECT + CAPTION)
    return Reply("".join(DESCRIPTIONS))


class Endpoint(sockets.Server):
    """A server that runs."""

    def __init__(self, reply: Callable[[Asked], Reply]):
        self.asked: list[Asked] = []  # in the order of their arrival
        self.busiest = self.open = 0  # requests at one time
        self.reply = reply
        self.lock = threading.Lock()
        super().__init__(None)

    def respond(self, connection: socket.socket, head: bytes, content: bytes) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        body = json.loads(content)
        parts = {part["type"]: part for part in body["messages"][0]["content"]}
        encoded = base64.b64decode(parts["image_url"]["image_url"]["url"].partition(",")[2])
        picture = PIL.Image.open(io.BytesIO(encoded))
        headers = dict(line.split(": ", 1) for line in lines)
        asked = Asked(parts["text"]["text"], picture, body, headers)
        with self.lock:
            self.asked.append(asked)
            self.open += 1
            self.busiest = max(self.busiest, self.open)
            reply = self.reply(asked)
        time.sleep(reply.seconds)
        with self.lock:
            self.open -= 1
        if "/v1/chat/completions" not in first:
            reply = Reply("no such path", status=404)
        if not reply.hang_up:
            connection.sendall(reply.encode())


@contextlib.contextmanager
def serve(reply: Callable[[Asked], Reply] = annotator) -> Iterator[Endpoint]:
    """A server on a free port, until the block ends; `reply` is called with one request at a time."""
    with sockets.running(Endpoint(reply)) as server:
        yield server


def client(url: str, **args: Any) -> contextlib.closing[endpoint_chat.EndpointChat]:
    """A client with these flags, for a with block."""
    args = Annotate(images="", output="", endpoint=url, chat="tiny", **args)
    return contextlib.closing(endpoint_chat.EndpointChat(args))


def ask(url: str, **args: Any) -> chat.Answer | chat.Failure:
    """The answer about PICTURE."""
    with client(url, **args) as asked:
        return asked.answer([PICTURE], ["List."])[0]
