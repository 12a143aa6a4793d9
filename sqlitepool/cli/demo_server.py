"""The demo's server: a threaded WSGI server whose handlers borrow a `UserDatabase` from a pool."""

import json
import sqlite3
import sys
import threading
from collections import Counter
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from sqlitepool import ConnectionPool, PoolTimeout

TABLE = "sqlitepool_demo_users"


class UserDatabase:
    """What an application would write: its queries, around a connection that the pool opened."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def create_table(self) -> None:
        """Create the demo's table where there is none yet."""
        self._connection.execute(
            f"CREATE TABLE IF NOT EXISTS {TABLE} (id INTEGER PRIMARY KEY, run TEXT NOT NULL, name TEXT NOT NULL)"
        )

    def add(self, run: str, name: str) -> int:
        """Add a user under this run of the demo, and return the new id."""
        cursor = self._connection.execute(f"INSERT INTO {TABLE} (run, name) VALUES (?, ?)", (run, name))
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def get(self, user_id: int) -> dict[str, Any] | None:
        """Return one user, None if there is none with this id."""
        row = self._connection.execute(f"SELECT id, name FROM {TABLE} WHERE id = ?", (user_id,)).fetchone()
        return None if row is None else {"id": row[0], "name": row[1]}

    def newest(self, limit: int) -> list[dict[str, Any]]:
        """Return the users added last, at most `limit`, the newest first."""
        rows = self._connection.execute(f"SELECT id, name FROM {TABLE} ORDER BY id DESC LIMIT ?", (limit,))
        return [{"id": user_id, "name": name} for user_id, name in rows]

    def count(self, run: str) -> int:
        """Count the users that this run of the demo has added."""
        (count,) = self._connection.execute(f"SELECT count(*) FROM {TABLE} WHERE run = ?", (run,)).fetchone()
        return int(count)


class UserApplication:
    """The WSGI application: `GET /users/ID`, `GET /newest` and `POST /users` with a JSON body.

    Each handler borrows a `UserDatabase` for as long as it needs one. A POST is answered only after the block
    has ended, that is after the COMMIT.
    """

    def __init__(self, pool: ConnectionPool[UserDatabase], run: str) -> None:
        self._pool = pool
        self._run = run

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        """Answer one request; an exception becomes a 503 or a 500 that says what it was."""
        try:
            status, answer = self._handle(environ)
        except PoolTimeout as error:
            status, answer = "503 Service Unavailable", {"error": str(error)}
        except Exception as error:  # the demo counts and shows whatever went wrong, instead of logging it
            status, answer = "500 Internal Server Error", {"error": f"{type(error).__name__}: {error}"}
        body = json.dumps(answer).encode()
        start_response(status, [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]

    def _handle(self, environ: WSGIEnvironment) -> tuple[str, Any]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if method == "GET" and path == "/newest":
            with self._pool.connection() as users:
                return "200 OK", users.newest(10)
        if method == "GET" and path.startswith("/users/"):
            with self._pool.connection() as users:
                user = users.get(int(path.removeprefix("/users/")))
            return ("200 OK", user) if user else ("404 Not Found", {"error": "no such user"})
        if method == "POST" and path == "/users":
            name = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))["name"]
            with self._pool.connection() as users:
                user_id = users.add(self._run, name)
            return "201 Created", {"id": user_id, "name": name}
        return "404 Not Found", {"error": f"nothing at {method} {path}"}


class ThreadedServer(ThreadingMixIn, WSGIServer):
    """wsgiref's server with a thread for each request; counts those threads.

    As a context manager it serves from a thread of its own, and has joined every thread when the block ends.
    """

    daemon_threads = False  # only those that are not daemons are joined by server_close()
    request_queue_size = 1024  # a full accept queue would show as requests that take a second

    def __init__(self, application: UserApplication) -> None:
        super().__init__(("127.0.0.1", 0), _QuietHandler)
        self.set_app(self._counted(application))
        self._lock = threading.Lock()
        self._active = 0
        self.threads = 0
        """Threads that served a request."""
        self.threads_at_once = 0
        """The most of them that were in the application at the same time."""
        self.failures: Counter[str] = Counter()
        """What went wrong outside the application, by its text."""
        # a daemon, because who presses Ctrl-C twice may interrupt the end of the block
        self._acceptor = threading.Thread(target=self.serve_forever, args=(0.05,), name="demo-server", daemon=True)

    def server_bind(self) -> None:
        """Bind as WSGIServer does, without asking the resolver for this machine's name: that can take seconds."""
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]
        self.setup_environ()

    def __enter__(self) -> "ThreadedServer":
        self._acceptor.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._acceptor.join()
        self.server_close()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one request on the thread made for it, and count that thread."""
        with self._lock:
            self.threads += 1
        super().process_request_thread(request, client_address)

    def _counted(self, application: UserApplication) -> WSGIApplication:
        def count(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
            with self._lock:
                self._active += 1
                self.threads_at_once = max(self.threads_at_once, self._active)
            try:
                return application(environ, start_response)
            finally:
                with self._lock:
                    self._active -= 1

        return count

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Note what went wrong outside the application."""
        error = sys.exception()
        with self._lock:
            self.failures[f"{type(error).__name__}: {error}"] += 1


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass
