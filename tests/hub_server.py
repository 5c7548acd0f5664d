"""
A small Hub for tests, on loopback and in memory: what `huggingface_hub` 1.x and 2.x really call when they push a
model or a data set and fetch it again. Faults are injected at the server; the client is the unmodified one.

    with HubServer() as hub:
        subprocess.run(command, env=hub.environment(tmp_path))
        assert hub.repo("you/tiny").history()[0].title == "Upload"

As on the real Hub, large files go to and come from a storage of another address, which never sees the token. They do
so by Git-LFS: hf_xet, which the client prefers where it is installed, speaks more than the published protocol
(`/v1/xorb-grants`, streamed `/v2/shards` in 1.8) and is used without asking whether the server knows it. So
`environment()` and `connect()` set `HF_HUB_DISABLE_XET`; without it, an upload fails here at the xet token (404).
"""

import json
import os
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import constants

from tests.hub_endpoints import HUB_ROUTES, LARGE, STORAGE_ROUTES, Answer, Refused, Request
from tests.hub_store import File, Repo


LOOPBACK = "127.0.0.1,localhost"  # not through a proxy
TOKENS = {"hf_you": "you", "hf_other": "other"}


@dataclass
class Fault:
    """
    What goes wrong with the next `times` requests that fit (None: with all of them).

    Args:
        method, path: of the requests; `path` is a regular expression that is searched for.
        status: the answer; None resets the connection, for an upload in the middle of the body.
        perform: carry the request out and lose the answer only.
        after: requests that fit and pass before the first that does not.
    """

    method: str
    path: str
    status: int | None = 500
    times: int | None = 1
    perform: bool = False
    after: int = 0


class HubServer:
    """`url` is the Hub, `storage_url` where large files are; `requests` logs (method, path, status) of both."""

    def __init__(self):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}  # large files by SHA-256, committed or not
        self.faults: list[Fault] = []
        self.tampered: dict[str, Callable[[bytes], bytes]] = {}  # by file name, applied on the way down
        self.requests: list[tuple[str, str, int | None]] = []
        self.unknown: list[tuple[str, str]] = []  # requests that no route takes
        self.crashes: list[Exception] = []  # of the server itself
        self.lock = threading.RLock()
        self._servers = [_Server(self, routes) for routes in (HUB_ROUTES, STORAGE_ROUTES)]
        # Two names of this machine: by its port alone, the client would not take the storage for another host.
        hosts = ("127.0.0.1", "localhost")
        self.url, self.storage_url = (
            f"http://{host}:{server.server_port}" for host, server in zip(hosts, self._servers)
        )

    def __enter__(self) -> "HubServer":
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def environment(self, home: Any, token: str | None = "hf_you") -> dict[str, str]:
        """Variables for a process whose Hub is this one: with a cache of its own and without this clone in its path."""
        dropped = ("PYTHONPATH", "HF_HUB_OFFLINE", "HF_TOKEN", "HF_MODULES_CACHE", "HF_HUB_CACHE")
        variables = {name: value for name, value in os.environ.items() if name not in dropped}
        variables |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": LOOPBACK, "no_proxy": LOOPBACK}
        variables |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return variables | ({"HF_TOKEN": token} if token else {})

    def connect(self, monkeypatch: Any, token: str | None = "hf_you") -> None:
        """What `environment()` does for a new process, for this one, whose client has read its variables already."""
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(name, LOOPBACK)
        monkeypatch.setenv("HF_TOKEN", token or "")

    def repo(self, name: str, kind: str = "model") -> Repo:
        return self.repos[kind, name]

    def create(self, name: str, kind: str = "model", private: bool = False) -> Repo:
        """A new repository with the file that the Hub puts into each."""
        repo = self.repos[kind, name] = Repo(kind, name, private)
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE).encode()
        repo.commit("refs/heads/main", {".gitattributes": File(attributes)}, "initial commit", "", repo.owner, None)
        return repo

    def called(self, method: str, path: str) -> int:
        """How often a path that fits the regular expression was asked for."""
        return sum(known == method and bool(re.search(path, asked)) for known, asked, _ in self.requests)

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times != 0 and fault.method == method and re.search(fault.path, path):
                    if fault.after:
                        fault.after -= 1
                        continue
                    fault.times = fault.times and fault.times - 1
                    return fault
        return None


# ------------------------------------------------------------------------------------------------------------------ HTTP


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, hub: HubServer, routes: list):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.routes = hub, routes

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that hang up, or were reset on purpose; crashes are kept elsewhere


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60

    def _handle(self) -> None:
        hub, path = self.server.hub, urlsplit(self.path).path
        fault = hub.take_fault(self.command, path)
        if fault and fault.status is None and not fault.perform:
            self.rfile.read(min(512, int(self.headers.get("Content-Length") or 0)))
            self._log(path, None)
            return self._reset()
        body = self._body()
        if fault and not fault.perform:
            # Retry-After: the client waits a second in place of up to eight
            answer = Answer({"error": "Injected fault"}, fault.status, {"Retry-After": "0"})
        else:
            answer = self._answer(path, body)
        self._log(path, answer.status)
        return self._reset() if fault and fault.perform else self._send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _answer(self, path: str, body: bytes) -> Answer:
        hub = self.server.hub
        try:
            request = Request(
                self.command, path, parse_qs(urlsplit(self.path).query), self.headers, body, self._user()
            )
            for methods, pattern, function in self.server.routes:
                match = pattern.fullmatch(path)
                if match and self.command in methods:
                    named = {name: unquote(value) for name, value in match.groupdict().items() if value}
                    request.kind, request.repo = named.pop("kind", "model"), named.pop("repo", "")
                    request.rest = named
                    with hub.lock:
                        return function(hub, request)
            hub.unknown.append((self.command, path))
            raise Refused(404, "Sorry, we can't find the page you are looking for.")
        except Refused as refused:
            return Answer(refused.body, refused.status, refused.headers)
        except Exception as error:
            hub.crashes.append(error)
            return Answer({"error": f"the test Hub crashed: {error!r}"}, 501)

    def _user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and self.server.routes is STORAGE_ROUTES:
            raise Refused(400, "The token was sent to the storage, which is not the Hub")
        if token and token not in TOKENS:
            raise Refused(401, "Invalid credentials in Authorization header")
        return TOKENS.get(token)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, answer: Answer) -> None:
        plain = isinstance(answer.body, bytes)
        body = answer.body if plain else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        self.send_header("Content-Type", "application/octet-stream" if plain else "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _reset(self) -> None:
        """Ends the connection as a crashed machine does: the other side sees "connection reset by peer"."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        os.close(self.connection.detach())  # `close()` would wait for the files that were made of it

    def _log(self, path: str, status: int | None) -> None:
        with self.server.hub.lock:
            self.server.hub.requests.append((self.command, path, status))

    def log_message(self, *_: Any) -> None:
        pass
