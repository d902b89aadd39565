"""A chat model behind an OpenAI-compatible endpoint: what vLLM, SGLang and `transformers serve` offer.

By httpx, which follows the proxies of the environment and no redirects. It bounds neither the time nor the bytes of a
whole response, so each request runs in an event loop of its own that ends with `seconds`. Whatever a server sends, a
request ends in an answer, a failure of a fixed name, or EndpointError.
"""

import asyncio
import base64
import concurrent.futures
import email.utils
import io
import json
import os
import random
import re
import ssl
import threading
import time
from collections.abc import Sequence
from typing import Any

import PIL.Image
from etils import epy

from grain_jax.core import errors
from grain_jax.data.annotate import chat
from grain_jax.data.annotate.arguments import Annotate

with epy.lazy_imports():  # it need not be installed
    import httpx

TIME_OUT, CONNECTION = "time-out", "no connection"
SERVER_ERROR, RATE_LIMIT = "server error", "rate limit"
REJECTED, NO_ANSWER = "request rejected", "no answer in the response"

KEY = "OPENAI_API_KEY"  # of the environment; holds the key, where one is needed
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between tries, doubled each time
LONGEST_RETRY_AFTER = 3600.0  # seconds; a server that asks for more is not waited for any longer
MAX_SIDE = 1344  # pixels of the image that is sent; LLaVA-NeXT looks at no more than 1008
JPEG_QUALITY = 92
MAX_BYTES = 1 << 20  # of a response; an answer of 256 tokens has a few thousand
MAX_TOKENS = 1 << 31  # of a request, by the server's count; counters are of 64 bits
# What concerns every request alike: a wrong key, address or model. Going on would only fail 12 million times.
_FATAL = {401: "the key is wrong or missing", 403: "not allowed", 404: "no such address or model"}
_RETRIED = {408: TIME_OUT, 425: SERVER_ERROR, 429: RATE_LIMIT}  # and all from 500 on
_ENDED = ("peer closed", "disconnected")  # how httpx says that a connection ended early


class EndpointError(errors.UserError):
    """The endpoint cannot be used at all."""


