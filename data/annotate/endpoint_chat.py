"""A chat model behind an OpenAI-compatible endpoint, as vLLM, SGLang and `transformers serve` offer.

httpx bounds neither time nor bytes of a whole response, so requests run in an event loop, whose timers end
them. It follows no redirects. A request ends in an answer, a failure with a fixed name, or UserError, and
none of them has the key.
"""

import asyncio
import base64
import functools
import io
import json
import os
import random
import re
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
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

KEY = "OPENAI_API_KEY"  # the environment variable that holds the key
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between tries, doubled each time
IDLE = 2.0  # seconds that a connection stays open; servers close theirs after 5 or more
LONGEST_RETRY_AFTER = 3600.0  # seconds
MAX_SIDE = 1344  # pixels of the image that is sent; LLaVA-NeXT looks at no more than 1008
JPEG_QUALITY = 92
MAX_BYTES = 1 << 20  # of a response; an answer of 256 tokens has a few thousand
# Faults of every request, such as a wrong key: going on would only fail 12 million times.
_FATAL = {401: "the key is wrong or missing", 403: "not allowed", 404: "no such address or model"}
_RETRIED = {408: TIME_OUT, 425: SERVER_ERROR, 429: RATE_LIMIT}  # and all from 500 on

_Result = tuple[chat.Answer | chat.Failure, float | None]


class _Message(msgspec.Struct):
    content: str


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None


class _Response(msgspec.Struct):
    choices: Annotated[list[_Choice], msgspec.Meta(min_length=1)]


