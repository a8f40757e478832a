"""Carries tasks to clients in this process and their replies back, one client at a time. No copies of arrays."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from chainfed_engine.client import Client
from chainfed_engine.errors import InvalidArgument
from chainfed_engine.federation.patience import Patience
from chainfed_engine.types import Reply, Task


class Transport(Protocol):
    def exchange(self, tasks: Sequence[Task]) -> Iterable[Reply]:
        """Replies in any order; a client that cannot be reached gives an error reply or none."""


class LocalTransport:
    """`order`: in which order a round's clients work; results must not depend on it (default: as the tasks come).
    `patience`: a client that the exchange has no time left for is not asked; one at work is not interrupted.

    Replies are handed over as they are made, so that no more than one large reply need exist at a time, and clients
    share the server's current arrays, so that memory does not grow with their number.
    """

    def __init__(
        self,
        clients: Iterable[Client],
        *,
        order: Callable[[Sequence[Task]], Iterable[Task]] | None = None,
        patience: Patience | None = None,
    ) -> None:
        self._clients: dict[str, Client] = {}
        for client in clients:
            if client.name in self._clients:
                raise InvalidArgument(f"clients: expected distinct names, got {client.name!r} twice")
            self._clients[client.name] = client
        self._order = order or iter
        self._patience = patience or Patience()

    @property
    def client_samples(self) -> dict[str, int]:
        """Training samples by client: what the server asks to know before it starts."""
        return {name: client.num_samples for name, client in self._clients.items()}

    @property
    def client_windows(self) -> dict[str, int]:
        """Layers a client can train at once, where that is a limit."""
        return {name: client.max_window for name, client in self._clients.items() if client.max_window is not None}

    def exchange(self, tasks: Sequence[Task]) -> Iterator[Reply]:
        current = {key: version for task in tasks for key, version in task.versions.items()}
        for holder in self._clients.values():
            holder.forget_outdated(current)
        wait = self._patience.start(len(tasks))
        for task in self._order(tasks):
            client = self._clients.get(task.client)
            if client is None:
                raise InvalidArgument(
                    f"exchange: no client {task.client!r} here; server and transport do not belong together"
                )
            if wait.is_over:
                return
            reply = client.handle(task)
            if reply.error is None:
                wait.answered()
            yield reply
