"""Weights where a CUDA device can read them: `Streamed` for devices with memory of their own, `InPlace` for boards.

Enters: a native reader whose slots are pinned, the number of a file. Leaves: `DeviceLease`, whose matrices are on the
device and valid until its release. Nothing here waits for the device unless every slot is in use.

Streamed   host slot -> (copy stream) -> device slot. The copy of one layer runs while the device computes another: the
           copy waits, on the device, for the last kernel that read the slot; kernels wait for the copy.
InPlace    the device reads the ring's own slots: no second copy. A slot stays leased until the device is past the last
           kernel that read it.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from chainfed_engine import native
from chainfed_engine.errors import InvalidArgument

Event = Any  # torch.cuda.Event: query(), synchronize()


class Streams(Protocol):
    """What is needed of a device's queues; `TorchStreams` in earnest."""

    def slot(self, num_bytes: int) -> Any: ...  # u8 [num_bytes] on the device, as native calls take it
    @property
    def copies(self) -> int: ...  # address of the copy stream
    def computed(self) -> Event: ...  # an event after all that is queued on the caller's stream
    def copied(self) -> Event: ...  # an event after all copies queued so far
    def copy_after(self, event: Event) -> None: ...  # later copies wait for it
    def compute_after(self, event: Event) -> None: ...  # later kernels of the caller's stream wait for it


class TorchStreams:
    """Torch's allocator, events and streams of device `index`, so that torch's own figures count every byte."""

    def __init__(self, index: int) -> None:
        self._device = torch.device("cuda", index)
        self._copy_stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def slot(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    @property
    def copies(self) -> int:
        return int(self._copy_stream.cuda_stream)

    def computed(self) -> Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def copied(self) -> Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._copy_stream)
        return event

    def copy_after(self, event: Event) -> None:
        self._copy_stream.wait_event(event)

    def compute_after(self, event: Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)


