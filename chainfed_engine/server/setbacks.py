"""Exchanges that brought nothing usable, counted in a row: a run that cannot go on stops and says why.

In: the refusals of each rejected exchange; out: the error once there are `MAX_REJECTED_IN_A_ROW`. An accepted exchange
clears the account.
"""

from collections.abc import Mapping, Sequence

from chainfed_engine.errors import ChainfedError, InconsistentUpdates, NonFiniteLoss
from chainfed_engine.server.updates import only_non_finite, summarize_reasons

MAX_REJECTED_IN_A_ROW = 3


class Setbacks:
    """`reasons`: one line for each rejected exchange since the last accepted one; `only_non_finite`: whether NaN and
    infinity are all that is behind them."""

    def __init__(self, reasons: Sequence[str] = (), only_non_finite: bool = True) -> None:
        self.reasons, self.only_non_finite = list(reasons), only_non_finite

    def accepted(self) -> None:
        self.reasons, self.only_non_finite = [], True

    def rejected(self, refusals: Mapping[str, str]) -> None:
        """An exchange without one usable reply; `refusals`: client -> reason."""
        self.reasons.append(summarize_reasons(refusals))
        self.only_non_finite &= only_non_finite(refusals)

    def renew(self) -> None:
        """A run that stopped over its setbacks gets as many new chances when it is taken up."""
        if len(self.reasons) >= MAX_REJECTED_IN_A_ROW:
            self.accepted()

    def check(self, what: str) -> None:
        """Raises NonFiniteLoss or InconsistentUpdates once too many exchanges (`what`: their name) were rejected."""
        if len(self.reasons) >= MAX_REJECTED_IN_A_ROW:
            raise self._error(f"in {len(self.reasons)} {what} in a row", "; the parameters are as before them")

    def at_end(self, rounds: int) -> str | None:
        """What to tell of a run that ended after `rounds` rounds, the last of which were rejected; None where the last
        one counted. Raises as `check` where none counted: nothing was trained."""
        count = len(self.reasons)
        if not count:
            return None
        if count >= rounds:
            raise self._error(f"in any of {rounds} rounds", "; nothing was trained")
        return (
            f"no usable update in the last {count} of {rounds} rounds (last: {self.reasons[-1]}); the parameters are "
            f"those of round {rounds - count}{self._advice}"
        )

    @property
    def _advice(self) -> str:
        return "; try a lower lr" if self.only_non_finite else ""

    def _error(self, where: str, state: str) -> ChainfedError:
        kind: type[ChainfedError] = NonFiniteLoss if self.only_non_finite else InconsistentUpdates
        return kind(f"no usable update {where} (last: {self.reasons[-1]}){state}{self._advice}")
