"""Exchanges that brought nothing usable, counted in a row: a run that cannot go on stops and says why.

In: the refusals of each rejected exchange; out: the error once there are `MAX_REJECTED_IN_A_ROW` of a kind. Rounds and
profiles have accounts of their own, each cleared by an accepted one: a profile trains nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from chainfed_engine.errors import ChainfedError, InconsistentUpdates, NonFiniteLoss
from chainfed_engine.server.updates import only_non_finite, summarize_reasons

MAX_REJECTED_IN_A_ROW = 3


class Setbacks:
    """`rounds`, `profiles`: one line for each that was rejected since the last accepted one; `only_non_finite`: whether
    NaN and infinity are all that is behind them."""

    def __init__(self, rounds: Sequence[str] = (), profiles: Sequence[str] = (), only_non_finite: bool = True) -> None:
        self.rounds, self.profiles, self.only_non_finite = list(rounds), list(profiles), only_non_finite

    def accepted(self, kind: Literal["profile", "round"]) -> None:
        self._of(kind).clear()
        self.only_non_finite |= not self.rounds and not self.profiles

    def rejected(self, kind: Literal["profile", "round"], refusals: Mapping[str, str]) -> None:
        """An exchange without one usable reply; `refusals`: client -> reason."""
        self._of(kind).append(summarize_reasons(refusals))
        self.only_non_finite &= only_non_finite(refusals)

    def renew(self) -> None:
        """A run that stopped over its setbacks gets as many new chances when it is taken up."""
        if max(len(self.rounds), len(self.profiles)) >= MAX_REJECTED_IN_A_ROW:
            self.rounds, self.profiles, self.only_non_finite = [], [], True

    def check(self) -> None:
        """Raises NonFiniteLoss or InconsistentUpdates once too many of a kind were rejected."""
        for what, reasons in (("profile attempts", self.profiles), ("rounds", self.rounds)):
            if len(reasons) >= MAX_REJECTED_IN_A_ROW:
                raise self._error(reasons, f"in {len(reasons)} {what} in a row", "; the parameters are as before them")

    def at_end(self, rounds: int) -> str | None:
        """What to tell of a run that ended after `rounds` rounds, the last of which were rejected; None where the last
        one counted. Raises as `check` where none counted: nothing was trained."""
        count = len(self.rounds)
        if not count:
            return None
        if count >= rounds:
            raise self._error(self.rounds, f"in any of {rounds} rounds", "; nothing was trained")
        return (
            f"no usable update in the last {count} of {rounds} rounds (last: {self.rounds[-1]}); the parameters are "
            f"those of round {rounds - count}{self._advice}"
        )

    @property
    def _advice(self) -> str:
        return "; try a lower lr" if self.only_non_finite else ""

    def _of(self, kind: Literal["profile", "round"]) -> list[str]:
        return self.profiles if kind == "profile" else self.rounds

    def _error(self, reasons: Sequence[str], where: str, state: str) -> ChainfedError:
        kind: type[ChainfedError] = NonFiniteLoss if self.only_non_finite else InconsistentUpdates
        return kind(f"no usable update {where} (last: {reasons[-1]}){state}{self._advice}")