class EndpointChat:
    """A client, which one thread at a time may use, to be closed. Raises UserError: the key is not valid."""

    def __init__(self, args: Annotate):
        self._args = args
        self._url = f"{(args.endpoint or '').rstrip('/')}/chat/completions"
        key = os.environ.get(KEY, "").strip()  # key files end with a new line
        if key and not re.fullmatch("[!-~]+", key):
            raise errors.UserError(f"{KEY}: holds white space or other than ASCII, expected a key")
        # The key as it stands, with the escapes of JSON, and percent-encoded.
        forms = (rf"(?:\\?{re.escape(x)}|\\u{ord(x):04x}|%{ord(x):02x})" for x in key)
        self._key = re.compile("".join(forms) or "(?!)", re.IGNORECASE)
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        self._connect = functools.partial(
            httpx.AsyncClient,
            headers=headers | ({"Authorization": f"Bearer {key}"} if key else {}),
            # httpcore leaves a socket open if a handshake is cancelled, so connecting must end earlier.
            timeout=httpx.Timeout(None, connect=0.9 * args.request_seconds),
            limits=httpx.Limits(keepalive_expiry=IDLE),
        )
        self._runner, self._client = asyncio.Runner(), self._connect()
        self._next_start = 0.0  # on the monotonic clock: no request starts earlier

    def answer(
        self, images: Sequence[PIL.Image.Image], prompts: Sequence[str]
    ) -> list[chat.Answer | chat.Failure]:
        """One answer per image (of any size and mode) with its prompt, in their order.

        Failures: "time-out", "no connection", "server error" and "rate limit" after the last try;
        "request rejected" (this image or prompt) and "no answer in the response".

        Raises:
          UserError: the endpoint refuses the key, knows neither the address nor the model, or redirects.
        """
        return self._runner.run(self._answer(images, prompts))

    def close(self) -> None:
        """Closes the event loop and its connections; `answer` makes others. A finalizer could deadlock."""
        self._runner.run(self._client.aclose())
        self._runner.close()
        self._runner, self._client = asyncio.Runner(), self._connect()

    async def _answer(self, images: Any, prompts: Any) -> list[chat.Answer | chat.Failure]:
        free = asyncio.Semaphore(self._args.concurrency)

        async def ask(image: PIL.Image.Image, prompt: str) -> chat.Answer | chat.Failure:
            async with free:
                return await self._ask(await asyncio.to_thread(self._body, image, prompt))

        try:
            async with asyncio.TaskGroup() as group:
                pairs = zip(images, prompts, strict=True)
                tasks = [group.create_task(ask(*pair)) for pair in pairs]
        except ExceptionGroup as several:
            raise several.exceptions[0] from None
        return [task.result() for task in tasks]

    def _body(self, image: PIL.Image.Image, prompt: str) -> bytes:
        image = image.convert("RGB")
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=JPEG_QUALITY)
        url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]
        body = {"messages": [{"role": "user", "content": parts}], "temperature": 0}
        body |= {"model": self._args.chat, "max_tokens": chat.MAX_TOKENS}
        return json.dumps(body).encode()

    async def _ask(self, body: bytes) -> chat.Answer | chat.Failure:
        for count in range(self._args.tries):
            await asyncio.sleep(max(0.0, self._next_start - time.monotonic()))
            result, retry_after = await self._try(body)
            if retry_after is None or count + 1 == self._args.tries:
                break
            if retry_after:  # all requests wait: the server says when it has room
                self._next_start = max(self._next_start, time.monotonic() + retry_after)
            else:
                wait = min(LONGEST_WAIT, FIRST_WAIT * 2**count)
                await asyncio.sleep(wait * random.uniform(0.5, 1))  # not all at the same moment
        return result

    async def _try(self, body: bytes) -> _Result:
        """Sends a request; returns its result and the seconds before a retry (0: unknown; None: no retry)."""
        response, content = None, bytearray()
        try:
            async with (
                asyncio.timeout(self._args.request_seconds),
                self._client.stream("POST", self._url, content=body) as response,
            ):
                async for piece in response.aiter_raw():
                    content += piece
                    if len(content) > MAX_BYTES:
                        raise ValueError(f"got more than {MAX_BYTES} bytes, expected an answer")
        except (httpx.TransportError, OSError, OverflowError, ValueError) as error:
            if response is None or response.is_success:  # else the status says enough
                if isinstance(error, TimeoutError | httpx.TimeoutException):
                    late = f"timed out after {self._args.request_seconds:g} s"
                    return chat.Failure(TIME_OUT, late), 0.0
                cause = CONNECTION if isinstance(error, httpx.TransportError | OSError) else NO_ANSWER
                *_, first = errors.causes(error)  # what the system said
                return chat.Failure(cause, self._line(f"{type(first).__name__}: {first}")), 0.0
        if response.is_success:
            return self._parsed(content)
        return self._refused(response.status_code, response.headers, content)

    def _parsed(self, content: bytes | bytearray) -> _Result:
        try:
            choice = msgspec.json.decode(content, type=_Response).choices[0]
        except (msgspec.MsgspecError, ValueError, RecursionError):
            # Perhaps the page of a proxy: another try may reach the server.
            got = self._line(content.decode(errors="replace"), 100)
            return chat.Failure(NO_ANSWER, f"expected choices[0].message.content, got {got}"), 0.0
        text = self._without_key(choice.message.content)
        return chat.Answer(text, cut_off=choice.finish_reason == "length"), None

    def _refused(self, status: int, headers: Mapping[str, str], content: bytearray) -> _Result:
        detail = self._line(f"status {status}: {content.decode(errors='replace')}")
        if status < 400 and (elsewhere := headers.get("Location")):
            raise errors.UserError(
                f"{self._url}: redirects to {self._line(elsewhere)} (status {status}), where"
                " neither images nor the key are sent; if you trust that address, give it as --endpoint"
            )
        if status in _FATAL:
            raise errors.UserError(
                f"{self._url}: {_FATAL[status]} (model {self._args.chat!r}, key from {KEY}): {detail}"
            )
        cause = SERVER_ERROR if status >= 500 else _RETRIED.get(status)
        if cause is None:
            return chat.Failure(REJECTED, detail), None
        seconds = headers.get("Retry-After", "")  # a date is not read: vLLM and SGLang send none
        wait = float(seconds) if seconds.isdecimal() else 0.0
        return chat.Failure(cause, detail), min(wait, LONGEST_RETRY_AFTER)

    def _without_key(self, text: str) -> str:
        """What a server sent, without the key: servers repeat headers, and users publish the files."""
        return self._key.sub(f"[{KEY}]", text)

    def _line(self, text: str, limit: int = 200) -> str:
        """What a server sent, on one line and without the key."""
        return chat.one_line(self._without_key(text), limit)
