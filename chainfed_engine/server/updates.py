"""The updates of one round as they come in. In: replies one by one; out: the usable ones, and a reason for every other.

The same reply twice counts once: networks repeat. A client that sends two different replies loses both: which of
them came first must not matter.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np

from chainfed_engine.server import quarantine
from chainfed_engine.server.aggregate import krum_outsiders
from chainfed_engine.server.checks import NON_FINITE, one_line, refuse_envelope
from chainfed_engine.server.lateness import discounted
from chainfed_engine.types import Arrays, Reply, Task

LOSS = "loss"


class UpdateCollector:
    """`refuse`: why the arrays of a reply do not answer its task, or None. `before`: what an update is measured from
    (None: these replies are no updates, their size says nothing). `last_size`: what was typical of the last cohort that
    could tell. `max_weight`: what a client's samples weigh at most, whatever it says. `decode`: makes float32
    arrays of those of a reply, or a reason."""

    def __init__(
        self,
        tasks: Mapping[str, Task],
        *,
        refuse: Callable[[Task, Arrays], str | None],
        before: Callable[[Task], Mapping[str, np.ndarray]] | None,
        samples: Mapping[str, int],
        last_size: quarantine.Size | None = None,
        max_weight: int | None = None,
        decode: Callable[[object, Mapping[str, np.ndarray]], Arrays | str] | None = None,
    ) -> None:
        self._tasks = tasks
        self._refuse, self._before = refuse, before
        self._decode = decode
        self._samples, self._max_weight = samples, max_weight
        self._seen: set[str] = set()
        self._sizes: dict[str, quarantine.Size] = {}
        self.typical_size = last_size
        self.usable: dict[str, Reply] = {}
        self.late: dict[str, int] = {}  # client -> rounds late, of those that count

    def add(self, reply: Reply) -> str | None:
        """Take one reply of a client that was asked; the reason if it is refused."""
        task = self._tasks[reply.client]
        if reply.client in self._seen:
            return self._add_again(reply)
        self._seen.add(reply.client)
        if self.late.pop(reply.client, None) is not None:
            self.drop([reply.client])
        return self._take(reply, task)

    def _take(self, reply: Reply, task: Task) -> str | None:
        reason = refuse_envelope(reply, task, max_samples=self._samples[reply.client])
        if reason is None and LOSS not in reply.metrics:
            reason = f"metrics: expected {LOSS}"
        if reason is None:
            reply, reason = self._decoded(reply)
        if reason is None:
            reason = self._refuse(task, reply.arrays)
        if reason is None:
            reply = self._weighed(reply, task)
            if self._before is not None:
                norm = quarantine.update_norm(reply.arrays, self._before(task))
                self._sizes[reply.client] = quarantine.Size(norm, num_steps(task, reply.num_samples))
            self.usable[reply.client] = reply
        return reason

    @property
    def asked(self) -> Iterable[str]:
        return self._tasks

    @property
    def heard(self) -> set[str]:
        """Clients that were asked and answered, whatever it was."""
        return self._seen

    def add_late(self, reply: Reply, task: Task, rounds_late: int) -> str | None:
        """Take a reply to an earlier round, as if `task` had been asked; the reason if it is refused. What its client
        says in this round replaces it."""
        if reply.client in self._seen or reply.client in self.late:
            return None
        reason = self._take(reply, task)
        if reason is None:
            self.usable[reply.client] = discounted(self.usable[reply.client], rounds_late)
            self.late[reply.client] = rounds_late
        return reason

    def finish(self, *, norm_limit: float, aggregation: str, hostile_share: float) -> dict[str, str]:
        """No more replies will come: refuse updates that are out of line with the cohort; client -> reason."""
        if self._before is None:
            return {}
        sizes = {client: self._sizes[client] for client in sorted(self.usable)}
        typical = quarantine.typical_size(sizes, self.typical_size)
        refused = quarantine.refuse_norms(sizes, typical, limit=norm_limit)
        self.drop(refused)
        if self.usable:
            self.typical_size = typical
        if aggregation == "multi-krum":
            far = krum_outsiders(self.usable, hostile_share=hostile_share)
            refused |= dict.fromkeys(far, "multi-krum: among the furthest from the other updates")
            self.drop(refused)
        return refused

    def mean_loss(self) -> float | None:
        """Mean loss of the usable replies weighted by samples, summed in name order. None counts as less than nothing:
        one client's word must not outweigh what the others measured."""
        ordered = [self.usable[name] for name in sorted(self.usable)]
        total = sum(reply.num_samples for reply in ordered)
        weighted = sum(reply.num_samples * max(float(reply.metrics[LOSS]), 0.0) for reply in ordered)
        return weighted / total if ordered else None

    def totals(self) -> dict[str, float]:
        """Every metric but the loss, summed over the usable replies in name order."""
        sums: dict[str, float] = {}
        for name in sorted(self.usable):
            for metric, value in sorted(self.usable[name].metrics.items()):
                if metric != LOSS:
                    sums[metric] = sums.get(metric, 0.0) + float(value)
        return sums

    def drop(self, refused: Iterable[str]) -> None:
        """These do not count after all."""
        for client in refused:
            self.usable.pop(client, None)
            self.late.pop(client, None)

    def _weighed(self, reply: Reply, task: Task) -> Reply:
        """It weighs the samples that it has, as it says, but no more than it trained on and no more than the limit."""
        trained_on = samples_trained_on(task, reply.num_samples)
        weight = trained_on if self._max_weight is None else min(trained_on, self._max_weight)
        return replace(reply, num_samples=weight)

    def _decoded(self, reply: Reply) -> tuple[Reply, str | None]:
        """The reply with its arrays in float32, and the reason if they cannot be read."""
        if self._decode is None or self._before is None:
            return reply, None
        arrays = self._decode(reply.arrays, self._before(self._tasks[reply.client]))
        return (reply, arrays) if isinstance(arrays, str) else (replace(reply, arrays=arrays), None)

    def _add_again(self, reply: Reply) -> str | None:
        first = self.usable.get(reply.client)
        if first is not None and isinstance(reply.num_samples, int):
            again, reason = self._decoded(self._weighed(reply, self._tasks[reply.client]))
            if reason is None and _same(first, again):
                return None
        self.usable.pop(reply.client, None)
        return "more than one reply to one task, and not the same"


