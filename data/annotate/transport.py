"""A request to an untrusted server: bounded in time and bytes, and never redirected.

urllib follows redirects with all headers, the key included; it waits anew for each piece that a server
drips, and reads whatever length a server claims.
"""

import functools
import http.client
import io
import socket
import time
import urllib.request
from typing import Any

MAX_BYTES = 1 << 20  # of a response, its head included; an answer of 256 tokens has a few thousand


class TooLong(http.client.HTTPException):
    """A response has more than MAX_BYTES."""

    def __init__(self):
        super().__init__(f"got more than {MAX_BYTES} bytes, expected an answer")


def post(url: str, body: bytes, headers: dict[str, str], *, seconds: float) -> bytes:
    """Posts `body` and returns the response's.

    Args:
      url: http or https; a proxy that the environment names is used.
      body: of the request.
      headers: of the request; no address but that of `url` gets them.
      seconds: from the start of the connection to the last byte of the response.

    Raises:
      urllib.error.HTTPError: another status than 2xx, a redirect's among them; `refusal` reads its body.
      TimeoutError, or urllib.error.URLError with one as its reason: the time is up.
      OSError, http.client.HTTPException, ValueError: no connection, or what came is not HTTP.
    """
    request = urllib.request.Request(url, body, headers)
    with _OPENER.open(request, timeout=seconds) as response:
        return _read(response)


def refusal(error: Any) -> str:
    """The readable part of a response with an error status."""
    try:
        return _read(error).decode(errors="replace")
    except (OSError, http.client.HTTPException, ValueError):
        return ""


def _read(response: Any) -> bytes:
    body = response.read(MAX_BYTES)  # all: _Bounded ends a longer one
    missing = response.length  # of what Content-Length promised; None where it says nothing
    if missing:
        raise http.client.IncompleteRead(body, missing)
    return body


class _Bounded(io.RawIOBase):
    """What a socket receives until `deadline` (on the monotonic clock), MAX_BYTES of it at most."""

    def __init__(self, connection: socket.socket, deadline: float):
        super().__init__()
        self._socket, self._deadline, self._left = connection, deadline, MAX_BYTES
        self._raw = connection.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._socket.settimeout(_left(self._deadline))
        count = self._raw.readinto(buffer)
        self._left -= count
        if self._left < 0:
            raise TooLong
        return count

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, connection: socket.socket, *args: Any, deadline: float, **named: Any):
        super().__init__(connection, *args, **named)
        self.fp.close()
        self.fp = io.BufferedReader(_Bounded(connection, deadline))


class _Connection(http.client.HTTPConnection):
    def connect(self) -> None:
        deadline = time.monotonic() + self.timeout
        self.response_class = functools.partial(_Response, deadline=deadline)
        self._create_connection = functools.partial(_connect, deadline=deadline)
        super().connect()
        self.sock.settimeout(_left(deadline))  # of what is sent, and of TLS's handshake


class _SecureConnection(http.client.HTTPSConnection, _Connection):
    pass


def _connect(address: tuple[str, int], *unused: Any, deadline: float) -> socket.socket:
    """A connection to the first of the host's addresses that takes one in time."""
    failure: OSError = OSError(f"{address[0]}: no address")
    for family, kind, protocol, _, place in socket.getaddrinfo(*address, 0, socket.SOCK_STREAM):
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(_left(deadline))
            connection.connect(place)
            return connection
        except OSError as error:
            connection.close()
            failure = error
    raise failure


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


class _Handler(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_Connection, request)


class _SecureHandler(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_SecureConnection, request)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *unused: Any) -> None:
        """None: the redirect is an HTTPError."""


_OPENER = urllib.request.build_opener(_Handler, _SecureHandler, _NoRedirect)
