"""ASGI middleware in front of the page: refuses requests that the page itself does not make.

The answer has a status 4xx and one line. Gradio alone serves many routes that this page does not use, opens paths and
URLs that a request names, and answers malformed requests with status 500 and a traceback. This module needs no Gradio.
"""

import contextlib
import json
import os
import re
import stat
import sys
import time
from collections.abc import Callable
from typing import Any

from etils import epath

MAX_FILE = 32 << 20  # bytes of an upload
MAX_FILES = 8  # of an upload; the page sends one
MAX_CALL = 1 << 20  # bytes of any other call
MAX_STORED = 1 << 30  # bytes of all uploads that are not deleted yet
_LEAST = 64 << 10  # bytes that a file counts for: small ones fill the disk's tables
_FORM = re.compile(rb"multipart/form-data; *boundary=([!-~]{1,70})")
_ENVELOPE = 64 << 10  # bytes around the file in an upload
_API = "/gradio_api"
_UPLOAD = f"{_API}/upload"
_EVENTS = (f"{_API}/queue/join", f"{_API}/run/predict")
_POSTS = (_UPLOAD, *_EVENTS, f"{_API}/cancel", f"{_API}/reset")
# Routes that stay closed: Gradio would fetch any URL for a client, and store data of sessions.
_ELSEWHERE = re.compile(f"{_API}/(proxy=|file=(?!/)|deep_link)")
_ABANDONED = 600  # seconds after which what is left of an upload that was cut off is deleted
_READ_ON = 1 << 30  # bytes of a refused upload: a client that is not read sees no response


class Refused(Exception):
    """A refused request; the message is the line of the response.

    Attributes:
      status: the HTTP status of the response.
    """

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class Guard:
    """ASGI middleware.

    Args:
      app: the application that handles the accepted requests.
      folder: folder of the uploads.
      check: called with the number and the JSON values of each event; raises ValueError, with the reason, for values
        that the page does not send.
    """

    def __init__(self, app: Callable, folder: str, check: Callable[[Any, Any], None]):
        self._app, self._folder, self._check = app, folder, check

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        """Handles a request, as ASGI defines it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = ended = False

        async def heard():
            nonlocal ended
            message = await receive()
            ended = not message.get("more_body", False)
            return message

        async def answer(message):
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, await self._checked(scope, heard), answer)
            return
        except Refused as error:
            status, reason, left = error.status, str(error), _READ_ON
            while status == 413 and not ended and left > 0:
                left -= len((await heard()).get("body", b""))
        except Exception as error:  # Gradio raises many types for malformed requests
            said = _line(f"{type(error).__name__}: {error}")
            print(_line(f"{scope['method']} {scope['path']}: {said}"), file=sys.stderr)
            status, reason = 400, f"this cannot be served: {said}"
        body = b"" if begun else json.dumps({"detail": reason}).encode()
        if not begun:
            headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _checked(self, scope: dict[str, Any], receive: Callable) -> Callable:
        """Checks a request; returns a `receive` for its body that enforces a limit of size. Raises Refused."""
        path = scope["path"].rstrip("/")
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            if _ELSEWHERE.match(path):
                raise Refused(404, "expected a part of the page, or a file that was uploaded here")
            return receive
        if path not in _POSTS:
            raise Refused(404, "the page makes no such call")
        if path == _UPLOAD:
            if _stored(self._folder) > MAX_STORED:
                raise Refused(413, "too many uploads are stored here; try again in an hour")
            most, limit = MAX_FILE + _ENVELOPE, f"{MAX_FILE >> 20} MiB a file"
            headers = dict(scope["headers"])
            length = headers.get(b"content-length", b"")
            if length.isdigit() and int(length[:20]) > most:
                raise Refused(413, f"expected at most {limit}")
            form = _FORM.fullmatch(headers.get(b"content-type", b""))
            if form is None:
                raise Refused(400, "expected a form with a file")
            return _bounded(receive, most, limit, b"--" + form[1])
        receive = _bounded(receive, MAX_CALL, f"{MAX_CALL >> 20} MiB")
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        try:
            call = json.loads(body, parse_constant=_not_json)
            if not isinstance(call, dict):
                raise ValueError("expected an object")
            if path in _EVENTS:
                self._check(call.get("fn_index"), call.get("data"))
        except (ValueError, RecursionError) as error:
            raise Refused(400, _line(str(error))) from None
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def repeated():
            return waiting.pop() if waiting else await receive()

        return repeated


def _not_json(constant: str) -> None:
    raise ValueError(f"got {constant}, expected JSON")


def _bounded(receive: Callable, most: int, limit: str, mark: bytes = b"") -> Callable:
    """A `receive` that enforces a limit of size and MAX_FILES; `mark` stands before each file and at the end."""
    left, marks, tail = most, 0, b""

    async def bounded():
        nonlocal left, marks, tail
        message = await receive()
        body = message.get("body", b"")
        left -= len(body)
        if left < 0:
            raise Refused(413, f"expected at most {limit}")
        if mark:
            marks += (tail + body).count(mark)
            tail = (tail + body)[1 - len(mark) :]
        if marks > MAX_FILES + 1:
            raise Refused(413, f"expected at most {MAX_FILES} files")
        return message

    return bounded


def _stored(folder: str) -> int:
    """Deletes abandoned uploads; returns the bytes that all files count for in the folder and its sub-folders."""
    total = 0
    # Gradio moves a complete upload into a sub-folder.
    for pattern in ("*", "*/*"):
        for path in epath.Path(folder).glob(pattern):
            with contextlib.suppress(FileNotFoundError):  # another request has deleted it
                found = os.stat(path)
                if stat.S_ISDIR(found.st_mode):
                    continue
                if pattern == "*" and time.time() - found.st_mtime > _ABANDONED:
                    path.unlink()
                else:
                    total += max(found.st_size, _LEAST)
    return total


def _line(text: str) -> str:
    """The text as one line of printable characters, at most 300."""
    text = " ".join(text.split())[:300]
    return "".join(char if char.isprintable() else "\ufffd" for char in text)
