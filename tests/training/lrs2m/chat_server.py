"""
A small OpenAI-compatible chat endpoint on loopback for tests and the client's benchmark, with faults to order.

    with ChatServer(faults=lambda request: Fault(status=429) if request.count == 1 else None) as server:
        ...  # base_url: server.url
    assert server.requests

`python -m tests.training.lrs2m.chat_server --delay 0.05` serves until it is ended; the first line it prints is its URL,
and `GET /busy` gives the share of the time since the first request in which `--cap` requests were at work.
"""

import argparse
import asyncio
import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class Fault:
    """What goes wrong with a request: an HTTP status, or how the answer is spoilt."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: str | None = None  # sent in place of the answer, with `status` or 200
    text: str | None = None  # the caption in place of the answer's
    delay: float = 0.0  # seconds before anything is sent
    reset: bool = False  # hang up without an answer
    half: bool = False  # hang up in the middle of the body
    finish_reason: str = "stop"


@dataclass
class ChatRequest:
    body: dict[str, Any]
    system: str
    text: str  # of the user
    image: str | None  # data URL
    count: int  # how often the same conversation was asked, this time included
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def seed(self) -> int | None:
        return self.body.get("seed")


def plausible(request: ChatRequest) -> str:
    """A caption that passes the checks: short where at most so many words are asked for, else long; names what it was told."""
    quoted = re.findall(r'"([^"]+)"', request.text)
    words = re.findall(r"\w[\w'-]*", quoted[-1] if quoted else "the scene")
    if re.search(r"\b20 words\b", request.system + request.text):
        return "Seen from above: " + " ".join(words[:12]) + "."
    digest = hashlib.sha256(request.text.encode() + (request.image or "").encode()).hexdigest()[:6]
    return (
        f"The image shows {' '.join(words[:60])}. In the upper left part of the tile the ground is bright and dry, "
        "while a darker patch of vegetation lies towards the right edge. A narrow road crosses the lower half, and small "
        f"buildings with flat roofs stand along it; the parcel in the centre carries the number {digest}."
    )


class ChatServer:
    """
    Args:
        answer: the caption for a request; an empty string is sent as it is.
        faults: what goes wrong with a request, or None.
        delay: seconds that every answer takes.
    """

    def __init__(
        self,
        answer: Callable[[ChatRequest], str] = plausible,
        faults: Callable[[ChatRequest], Fault | None] = lambda request: None,
        delay: float = 0.0,
        cap: int = 0,
    ):
        self.answer, self.faults, self.delay, self.cap = answer, faults, delay, cap
        self.requests: list[tuple[ChatRequest, str]] = []  # with what was sent: a status, "reset", "half" or the text
        self.most_at_once = 0
        self._counts: Counter[str] = Counter()
        self._at_work, self._busy, self._first, self._since = 0, 0.0, None, 0.0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()

    def __enter__(self) -> "ChatServer":
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._ready.wait(10)
        return self

    def __exit__(self, *_: Any) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        self._ready.set()
        self._loop.run_forever()

    async def _start(self) -> None:
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/busy", self._tell_busy)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/v1"

    async def _end(self) -> None:
        await self._runner.cleanup()
        rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    async def _chat(self, http: web.Request) -> web.StreamResponse:
        self._count_work(1)
        try:
            return await self._respond(http)
        finally:
            self._count_work(-1)

    async def _respond(self, http: web.Request) -> web.StreamResponse:
        request = self._read(await http.json(), dict(http.headers))
        fault = self.faults(request) or Fault()
        await asyncio.sleep(self.delay + fault.delay)
        if fault.reset:
            self.requests.append((request, "reset"))
            http.transport.abort()
            return web.Response()
        if fault.status or fault.body is not None:
            self.requests.append((request, str(fault.status or "malformed")))
            body = fault.body if fault.body is not None else json.dumps({"error": {"message": "injected fault"}})
            return web.Response(status=fault.status or 200, headers=fault.headers, body=body)
        text = self.answer(request) if fault.text is None else fault.text
        reply = {
            "id": "chat",
            "object": "chat.completion",
            "model": request.body.get("model"),
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": fault.finish_reason}
            ],
            "usage": {"prompt_tokens": 10, "completion_tokens": len(text.split()), "total_tokens": 0},
        }
        if fault.half:
            self.requests.append((request, "half"))
            body = json.dumps(reply).encode()
            response = web.StreamResponse(headers={"Content-Length": str(len(body))})
            await response.prepare(http)
            await response.write(body[: len(body) // 2])
            http.transport.abort()
            return response
        self.requests.append((request, text))
        return web.json_response(reply)

    def _read(self, body: dict[str, Any], headers: dict[str, str]) -> ChatRequest:
        system, text, image = "", "", None
        for message in body["messages"]:
            parts = message["content"]
            parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
            said = " ".join(part["text"] for part in parts if part["type"] == "text")
            image = next((part["image_url"]["url"] for part in parts if part["type"] == "image_url"), image)
            system, text = (system + said, text) if message["role"] == "system" else (system, text + said)
        key = hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest()
        self._counts[key] += 1
        return ChatRequest(body, system, text, image, self._counts[key], headers)

    def _count_work(self, change: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = self._since = now
        self._busy += min(self._at_work, self.cap or self._at_work) * (now - self._since)
        self._since, self._at_work = now, self._at_work + change
        self.most_at_once = max(self.most_at_once, self._at_work)

    async def _tell_busy(self, http: web.Request) -> web.Response:
        seconds = self._since - self._first if self._first is not None else 0
        share = self._busy / seconds / self.cap if seconds and self.cap else 0
        return web.json_response(
            {"busy": share, "seconds": seconds, "requests": len(self.requests), "most_at_once": self.most_at_once}
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay", type=float, default=0.05, help="seconds that an answer takes")
    parser.add_argument("--cap", type=int, default=32, help="requests at a time that count as busy")
    arguments = parser.parse_args()
    with ChatServer(delay=arguments.delay, cap=arguments.cap) as server:
        print(server.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