class DeviceLease:
    """Matrices of one file on the device, by name, until `release` (or the end of a with block)."""

    def __init__(self, matrix: Callable[[str], native.Matrix], on_release: Callable[[], None], what: str) -> None:
        self._matrix, self._on_release, self._what = matrix, on_release, what
        self._released = False

    def matrix(self, name: str) -> native.Matrix:
        if self._released:
            raise InvalidArgument(f"the lease of {self._what} was released; acquire the file again")
        return self._matrix(name)

    def release(self) -> None:
        if not self._released:
            self._released = True
            self._on_release()

    def __enter__(self) -> "DeviceLease":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class _Pending:
    """Host leases that the device may still need, oldest first; at most `limit`, then the oldest is waited for."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._leases: deque[tuple[Event, native.Lease]] = deque()

    def add(self, event: Event, lease: native.Lease) -> None:
        self._leases.append((event, lease))
        self.drop_finished(self.limit)

    def drop_finished(self, keep: int) -> None:
        """Release what the device is past; wait for the oldest while more than `keep` are left."""
        while self._leases and (len(self._leases) > keep or self._leases[0][0].query()):
            event, lease = self._leases.popleft()
            event.synchronize()
            lease.release()


@dataclass
class _Slot:
    memory: Any
    file: int = -1
    matrices: dict[str, native.Matrix] = field(default_factory=dict)
    num_leases: int = 0
    last_used: int = 0
    read: Event | None = None  # after the last kernel that read the slot


class Streamed:
    """Device slots for `num_slots` files, filled from the reader's pinned host slots (`num_host_slots` of them).

    `file_bytes`: the size of each file, where every one has a slot to itself; None: slots hold the largest.
    """

    def __init__(
        self,
        reader: native.StoreReader,
        streams: Streams,
        *,
        num_slots: int,
        num_host_slots: int,
        file_bytes: Sequence[int] | None = None,
    ) -> None:
        self._reader, self._streams, self._num_slots = reader, streams, num_slots
        self._file_bytes = file_bytes
        self._slots: list[_Slot] = []
        self._pending = _Pending(max(0, num_host_slots - 1))
        self._clock = 0
        self.bytes_copied = 0

    def lease(self, file: int) -> DeviceLease:
        """The file's matrices on the device. Raises InvalidArgument when every slot is leased (a planning error)."""
        slot = next((one for one in self._slots if one.file == file), None) or self._fill(file)
        self._clock += 1
        slot.num_leases, slot.last_used = slot.num_leases + 1, self._clock

        def done() -> None:
            slot.num_leases -= 1
            slot.read = self._streams.computed()

        return DeviceLease(lambda name: _named(slot.matrices, name), done, f"file {file} on the device")

    def close(self) -> None:
        self._pending.drop_finished(0)
        self._slots.clear()

    def _fill(self, file: int) -> _Slot:
        slot = self._free_slot(file)
        self._pending.drop_finished(self._pending.limit)
        lease = self._reader.acquire(file)
        slot.file, slot.matrices = -1, {}  # until the copy is queued
        if slot.read is not None:
            self._streams.copy_after(slot.read)
        lease.copy_to(slot.memory, stream=self._streams.copies)
        copied = self._streams.copied()
        self._streams.compute_after(copied)
        slot.file, slot.matrices = file, {name: lease.matrix_in(name, slot.memory) for name in lease.names()}
        self.bytes_copied += lease.file_bytes
        self._pending.add(copied, lease)
        return slot

    def _free_slot(self, file: int) -> _Slot:
        if len(self._slots) < self._num_slots:
            # The allocator may hand out memory that kernels already queued still read: the first copy waits for them.
            num_bytes = self._reader.slot_bytes() if self._file_bytes is None else self._file_bytes[file]
            memory = self._streams.slot(num_bytes)
            self._slots.append(_Slot(memory, read=self._streams.computed()))
            return self._slots[-1]
        free = [slot for slot in self._slots if slot.num_leases == 0]
        if not free:
            raise InvalidArgument(
                f"no free slot on the device for file {file}: all {self._num_slots} are leased; release a lease first "
                "or open the store with more slots"
            )
        return min(free, key=lambda slot: slot.last_used)


@dataclass
class _Held:
    lease: native.Lease
    num_leases: int = 0
    read: Event | None = None


class InPlace:
    """The reader's own slots, read by device `index`; `num_host_slots` as the reader has."""

    def __init__(self, reader: native.StoreReader, streams: Streams, *, index: int, num_host_slots: int) -> None:
        self._reader, self._streams, self._index = reader, streams, index
        self._limit = max(1, num_host_slots - 1)
        self._held: dict[int, _Held] = {}  # by file, least recently used first
        self.bytes_copied = 0

    def lease(self, file: int) -> DeviceLease:
        """The file's matrices where they lie. Raises InvalidArgument when every slot is leased (a planning error)."""
        held = self._held.pop(file, None)
        if held is None:
            self._let_go(self._limit - 1)
            held = _Held(self._reader.acquire(file))
        self._held[file] = held
        held.num_leases += 1

        def done() -> None:
            held.num_leases -= 1
            held.read = self._streams.computed()

        return DeviceLease(lambda name: held.lease.matrix(name, device=self._index), done, f"file {file}")

    def close(self) -> None:
        self._let_go(0)

    def _let_go(self, keep: int) -> None:
        """Give back the slots that the device is past; wait for the oldest while more than `keep` are held."""
        for file, held in list(self._held.items()):
            if held.num_leases or held.read is None:
                continue
            if len(self._held) > keep or held.read.query():
                held.read.synchronize()
                held.lease.release()
                del self._held[file]


def _named(matrices: dict[str, native.Matrix], name: str) -> native.Matrix:
    if name not in matrices:
        raise InvalidArgument(f"no tensor {name!r} in the file: it holds {', '.join(matrices)}")
    return matrices[name]
