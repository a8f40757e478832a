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
    infinity are all that is behind them. A run that stopped over them gets as many new chances when it is taken up."""

    def __init__(self, reasons: Sequence[str] = (), only_non_finite: bool = True) -> None:
        exhausted = len(reasons) >= MAX_REJECTED_IN_A_ROW
        self.reasons = [] if exhausted else list(reasons)
        self.only_non_finite = exhausted or only_non_finite

    def accepted(self) -> None:
        self.reasons, self.only_non_finite = [], True

    def rejected(self, refusals: Mapping[str, str]) -> None:
        """An exchange without one usable reply; `refusals`: client -> reason."""
        self.reasons.append(summarize_reasons(refusals))
        self.only_non_finite &= only_non_finite(refusals)

    def check(self, what: str) -> None:
        """Raises NonFiniteLoss or InconsistentUpdates once too many exchanges (`what`: their name) were rejected."""
        if len(self.reasons) < MAX_REJECTED_IN_A_ROW:
            return
        kind: type[ChainfedError] = NonFiniteLoss if self.only_non_finite else InconsistentUpdates
        advice = "; try a lower lr" if kind is NonFiniteLoss else ""
        raise kind(
            f"no usable update in {len(self.reasons)} {what} in a row (last: {self.reasons[-1]}); "
            f"the parameters are as before them{advice}"
        )
