"""A Flower grid as the courier of a `FlowerTransport`: who is connected, push, pull. With flower_records.py and the app
the only modules that import Flower."""

import sys
from collections.abc import Iterator, Sequence

import httpx
from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from chainfed_engine.errors import CorruptFile
from chainfed_engine.federation.flower_records import from_records, to_records
from chainfed_engine.federation.transport_flower import Delivery, Node


class GridCourier:
    """Names are those under which the SuperLink's operator registered the keys."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def nodes(self) -> list[Node]:
        return [
            Node(str(getattr(info, "name", "")), int(info.node_id), str(getattr(info, "last_activated_at", "")))
            for info in self._grid.get_nodes()
        ]

    def push(self, node_id: int, header: bytes, payload: bytes, *, ttl_seconds: float) -> str | None:
        message = Message(to_records(header, payload), node_id, "query", ttl=ttl_seconds)
        try:
            (message_id,) = list(self._grid.push_messages([message])) or [None]
        except (httpx.HTTPError, ObjectPushError) as error:  # the SuperLink went away: the transport tries again
            print(f"chainfed: message not sent: {' '.join(str(error).split())[:200]}", file=sys.stderr, flush=True)
            return None
        return message_id or None

    def pull(self, message_ids: Sequence[str]) -> Iterator[Delivery]:
        for message in self._grid.pull_messages(message_ids):
            # Errors that the SuperLink makes come from node 1: what they answer tells whose they are.
            asked = str(message.metadata.reply_to_message_id)
            if message.has_error():
                reason = " ".join(str(message.error.reason).split())[:300]
                yield Delivery(asked, b"", b"", f"Flower error {message.error.code}: {reason}")
                continue
            try:
                header, payload = from_records(message.content)
            except CorruptFile as error:
                yield Delivery(asked, b"", b"", str(error))
            else:
                yield Delivery(asked, header, payload, None)