def num_steps(task: Task, num_samples: int) -> float:
    """Optimizer steps that the task asks of a client with so many samples; 1 where it does not say."""
    settings = task.settings
    batch_size = int(settings.get("batch_size", 0)) or max(num_samples, 1)
    steps = -(-num_samples // batch_size) * int(settings.get("local_epochs", 1))
    limit = int(settings.get("max_local_steps", 0))
    return float(max(1, min(steps, limit) if limit else steps))


def samples_trained_on(task: Task, num_samples: int) -> int:
    """How many of a client's samples the task has it train on. Where `max_local_steps` leaves some out, an update tells
    no more of a large client than of a small one, and to weigh it by all samples made two of three updates count for
    little (docs/LOG.md, 2026-11-30)."""
    limit = int(task.settings.get("max_local_steps", 0)) * int(task.settings.get("batch_size", 0))
    return min(num_samples, limit) if limit else num_samples


def only_non_finite(reasons: Mapping[str, str]) -> bool:
    """Whether every client was refused because of NaN or infinity."""
    return bool(reasons) and all(NON_FINITE in reason for reason in reasons.values())


def summarize_reasons(reasons: Mapping[str, str]) -> str:
    """The first few reasons, by client name, on one line."""
    named = [f"{client}: {reason}" for client, reason in sorted(reasons.items())]
    more = f"; and {len(named) - 3} more" if len(named) > 3 else ""
    return one_line("; ".join(named[:3])) + more if named else "no client answered"


def _same(first: Reply, second: Reply) -> bool:
    """Whether two replies say the same, bit for bit, but for what was measured in seconds."""
    if second.error is not None or first.num_samples != second.num_samples or not isinstance(second.arrays, Mapping):
        return False
    if first.arrays.keys() != second.arrays.keys():
        return False
    pairs = [(array, second.arrays[key]) for key, array in first.arrays.items()]
    return all(
        isinstance(other, np.ndarray)
        and array.shape == other.shape
        and array.dtype == other.dtype
        and array.tobytes() == other.tobytes()
        for array, other in pairs
    )
