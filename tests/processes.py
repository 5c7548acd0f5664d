"""
Processes that need no seconds of imports: forked from one that has imported, as by `multiprocessing`'s fork server.

`run` and `start` take the command that `subprocess` takes, `[sys.executable, "-m" | "-c" | FILE, ...]`; the process has
arguments, folder, environment, outputs, module search path and exit code of its own, and dies of a signal like any other.
Unlike after a start, torch and other libraries are in memory; nothing of Hugging Face is, whose variables (`HF_HOME`,
`HF_HUB_OFFLINE`, ...) are read when it is imported, and nothing of this project, which such a process need not be able
to import. With `project=True` they are, too, and those variables must stay as they are.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import pickle
import random
import runpy
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any


ROOT = Path(__file__).parents[1]
LIBRARIES = ("torch", "torch._dynamo", "torch.distributed.tensor", "torch.onnx", "scipy.optimize", "pandas")
LIBRARIES += (
    "pyarrow.dataset",
    "pyarrow.parquet",
    "PIL.Image",
    "tokenizers",
    "safetensors.torch",
    "httpx",
    "requests",
)
LIBRARIES += ("aiohttp", "jinja2", "pydantic", "psutil", "yaml", "regex", "sklearn.metrics")
PROJECT = (
    "training.train",
    "training.run",
    "evaluation.run",
    "evaluation.tasks",
    "geosearch.shards",
    "model_cards.push_to_hub",
)
PROJECT += ("torch.utils.tensorboard", "torch.distributed.fsdp", "accelerate.commands.launch", "pytest")
PATIENCE = 500  # seconds for what should take a few, on a busy machine
CALL = "import pickle, sys; function, arguments = pickle.load(open(sys.argv[1], 'rb')); function(*arguments)"
_SOCKETS: dict[bool, Path] = {}  # of the servers of this process: without the project, with it
_SERVERS: list["Process"] = []  # the latter; a process ends with the object here that stands for it
_FAILURES: dict[bool, str] = {}  # of servers that did not start, so that only the first call waits for them
_SETTINGS: dict[str, str] = {}  # Hugging Face's, when the one with the project was started


class Process:
    """A running process, which ends at the latest with this object; the interface is that of `subprocess.Popen`."""

    def __init__(self, command: list[str], connection: socket.socket):
        self.args, self.connection, self.returncode = command, connection, None
        (self.pid,) = struct.unpack("i", connection.recv(4))

    def poll(self) -> int | None:
        return self._status(0)

    def wait(self, timeout: float | None = PATIENCE) -> int:
        if self._status(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def _status(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self.connection], [], [], timeout)[0]:
            (self.returncode,) = struct.unpack("i", self.connection.recv(4))
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it, and the processes that it started in its session."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it ended by itself, or has no session of its own yet
                os.kill(self.pid, signal.SIGKILL)
                os.killpg(self.pid, signal.SIGKILL)


def start(
    command, *, cwd=None, env=None, stdout=None, stderr=None, project: bool = False, start_new_session: bool = True
) -> Process:
    """
    Start a process.

    Args:
        command: the words, `sys.executable` first.
        cwd: folder; by default this one.
        env: the whole environment; by default this process's.
        stdout, stderr: open files; by default nothing is kept.
        project: whether it begins with this project and Hugging Face's libraries imported.
        start_new_session: as all do.
    """
    assert start_new_session
    words, environment = list(map(str, command)), dict(os.environ if env is None else env)
    assert words[0] == sys.executable and (words[1] in ("-m", "-c") or not words[1].startswith("-")), words
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(_server(project)))
    assert not project or _settings(environment) == _SETTINGS, "read at the import: " + str(_settings(environment))
    with tempfile.TemporaryFile() as request, open(os.devnull, "r+b") as null:
        request.write(json.dumps([words[1:], str(Path(cwd or ".").absolute()), environment]).encode())
        request.flush()
        files = [request, null, stdout or null, (stdout if stderr == subprocess.STDOUT else stderr) or null]
        socket.send_fds(connection, [b"."], [file.fileno() for file in files])
        return Process(words, connection)


def run(
    command, *, check: bool = False, timeout: float = PATIENCE, capture_output=True, text=True, **options: Any
) -> subprocess.CompletedProcess:
    """Run a process to its end; returns its exit code, and what it wrote as text. Options: see [`start`]."""
    assert capture_output and text
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process = start(command, stdout=stdout, stderr=stderr, **options)
        try:
            process.wait(timeout)
        finally:
            process.kill()
        done = _completed(process, stdout, stderr)
    if check:
        done.check_returncode()
    return done


def _completed(process: Process, *files: IO[bytes]) -> subprocess.CompletedProcess:
    for file in files:
        file.seek(0)
    return subprocess.CompletedProcess(process.args, process.returncode, *(file.read().decode() for file in files))


def call(function: Callable, *arguments: Any, **options: Any) -> Process:
    """Start a process that calls a function of a module, with arguments that can be pickled. Options: see [`start`]."""
    with tempfile.NamedTemporaryFile(dir=_server(True).parent, delete=False) as file:
        pickle.dump((function, arguments), file)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return start([sys.executable, "-c", CALL, file.name], env=environment, project=True, **options)


def wait_for_all(ranks: list[Process], timeout: float = PATIENCE) -> list[int]:
    """Exit codes; when one has failed, those that would wait for it are killed."""
    until = time.monotonic() + timeout
    while None in (codes := [rank.poll() for rank in ranks]):
        if any(codes) or time.monotonic() > until:
            for rank in ranks:
                rank.kill()
        time.sleep(0.02)
    return codes


def run_ranks(
    command, world: int, env=None, timeout: float = PATIENCE, **options: Any
) -> list[subprocess.CompletedProcess]:
    """
    Run a command in `world` processes that meet as those of `torchrun --standalone`; when one fails, the others are
    killed. Options: see [`start`].
    """
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # at a port that nobody else has
    environment = dict(os.environ if env is None else env) | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(world)}
    environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    environment |= {"LOCAL_WORLD_SIZE": str(world)}
    with contextlib.ExitStack() as stack:
        ranks, files = [], []
        for rank in range(world):
            stdout, stderr = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
            variables = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(start(command, env=variables, stdout=stdout, stderr=stderr, **options))
            stack.callback(ranks[-1].kill)
            files.append((stdout, stderr))
        wait_for_all(ranks, timeout)
        return [_completed(rank, *outputs) for rank, outputs in zip(ranks, files, strict=True)]


def as_subprocess(project: bool = False) -> types.SimpleNamespace:
    """Stand-in for the module `subprocess`, where it is the program tested that starts processes."""
    replaced = {"run": partial(run, project=project), "Popen": partial(start, project=project)}
    return types.SimpleNamespace(**vars(subprocess) | replaced)


# ---------------------------------------------------------------------------------------------------------- the server


def _server(project: bool) -> Path:
    """The socket of a server, which is started with the first process that it is asked for."""
    if project in _FAILURES:
        raise RuntimeError(_FAILURES[project])
    if project not in _SOCKETS:
        short = "/tmp" if len(tempfile.gettempdir()) > 60 else None  # a socket's path has at most 107 bytes, or 103
        folder = _server(False).parent if project else Path(tempfile.mkdtemp(prefix="processes-", dir=short))
        path = folder / ("project" if project else "libraries")
        words = [sys.executable, __file__, str(os.getpid()), str(path), *(PROJECT if project else LIBRARIES)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # threads do not come along in a fork
        log = path.with_suffix(".log")
        with log.open("wb") as output:
            written = {"stdout": output, "stderr": subprocess.STDOUT}
            if project:  # from the other one, which has half of it
                server = start(words, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, **written)
                _SERVERS.append(server)
            else:
                server = subprocess.Popen(words, env=environment, cwd=path.parent, start_new_session=True, **written)
        until = time.monotonic() + PATIENCE
        while not path.exists():
            if server.poll() is not None or time.monotonic() > until:
                ending = f"ended with {server.returncode}" if server.poll() is not None else f"took over {PATIENCE} s"
                _FAILURES[project] = f"{words} {ending} instead of waiting for requests:\n{log.read_text()}"
                server.kill()
                raise RuntimeError(_FAILURES[project])
            time.sleep(0.01)
        _SOCKETS[project] = path
        if project:
            _SETTINGS.update(_settings(os.environ))
    return _SOCKETS[project]


def _serve(client: int, path: Path, modules: list[str]) -> tuple[int, ...]:
    """Fork a process for each connection as long as the client lives; return in these, with their open files."""
    gc.disable()
    for module in modules:
        with contextlib.suppress(ModuleNotFoundError):  # not all are needed by all versions
            importlib.import_module(module)
    gc.freeze()
    gc.enable()
    assert threading.active_count() == 1, threading.enumerate()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path.with_suffix(".partial")))
    listener.listen(64)
    path.with_suffix(".partial").rename(path)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        if not select.select([listener], [], [], 2)[0]:
            try:
                os.kill(client, 0)
            except ProcessLookupError:
                shutil.rmtree(path.parent, ignore_errors=True)
                os._exit(0)
            continue
        connection, _ = listener.accept()
        if not os.fork():  # waits for the process, and tells its end
            break
        connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    listener.close()
    _, files, _, _ = socket.recv_fds(connection, 1, 4)
    if not (process := os.fork()):
        return tuple(files)
    with contextlib.suppress(OSError):  # nobody is there to be told
        connection.sendall(struct.pack("i", process))
        while not (ended := os.waitpid(process, os.WNOHANG))[0]:
            if select.select([connection], [], [], 0.02)[0]:  # closed: nobody waits for this process, or can end it
                os.kill(process, signal.SIGKILL)
                os.killpg(process, signal.SIGKILL)
        connection.sendall(struct.pack("i", os.waitstatus_to_exitcode(ended[1])))
    os._exit(0)


def _become(search_path: list[str], request: int, *outputs: int) -> None:
    """Make of a forked process what a started one is, and run its command to the end."""
    with open(request, "rb", closefd=False) as file:
        file.seek(0)
        words, folder, environment = json.load(file)
    for number, output in enumerate(outputs):
        os.dup2(output, number)
    os.closerange(3, 1024)
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    random.seed()
    sys.modules["numpy"].random.seed()
    first = {"-m": folder, "-c": ""}.get(words[0], os.path.dirname(os.path.realpath(words[0])))
    sys.path[:] = [first, *_entries(environment), *search_path]
    importlib.invalidate_caches()
    code = 1
    try:
        if words[0] == "-m":
            sys.argv[:] = words[1:]
            package, _, name = words[1].rpartition(".")
            if sys.modules.pop(words[1], None) and package:  # runs anew, as a program
                vars(sys.modules[package]).pop(name, None)
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.argv[:] = ["-c", *words[2:]]
            sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(words[1], "<string>", "exec"), vars(sys.modules["__main__"]))
        else:
            sys.argv[:] = words
            runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:  # of an interpreter, but for giving the memory back bit by bit
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code & 0xFF)


def _settings(environment: Mapping[str, str]) -> dict[str, str]:
    # of no effect without network, and gradio writes it into the environment of the process that shows a page
    changing = ("HF_TOKEN", "HF_HUB_DISABLE_TELEMETRY")
    return {name: value for name, value in environment.items() if name.startswith("HF_") and name not in changing}


def _entries(environment: Mapping[str, str]) -> list[str]:
    return list(filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)))


if __name__ == "__main__":
    here = sys.path[1 + len(_entries(os.environ)) :]
    _become(here, *_serve(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
