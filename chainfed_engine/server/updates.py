"""The updates of one round as they come in. In: replies one by one; out: the usable ones, and a reason for every other.

A client that sends more than one reply loses all of them: which of two came first must not matter.
"""

from collections.abc import Callable, Mapping

from chainfed_engine.server.checks import NON_FINITE, one_line, refuse_envelope
from chainfed_engine.types import Arrays, Reply, Task

LOSS = "loss"


class UpdateCollector:
    """`refuse`: why a reply's arrays are none that this round asked for, or None."""

    def __init__(
        self, tasks: Mapping[str, Task], *, refuse: Callable[[Arrays], str | None], samples: Mapping[str, int]
    ) -> None:
        self._tasks = tasks
        self._refuse = refuse
        self._samples = samples
        self._seen: set[str] = set()
        self.usable: dict[str, Reply] = {}

    def add(self, reply: Reply) -> str | None:
        """Take one reply of a client that was asked; the reason if it is refused."""
        if reply.client in self._seen:
            self.usable.pop(reply.client, None)
            return "more than one reply to one task"
        self._seen.add(reply.client)
        reason = refuse_envelope(reply, self._tasks[reply.client], max_samples=self._samples[reply.client])
        if reason is None and LOSS not in reply.metrics:
            reason = f"metrics: expected {LOSS}"
        if reason is None:
            reason = self._refuse(reply.arrays)
        if reason is None:
            self.usable[reply.client] = reply
        return reason

    def mean_loss(self) -> float | None:
        """Mean loss of the usable replies weighted by samples, summed in name order."""
        ordered = [self.usable[name] for name in sorted(self.usable)]
        total = sum(reply.num_samples for reply in ordered)
        weighted = sum(reply.num_samples * float(reply.metrics[LOSS]) for reply in ordered)
        return weighted / total if ordered else None

    def totals(self) -> dict[str, float]:
        """Every metric but the loss, summed over the usable replies in name order."""
        sums: dict[str, float] = {}
        for name in sorted(self.usable):
            for metric, value in sorted(self.usable[name].metrics.items()):
                if metric != LOSS:
                    sums[metric] = sums.get(metric, 0.0) + float(value)
        return sums


def only_non_finite(reasons: Mapping[str, str]) -> bool:
    """Whether every client was refused because of NaN or infinity."""
    return bool(reasons) and all(NON_FINITE in reason for reason in reasons.values())


def summarize_reasons(reasons: Mapping[str, str]) -> str:
    """The first few reasons, by client name, on one line."""
    named = [f"{client}: {reason}" for client, reason in sorted(reasons.items())]
    more = f"; and {len(named) - 3} more" if len(named) > 3 else ""
    return one_line("; ".join(named[:3])) + more if named else "no client answered"
