"""Sixteen members of the example's club who come all the time, each a thread that remembers what it was told."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pool_support import PATIENCE, eventually


@dataclass(frozen=True)
class Failure:
    """A request that was not answered as it should be.

    Attributes:
        began: when it was sent, in monotonic seconds.
        text: what came instead.
        is_ours: the application answered, not the server in its place.
    """

    began: float
    text: str
    is_ours: bool


@dataclass
class Member:
    """One client. It only ever talks about its own member, so it knows what the count must be."""

    port: int
    prefix: str
    name: str
    token: str = ""
    requests: int = 0
    acknowledged: int = 0  # visits that were counted, as far as we were told
    unanswered: int = 0  # visits that may have been counted
    timings: list[tuple[str, float, float]] = field(default_factory=list)  # what, when, and seconds within the server
    failures: list[Failure] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    seen: set[tuple[int, str | None]] = field(default_factory=set)  # who answered: process and application group

    def __post_init__(self) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)

    def enter(self) -> None:
        """Make the member, and log in."""
        form = f"name={self.name}&password=secret"
        self._ask("POST", "/members", form)
        answer = self._ask("POST", "/login", form)
        self.token = "" if answer is None else answer["token"]

    def come(self) -> None:
        """One round of requests: as many that write as that read."""
        self._visit()
        self._read()
        self._visit()
        if self.requests // 4 % 8 == 1:  # the first time, and then each eighth
            answer = self._ask("GET", "/status")
            if answer is not None:
                self.seen.add((answer["process"], answer["application_group"]))
        else:
            self._ask("GET", "/")

    def _visit(self) -> None:
        answer = self._ask("POST", "/visits")
        if answer is None:
            self.unanswered += 1
        else:
            self.acknowledged += 1
            self._check(answer["visits"])

    def _read(self) -> None:
        answer = self._ask("GET", f"/members/{self.name}")
        if answer is not None:
            self._check(answer["visits"])

    def _check(self, visits: int) -> None:
        if not self.acknowledged <= visits <= self.acknowledged + self.unanswered:
            expected = f"{self.acknowledged} were acknowledged, {self.unanswered} not answered"
            self.wrong.append(f"{self.name}: {visits} visits, but {expected}")

    def _ask(self, method: str, path: str, body: str | None = None) -> Any:
        """The answer of the application, or None if there was none, or a refusal."""
        began = time.monotonic()
        # Servers may close idle connections, and the client cannot know before it asks: so a new one each time.
        headers = {"Connection": "close", "Authorization": f"Bearer {self.token}"}
        try:
            self._connection.request(method, self.prefix + path, body, headers)
            response = self._connection.getresponse()
            text = response.read().decode()
        except (OSError, http.client.HTTPException) as error:
            self._fail(Failure(began, f"{method} {path}: {error!r}", is_ours=False))
            return None
        finally:
            self._connection.close()
        self.requests += 1
        is_ours = response.getheader("Content-Type") == "application/json"
        if response.status >= 300 or not is_ours:
            self._fail(Failure(began, f"{method} {path}: {response.status} {text}", is_ours))
            return None
        timing = response.getheader("Server-Timing")
        if timing is not None:
            what, milliseconds = timing.split(";dur=")
            self.timings.append((what, began, float(milliseconds) / 1000))
        return json.loads(text)

    def _fail(self, failure: Failure) -> None:
        self.failures.append(failure)
        time.sleep(0.01)  # a server that refuses everybody is not to be asked ten thousand times


class Crowd:
    """All of them at once, each on a thread. Use as a context manager: they come until it ends.

    Args:
        port: where the server is.
        prefixes: below which paths the application is; the members are shared out among them.
    """

    def __init__(self, port: int, prefixes: Sequence[str] = ("",), count: int = 16) -> None:
        self.members = [Member(port, prefixes[n % len(prefixes)], f"member{n}") for n in range(count)]
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(member,)) for member in self.members]

    def _run(self, member: Member) -> None:
        try:
            member.enter()
            while member.token and not self._end.is_set():
                member.come()
        except Exception as error:
            member.wrong.append(repr(error))
            raise

    def __enter__(self) -> Crowd:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(2 * PATIENCE)

    def wait_until_all_came(self, times: int) -> None:
        """Wait until everybody has had so many answers from now on, or cannot go on."""
        goals = [member.requests + times for member in self.members]
        eventually(lambda: all(m.requests >= goal for m, goal in zip(self.members, goals, strict=True)) or self.wrong())

    def wrong(self) -> list[str]:
        """What must never happen: a count that cannot be, or an answer of the application that is an error."""
        ours = [failure.text for member in self.members for failure in member.failures if failure.is_ours]
        return [text for member in self.members for text in member.wrong] + ours

    def failures_since(self, moment: float) -> list[str]:
        return [failure.text for member in self.members for failure in member.failures if failure.began >= moment]

    def idle_since(self, moment: float) -> list[str]:
        """Those who have asked for nothing since then that was answered."""
        return [member.name for member in self.members if not member.timings or member.timings[-1][1] < moment]

    def check_nothing_failed_since(self, moment: float) -> None:
        failures = self.wrong() or self.failures_since(moment)
        assert not failures, failures

    def check_all_went_well_since(self, moment: float) -> None:
        self.check_nothing_failed_since(moment)
        idle = self.idle_since(moment)
        assert not idle, idle

    def longest(self, what: str, since: float = 0.0) -> float:
        """The longest "read" or "write" within the server that ended since then, in seconds."""
        timings = [timing for member in self.members for timing in member.timings]
        found = [seconds for kind, began, seconds in timings if kind == what and began + seconds >= since]
        return max(found, default=0.0)

    def check_counts(self, visits: dict[str, int]) -> None:
        """See that the database says what the members were told."""
        wrong = self.wrong()
        assert not wrong, wrong
        for member in self.members:
            told = range(member.acknowledged, member.acknowledged + member.unanswered + 1)
            assert visits[member.name] in told, (member.name, visits[member.name], told)

    def seen(self) -> set[tuple[int, str | None]]:
        return set().union(*(member.seen for member in self.members))

    def __str__(self) -> str:
        requests = sum(member.requests for member in self.members)
        refused = sum(len(member.failures) for member in self.members)
        longest = {what: f"{self.longest(what) * 1000:.1f} ms" for what in ("read", "write")}
        return f"{requests} requests, {refused} refused, longest: {longest}"
