"""How long an exchange waits: deadline, quorum, grace. In: how many were asked and answered, a clock. Out: go on?

An exchange is over when everybody answered, when `deadline_seconds` are over, or `grace_seconds` after the quorum
answered: stragglers get a little longer, and nobody holds up a round. What comes later is a late reply, which the
server drops. A client's tasks live as long as the deadline: one that was away does not work through old rounds.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from chainfed_engine.config import ChainConfig


@dataclass(frozen=True)
class Patience:
    """`deadline_seconds` 0: no deadline. `quorum`: share of those asked. `grace_seconds` counts from the quorum on; a
    quorum of everybody ends the exchange by itself."""

    deadline_seconds: float = 0.0
    quorum: float = 1.0
    grace_seconds: float = 0.0

    @classmethod
    def of(cls, config: ChainConfig) -> "Patience":
        return cls(config.deadline_seconds, config.quorum, config.grace_seconds)

    def start(self, asked: int, *, now: Callable[[], float] = time.monotonic) -> "Wait":
        return Wait(self, asked, now)


class Wait:
    """One exchange's clock, started when it is made."""

    def __init__(self, patience: Patience, asked: int, now: Callable[[], float]) -> None:
        self._patience, self._asked, self._now = patience, asked, now
        self._started = now()
        self._quorum_at: float | None = None
        self._answered = 0

    def answered(self) -> None:
        """One more client answered."""
        self._answered += 1
        if self._quorum_at is None and self._answered >= self._patience.quorum * self._asked:
            self._quorum_at = self._now()

    @property
    def is_over(self) -> bool:
        return self._answered >= self._asked or self.remaining_seconds <= 0

    @property
    def remaining_seconds(self) -> float:
        """Until the exchange ends whoever has answered; infinite without a deadline and before the quorum."""
        patience, now = self._patience, self._now()
        remaining = math.inf
        if patience.deadline_seconds:
            remaining = self._started + patience.deadline_seconds - now
        if self._quorum_at is not None:
            remaining = min(remaining, self._quorum_at + patience.grace_seconds - now)
        return remaining
