"""A captioner behind an OpenAI-compatible chat endpoint, such as vLLM: many requests at a time, each until it is answered."""

import asyncio
import email.utils
import json
import os
import random
import time
from typing import Any

import aiohttp

from ..recipe import CaptionerConfig
from ..sources.images import data_url, is_sent_as_it_is
from .captioner import Answer, CaptionerDown, NoAnswer, Request, captioner_id, captioner_identity


AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # what may pass; other errors will not
REFUSED = (401, 403, 404, 405)  # key, model or address are wrong for every request
LONGEST_WAIT = 60.0  # seconds between two tries, unless the server names a longer one
LONGEST_ASKED = 600.0  # seconds of a Retry-After that are believed


class OpenAICaptioner:
    """
    Args:
        config: of kind `openai`. At most `concurrency` requests are under way; one that the network, the server's state
            or a garbled answer spoils is sent again after a growing pause or the server's Retry-After, `tries` times
            in all. A pause that the server asks for holds for all requests.
    """

    def __init__(self, config: CaptionerConfig):
        assert config.base_url is not None
        self.config, self.id, self.identity = config, captioner_id(config), captioner_identity(config)
        self.url = config.base_url.rstrip("/") + "/chat/completions"
        self._free = asyncio.Semaphore(config.concurrency)
        self._session: aiohttp.ClientSession | None = None
        self._not_before = 0.0  # on the loop's clock

    async def ask(self, request: Request) -> Answer:
        async with self._free:
            picture = request.picture
            if picture is None or is_sent_as_it_is(picture, self.config.max_image_side):
                body = self._body(request)
            else:  # scaling and encoding take milliseconds, in which other requests would wait
                body = await asyncio.to_thread(self._body, request)
            reason = ""
            for attempt in range(self.config.tries):
                await self._wait()
                try:
                    return await self._post(body)
                except _Again as again:
                    reason = again.reason
                    if attempt + 1 < self.config.tries:
                        self._postpone(again)
                        await asyncio.sleep(self._pause(attempt))
            raise NoAnswer(f"{reason} ({self.config.tries} tries)")

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _post(self, body: bytes) -> Answer:
        try:
            async with self._opened().post(self.url, data=body) as response:
                content = await response.read()
                status, headers = response.status, response.headers
        except asyncio.TimeoutError:
            raise _Again(f"no answer within {self.config.timeout:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise _Again(f"connection failed: {type(error).__name__}") from error
        if status in AGAIN:
            raise _Again(f"HTTP {status}", _retry_after(headers.get("Retry-After")))
        if status in REFUSED:
            variable = self.config.api_key_variable
            raise CaptionerDown(
                f"{self.url} refuses model {self.config.model} with HTTP {status} ({_said(content)}); check base_url, "
                f"model and the key in {variable}, then run the same command again."
            )
        if status != 200:
            raise NoAnswer(f"HTTP {status}: {_said(content)}")
        return _read_answer(content)

    def _body(self, request: Request) -> bytes:
        content: Any = request.user
        if request.picture is not None:
            url = data_url(request.picture, self.config.max_image_side)
            content = [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": request.user},
            ]
        body = {
            "model": self.config.model,
            "messages": [{"role": "system", "content": request.system}, {"role": "user", "content": content}],
            **request.sampling.settings(),
            **self.config.extra,
        }
        return json.dumps(body).encode()

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            key = os.environ.get(self.config.api_key_variable)
            headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),  # the semaphore is the limit
                timeout=aiohttp.ClientTimeout(total=self.config.timeout),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=headers,
            )
        return self._session

    async def _wait(self) -> None:
        """Until the pause that the server asked for is over."""
        while (rest := self._not_before - time.monotonic()) > 0:
            await asyncio.sleep(rest)

    def _postpone(self, again: "_Again") -> None:
        if again.after is not None:
            self._not_before = max(self._not_before, time.monotonic() + again.after)

    def _pause(self, attempt: int) -> float:
        """Seconds before the next try: doubled each time, less up to a half so that requests do not come in step."""
        return min(LONGEST_WAIT, self.config.backoff * 2**attempt) * random.uniform(0.5, 1)


class _Again(Exception):
    """A try that failed in a way that may pass, and the seconds the server asks to wait."""

    def __init__(self, reason: str, after: float | None = None):
        super().__init__(reason)
        self.reason, self.after = reason, after


def _read_answer(content: bytes) -> Answer:
    try:
        choice = json.loads(content)["choices"][0]
        text = choice["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise _Again(f"malformed answer: {type(error).__name__}") from error
    if text is None:  # a refusal, or reasoning that used up max_tokens
        text = choice["message"].get("refusal") or ""
    if not isinstance(text, str):
        raise _Again(f"malformed answer: content is {type(text).__name__}")
    return Answer(text, choice.get("finish_reason") in ("stop", None))


def _retry_after(header: str | None) -> float | None:
    """Seconds, from a number of them or an HTTP date."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return None
    return min(LONGEST_ASKED, max(0.0, seconds))


def _said(content: bytes) -> str:
    """The server's words for an error, in one line."""
    text = content.decode("utf-8", "replace")
    try:
        document = json.loads(text)
        error = document.get("error", document.get("message", document))
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:200]
