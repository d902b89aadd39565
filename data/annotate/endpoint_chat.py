"""A chat model behind an OpenAI-compatible endpoint: what vLLM, SGLang and `transformers serve` offer.

By httpx, which follows the proxies of the environment (HTTP_PROXY and so on) and no redirects. It bounds neither the
time nor the bytes of a whole response, so requests run in an event loop, where a timer can end them. A worker has one
client and one loop. Whatever a server sends, a request ends in an answer, a failure of a fixed name, or EndpointError,
and none of these holds the key.
"""

import asyncio
import base64
import concurrent.futures
import email.utils
import http.cookiejar
import io
import json
import os
import random
import re
import threading
import time
import weakref
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
IDLE = 2.0  # seconds that a connection stays open for the next request; servers close theirs after 5 or more
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
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        key = os.environ.get(KEY, "").strip()  # files of keys end with a new line
        if key:
            if not re.fullmatch("[!-~]+", key):
                raise EndpointError(f"{KEY}: holds white space or other than ASCII, expected a key")
            headers["Authorization"] = f"Bearer {key}"
        # The key as it stands, with escapes of JSON, and percent-encoded.
        forms = (rf"(?:\\?{re.escape(x)}|\\u{ord(x):04x}|%{ord(x):02x})" for x in key)
        self._key = re.compile("".join(forms) or "(?!)", re.IGNORECASE)
        try:
            self._client = httpx.AsyncClient(
                headers=headers,
                # Connecting takes less, since httpcore does not close the socket where a handshake is cancelled.
                timeout=httpx.Timeout(None, connect=0.9 * given.request_seconds),
                limits=httpx.Limits(keepalive_expiry=IDLE),
                cookies=http.cookiejar.CookieJar(
                    http.cookiejar.DefaultCookiePolicy(allowed_domains=())
                ),
            )
        except (ImportError, ValueError, httpx.InvalidURL) as error:  # SOCKS needs a package
            raise EndpointError(f"the environment's proxy: {chat.one_line(error)}") from None
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=_run, args=(self._loop,), daemon=True).start()
        weakref.finalize(self, _end, self._loop, self._client)
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
            posted = asyncio.run_coroutine_threadsafe(self._post(body), self._loop)
            response, content = posted.result()
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
            return chat.Failure(cause, self._line(f"{type(error).__name__}: {error}")), 0.0
        if response.is_success:
            return self._answer(content)
        return self._refusal(response.status_code, response.headers, content)

    async def _post(self, body: bytes) -> tuple[Any, bytes]:
        """The response and its content; of one with an error status, what came of it in time.

        Raises:
          TimeoutError: the time is up; ValueError: more than MAX_BYTES; httpx.HTTPError.
        """
        response, content = None, bytearray()
        try:
            async with (
                asyncio.timeout(self._given.request_seconds),
                self._client.stream("POST", self._url, content=body) as response,
            ):
                async for piece in response.aiter_raw():
                    content += piece
                    if len(content) > MAX_BYTES:
                        raise ValueError(f"got more than {MAX_BYTES} bytes, expected an answer")
        except (httpx.HTTPError, OSError, ValueError):
            if response is None or response.is_success:
                raise
        return response, bytes(content)

    def _without_key(self, text: str) -> str:
        """What a server sent, without the key: servers repeat the headers of a request, and users publish the files."""
        return self._key.sub(f"[{KEY}]", text)

    def _line(self, text: str, limit: int = 200) -> str:
        """What a server sent, on one line without the key."""
        return chat.one_line(self._without_key(text), limit)

    def _answer(self, content: bytes) -> tuple[chat.Answer | chat.Failure, float | None]:
        try:
            # As floats, since a whole number of more than 4,300 digits is an error.
            parsed = json.loads(content, parse_int=float)
            choice = parsed["choices"][0]
            text = choice["message"]["content"]
            if not isinstance(text, str):
                raise TypeError
            usage = parsed.get("usage")
            tokens = [_count(usage, key) for key in ("prompt_tokens", "completion_tokens")]
            cut_off = choice.get("finish_reason") == "length"
            return chat.Answer(self._without_key(text), *tokens, cut_off=cut_off), None
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            # A proxy's page in between, for one: another try may reach the server.
            shown = self._line(content.decode(errors="replace"), 100)
            return chat.Failure(NO_ANSWER, f"expected choices[0].message.content, got {shown}"), 0.0

    def _refusal(
        self, status: int, headers: Any, content: bytes
    ) -> tuple[chat.Failure, float | None]:
        detail = self._line(f"status {status}: {content.decode(errors='replace')}")
        elsewhere = headers.get("Location")
        if status < 400 and elsewhere:
            raise EndpointError(
                f"{self._url}: redirects to {self._line(elsewhere)} (status {status}), where"
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


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """Runs the loop until `_end`."""
    loop.run_forever()
    loop.close()


def _end(loop: asyncio.AbstractEventLoop, client: Any) -> None:
    """Closes the client's connections and ends its loop."""

    async def close():
        await client.aclose()
        loop.stop()

    asyncio.run_coroutine_threadsafe(close(), loop)


def _content(image: PIL.Image.Image, prompt: str) -> list[dict[str, Any]]:
    image = image.convert("RGB")
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]


def _count(usage: Any, key: str) -> int:
    """The number of tokens, which is only a statistic; 0 where the response has no valid one."""
    tokens = usage.get(key) if isinstance(usage, dict) else None
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
