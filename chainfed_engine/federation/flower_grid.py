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

# What Flower raises when the SuperLink goes away in the middle of a call: it tries again by itself, but for a TLS
# connection that was cut ("SSL", it thinks, is a wrong certificate) and for objects of a push that nobody remembers.
_AWAY = (httpx.HTTPError, ObjectPushError)

# Flower's codes: the message or its answer is gone, the SuperNode is, or its process was killed. A site answers the
# same task with the same bits, so it may be asked again.
_LOST = (3, 4, 5, 8)


class GridCourier:
    """Names are those under which the SuperLink's operator registered the keys. While the SuperLink is away nobody is
    connected, nothing is sent and nothing comes: the transport asks again until its patience is at an end."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def nodes(self) -> list[Node]:
        try:
            return [
                Node(str(getattr(info, "name", "")), int(info.node_id), str(getattr(info, "last_activated_at", "")))
                for info in self._grid.get_nodes()
            ]
        except _AWAY as error:
            _say("sites not listed", error)
            return []

    def push(self, node_id: int, header: bytes, payload: bytes, *, ttl_seconds: float) -> str | None:
        message = Message(to_records(header, payload), node_id, "query", ttl=ttl_seconds)
        try:
            (message_id,) = list(self._grid.push_messages([message])) or [None]
        except _AWAY as error:
            _say("message not sent", error)
            return None
        return message_id or None

    def pull(self, message_ids: Sequence[str]) -> Iterator[Delivery]:
        # One at a time: Flower forgets what it handed over, and a call that breaks off loses all it had gathered.
        for message_id in message_ids:
            try:
                messages = list(self._grid.pull_messages([message_id]))
            except _AWAY as error:
                _say("answers not fetched", error)
                return
            yield from map(_delivery, messages)


def _delivery(message: Message) -> Delivery:
    # Errors that the SuperLink makes come from node 1: what they answer tells whose they are.
    asked = str(message.metadata.reply_to_message_id)
    if message.has_error():
        reason = " ".join(str(message.error.reason).split())[:300]
        lost = message.error.code in _LOST
        return Delivery(asked, b"", b"", f"Flower error {message.error.code}: {reason}", lost)
    try:
        header, payload = from_records(message.content)
    except CorruptFile as error:
        return Delivery(asked, b"", b"", str(error))
    return Delivery(asked, header, payload, None)


def _say(what: str, error: Exception) -> None:
    print(f"chainfed: {what}: {' '.join(str(error).split())[:200]}", file=sys.stderr, flush=True)
