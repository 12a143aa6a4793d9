"""The command line: `python -m sqlitepool demo` and what may come beside it."""

import argparse
from collections.abc import Sequence

from sqlitepool import __version__
from sqlitepool.cli import demo


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    `arguments` are those of the process when None. Arguments that argparse refuses, `--help` and `--version` end in
    `SystemExit`, as usual with argparse.
    """
    parser = argparse.ArgumentParser(prog="python -m sqlitepool", description="Bounded pools of SQLite connections.")
    parser.add_argument("--version", action="version", version=f"sqlitepool {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    demo.add_command(commands)
    options = parser.parse_args(arguments)
    if not hasattr(options, "run"):
        parser.print_help()
        return 0
    return int(options.run(options))
