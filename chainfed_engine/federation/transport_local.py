"""Carries tasks to clients in this process and their replies back, one client at a time. No copies of arrays."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from chainfed_engine.client import Client
from chainfed_engine.errors import InvalidArgument
from chainfed_engine.types import Reply, Task


class Transport(Protocol):
    def exchange(self, tasks: Sequence[Task]) -> Iterable[Reply]:
        """Replies in any order; a client that cannot be reached gives an error reply or none."""


class LocalTransport:
    """`order`: in which order a round's clients work; results must not depend on it (default: as the tasks come).

    Replies are handed over as they are made, so that no more than one large reply need exist at a time, and clients
    share the server's current arrays, so that memory does not grow with their number.
    """

    def __init__(
        self, clients: Iterable[Client], *, order: Callable[[Sequence[Task]], Iterable[Task]] | None = None
    ) -> None:
        self._clients: dict[str, Client] = {}
        for client in clients:
            if client.name in self._clients:
                raise InvalidArgument(f"clients: expected distinct names, got {client.name!r} twice")
            self._clients[client.name] = client
        self._order = order or iter

    @property
    def client_samples(self) -> dict[str, int]:
        """Training samples by client: what the server asks to know before it starts."""
        return {name: client.num_samples for name, client in self._clients.items()}

    def exchange(self, tasks: Sequence[Task]) -> Iterator[Reply]:
        current = {key: version for task in tasks for key, version in task.versions.items()}
        for holder in self._clients.values():
            holder.forget_outdated(current)
        for task in self._order(tasks):
            client = self._clients.get(task.client)
            if client is None:
                raise InvalidArgument(
                    f"exchange: no client {task.client!r} here; server and transport do not belong together"
                )
            yield client.handle(task)
