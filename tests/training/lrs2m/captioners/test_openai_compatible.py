"""The client of a chat endpoint: pauses that hold for all requests, and what is sent without a key."""

import asyncio
import time

from tests.training.lrs2m.chat_server import ChatServer, Fault
from training.lrs2m.captioners.captioner import Request, Sampling
from training.lrs2m.captioners.openai_compatible import OpenAICaptioner
from training.lrs2m.recipe import CaptionerConfig


def ask_all(url: str, users: list[str], **fields) -> list[str]:
    async def ask() -> list[str]:
        captioner = OpenAICaptioner(CaptionerConfig(kind="openai", model="tiny", base_url=url, **fields))
        requests = [Request("You describe.", user, None, Sampling(0.5, 0.9, 20, 0)) for user in users]
        answers = await asyncio.gather(*map(captioner.ask, requests))
        await captioner.close()
        return [answer.text for answer in answers]

    return asyncio.run(ask())


def test_a_pause_that_the_server_asks_for_holds_for_all():
    arrivals = []

    def fault(request):
        arrivals.append(time.monotonic())
        return Fault(status=429, headers={"Retry-After": "1"}) if len(arrivals) == 1 else None

    with ChatServer(faults=fault) as server:
        assert len(ask_all(server.url, [f"Describe {index}." for index in range(4)], concurrency=1)) == 4
    assert len(arrivals) == 5 and arrivals[1] - arrivals[0] >= 0.95  # the refused one comes again, none before it

    arrivals.clear()
    with ChatServer(faults=fault, delay=0.2) as server:  # two at a time: the second is under way when the pause begins
        ask_all(server.url, [f"Describe {index}." for index in range(6)], concurrency=2)
    assert len(arrivals) == 7 and arrivals[2] - arrivals[0] >= 0.95


def test_a_key_is_sent_only_where_there_is_one(monkeypatch):
    for key, expected in ((None, None), ("secret", "Bearer secret")):
        monkeypatch.delenv("LRS2M_KEY", raising=False)
        if key:
            monkeypatch.setenv("LRS2M_KEY", key)
        with ChatServer() as server:
            ask_all(server.url, ["A \ud800 lone surrogate."], api_key_variable="LRS2M_KEY", extra={"top_k": 5})
            (request, _), *_ = server.requests
        assert request.headers.get("Authorization") == expected
        assert request.body["top_k"] == 5 and request.text == "A ? lone surrogate."
