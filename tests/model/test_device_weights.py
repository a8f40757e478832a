"""Slots on a device: what is copied, what waits for what, and what is refused; over a reader and streams made of lists,
and once over a real reader on the emulated CUDA library.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chainfed_engine import native
from chainfed_engine.errors import InvalidArgument
from chainfed_engine.model.device_weights import InPlace, Streamed

sys.path.insert(0, str(Path(__file__).parents[1] / "native"))
from fake_cuda import EMULATOR, NEEDS_EMULATOR, CudaArray, empty, on_device


class FakeEvent:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name, self.finished = log, name, False

    def query(self) -> bool:
        return self.finished

    def synchronize(self) -> None:
        if not self.finished:
            self.log.append(f"wait for {self.name}")
            self.finished = True


class FakeStreams:
    """Notes in `log` what is asked of a device; its events finish when told."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.events: list[FakeEvent] = []

    copies = 99

    def slot(self, num_bytes: int) -> CudaArray:
        self.log.append(f"slot {num_bytes}")
        return empty((num_bytes,), np.uint8)

    def _event(self, kind: str) -> FakeEvent:
        self.events.append(FakeEvent(self.log, f"{kind}{len(self.events)}"))
        return self.events[-1]

    def computed(self) -> FakeEvent:
        return self._event("computed")

    def copied(self) -> FakeEvent:
        return self._event("copied")

    def copy_after(self, event: FakeEvent) -> None:
        self.log.append(f"copy after {event.name}")

    def compute_after(self, event: FakeEvent) -> None:
        self.log.append(f"compute after {event.name}")


class FakeLease:
    file_bytes = 64

    def __init__(self, reader: "FakeReader", file: int) -> None:
        self.reader, self.file = reader, file
        reader.held.append(file)

    def names(self) -> list[str]:
        return ["w"]

    def copy_to(self, slot: Any, *, stream: int) -> None:
        self.reader.log.append(f"copy {self.file} on {stream}")

    def matrix_in(self, name: str, slot: Any) -> Any:
        return (self.file, name)

    def matrix(self, name: str, *, device: int) -> Any:
        return (self.file, name, device)

    def release(self) -> None:
        self.reader.held.remove(self.file)


class FakeReader:
    def __init__(self, log: list[str]) -> None:
        self.log, self.held = log, []

    def slot_bytes(self) -> int:
        return 4096

    def acquire(self, file: int) -> FakeLease:
        return FakeLease(self, file)


def streamed(num_slots: int = 2, num_host_slots: int = 3) -> tuple[Streamed, FakeReader, FakeStreams]:
    streams = FakeStreams()
    reader = FakeReader(streams.log)
    weights: Any = Streamed(reader, streams, num_slots=num_slots, num_host_slots=num_host_slots)  # type: ignore[arg-type]
    return weights, reader, streams


def test_a_file_is_copied_once_and_kernels_wait_for_the_copy() -> None:
    weights, _, streams = streamed()
    for _ in range(2):
        with weights.lease(5) as lease:
            assert lease.matrix("w") == (5, "w")
    copies = [line for line in streams.log if line.startswith("copy 5")]
    assert copies == ["copy 5 on 99"]
    assert "compute after copied1" in streams.log
    assert weights.bytes_copied == 64


def test_a_slot_is_overwritten_only_after_its_last_reader() -> None:
    weights, _, streams = streamed(num_slots=2)
    for file in (0, 1):
        weights.lease(file).release()
    with weights.lease(0):
        pass
    streams.log.clear()
    weights.lease(2)
    assert streams.log[0].startswith("copy after computed")
    assert streams.log[1] == "copy 2 on 99"
    # File 1 was the least recently used: 0 is still there, 1 is not.
    streams.log.clear()
    weights.lease(0)
    assert streams.log == []


def test_host_slots_are_given_back_when_their_copy_is_over() -> None:
    weights, reader, streams = streamed(num_slots=4, num_host_slots=3)
    weights.lease(0)
    weights.lease(1)
    assert reader.held == [0, 1]  # copies under way
    for event in streams.events:
        event.finished = True
    weights.lease(2)
    assert reader.held == [2]
    assert not [line for line in streams.log if line.startswith("wait")]


def test_the_oldest_copy_is_waited_for_only_when_host_slots_run_out() -> None:
    weights, reader, streams = streamed(num_slots=4, num_host_slots=2)
    weights.lease(0)
    weights.lease(1)
    assert [line for line in streams.log if line.startswith("wait")] == ["wait for copied1"]
    assert reader.held == [1]
    weights.close()
    assert reader.held == []


def test_files_that_all_stay_take_their_own_size_and_no_more() -> None:
    streams = FakeStreams()
    weights: Any = Streamed(
        FakeReader(streams.log),
        streams,
        num_slots=3,
        num_host_slots=2,
        file_bytes=[4096, 64, 128],  # type: ignore[arg-type]
    )
    for file in (1, 0, 2, 1, 0):
        weights.lease(file).release()
    assert [line for line in streams.log if line.startswith("slot")] == ["slot 64", "slot 4096", "slot 128"]


