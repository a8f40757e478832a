"""What the transport makes of answers that nobody waits for any more, or that cannot be."""

from collections.abc import Iterator, Sequence

import pytest

from chainfed_engine.errors import CorruptFile
from chainfed_engine.federation.codec import pack
from chainfed_engine.federation.messages import reply_from, reply_record
from chainfed_engine.federation.patience import Patience
from chainfed_engine.federation.transport_flower import Delivery, FlowerTransport, Node
from chainfed_engine.types import Reply, Task


class SlowCourier:
    """One site, which says nothing in its first exchange and then both: that the first task failed, and an answer."""

    def __init__(self) -> None:
        self.now, self.pushed = 0.0, 0

    def nodes(self) -> list[Node]:
        return [Node("a", 7, "1")]

    def push(self, node_id: int, header: bytes, payload: bytes, *, ttl_seconds: float) -> str:
        self.pushed += 1
        return f"message-{self.pushed}"

    def pull(self, message_ids: Sequence[str]) -> Iterator[Delivery]:
        if "message-2" in message_ids:
            yield Delivery("message-1", b"", b"", "the process was restarted")
            answer = {"message": "reply", "reply": reply_record(Reply("train", "a", 1, 5))}
            yield Delivery("message-2", *pack(answer, {}), None)

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 1.0)


def test_a_late_error_is_not_taken_for_an_answer_to_the_task_under_way() -> None:
    courier = SlowCourier()
    transport = FlowerTransport(courier, Patience(5.0), sleep=courier.sleep, now=lambda: courier.now)
    replies = [list(transport.exchange([Task("train", "a", n, None, {}, {}, {}, "")])) for n in range(2)]
    assert replies[0] == []
    assert [(reply.round_id, reply.error) for reply in replies[1]] == [(1, None)]


def test_a_whole_number_that_no_float_holds_is_refused_where_the_message_is_read() -> None:
    record = reply_record(Reply("train", "a", 1, 5, metrics={"loss": 1.0}))
    record["metrics"] = {"loss": 10**400}
    with pytest.raises(CorruptFile, match="64 bits"):
        reply_from(record, {})
