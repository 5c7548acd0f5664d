"""The search for near-duplicates of a large set, in a process of its own with several workers."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from .finder import DuplicateFinder, Match, Query, Seen
from .store import count_images


LARGE = 20_000  # images stored, from which on workers are worth their start
MOST = 8  # workers: one process decides in the order of the images
LONGEST = 600  # seconds that some images are waited for, before the process is ended
_ENDED = "{} for near-duplicates was ended, perhaps for want of memory; run the same command again to go on."


class Guard:
    """
    A [`DuplicateFinder`] on a store: in this process while the set is small, in one of its own with workers beyond that.
    The answers are the same.

    Args:
        workers: that look at images at the same time; None: as many as there are processors, up to `MOST`. More than one
            need Linux, which forks a process without copying its memory.
        arguments: of the finder; a store is needed.
    """

    def __init__(self, workers: int | None = None, **arguments: Any):
        forks = sys.platform == "linux"
        processors = len(os.sched_getaffinity(0)) if forks else 1
        self._workers, self._arguments = (workers or min(MOST, processors)) if forks else 1, arguments
        self._lock = threading.Lock()  # of the change from one to the other
        stored = count_images(arguments["store"], arguments.get("inside", True))
        many = self._workers > 1 and stored >= LARGE
        self._finder = _Process(self._workers, arguments) if many else DuplicateFinder(**arguments)

    def check_all(self, queries: Sequence[Query]) -> list[Match | None]:
        """[`DuplicateFinder.check_all`]; `ValueError` where the process with the workers was ended."""
        if self._workers > 1 and isinstance(self._finder, DuplicateFinder) and self._finder.stored >= LARGE:
            with self._lock:
                self._finder.commit()  # so that another process sees it
                few, self._finder = self._finder, _Process(self._workers, self._arguments)
                few.close()
        return self._finder.check_all(list(queries))

    def commit(self) -> None:
        """Force all answers so far to disk; may be called while another thread checks images."""
        with self._lock:
            self._finder.commit()

    def close(self) -> None:
        """Writes what is pending."""
        self._finder.close()


class _Process:
    """A finder in a process that does nothing else: it may be forked, as one with threads may not."""

    def __init__(self, workers: int, arguments: dict[str, Any]):
        self._connection, other = multiprocessing.Pipe()
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(other.fileno()), str(workers)],
            stdin=subprocess.DEVNULL,
            pass_fds=[other.fileno()],
            env=os.environ | paths | {"OPENBLAS_NUM_THREADS": "1"},
        )
        other.close()
        self._lock, self._answers = threading.Lock(), True  # whether it has answered all that it was asked
        try:
            self._ask("start", arguments)
        except BaseException:
            self.close()
            raise

    def check_all(self, queries: list[Query]) -> list[Match | None]:
        return self._ask("check_all", queries)

    def commit(self) -> None:
        self._ask("commit")

    def close(self) -> None:
        try:
            if self._answers and self._process.poll() is None:
                self._ask("close")
        finally:
            self._connection.close()  # which ends it
            try:
                self._process.wait(LONGEST)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _ask(self, what: str, *arguments: Any) -> Any:
        with self._lock:
            self._answers = False  # until it has: an interrupt may come in between
            try:
                self._connection.send((what, arguments))
                if what != "start" and not self._connection.poll(LONGEST):  # which reads whole evaluation sets
                    self._process.kill()
                answer = self._connection.recv()
            except (EOFError, OSError) as error:
                raise ValueError(_ENDED.format("the process that looks")) from error
            self._answers = what != "start" or not isinstance(answer, Exception)
        if isinstance(answer, Exception):
            raise answer
        return answer


def serve(descriptor: int, workers: int) -> None:
    """
    Answer what a [`_Process`] asks, until it ends.

    Args:
        descriptor: of the connection's end.
        workers: that look at images at the same time.
    """
    import cv2
    import faiss

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the one that asks says what to do
    cv2.setNumThreads(0)
    faiss.omp_set_num_threads(1)
    connection = Connection(descriptor)
    finder, forks = None, None
    while True:
        try:
            what, arguments = connection.recv()
        except EOFError:
            return
        try:
            if what == "start":
                finder = DuplicateFinder(**arguments[0])
                forks, answer = _Forks(finder, workers), None
            elif what == "check_all":
                answer = finder.check_all(*arguments, forks.look)
            else:
                answer = getattr(finder, what)()
        except Exception as error:
            answer = error.with_traceback(None)
            if forks is not None:
                forks.end()  # they may have answers that nobody took
        try:
            connection.send(answer)
        except OSError:
            return
        if what == "close":
            return


class _Forks:
    """Forks of this process, each with the index as it was after the last whole block; they read only."""

    def __init__(self, finder: DuplicateFinder, workers: int):
        self._finder, self._workers, self._blocks = finder, workers, -1
        self._connections: list[Connection] = []

    def look(self, queries: list[Query]) -> Iterator[Seen]:
        """[`DuplicateFinder.look`], in turns by each fork; the first answers are used while the others are found."""
        if self._blocks != self._finder.blocks:
            self._fork()
        try:
            for first, connection in enumerate(self._connections):
                connection.send(queries[first :: self._workers])
            for number in range(len(queries)):
                yield self._connections[number % self._workers].recv()
        except (EOFError, OSError) as error:
            raise ValueError(_ENDED.format("one of the processes that look")) from error

    def end(self) -> None:
        """End the forks; the next look makes new ones."""
        for connection in self._connections:
            connection.close()
        self._connections, self._blocks = [], -1

    def _fork(self) -> None:
        self.end()
        context = multiprocessing.get_context("fork")
        for _ in range(self._workers):
            mine, other = context.Pipe()
            context.Process(target=self._work, args=(other, [*self._connections, mine]), daemon=True).start()
            other.close()
            self._connections.append(mine)
        self._blocks = self._finder.blocks

    def _work(self, connection: Connection, others: list[Connection]) -> None:
        for other in others:
            other.close()  # so that each fork is told of the end
        self._finder.store.open_again()
        while True:
            try:
                queries = connection.recv()
            except EOFError:
                return
            for query in queries:
                connection.send(self._finder.look(query))


if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]))
