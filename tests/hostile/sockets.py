"""A server on loopback that sends what a test likes, byte by byte: http.server would refuse to."""

import contextlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator

STOP = threading.Event  # set when the server ends: a behaviour that goes on for ever looks at it
Behaviour = Callable[[socket.socket, STOP], None]


def head(*lines: str, status: str = "200 OK") -> bytes:
    """The head of a response; it ends the connection afterwards unless `lines` say otherwise."""
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode("latin-1")


def answer(text: str = "a beak", usage: str = '{"prompt_tokens": 3}') -> bytes:
    """The body of a right answer; `usage` is spelt by the test."""
    choice = {"message": {"content": text}, "finish_reason": "stop"}
    return f'{{"choices": [{json.dumps(choice)}], "usage": {usage}}}'.encode()


def sent(data: bytes) -> Behaviour:
    """Sends `data` and ends the connection."""
    return lambda connection, stop: connection.sendall(data)


def body(data: bytes, *lines: str) -> Behaviour:
    """Sends `data` with a right length."""
    return sent(head(f"Content-Length: {len(data)}", *lines) + data)


def dripping(start: bytes, piece: bytes, seconds: float = 0.05) -> Behaviour:
    """Sends `start`, then `piece` over and over, `seconds` apart."""

    def behave(connection, stop):
        connection.sendall(start)
        while not stop.wait(seconds):
            connection.sendall(piece)

    return behave


def serve(behave: Behaviour):
    """A server on a free port, until the block ends."""
    return running(Server(behave))


@contextlib.contextmanager
def running(server: "Server") -> Iterator["Server"]:
    """Ends the server with the block."""
    try:
        yield server
    finally:
        server.stop.set()
        server.listener.close()


class Server:
    """A server that runs.

    Attributes:
      url: what a client is given, up to the version.
      requests: the heads of the requests so far.
    """

    def __init__(self, behave: Behaviour | None):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.requests: list[bytes] = []
        self.stop = threading.Event()
        self._behave = behave
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(10)
            head, content = request(connection)
            self.requests.append(head)
            self.respond(connection, head, content)

    def respond(self, connection: socket.socket, head: bytes, content: bytes) -> None:
        """Answers a request."""
        self._behave(connection, self.stop)


def request(connection: socket.socket) -> tuple[bytes, bytes]:
    """Reads a whole request, so that an early end is not a reset; returns its head and its content."""
    data, length = b"", None
    while True:
        head, end, content = data.partition(b"\r\n\r\n")
        if end and length is None:
            header = re.search(rb"content-length: *(\d+)", head.lower())
            length = int(header[1]) if header else 0
        more = b"" if end and len(content) >= length else connection.recv(65536)
        if not more:
            return head, content
        data += more
