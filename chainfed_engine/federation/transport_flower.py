"""Carries tasks to sites on other machines and their replies back; the same round loop as in process.

In: tasks; out: replies, as they come. A site is known by the name under which its key was registered, never by what it
says of itself; its reply under another name is refused. Replies to exchanges that are over are handed on (the server
drops them as late); a site that was restarted in the middle of an exchange is sent its task again. One thread. The
courier is Flower's grid (flower_records.py) or, in tests, a stand-in.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from chainfed_engine.errors import CorruptFile
from chainfed_engine.federation.codec import pack, unpack
from chainfed_engine.federation.messages import reply_from, task_record
from chainfed_engine.federation.patience import Patience, Wait
from chainfed_engine.types import Arrays, Reply, Task

POLL_SECONDS = 0.2
_NODES_SECONDS = 2.0  # between looks at which sites are there
_DAY_SECONDS = 86400.0
MAX_LOST = 3  # times that a task is sent again in one exchange; a site whose processes always die is given up
_MAX_LATE = 1024  # messages of exchanges that are over, still listened for


@dataclass(frozen=True)
class Node:
    """A connected site by the name of its registration. `activation` changes when it is started again."""

    name: str
    node_id: int
    activation: str


@dataclass(frozen=True)
class Delivery:
    """What came back for the message `asked`: header and payload, or a line of error. `lost`: the message or its answer
    got lost on the way, so it may be sent again."""

    asked: str
    header: bytes
    payload: bytes
    error: str | None
    lost: bool = False


class Courier(Protocol):
    def nodes(self) -> Iterable[Node]:
        """Everybody who is connected."""

    def push(self, node_id: int, header: bytes, payload: bytes, *, ttl_seconds: float) -> str | None:
        """Send; the message's id, None where it could not be sent."""

    def pull(self, message_ids: Sequence[str]) -> Iterable[Delivery]:
        """Answers to these messages that have come since the last look."""


@dataclass(frozen=True)
class Answer:
    """What one site said: a record with its arrays, or a line of error."""

    site: str
    record: Mapping[str, Any]
    arrays: Arrays
    error: str | None
    lost: bool = False


@dataclass
class _Sent:
    site: str
    node: Node
    late: bool = False


class FlowerTransport:
    """`patience` holds for exchanges; a message lives no longer than its exchange may last."""

    def __init__(
        self,
        courier: Courier,
        patience: Patience,
        *,
        sleep: Callable[[float], None] = time.sleep,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._courier, self._patience, self._sleep, self._now = courier, patience, sleep, now
        self._sent: dict[str, _Sent] = {}  # message id -> what was asked

    def nodes(self) -> dict[str, Node]:
        """Connected sites by name; where two nodes have one name, neither of them."""
        found: dict[str, list[Node]] = {}
        for node in self._courier.nodes():
            found.setdefault(node.name, []).append(node)
        return {name: nodes[0] for name, nodes in found.items() if name and len(nodes) == 1}

    def exchange(self, tasks: Sequence[Task]) -> Iterator[Reply]:
        """Replies of these tasks and late ones of earlier tasks, until everybody answered or patience is at its end."""
        kinds = {task.client: task for task in tasks}
        messages = {task.client: pack({"message": "task", "task": task_record(task)}, task.arrays) for task in tasks}
        for answer in self.ask(messages, self._patience.start(len(tasks), now=self._now)):
            yield _reply(answer, kinds.get(answer.site))

    def ask(self, messages: Mapping[str, tuple[bytes, bytes]], wait: Wait) -> Iterator[Answer]:
        """Send site -> (header, payload) and yield answers; sites that are away are sent theirs when they come back."""
        for sent in self._sent.values():
            sent.late = True
        while len(self._sent) > _MAX_LATE:
            del self._sent[next(iter(self._sent))]
        unanswered, lost = set(messages), dict.fromkeys(messages, 0)
        looked = -math.inf
        while unanswered and not wait.is_over:
            if self._now() - looked > _NODES_SECONDS:
                looked = self._now()
                self._send({site: messages[site] for site in sorted(unanswered)}, wait.remaining_seconds)
            for answer, late in self._pull():
                if answer.lost and (late or lost[answer.site] < MAX_LOST):
                    lost[answer.site] = lost.get(answer.site, 0) + 1  # sent again once the site is there
                    continue
                if late and answer.error is not None:
                    continue  # it says nothing of the task that is under way
                if not late:
                    unanswered.discard(answer.site)
                    if answer.error is None:
                        wait.answered()
                yield answer
            if unanswered:
                self._sleep(min(POLL_SECONDS, max(wait.remaining_seconds, 0.0)))

    def _send(self, messages: Mapping[str, tuple[bytes, bytes]], remaining_seconds: float) -> None:
        """Messages that their site, as it is connected now, was not sent yet."""
        nodes = self.nodes()
        under_way = {(sent.site, sent.node) for sent in self._sent.values() if not sent.late}
        for site, (header, payload) in messages.items():
            node = nodes.get(site)
            if node is None or (site, node) in under_way:
                continue
            ttl = min(max(remaining_seconds, 1.0), _DAY_SECONDS)
            message_id = self._courier.push(node.node_id, header, payload, ttl_seconds=ttl)
            if message_id is not None:
                self._sent[message_id] = _Sent(site, node)

    def _pull(self) -> Iterator[tuple[Answer, bool]]:
        if not self._sent:
            return
        for delivery in self._courier.pull(list(self._sent)):
            sent = self._sent.pop(delivery.asked, None)
            if sent is not None:
                yield _answer(sent.site, delivery), sent.late


def _answer(site: str, delivery: Delivery) -> Answer:
    if delivery.error is not None:
        return Answer(site, {}, {}, delivery.error, delivery.lost)
    try:
        record, arrays = unpack(delivery.header, delivery.payload)
    except CorruptFile as error:
        return Answer(site, {}, {}, str(error))
    if record.get("message") == "error":
        return Answer(site, {}, {}, str(record.get("error"))[:2000])
    return Answer(site, record, arrays, None)


def _reply(answer: Answer, task: Task | None) -> Reply:
    """The reply in an answer; whatever is wrong with it becomes a reply with an error in the site's own name."""
    error = answer.error
    if error is None:
        try:
            reply = reply_from(answer.record.get("reply"), answer.arrays)
        except CorruptFile as reason:
            error = str(reason)
        else:
            if reply.client == answer.site:
                return reply
            error = f"expected a reply of {answer.site}, got one in the name of {reply.client!r:.80}"
    kind, round_id = (task.kind, task.round_id) if task is not None else ("train", 0)
    return Reply(kind, answer.site, round_id, 0, error=error)
