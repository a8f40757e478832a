"""The layer store's reader from Python: hostile indexes, truncated files, leases, the ring's order, the page cache."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chainfed_engine import native
from chainfed_engine.errors import ChainfedError, CorruptFile, InvalidArgument, StorageError
from chainfed_engine.memory.meter import resident_file_bytes

NUM_COLS = 64
DATA_START = 4096
Tensor = tuple[str, str, int, int, int, int, int, int]
Entry = tuple[str, int, list[Tensor]]


def write_file(path: Path, value: float, num_rows: int = 100) -> Entry:
    """A file of one f32 matrix "w" [num_rows, 64] filled with `value`, on the disk and not only in the page cache."""
    payload = np.full((num_rows, NUM_COLS), value, np.float32).tobytes()
    with path.open("wb") as out:
        out.write(bytes(DATA_START) + payload)
        out.flush()
        os.fsync(out.fileno())
    return str(path), DATA_START + len(payload), [("w", "f32", num_rows, NUM_COLS, DATA_START, len(payload), 0, 0)]


def write_files(folder: Path, count: int, num_rows: int = 100) -> list[Entry]:
    return [write_file(folder / f"{i}.safetensors", float(i), num_rows) for i in range(count)]


def values_of(lease: native.Lease) -> np.ndarray:
    matrix = lease.matrix("w")
    out = np.full((matrix.num_rows, matrix.num_cols), -1, np.float32)
    native.dequantize_rows(matrix, 0, matrix.num_rows, out=out)
    return out


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_lease_gives_the_file_and_raises_after_release(tmp_path: Path) -> None:
    reader = native.StoreReader(write_files(tmp_path, 3), num_slots=2)
    with reader.acquire(2) as lease:
        matrix = lease.matrix("w")
        assert lease.names() == ["w"]
        assert (matrix.num_rows, matrix.num_cols, matrix.block_format) == (100, NUM_COLS, "f32")
        assert (values_of(lease) == 2).all()
        with pytest.raises(InvalidArgument, match="it holds: w"):
            lease.matrix("v")
    lease.release()
    with pytest.raises(InvalidArgument, match="released"):
        lease.matrix("w")
    out = np.full((1, NUM_COLS), 5, np.float32)
    with pytest.raises(InvalidArgument, match=r"dequantize_rows: .*released"):
        native.dequantize_rows(matrix, 0, 1, out=out)
    assert (out == 5).all()


def test_matrix_keeps_its_lease_and_lease_outlives_the_reader(tmp_path: Path) -> None:
    reader = native.StoreReader(write_files(tmp_path, 2), num_slots=1)
    matrix = reader.acquire(1).matrix("w")
    with pytest.raises(InvalidArgument, match="all 1 slots are pinned"):
        reader.acquire(0)
    reader.close()
    out = np.zeros((1, NUM_COLS), np.float32)
    native.dequantize_rows(matrix, 0, 1, out=out)
    assert (out == 1).all()
    with pytest.raises(InvalidArgument, match="closed"):
        reader.acquire(0)


def test_least_recently_used_file_is_read_again(tmp_path: Path) -> None:
    files = write_files(tmp_path, 3)
    reader = native.StoreReader(files, num_slots=2)
    for file in (0, 1, 0, 2, 0, 1):  # 2 evicts 1, the last 1 evicts 2
        reader.acquire(file).release()
    stats = reader.stats()
    assert (stats["hits"], stats["misses"]) == (2, 4)
    assert stats["bytes_read"] == 4 * files[0][1]
    assert stats["resident_bytes"] == 2 * reader.slot_bytes()
    assert set(stats) == {"bytes_read", "stall_ns", "read_ns", "hits", "misses", "resident_bytes"}


def test_prefetched_file_is_acquired_without_a_stall(tmp_path: Path) -> None:
    files = write_files(tmp_path, 2, num_rows=100_000)
    reader = native.StoreReader(files, num_slots=2)
    lease = reader.acquire(0)
    stall_ns = reader.stats()["stall_ns"]
    reader.prefetch(1)
    wait_until(lambda: reader.stats()["bytes_read"] == 2 * files[0][1])
    time.sleep(0.01)
    assert (values_of(reader.acquire(1)) == 1).all()
    assert reader.stats()["stall_ns"] == stall_ns
    assert reader.stats()["hits"] == 1
    lease.release()


def test_acquire_of_a_resident_file_costs_microseconds(tmp_path: Path) -> None:
    reader = native.StoreReader(write_files(tmp_path, 1), num_slots=1)
    reader.acquire(0).release()
    best = 1.0
    for _ in range(50):
        start = time.perf_counter()
        for _ in range(100):
            reader.acquire(0).release()
        best = min(best, (time.perf_counter() - start) / 100)
    assert best < 20e-6  # about 1 on a quiet machine


@pytest.mark.parametrize("direct", [True, False])
def test_reading_leaves_nothing_in_the_page_cache(tmp_path: Path, direct: bool) -> None:
    files = write_files(tmp_path, 2, num_rows=50_000)
    paths = [Path(file[0]) for file in files]
    reader = native.StoreReader(files, num_slots=1, direct=direct)
    if not direct:
        assert not reader.direct
    for file in (0, 1):
        assert (values_of(reader.acquire(file)) == file).all()
    out = np.zeros((2, NUM_COLS), np.float32)
    reader.gather_rows(1, "w", np.array([49_999, 25_000]), out=out)
    assert (out == 1).all()
    assert resident_file_bytes(paths) == 0


def test_tmpfs_is_read_whether_or_not_it_takes_direct_reads() -> None:
    path = Path(f"/dev/shm/chainfed-store-test-{os.getpid()}")
    if not path.parent.is_dir():
        pytest.skip("no /dev/shm")
    try:
        reader = native.StoreReader([write_file(path, 3.0)], num_slots=1, direct=True)
        assert (values_of(reader.acquire(0)) == 3).all()
        assert reader.direct in (True, False)
    finally:
        path.unlink(missing_ok=True)


def test_files_that_are_missing_cut_or_no_files_are_refused(tmp_path: Path) -> None:
    path, size, tensors = write_file(tmp_path / "a", 1.0)
    with pytest.raises(StorageError, match="No such file"):
        native.StoreReader([(str(tmp_path / "none"), size, tensors)], num_slots=1)
    with pytest.raises(CorruptFile, match="not a regular file"):
        native.StoreReader([(str(tmp_path), size, tensors)], num_slots=1)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CorruptFile, match="not a regular file"):
        native.StoreReader([(str(tmp_path / "pipe"), size, tensors)], num_slots=1)
    reader = native.StoreReader([(path, size, tensors)], num_slots=1)
    os.truncate(path, size - 1000)
    with pytest.raises(CorruptFile, match=f"ends at byte {size - 1000}"):
        reader.acquire(0)
    with pytest.raises(CorruptFile, match="but the index says"):
        native.StoreReader([(path, size, tensors)], num_slots=1)


@pytest.mark.parametrize("direct", [True, False])
def test_file_cut_before_an_aligned_border_is_corrupt_too(tmp_path: Path, direct: bool) -> None:
    path, size, tensors = write_file(tmp_path / "a", 1.0, num_rows=200)
    reader = native.StoreReader([(path, size, tensors)], num_slots=1, direct=direct)
    os.truncate(path, 8192)
    with pytest.raises(CorruptFile, match="ends at byte 8192"):
        reader.acquire(0)
    with pytest.raises(CorruptFile, match="ends at byte 8192"):
        reader.gather_rows(0, "w", np.array([199]), out=np.zeros((1, NUM_COLS), np.float32))


NUMBERS = st.one_of(
    st.integers(-(2**64), 2**64),
    st.sampled_from([0, 1, 32, 64, 100, 4096, 8192, 25600, 29696, 2**63 - 1, 2**63 - 64, -(2**63), -64]),
)
FIELDS = st.one_of(NUMBERS, st.none(), st.floats(), st.text(max_size=3))
TENSORS = st.tuples(
    st.one_of(st.text(max_size=3), st.none()),
    st.sampled_from(["int4", "nf4", "int8", "bf16", "f32", "f16", ""]),
    *[st.one_of(NUMBERS, st.integers(0, 200), FIELDS)] * 6,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=st.lists(TENSORS, max_size=3), size=st.one_of(st.just(29696), FIELDS))
def test_hostile_index_is_refused_with_one_of_our_errors(tmp_path: Path, tensors: list[Tensor], size: int) -> None:
    path, real_size, _ = write_file(tmp_path / "a", 1.0)
    assert real_size == 29696
    try:
        reader = native.StoreReader([(path, size, tensors)], num_slots=1)
    except ChainfedError:
        return
    lease = reader.acquire(0)
    for tensor in tensors:
        lease.matrix(tensor[0])
        assert tensor[4] + tensor[5] <= real_size


@given(shift=st.integers(-9000, 9000), field=st.integers(2, 7))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_true_entry_changed_in_one_number_is_refused(tmp_path: Path, shift: int, field: int) -> None:
    path, size, tensors = write_file(tmp_path / "a", 1.0)
    changed = list(tensors[0])
    changed[field] += shift
    fits = shift == 0 or (field == 4 and shift % 64 == 0 and -4096 <= shift <= 0)
    if not fits:
        with pytest.raises(ChainfedError):
            native.StoreReader([(path, size, [tuple(changed)])], num_slots=1)


@pytest.mark.parametrize(
    "files", [None, [], [()], [("a", 1)], [("a\0b", 1, [])], [(3, 1, [])], ["abc"], [("a", 1, [("w",)])]]
)
def test_index_of_the_wrong_shape_is_an_invalid_argument(files: object) -> None:
    with pytest.raises(InvalidArgument):
        native.StoreReader(files, num_slots=1)  # type: ignore[arg-type]


def test_gather_checks_ids_and_output(tmp_path: Path) -> None:
    reader = native.StoreReader(write_files(tmp_path, 2), num_slots=1)
    out = np.full((2, NUM_COLS), 9, np.float32)
    for ids in ([0, 100], [-1, 0]):
        with pytest.raises(InvalidArgument, match="row id"):
            reader.gather_rows(1, "w", np.array(ids), out=out)
    with pytest.raises(InvalidArgument):
        reader.gather_rows(1, "w", np.array([0]), out=out)
    with pytest.raises(InvalidArgument):
        reader.gather_rows(1, "w", np.array([0, 1], np.int32), out=out)
    assert (out == 9).all()
    reader.gather_rows(1, "w", np.array([99, 0]), out=out)
    assert (out == 1).all()
    assert reader.stats()["resident_bytes"] == 0


def test_release_in_another_thread_waits_for_the_kernel_that_reads(tmp_path: Path) -> None:
    num_rows = 60_000
    reader = native.StoreReader(write_files(tmp_path, 2, num_rows), num_slots=1)
    out = np.zeros((num_rows, NUM_COLS), np.float32)
    for _ in range(5):
        lease = reader.acquire(0)
        matrix = lease.matrix("w")
        started = threading.Event()

        def spoil(lease: native.Lease = lease, started: threading.Event = started) -> None:
            started.wait()
            lease.release()
            while True:
                try:
                    reader.acquire(1).release()
                    return
                except InvalidArgument:  # the kernel's pin
                    time.sleep(0)

        thread = threading.Thread(target=spoil)
        thread.start()
        started.set()
        try:
            native.dequantize_rows(matrix, 0, num_rows, out=out)
            assert (out == 0).all()
        except InvalidArgument as error:  # released first
            assert "released" in str(error)
        finally:
            thread.join()


def test_close_during_reads_in_other_threads_is_safe(tmp_path: Path) -> None:
    files = write_files(tmp_path, 4, num_rows=20_000)
    for _ in range(5):
        reader = native.StoreReader(files, num_slots=3)
        wrong: list[float] = []

        def work(reader: native.StoreReader = reader, wrong: list[float] = wrong) -> None:
            try:
                for file in (0, 1, 2, 3) * 10:
                    reader.prefetch((file + 1) % 4)
                    lease = reader.acquire(file)
                    if values_of(lease)[0, 0] != file:
                        wrong.append(file)
                    lease.release()
            except InvalidArgument as error:
                assert "closed" in str(error)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(0.02)
        reader.close()
        for thread in threads:
            thread.join()
        assert not wrong


def test_reader_is_refused_in_a_forked_child(tmp_path: Path) -> None:
    reader = native.StoreReader(write_files(tmp_path, 2), num_slots=2)
    lease = reader.acquire(0)
    reader.prefetch(1)
    child = os.fork()
    if child == 0:
        refused = 0
        try:
            for call in (lambda: reader.acquire(1), lambda: lease.matrix("w"), reader.stats):
                try:
                    call()
                except InvalidArgument:
                    refused += 1
            reader.close()
        finally:
            os._exit(refused)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 3
    assert (values_of(lease) == 0).all()
