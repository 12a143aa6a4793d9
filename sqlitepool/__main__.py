"""`python -m sqlitepool`: the command line."""

import sys

from sqlitepool.cli import main

if __name__ == "__main__":
    sys.exit(main())
