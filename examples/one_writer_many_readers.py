"""One writer and many readers: money goes round between accounts while others count it, and the sum never changes.

    python examples/one_writer_many_readers.py

Eight threads transfer by `run_write`, whose group commits take many transfers at once. Four threads read meanwhile:
each block sees one moment of the database, so between its statements no money is on the way.
"""

import sqlite3
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

from sqlitepool import Database

ACCOUNTS = 10
TRANSFERS = 100  # by each of the writers


def transfer(conn: sqlite3.Connection, giver: int, taker: int, amount: int) -> int:
    """Move money, and return what the giver has left. May run more than once, so it does nothing else."""
    conn.execute("UPDATE account SET balance = balance + ? WHERE id = ?", (amount, taker))
    cursor = conn.execute("UPDATE account SET balance = balance - ? WHERE id = ? RETURNING balance", (amount, giver))
    ((left,),) = cursor.fetchall()
    if left < 0:
        raise ValueError(f"account {giver} has not enough")  # undoes this transfer, and nobody else's
    return int(left)


def write(db: Database, number: int) -> int:
    """Make transfers; return how many were refused."""
    refused = 0
    for turn in range(TRANSFERS):
        try:
            db.run_write(transfer, number % ACCOUNTS, (number + turn) % ACCOUNTS, turn)
        except ValueError:
            refused += 1
    return refused


def read(db: Database, done: Event) -> set[int]:
    """Count the money again and again; return every sum that was seen."""
    sums = set()
    while not done.is_set():
        with db.read(time_limit=5.0) as conn:
            balances = [conn.execute("SELECT balance FROM account WHERE id = ?", (n,)) for n in range(ACCOUNTS)]
            sums.add(sum(balance for cursor in balances for (balance,) in cursor))
    return sums


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, Database(Path(folder, "bank.db"), durable=True) as db:
        with db.write() as conn:
            conn.execute("CREATE TABLE account (id INTEGER PRIMARY KEY, balance INTEGER NOT NULL)")
            conn.executemany("INSERT INTO account VALUES (?, 1000)", ((n,) for n in range(ACCOUNTS)))

        done = Event()
        with ThreadPoolExecutor(12) as threads:
            readers = [threads.submit(read, db, done) for _ in range(4)]
            writers = [threads.submit(write, db, number) for number in range(8)]
            refused = sum(writer.result() for writer in writers)
            done.set()
            sums = set().union(*(reader.result() for reader in readers))

        stats = db.stats()
        print(f"{8 * TRANSFERS} transfers asked for, {refused} of them refused")
        print(f"{stats.batches} group commits, with {stats.mean_batch:.1f} transfers on average")
        print(f"the sums that the readers saw: {sums}")


if __name__ == "__main__":
    main()