def test_leases_beyond_the_slots_are_refused_and_released_ones_raise() -> None:
    weights, _, _ = streamed(num_slots=1)
    first = weights.lease(0)
    with pytest.raises(InvalidArgument, match="no free slot on the device for file 1: all 1 are leased"):
        weights.lease(1)
    first.release()
    first.release()
    with pytest.raises(InvalidArgument, match="the lease of file 0 on the device was released"):
        first.matrix("w")
    with weights.lease(1) as lease, pytest.raises(InvalidArgument, match="no tensor 'x' in the file: it holds w"):
        lease.matrix("x")


class TimedStreams(FakeStreams):
    """A device whose two queues run beside each other, in made-up time: an event is when its queue gets that far."""

    def __init__(self, copy_time: float) -> None:
        super().__init__()
        self.copy_time, self.copying, self.computing = copy_time, 0.0, 0.0

    def computed(self) -> Any:
        return TimedEvent(self.computing)

    def copied(self) -> Any:
        self.copying += self.copy_time  # the copy that was just queued
        return TimedEvent(self.copying)

    def copy_after(self, event: Any) -> None:
        self.copying = max(self.copying, event.time)

    def compute_after(self, event: Any) -> None:
        self.computing = max(self.computing, event.time)


class TimedEvent:
    def __init__(self, time: float) -> None:
        self.time = time

    def query(self) -> bool:
        return False

    def synchronize(self) -> None: ...


@pytest.mark.parametrize(
    ("num_slots", "copy_time", "expected"), [(2, 1.0, 10.0), (2, 0.5, 9.0), (2, 3.0, 26.0), (1, 1.0, 16.0)]
)
def test_a_layer_is_copied_while_another_is_computed(num_slots: int, copy_time: float, expected: float) -> None:
    """Eight layers of one time unit each: with two slots the larger of copying and computing, one of the other, and at
    the start a layer's time because the second slot's memory may still be read by what was queued before."""
    streams = TimedStreams(copy_time)
    reader = FakeReader(streams.log)
    weights: Any = Streamed(reader, streams, num_slots=num_slots, num_host_slots=2)  # type: ignore[arg-type]
    for layer in range(8):
        with weights.lease(layer):
            streams.computing += 1
    assert streams.computing == expected


def in_place(num_host_slots: int) -> tuple[InPlace, FakeReader, FakeStreams]:
    streams = FakeStreams()
    reader = FakeReader(streams.log)
    weights: Any = InPlace(reader, streams, index=1, num_host_slots=num_host_slots)  # type: ignore[arg-type]
    return weights, reader, streams


def test_in_place_a_slot_stays_leased_until_the_device_is_past_it() -> None:
    weights, reader, streams = in_place(3)
    for _ in range(7):  # one layer, seven linears: one lease of the ring
        with weights.lease(0) as lease:
            assert lease.matrix("w") == (0, "w", 1)
    assert reader.held == [0]
    weights.lease(1).release()
    assert reader.held == [0, 1]
    weights.lease(2)  # the third needs a slot: the oldest is waited for
    assert reader.held == [1, 2]
    assert streams.log == [f"wait for {streams.events[6].name}"]
    assert weights.bytes_copied == 0


def test_in_place_finished_slots_are_given_back_without_waiting() -> None:
    weights, reader, streams = in_place(4)
    weights.lease(0).release()
    streams.events[-1].finished = True
    weights.lease(1)
    assert reader.held == [1]
    assert streams.log == []


@pytest.fixture
def emulator() -> Iterator[None]:
    if EMULATOR is None:
        pytest.skip(NEEDS_EMULATOR)
    native.set_cuda_library(str(EMULATOR))
    yield
    native.set_cuda_library(None)


def test_layers_stream_through_a_device_slot(emulator: None, tmp_path: Path) -> None:
    """Three files of one f32 matrix each through two host slots and one device slot, twice over."""
    rows, cols = 8, 32
    files = []
    for file in range(3):
        values = np.full((rows, cols), file + 1, np.float32)
        values.tofile(tmp_path / str(file))
        tensor = ("w", "f32", rows, cols, 0, values.nbytes, 0, 0)
        files.append((str(tmp_path / str(file)), values.nbytes, [tensor]))
    reader = native.StoreReader(files, num_slots=2, direct=False, pinned_for=0)
    weights = Streamed(reader, FakeStreams(), num_slots=1, num_host_slots=2)
    x, out = on_device(np.ones((1, cols), np.float32)), empty((1, rows), np.float32)
    size = native.linear_forward_workspace_bytes("f32", 1, rows, cols, device=0)
    workspace = empty((size,), np.uint8)
    for file in (0, 1, 2, 0, 1, 2):
        with weights.lease(file) as lease:
            native.linear_forward(lease.matrix("w"), x, None, activation="f32", out=out, workspace=workspace)
        assert (out.values == cols * (file + 1)).all()
    assert weights.bytes_copied == 6 * rows * cols * 4
    weights.close()
    reader.close()
