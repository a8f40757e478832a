"""Flower's SuperNode, which looks for messages more often: run as a module with the arguments of `flower-supernode`.

Flower 1.41 sleeps for three seconds whenever the server had nothing, and half a second at a time while a message is
worked on; no option changes that, so its module is given a clock with shorter naps. `CHAINFED_POLL_SECONDS`: between
two looks; every look is one signed request to the server, so a federation of hundreds of sites wants longer ones.
"""

import os
import time
from typing import Any

POLL_VARIABLE = "CHAINFED_POLL_SECONDS"
_FLOWERS_POLL_SECONDS = 3.0


class Clock:
    """The module `time` for another module, with naps shorter (or longer) by `factor`."""

    def __init__(self, factor: float) -> None:
        self._factor = factor

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds * self._factor)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def main() -> None:
    from flwr.supernode import start_client_internal
    from flwr.supernode.cli import flower_supernode

    factor = float(os.environ.get(POLL_VARIABLE, _FLOWERS_POLL_SECONDS)) / _FLOWERS_POLL_SECONDS
    if getattr(start_client_internal, "time", None) is time:  # a later version that sleeps elsewhere is left as it is
        start_client_internal.time = Clock(factor)
    flower_supernode()


if __name__ == "__main__":
    main()
