"""The client of chat endpoints: pauses that hold for all requests, servers that die, and what is sent without a key."""

import asyncio
import contextlib
import threading
import time

import pytest

from tests.training.lrs2m.chat_server import ChatServer, Fault
from training.lrs2m.captioners import openai_compatible
from training.lrs2m.captioners.captioner import NoAnswer, Request, Sampling
from training.lrs2m.captioners.openai_compatible import OpenAICaptioner
from training.lrs2m.recipe import CaptionerConfig


def ask_all(url: str | list[str], users: list[str], **fields) -> list[str]:
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


def test_of_three_servers_one_dies_and_no_request_is_lost():
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(ChatServer(delay=0.02)) for _ in range(2)]
        dying = ChatServer(faults=lambda _: Fault(delay=60) if len(dying.requests) >= 10 else None).__enter__()

        def end_after_ten():
            while len(dying.requests) < 10:
                time.sleep(0.005)
            dying.__exit__()

        killer = threading.Thread(target=end_after_ten)
        killer.start()
        users = [f"Describe number {index}." for index in range(120)]
        answers = ask_all([*(server.url for server in servers), dying.url], users, concurrency=4, tries=3)
        killer.join()
        assert len(answers) == 120 and all(server.most_at_once <= 4 for server in (*servers, dying))
        answered = [request.text for server in (*servers, dying) for request, _ in server.requests]
        assert set(answered) == set(users) and 120 <= len(answered) <= 120 + 4  # what was under way is asked again
        assert 10 <= len(dying.requests) < 14


def test_a_server_that_is_back_is_asked_again_and_without_any_a_request_ends():
    fails = {"yes": True}

    def fault(request):
        return Fault(status=503) if fails["yes"] else None

    with ChatServer(faults=fault) as first, ChatServer(faults=fault, delay=0.01) as second:
        with pytest.raises(NoAnswer, match=r"HTTP 503 \(2 tries\)"):
            ask_all([first.url, second.url], ["Describe."], tries=2)
        assert [len(server.requests) for server in (first, second)] == [1, 1]  # each was tried
        threading.Timer(0.3, fails.update, [{"yes": False}]).start()
        assert len(ask_all([first.url, second.url], ["A.", "B.", "C."], tries=4)) == 3


def test_a_server_that_failed_is_tried_with_one_request_at_a_time(monkeypatch):
    monkeypatch.setattr(openai_compatible, "FIRST_REST", 0.0)
    monkeypatch.setattr(openai_compatible, "LONGEST_REST", 0.0)
    states, fails = {"failing": True}, lambda _: Fault(status=503) if states["failing"] else None
    with ChatServer(delay=0.1) as well, ChatServer(faults=fails, delay=0.05) as failed:
        urls = [well.url, failed.url]
        config = CaptionerConfig(kind="openai", model="tiny", concurrency=4, tries=20, base_url=urls)

        async def ask() -> None:
            captioner = OpenAICaptioner(config)
            captioner._servers[1].rest()
            requests = [Request("You describe.", f"{n}.", None, Sampling(0.5, 0.9, 20, 0)) for n in range(40)]
            await asyncio.gather(*map(captioner.ask, requests[:12]))
            assert failed.most_at_once == 1 < len(failed.requests)
            states["failing"] = False
            await asyncio.gather(*map(captioner.ask, requests[12:]))
            assert failed.most_at_once > 1
            await captioner.close()

        asyncio.run(ask())


def test_of_several_servers_one_that_never_ends_is_given_up_after_the_time_of_one_try(monkeypatch):
    monkeypatch.setattr(openai_compatible, "FIRST_REST", 0.0)
    monkeypatch.setattr(openai_compatible, "LONGEST_PAUSE", -0.9)  # a tenth of a second a try
    given_up = pytest.raises(NoAnswer, match=r"no answer within 1 s \(3 tries\)")
    with ChatServer(delay=0.2) as one, ChatServer(delay=0.2) as other, given_up:
        ask_all([one.url, other.url], ["Describe."], tries=3, timeout=1)
