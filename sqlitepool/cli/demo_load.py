"""The demo's load: client threads that send requests over HTTP and note how each of them went."""

import http.client
import json
import random
import socket
import struct
import threading
import time
from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Any

WRITE_SHARE = 0.2
NEWEST_SHARE = 0.2  # of all requests; the remaining ones read a single user
REQUEST_TIMEOUT = 40.0  # seconds; longer than the pool's own timeout, so that the server answers first

# A client that closes with a reset leaves no socket in TIME_WAIT, so a long demo cannot run out of ports.
_CLOSE_WITH_RESET = struct.pack("ii", 1, 0)


class Client(threading.Thread):
    """Sends one request after the other until it is told to stop, then finishes the one it is at."""

    def __init__(
        self, number: int, address: tuple[str, int], user_ids: range, stop: threading.Event, signals: Sequence[int]
    ) -> None:
        # a daemon, because after a second Ctrl-C there may be nobody left to answer it
        super().__init__(name=f"demo-client-{number}", daemon=True)
        self._address = address
        self._user_ids = user_ids
        self._stop_sending = stop
        self._signals = signals
        self._random = random.Random(number)
        self.reads = 0
        self.writes = 0
        """Writes that the server has acknowledged."""
        self.failed = 0
        self.errors: Counter[str] = Counter()
        """How often each error came up, by its text; to be read when the thread has ended."""
        self.latencies = array("d")
        """Seconds that each answered request took, failed ones included."""

    @property
    def requests(self) -> int:
        """How many requests have ended, well or not."""
        return self.reads + self.writes + self.failed

    def run(self) -> None:
        """Send until told to stop; no failure ends it."""
        while not self._stop_sending.is_set() and not self._signals:
            started = time.perf_counter()
            try:
                self._send_one()
            except Exception as error:  # whatever it is, the demo goes on and shows it
                self.failed += 1
                self.errors[str(error) if isinstance(error, RequestFailed) else f"{type(error).__name__}: {error}"] += 1
            self.latencies.append(time.perf_counter() - started)

    def _send_one(self) -> None:
        kind = self._random.random()
        if kind < WRITE_SHARE:
            name = f"user {self._random.randrange(1_000_000)}"
            user = self._request("POST", "/users", {"name": name})
            _expect(user["name"] == name, "a write was answered with another user")
            self.writes += 1
        elif kind < WRITE_SHARE + NEWEST_SHARE:
            users = self._request("GET", "/newest")
            _expect(len(users) == 10, "the list of the newest users is incomplete")
            self.reads += 1
        else:
            user_id = self._random.choice(self._user_ids)
            user = self._request("GET", f"/users/{user_id}")
            _expect(user["id"] == user_id, "a read was answered with another user")
            self.reads += 1

    def _request(self, method: str, path: str, content: Any = None) -> Any:
        connection = http.client.HTTPConnection(*self._address, timeout=REQUEST_TIMEOUT)
        try:
            connection.connect()
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _CLOSE_WITH_RESET)
            connection.request(method, path, None if content is None else json.dumps(content))
            response = connection.getresponse()
            answer = json.loads(response.read())
        finally:
            connection.close()
        if response.status >= 400:
            raise RequestFailed(f"{response.status} {answer['error']}")
        return answer


class Load:
    """`threads` clients at once; a context manager that starts them and has joined them all when its block ends.

    They also stop when there is something in `signals`: who presses Ctrl-C twice may interrupt the end of the block.
    """

    def __init__(self, threads: int, address: tuple[str, int], user_ids: range, signals: Sequence[int] = ()) -> None:
        self._stop = threading.Event()
        self._clients = [Client(number, address, user_ids, self._stop, signals) for number in range(threads)]
        self._started = 0.0
        self.seconds = 0.0
        """How long the clients sent, in seconds; known when the block has ended."""

    def __enter__(self) -> "Load":
        self._started = time.perf_counter()
        try:
            for client in self._clients:
                client.start()
        except BaseException:
            self._finish()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()

    def _finish(self) -> None:
        self._stop.set()
        for client in self._clients:
            if client.ident is not None:
                client.join()
        self.seconds = time.perf_counter() - self._started

    @property
    def requests(self) -> int:
        """How many requests of all clients have ended, well or not."""
        return sum(client.requests for client in self._clients)

    @property
    def reads(self) -> int:
        """How many reads were answered."""
        return sum(client.reads for client in self._clients)

    @property
    def acknowledged_writes(self) -> int:
        """How many writes the server has said are done."""
        return sum(client.writes for client in self._clients)

    @property
    def failed(self) -> int:
        """How many requests failed."""
        return sum(client.failed for client in self._clients)

    def errors(self) -> Counter[str]:
        """How often each error came up, by its text; for when the block has ended."""
        return sum((client.errors for client in self._clients), Counter())

    def latencies(self) -> list[float]:
        """Seconds that each request took, the shortest first; for when the block has ended."""
        return sorted(seconds for client in self._clients for seconds in client.latencies)


class RequestFailed(Exception):
    """The server answered with an error, or with something that it was not asked for."""


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RequestFailed(otherwise)
