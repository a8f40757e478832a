"""`python -m chainfed_engine` is the program `chainfed`."""

import sys

from chainfed_engine.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
