"""The two ways in which stress/requests.py has requests served: by waitress, and by Flask's test client.

Waitress runs in this process, and those who ask in a process of their own: several keep-alive connections, each with
one request under way at all times, served by a single loop, so that they take little of the machine. How busy either
side was is measured too. If it is not the server that is busy all the time, it is not the server that was measured.
"""

import logging
import multiprocessing
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from _requests_ways import ANSWER, URL, Application, Way

REQUEST = f"GET {URL} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
CONNECTIONS_FOR_EACH_THREAD = 2
"""One request is being served while the next arrives."""
PATIENCE = 30.0
"""Seconds that the process of the clients may take longer than it should."""


@dataclass(frozen=True)
class Served:
    """What came of one run.

    Attributes:
        rate: requests per second.
        p99: how long, in seconds, all but one in a hundred took at most, as their client saw it.
        cost: the processor time, in seconds, of the serving process for each request.
        server_busy: the processor time of the serving process, as a share of the run.
        client_busy: that of the process that asked; 0 if it was the same.
    """

    rate: float
    p99: float
    cost: float
    server_busy: float
    client_busy: float = 0.0


@dataclass(frozen=True)
class Turn:
    """What one turn of a contestant gave, in seconds."""

    latencies: list[float]
    wall: float
    server_used: float
    client_used: float = 0.0


def summary(turns: Sequence[Turn]) -> Served:
    """Put together the turns of one round."""
    latencies = [one for turn in turns for one in turn.latencies]
    wall, used, client_used = (
        sum(getattr(one, what) for one in turns) for what in ("wall", "server_used", "client_used")
    )
    if not latencies:
        raise RuntimeError(f"nothing was answered within {wall:g} s")
    p99 = sorted(latencies)[int(len(latencies) * 0.99)]
    return Served(len(latencies) / wall, p99, used / len(latencies), used / wall, client_used / wall)


# ---- waitress


@contextmanager
def served_by_waitress(application: Application, threads: int) -> Iterator[int]:
    """Run a server during the block, on the port of the loopback that is given."""
    from waitress import wasyncore
    from waitress.server import create_server

    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # it warns when a request has to wait
    channels: dict[int, Any] = {}
    server: Any = create_server(application, map=channels, listen="127.0.0.1:0", threads=threads)
    loop = threading.Thread(target=server.run, name="waitress", daemon=True)
    loop.start()
    try:
        yield server.effective_port
    finally:
        server.trigger.pull_trigger(lambda: wasyncore.close_all(channels))  # in the loop, which ends with that
        loop.join(PATIENCE)
        server.task_dispatcher.shutdown()


class Clients:
    """The process in which the clients live. To be closed."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # so that nothing is inherited
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_answer_orders, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def load(self, port: int, threads: int, seconds: float) -> Turn:
        """Have a server with so many threads asked for `seconds`.

        Raises:
            RuntimeError: an answer was not what it should be.
        """
        self._pipe.send((port, threads * CONNECTIONS_FOR_EACH_THREAD, seconds))
        self._receive()  # warm now
        used = time.process_time()
        latencies, wall, client_used = self._receive()
        return Turn(latencies, wall, time.process_time() - used, client_used)

    def _receive(self) -> Any:
        if not self._pipe.poll(PATIENCE):
            raise TimeoutError("the clients never came back")
        told = self._pipe.recv()
        if isinstance(told, Exception):
            raise RuntimeError(f"the clients met {type(told).__name__}: {told}")
        return told

    def close(self) -> None:
        self._pipe.close()
        self._process.join(PATIENCE)
        self._process.kill()
        self._process.join()


def _answer_orders(pipe: Connection) -> None:
    with ExitStack() as opened:
        sockets: dict[int, list[socket.socket]] = {}
        while True:
            try:
                port, connections, seconds = pipe.recv()
            except (EOFError, KeyboardInterrupt):
                return
            try:
                if port not in sockets:
                    sockets[port] = [opened.enter_context(_connect(port)) for _ in range(connections)]
                _ask(sockets[port], 0.0)
                pipe.send(None)
                pipe.send(_ask(sockets[port], seconds))
            except Exception as error:
                pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


def _connect(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _ask(sockets: Sequence[socket.socket], seconds: float) -> tuple[list[float], float, float]:
    """Ask over all of them for `seconds`, once at least.

    Returns how long each request took, how long all of it took, and the processor time.
    """
    clock = time.perf_counter
    by_number = {one.fileno(): one for one in sockets}
    poller = select.poll()
    asked: dict[int, float] = {}
    answers = dict.fromkeys(by_number, b"")
    latencies: list[float] = []
    used, started = time.process_time(), clock()
    end = started + seconds
    for number, one in by_number.items():
        poller.register(number, select.POLLIN)
        asked[number] = clock()
        one.sendall(REQUEST)
    while asked:
        ready = poller.poll(PATIENCE * 1000)
        if not ready:
            raise TimeoutError("a request was never answered")
        for number, _ in ready:
            one = by_number[number]
            received = one.recv(65536)
            answers[number] += received
            if not answers[number].endswith(ANSWER):
                if not received or len(answers[number]) > 65536:
                    raise ValueError(f"an unexpected answer: {answers[number][:200]!r}")
                continue
            now = clock()
            if not answers[number].startswith(b"HTTP/1.1 200 "):
                raise ValueError(f"an unexpected answer: {answers[number][:200]!r}")
            answers[number] = b""
            latencies.append(now - asked[number])
            if now < end:
                asked[number] = now
                one.sendall(REQUEST)
            else:
                del asked[number]
    return latencies, clock() - started, time.process_time() - used


# ---- Flask's test client


def ask_test_client(way: Way) -> Callable[[float], Turn]:
    """Return a function that asks the way's Flask application for so many seconds, once at least."""
    get = way.flask_application().test_client().get
    answer = get(URL)
    if (answer.status_code, answer.data) != (200, ANSWER):
        raise ValueError(f"an unexpected answer: {answer.status} {answer.data[:200]!r}")

    def ask(seconds: float) -> Turn:
        clock = time.perf_counter
        latencies = []
        used, started = time.process_time(), clock()
        end = started + seconds
        asked = started
        while asked < end:
            status = get(URL).status_code
            now = clock()
            if status != 200:
                raise ValueError(f"an unexpected answer: status {status}")
            latencies.append(now - asked)
            asked = now
        return Turn(latencies, clock() - started, time.process_time() - used)

    return ask
