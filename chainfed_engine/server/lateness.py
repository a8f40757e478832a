"""Which replies to earlier rounds may still count, and for how much. In: who was asked and silent; out: tasks, weights.

A late reply counts once, in a later round of the same window and pass, if its client was not heard of in its own round
and sends nothing newer, at 1 / (1 + rounds late) of its weight. One that answered already, or comes more than
`MAX_ROUNDS_LATE` rounds later, is dropped. Source: Xie et al., 2019, "Asynchronous Federated Optimization", arXiv
1903.03934, for the weight.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from chainfed_engine.types import Reply, Task

MAX_ROUNDS_LATE = 4


class Awaited:
    """Clients that owe an answer, and to which round. `rounds`: as saved."""

    def __init__(self, rounds: Mapping[str, int] | None = None) -> None:
        self.rounds = dict(rounds or {})

    def owes(self, reply: Reply) -> bool:
        return reply.kind == "train" and self.rounds.get(reply.client) == reply.round_id

    def finish(self, round_id: int, *, silent: Iterable[str], heard: Iterable[str]) -> None:
        """A round is over: those who were silent owe it, those who were heard of owe nothing."""
        for client in heard:
            self.rounds.pop(client, None)
        self.rounds |= dict.fromkeys(silent, round_id)
        oldest = round_id + 1 - MAX_ROUNDS_LATE
        self.rounds = {client: owed for client, owed in sorted(self.rounds.items()) if owed >= oldest}


def late_task(task: Task, round_id: int) -> Task:
    """The task that a late reply must be an answer to in order to count now."""
    return replace(task, round_id=round_id, arrays={})


def discounted(reply: Reply, rounds_late: int) -> Reply:
    return replace(reply, num_samples=max(1, reply.num_samples // (1 + rounds_late)))
