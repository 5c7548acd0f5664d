"""A captioner behind one or more OpenAI-compatible chat endpoints, such as vLLM, by way of the `openai` client."""

import asyncio
import contextlib
import email.utils
import json
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import openai

from ..recipe import CaptionerConfig
from ..sources.images import data_url, is_sent_as_it_is
from .captioner import Answer, CaptionerDown, NoAnswer, Request, captioner_id, captioner_identity


REFUSED = (401, 403, 404, 405)  # key, model or address are wrong for every request
PING = 3.0  # seconds in which a server must say that it is there
LONGEST_PAUSE = 600.0  # seconds of a Retry-After that are believed; the client itself believes two minutes
FIRST_REST, LONGEST_REST = 0.5, 30.0  # seconds for which one of several servers that failed is asked nothing


@dataclass(frozen=True)
class Pong:
    """The answer of a server that was asked whether it is there."""

    url: str
    models: list[str] = field(default_factory=list)  # that it has; none where it does not tell
    fault: str = ""  # why it cannot be asked for captions


class _Server:
    """One endpoint: its client, the requests under way, and the moment before which it is asked nothing."""

    def __init__(self, url: str, config: CaptionerConfig, key: str | None):
        self.url, self.at_work, self.failures = url, 0, 0
        self.not_before = 0.0  # on the monotonic clock
        hooks = {"request": [self._wait_for_pause], "response": [self._note_pause]}
        self.client = openai.AsyncOpenAI(
            base_url=url,
            api_key=key or "none",
            timeout=config.timeout,
            max_retries=config.tries - 1 if len(config.base_urls) == 1 else 0,  # of several, another one is asked
            http_client=openai.DefaultAsyncHttpxClient(event_hooks=hooks),
        )

    def rest(self) -> None:
        """Ask nothing for a while that doubles with every failure in a row."""
        self.failures += 1
        seconds = min(LONGEST_REST, FIRST_REST * 2 ** (self.failures - 1))
        self.not_before = max(self.not_before, time.monotonic() + seconds)

    async def _wait_for_pause(self, request: Any) -> None:
        """Holds every request, a second try too, until the pause that the server asked for is over."""
        while (rest := self.not_before - time.monotonic()) > 0:
            await asyncio.sleep(rest)

    async def _note_pause(self, response: Any) -> None:
        seconds = _retry_after(response.headers.get("Retry-After")) if response.status_code >= 400 else None
        if seconds is not None:
            self.not_before = max(self.not_before, time.monotonic() + seconds)
            response.headers["Retry-After-Ms"] = "1"  # the client need not wait as well