class EndpointChat:
    """A client. It may be used by several threads; the limits hold for all of them together.

    Raises:
      EndpointError: the address, the key or a proxy is not valid; nothing is asked yet.
    """

    def __init__(self, given: Annotate):
        try:
            address = httpx.URL(given.endpoint)
            port = 80 if address.port is None else address.port
            known = address.scheme in ("http", "https") and address.host and 0 < port < 1 << 16
        except httpx.InvalidURL:
            known = False
        if not known or not re.fullmatch("[!-~]+", given.endpoint):
            raise EndpointError(
                f"{chat.one_line(given.endpoint)}: no address, expected one like http://host:8000/v1"
            )
        if address.userinfo:
            raise EndpointError(
                f"{address.host}: got a user in the address, expected the key in {KEY}"
            )
        self._given = given
        self._url = given.endpoint.rstrip("/") + "/chat/completions"
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        key = os.environ.get(KEY, "").strip()  # files of keys end with a new line
        if key:
            if not re.fullmatch("[!-~]+", key):
                raise EndpointError(f"{KEY}: holds white space or other than ASCII, expected a key")
            self._headers["Authorization"] = f"Bearer {key}"
        self._tls = ssl.create_default_context()
        try:
            httpx.Client(verify=self._tls).close()
        except (ImportError, ValueError, httpx.InvalidURL) as error:  # SOCKS needs a package
            raise EndpointError(f"the environment's proxy: {chat.one_line(error)}") from None
        self._pool = concurrent.futures.ThreadPoolExecutor(given.concurrency)
        self._lock = threading.Lock()
        self._next_start = 0.0  # of a request, on the monotonic clock

    def answer(
        self, images: Sequence[PIL.Image.Image], prompts: Sequence[str]
    ) -> list[chat.Answer | chat.Failure]:
        """One answer for each image (of any size and mode) with its prompt, in their order.

        Failures: "time-out", "no connection", "server error" and "rate limit" after the last try;
        "request rejected" (this image or prompt) and "no answer in the response".

        Raises:
          EndpointError: the endpoint refuses the key, knows neither the address nor the model, or redirects.
        """
        return list(self._pool.map(self._ask, images, prompts))

    def _ask(self, image: PIL.Image.Image, prompt: str) -> chat.Answer | chat.Failure:
        body = json.dumps(
            {
                "model": self._given.chat,
                "messages": [{"role": "user", "content": _content(image, prompt)}],
                "max_tokens": chat.MAX_TOKENS,
                "temperature": 0,
            }
        ).encode()
        for count in range(self._given.tries):
            self._wait_for_turn()
            result, retry_after = self._try(body)
            if isinstance(result, chat.Answer) or retry_after is None:
                return result
            if retry_after > LONGEST_RETRY_AFTER or count + 1 == self._given.tries:
                break
            if retry_after:  # all requests wait: the server has said when it has room
                with self._lock:
                    self._next_start = max(self._next_start, time.monotonic() + retry_after)
            else:
                wait = min(LONGEST_WAIT, FIRST_WAIT * 2**count)
                time.sleep(wait * random.uniform(0.5, 1))  # not all at the same moment again
        return result

    def _wait_for_turn(self) -> None:
        rate = self._given.requests_per_second
        with self._lock:
            start = max(time.monotonic(), self._next_start)
            self._next_start = start + (1 / rate if rate else 0)
        time.sleep(max(0.0, start - time.monotonic()))

    def _try(self, body: bytes) -> tuple[chat.Answer | chat.Failure, float | None]:
        """Sends one request; returns its result and the seconds to wait before a retry (0: unknown; None: no retry)."""
        try:
            response, content = asyncio.run(self._post(body))
        except (TimeoutError, httpx.TimeoutException):
            return chat.Failure(TIME_OUT, f"timed out after {self._given.request_seconds:g} s"), 0.0
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            cause = NO_ANSWER  # not HTTP, or too much of it
            if isinstance(error, (httpx.NetworkError, httpx.ProxyError, OSError)):
                cause = CONNECTION
            elif any(said in str(error) for said in _ENDED):
                cause = CONNECTION
            while inner := error.__cause__ or error.__context__:  # what the system said
                error = inner
            return chat.Failure(cause, chat.one_line(f"{type(error).__name__}: {error}")), 0.0
        if response.is_success:
            return _answer(content)
        return self._refusal(response.status_code, response.headers, content)

    async def _post(self, body: bytes) -> tuple[Any, bytes]:
        """The response and its content; of one with an error status, what came of it in time.

        Raises:
          TimeoutError: the time is up; ValueError: more than MAX_BYTES; httpx.HTTPError.
        """
        response, content = None, bytearray()
        seconds = self._given.request_seconds
        # Shorter, since httpcore does not close the socket where a handshake is cancelled.
        wait = httpx.Timeout(None, connect=0.9 * seconds)
        try:
            async with (
                asyncio.timeout(seconds),
                httpx.AsyncClient(verify=self._tls, timeout=wait) as client,
                client.stream("POST", self._url, content=body, headers=self._headers) as response,
            ):
                async for piece in response.aiter_raw():
                    content += piece
                    if len(content) > MAX_BYTES:
                        raise ValueError(f"got more than {MAX_BYTES} bytes, expected an answer")
        except (httpx.HTTPError, OSError, ValueError):
            if response is None or response.is_success:
                raise
        return response, bytes(content)

    def _refusal(
        self, status: int, headers: Any, content: bytes
    ) -> tuple[chat.Failure, float | None]:
        detail = chat.one_line(f"status {status}: {content.decode(errors='replace')}")
        elsewhere = headers.get("Location")
        if status < 400 and elsewhere:
            raise EndpointError(
                f"{self._url}: redirects to {chat.one_line(elsewhere)} (status {status}), where"
                " neither images nor the key are sent; if you trust that address, give it as --endpoint"
            )
        if status in _FATAL:
            raise EndpointError(
                f"{self._url}: {_FATAL[status]} (model {self._given.chat!r}, key from {KEY}): {detail}"
            )
        cause = SERVER_ERROR if status >= 500 else _RETRIED.get(status)
        if cause is None:
            return chat.Failure(REJECTED, detail), None
        return chat.Failure(cause, detail), _seconds(headers.get("Retry-After"))


def _content(image: PIL.Image.Image, prompt: str) -> list[dict[str, Any]]:
    image = image.convert("RGB")
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]


def _answer(response: bytes) -> tuple[chat.Answer | chat.Failure, float | None]:
    try:
        parsed = json.loads(response, parse_constant=_not_json)
        choice = parsed["choices"][0]
        text = choice["message"]["content"]
        if not isinstance(text, str):
            raise TypeError
        usage = parsed.get("usage") or {}
        tokens = [_count(usage.get(key)) for key in ("prompt_tokens", "completion_tokens")]
        return chat.Answer(text, *tokens, cut_off=choice.get("finish_reason") == "length"), None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        # A proxy's page in between, for one: another try may reach the server.
        shown = chat.one_line(response[:400].decode(errors="replace"), 100)
        return chat.Failure(NO_ANSWER, f"expected choices[0].message.content, got {shown}"), 0.0


def _not_json(constant: str) -> None:
    """Refuses NaN and Infinity, which the json module accepts as numbers."""
    raise ValueError(constant)


def _count(tokens: Any) -> int:
    """The number of tokens; 0 where the response has no valid one."""
    return int(tokens) if isinstance(tokens, int | float) and 0 <= tokens < MAX_TOKENS else 0


def _seconds(retry_after: str | None) -> float:
    """A Retry-After header in seconds from now; 0 where there is none that can be read."""
    try:
        seconds = float(retry_after or 0)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, OverflowError, OSError):  # no date, or one of no year that there is
            seconds = 0.0
    return seconds if seconds > 0 else 0.0  # also where it is not a number
