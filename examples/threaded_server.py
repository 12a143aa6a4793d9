"""The smallest threaded web server on a pool: a hundred threads, four connections, no "database is locked".

    python examples/threaded_server.py

Serves a guest book on 127.0.0.1, signs it from ten clients at once, shows what happened, and stops.
`GET /` lists the entries, `POST /` adds the body as a new one.
"""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from socketserver import ThreadingMixIn
from threading import Thread
from urllib.request import ProxyHandler, build_opener
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIEnvironment

from sqlitepool import ConnectionPool


class GuestBook:
    """A WSGI application. One instance serves all threads, so all of them share its pool."""

    def __init__(self, path: Path) -> None:
        self.pool = ConnectionPool(path, max_size=4)
        with self.pool.connection() as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS entries (text TEXT NOT NULL)")

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        if environ["REQUEST_METHOD"] == "POST":
            text = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])).decode()
            with self.pool.connection() as connection:  # committed at the end of the block, rolled back on an error
                connection.execute("INSERT INTO entries VALUES (?)", (text,))
            answer = "thank you"
        else:
            with self.pool.connection() as connection:
                answer = "\n".join(text for (text,) in connection.execute("SELECT text FROM entries"))
        start_response("200 OK", [("Content-Type", "text/plain; charset=utf-8")])
        return [answer.encode()]


class ThreadedServer(ThreadingMixIn, WSGIServer):
    daemon_threads = False  # server_close() waits for requests that are still running
    request_queue_size = 100


class QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        guest_book = GuestBook(Path(folder, "guests.db"))
        server = make_server("127.0.0.1", 0, guest_book, ThreadedServer, QuietHandler)
        Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        open_url = build_opener(ProxyHandler({})).open  # no proxy between this machine and itself

        def sign(number: int) -> None:
            with open_url(url, data=f"guest {number} was here".encode()) as answer:
                assert answer.read() == b"thank you"

        try:
            with ThreadPoolExecutor(10) as clients:
                list(clients.map(sign, range(100)))
            with open_url(url) as answer:
                entries = answer.read().decode().splitlines()
        finally:
            server.shutdown()
            server.server_close()
            guest_book.pool.close()

        print(f"{len(entries)} entries in the guest book, the last one: {entries[-1]!r}")
        print(f"{guest_book.pool.stats().opened} connections served 101 threads")


if __name__ == "__main__":
    main()