class OpenAICaptioner:
    """
    Asks many requests at a time, each until it is answered, the server with the fewest at work first.

    The client sends again what the network or the server's state spoiled, after 0.5 to 8 seconds; where there are several
    servers, one that failed rests and another is asked. Kept by hand beside it: a pause that a server asks for holds for
    all requests to it, not only for the one that was told; an answer that cannot be read is asked for again.

    Args:
        config: of kind `openai`. At most `concurrency` requests are under way at a server, each is sent `tries` times at
            most.
    """

    def __init__(self, config: CaptionerConfig):
        self.config, self.id, self.identity = config, captioner_id(config), captioner_identity(config)
        self._reached: asyncio.Task | None = None
        key = os.environ.get(config.api_key_variable)
        self._headers = None if key else {"Authorization": openai.Omit()}
        self._servers = [_Server(url, config, key) for url in config.base_urls]
        self._free = asyncio.Semaphore(config.concurrency * len(self._servers))
        self._released = asyncio.Event()  # a server has room for one more

    async def ask(self, request: Request) -> Answer:
        """
        The answer to a request.

        Raises:
            [`NoAnswer`]: when no try brought one, or the server refuses this request.
            [`CaptionerDown`]: when no server is there at the first request, or one refuses the key, the model or the
                address.
        """
        if self._reached is None:
            self._reached = asyncio.create_task(self._reach())
        await asyncio.shield(self._reached)
        async with self._free:
            picture = request.picture
            if picture is None or is_sent_as_it_is(picture, self.config.max_image_side):
                messages = self._messages(request)
            else:  # scaling and encoding take milliseconds, in which other requests would wait
                messages = await asyncio.to_thread(self._messages, request)
            # The client's time-out is that of a silent server; one that sends a byte now and then ends here.
            tries_of_client = self.config.tries if len(self._servers) == 1 else 1
            longest = tries_of_client * (self.config.timeout + LONGEST_PAUSE)
            reason = ""
            for _ in range(self.config.tries):
                async with self._server() as server:
                    try:
                        answer = _read_answer(await asyncio.wait_for(self._create(server, messages, request), longest))
                        server.failures = 0
                        return answer
                    except _Unreadable as error:
                        reason = f"malformed answer: {error}"
                        continue
                    except (openai.APITimeoutError, asyncio.TimeoutError):
                        reason = f"no answer within {self.config.timeout:g} s"
                    except openai.APIConnectionError as error:
                        reason = f"connection failed: {type(error.__cause__).__name__}"
                    except openai.APIStatusError as error:
                        reason = self._refused(server, error)
                    if len(self._servers) == 1:  # the client has tried again
                        break
                    server.rest()
            raise NoAnswer(f"{reason} ({self.config.tries} tries)")

    @contextlib.asynccontextmanager
    async def _server(self) -> AsyncIterator[_Server]:
        """
        The server with the fewest requests at work, for one more; waits while all rest or are full. Of several, one that
        failed is tried with a single request.
        """
        while True:
            now, several = time.monotonic(), len(self._servers) > 1
            rooms = [1 if several and server.failures else self.config.concurrency for server in self._servers]
            open_servers = [server for server, room in zip(self._servers, rooms) if server.at_work < room]
            ready = [server for server in open_servers if server.not_before <= now or not several]
            if ready:
                break
            rested = min((server.not_before - now for server in open_servers), default=LONGEST_REST)
            self._released.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._released.wait(), rested)
        server = min(ready, key=lambda server: server.at_work)
        server.at_work += 1
        try:
            yield server
        finally:
            server.at_work -= 1
            self._released.set()

    async def ping(self) -> list[Pong]:
        """Ask every server for its models; none of them is an error here."""
        return list(await asyncio.gather(*(self._ping_one(server) for server in self._servers)))

    async def _ping_one(self, server: _Server) -> Pong:
        client = server.client.with_options(timeout=PING, max_retries=0)
        try:
            listed = await client.models.list(extra_headers=self._headers)
            return Pong(server.url, [model.id for model in listed.data or ()])
        except openai.APIConnectionError as error:
            return Pong(server.url, fault=f"does not answer ({type(error.__cause__ or error).__name__})")
        except openai.APIStatusError as error:
            if error.status_code in (401, 403):
                key = self.config.api_key_variable
                return Pong(server.url, fault=f"refuses the key in {key} (HTTP {error.status_code})")
        except (openai.OpenAIError, ValueError, TypeError, AttributeError):
            pass
        return Pong(server.url)  # it is there, and has no list of models

    async def _reach(self) -> None:
        """Begins with the servers that are there; it takes a second to see, not the tries of the first rows."""
        pongs = await self.ping()
        if all(pong.fault for pong in pongs):
            faults = "; ".join(f"{pong.url} {pong.fault}" for pong in pongs)
            raise CaptionerDown(
                f"{faults}. Start the server of {self.config.model}, or set base_url. Nothing was asked."
            )
        for server, pong in zip(self._servers, pongs, strict=True):
            if pong.fault:
                server.rest()

    async def close(self) -> None:
        for server in self._servers:
            await server.client.close()

    async def _create(self, server: _Server, messages: list[dict[str, Any]], request: Request) -> Any:
        """A chat completion, or what else the server sent in its place."""
        try:
            return await server.client.chat.completions.create(
                model=self.config.model,
                messages=messages,
                **vars(request.sampling),
                extra_headers=self._headers,
                extra_body=self.config.extra or None,
            )
        except (json.JSONDecodeError, openai.APIResponseValidationError) as error:
            raise _Unreadable(type(error).__name__) from error

    def _messages(self, request: Request) -> list[dict[str, Any]]:
        # Lone surrogates, which JSON allows in a caption, cannot be sent.
        user = request.user.encode("utf-8", "replace").decode()
        content: Any = user
        if request.picture is not None:
            url = data_url(request.picture, self.config.max_image_side)
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": user}]
        return [{"role": "system", "content": request.system}, {"role": "user", "content": content}]

    def _refused(self, server: _Server, error: openai.APIStatusError) -> str:
        """The reason why a request stays without an answer; raises [`CaptionerDown`] where it holds for all."""
        status, message = error.status_code, _server_message(error)
        if status in REFUSED:
            raise CaptionerDown(
                f"{server.url} refuses model {self.config.model} with HTTP {status} ({message}); check base_url, "
                f"model and the key in {self.config.api_key_variable}, then run the same command again."
            )
        if status in (408, 409, 429) or status >= 500:  # what the client has tried again
            return f"HTTP {status}"
        server.failures = 0  # it is there
        raise NoAnswer(f"HTTP {status}: {message}")


class _Unreadable(Exception):
    """An answer that is no chat completion."""


def _read_answer(reply: Any) -> Answer:
    try:
        choice = reply.choices[0]
        # Without content it was a refusal, or reasoning that used up max_tokens.
        text = choice.message.content if choice.message.content is not None else choice.message.refusal or ""
    except (AttributeError, IndexError, TypeError) as error:
        raise _Unreadable(type(error).__name__) from error
    if not isinstance(text, str):
        raise _Unreadable(f"content is {type(text).__name__}")
    return Answer(text, choice.finish_reason in ("stop", None))


def _retry_after(header: str | None) -> float | None:
    """Seconds to wait, at most `LONGEST_PAUSE`, from a number of them or an HTTP date."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return None
    return min(LONGEST_PAUSE, max(0.0, seconds))


def _server_message(error: openai.APIStatusError) -> str:
    """The server's words for an error, in one line."""
    message = error.body if error.body is not None else error.response.text
    for name in ("error", "message"):
        message = message.get(name, message) if isinstance(message, dict) else message
    return " ".join(str(message).split())[:200]
