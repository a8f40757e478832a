"""The federation's picture in code: broadcast, local steps, aggregate, save; round after round.

    server.next_tasks -> transport -> clients train -> transport -> journal -> server.receive -> directory

Nothing here computes: the server decides, clients train, the transport carries, the directory remembers.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain

from chainfed_engine.federation.events import Event, exchange_event
from chainfed_engine.federation.privacy import epsilon
from chainfed_engine.federation.run_directory import RunDirectory
from chainfed_engine.federation.transport_local import Transport
from chainfed_engine.server import Server, Summary
from chainfed_engine.types import Reply


def run_rounds(
    server: Server,
    transport: Transport,
    directory: RunDirectory,
    *,
    emit: Callable[[Event], None],
    after_exchange: Callable[[Summary], None],
    held: Mapping[str, object],
) -> None:
    """Exchange by exchange until the server is done. A kill at any point loses at most the reply it fell in. `held`:
    what clients, asked at the start, said they hold."""
    while not server.done:
        started, cpu_started = time.perf_counter(), time.process_time()
        tasks = server.next_tasks()
        journal = directory.journal(tasks)
        replies = Timed(chain(journal.received(), journal.keep(transport.exchange(journal.missing))))
        summary = server.receive(replies)
        for client in journal.answered:  # what it holds was sent by a server that is gone; its own word counts
            server.forget([client])
            server.believe(client, held.get(client))
        server_seconds = time.perf_counter() - started - replies.seconds
        seconds = {"transport": replies.seconds, "server": server_seconds}
        spent = epsilon(server.config, num_clients=len(server.client_samples), rounds=server.round_id)
        cpu_seconds = time.process_time() - cpu_started
        emit(exchange_event(summary, rounds=server.rounds, seconds=seconds, cpu_seconds=cpu_seconds, epsilon=spent))
        directory.save(server.state())
        after_exchange(summary)


class Timed:
    """Replies as they come, and how many seconds were spent waiting for them."""

    def __init__(self, replies: Iterable[Reply]) -> None:
        self._replies = iter(replies)
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Reply]:
        return self

    def __next__(self) -> Reply:
        started = time.perf_counter()
        try:
            return next(self._replies)
        finally:
            self.seconds += time.perf_counter() - started
