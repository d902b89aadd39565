"""An OpenAI-compatible endpoint on loopback: real HTTP, answers that a test chooses, and faults on demand."""

import base64
import contextlib
import http.server
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import PIL.Image

from tests.data.annotate import models


class Asked(NamedTuple):
    """A request as it came in."""

    prompt: str
    picture: PIL.Image.Image
    body: dict[str, Any]
    headers: dict[str, str]
    time: float  # monotonic


class Reply(NamedTuple):
    """What the server does; by default it answers with `text`."""

    text: str = ""
    status: int = 200
    retry_after: str | None = None
    seconds: float = 0.0  # that it waits first
    body: bytes | None = None  # sent as it is, whatever `text` says
    finish_reason: str = "stop"
    hang_up: bool = False  # closes the connection instead of answering


def annotator(asked: Asked) -> Reply:
    """Answers as the tiny LLaVA-NeXT of `models` does."""
    if "Subject:" in asked.prompt:
        return Reply(models.SUBJECT + models.CAPTION)
    return Reply("".join(models.DESCRIPTIONS))


class Endpoint:
    """A server that runs.

    Attributes:
      url: what a client is given, up to the version.
      asked: the requests so far, in the order of their arrival.
      busiest: the most requests that were open at one time.
      reply: chooses what to do with a request.
    """

    def __init__(self, reply: Callable[[Asked], Reply]):
        self.url = ""
        self.asked: list[Asked] = []
        self.busiest = self.open = 0
        self.reply = reply
        self.lock = threading.Lock()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits for an acknowledgement: 40 ms

    def do_POST(self):
        endpoint = self.server.endpoint
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        parts = {part["type"]: part for part in body["messages"][0]["content"]}
        encoded = base64.b64decode(parts["image_url"]["image_url"]["url"].partition(",")[2])
        asked = Asked(
            parts["text"]["text"],
            PIL.Image.open(io.BytesIO(encoded)),
            body,
            dict(self.headers),
            time.monotonic(),
        )
        with endpoint.lock:
            endpoint.asked.append(asked)
            endpoint.open += 1
            endpoint.busiest = max(endpoint.busiest, endpoint.open)
            reply = endpoint.reply(asked)
        try:
            time.sleep(reply.seconds)
        finally:
            with endpoint.lock:
                endpoint.open -= 1
        if self.path != "/v1/chat/completions":
            reply = Reply("no such path", status=404)
        if reply.hang_up:
            self.close_connection = True
            return
        # A client that has given up does not read the answer.
        with contextlib.suppress(ConnectionError):
            self._send(reply)

    def _send(self, reply: Reply) -> None:
        data = reply.body
        if data is None and reply.status == 200:
            choice = {
                "index": 0,
                "message": {"role": "assistant", "content": reply.text},
                "finish_reason": reply.finish_reason,
            }
            tokens = len(reply.text.split())
            usage = {
                "prompt_tokens": 100,
                "completion_tokens": tokens,
                "total_tokens": 100 + tokens,
            }
            data = json.dumps({"choices": [choice], "usage": usage}).encode()
        elif data is None:
            data = json.dumps({"error": {"message": reply.text}}).encode()
        self.send_response(reply.status)
        if reply.retry_after is not None:
            self.send_header("Retry-After", reply.retry_after)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format, *args):
        pass


class _Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True


@contextlib.contextmanager
def serve(reply: Callable[[Asked], Reply] = annotator) -> Iterator[Endpoint]:
    """A server on a free port, until the block ends.

    Args:
      reply: chooses what to do with a request; called with one request at a time.
    """
    endpoint = Endpoint(reply)
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.endpoint = endpoint
        endpoint.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield endpoint
        finally:
            server.shutdown()
            thread.join()
