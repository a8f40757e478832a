"""Interrupted conversions, full disks, second writers, and memory: whole processes where that is the point."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from chainfed_engine.errors import StorageError
from chainfed_engine.model.convert import convert
from chainfed_engine.model.convert.partial import PartialStore
from chainfed_engine.model.format import StoreInfo
from tests.model.convert_cases import save_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*the store has no tokenizer.*:UserWarning")
REPOSITORY = Path(__file__).parents[2]
CONVERT_AND_DIE = """
import os, signal, sys
from chainfed_engine.model.convert import convert
def progress(name, done, total):
    if name == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)
convert(sys.argv[1], sys.argv[2], block_format="f32", progress=progress)
"""
PEAK_OF_CONVERSION = """
import sys
import numpy, warnings
from chainfed_engine.model.convert import convert
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
warnings.simplefilter("ignore")
before = peak()
convert(sys.argv[1], sys.argv[2], block_format=sys.argv[3])
print(peak() - before)
"""


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("last_file", ["embedding.safetensors", "layer-0001.safetensors", "head-0000.safetensors"])
def test_a_killed_conversion_resumes_and_keeps_the_finished_files(last_file: str, tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path / "model")
    whole = convert(tmp_path / "model", tmp_path / "whole", block_format="f32")
    died = python(CONVERT_AND_DIE, tmp_path / "model", tmp_path / "store", last_file)
    assert died.returncode == -signal.SIGKILL, died.stderr
    partial = tmp_path / "store.partial"
    assert not (tmp_path / "store").exists() and not (partial / "store.json").exists()
    with pytest.raises(StorageError, match=r"no store\.json"):
        StoreInfo.read(partial)
    finished = {path.name: path.stat().st_ino for path in partial.glob("*.safetensors")}
    assert (last_file == "embedding.safetensors") == (not finished)
    store = convert(tmp_path / "model", tmp_path / "store", block_format="f32")
    assert {name: (store / name).stat().st_ino for name in finished} == finished
    assert (store / "store.json").read_bytes() == (whole / "store.json").read_bytes()
    StoreInfo.read(store).verify()
    assert not partial.exists() and not list(store.glob("*.tmp"))


def interrupted(tmp_path: Path) -> Path:
    """A `.partial` folder with the embedding and the first layers finished."""

    def stop(name: str, done: int, total: int) -> None:
        if name == "layer-0002.safetensors":
            raise KeyboardInterrupt

    save_checkpoint("llama", tmp_path / "model")
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "model", tmp_path / "store", block_format="f32", progress=stop)
    return tmp_path / "store.partial"


def test_a_damaged_finished_file_is_made_again(tmp_path: Path) -> None:
    partial = interrupted(tmp_path)
    with open(partial / "layer-0000.safetensors", "r+b") as file:
        file.seek(5000)
        file.write(b"\xff\xff\xff")
    StoreInfo.read(convert(tmp_path / "model", tmp_path / "store", block_format="f32")).verify()


def test_other_settings_or_a_changed_source_start_over(tmp_path: Path) -> None:
    interrupted(tmp_path)
    info = StoreInfo.read(convert(tmp_path / "model", tmp_path / "store", block_format="bf16"))
    info.verify()
    assert {entry.block_format for entry in info.layers[0].tensors} == {"bf16", "f32"}
    shutil.rmtree(tmp_path / "store")
    (interrupted(tmp_path) / "layer-0000.safetensors").chmod(0o600)  # marks the old file
    os.utime(tmp_path / "model" / "model.safetensors", ns=(0, 0))
    store = convert(tmp_path / "model", tmp_path / "store", block_format="f32")
    assert (store / "layer-0000.safetensors").stat().st_mode & 0o777 != 0o600
    StoreInfo.read(store).verify()


def test_a_folder_that_no_conversion_wrote_is_never_cleared(tmp_path: Path) -> None:
    save_checkpoint("bert", tmp_path / "model")
    (tmp_path / "store.partial").mkdir()
    (tmp_path / "store.partial" / "thesis.txt").write_text("precious")
    with pytest.raises(StorageError, match=r"holds 'thesis.txt', which no conversion wrote"):
        convert(tmp_path / "model", tmp_path / "store", block_format="f32")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    with pytest.raises(StorageError, match="exists and is not a store"):
        convert(tmp_path / "model", tmp_path / "other", block_format="f32")
    assert (tmp_path / "other" / "thesis.txt").read_text() == "precious"


def test_an_empty_destination_folder_counts_as_absent(tmp_path: Path) -> None:
    save_checkpoint("bert", tmp_path / "model")
    (tmp_path / "store").mkdir()
    assert StoreInfo.read(convert(tmp_path / "model", tmp_path / "store", block_format="f32")).num_layers == 3


def test_two_conversions_do_not_write_the_same_store(tmp_path: Path) -> None:
    save_checkpoint("bert", tmp_path / "model")
    with (
        PartialStore(tmp_path / "store", "other"),
        pytest.raises(StorageError, match="another conversion is writing here"),
    ):
        convert(tmp_path / "model", tmp_path / "store", block_format="f32")


def test_a_disk_without_room_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint("bert", tmp_path / "model")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(StorageError, match=r"the disk is full: \d+ bytes needed, 1000 free"):
        convert(tmp_path / "model", tmp_path / "store", block_format="f32")
    assert not list((tmp_path / "store.partial").glob("*.safetensors*"))


def test_a_disk_that_fills_up_is_one_clear_error_and_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint("bert", tmp_path / "model")
    real_pwrite, written = os.pwrite, 0

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        nonlocal written
        written += len(data)
        if written > 200_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(StorageError, match=r"the disk is full.*finished files are kept"):
        convert(tmp_path / "model", tmp_path / "store", block_format="f32")
    finished = json.loads((tmp_path / "store.partial" / "conversion.json").read_text())["files"]
    assert "layer-0000.safetensors" in finished
    monkeypatch.undo()
    StoreInfo.read(convert(tmp_path / "model", tmp_path / "store", block_format="f32")).verify()


def test_a_destination_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    save_checkpoint("bert", tmp_path / "model")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        convert(tmp_path / "model", tmp_path / "file" / "store", block_format="f32")


def sparse_checkpoint(folder: Path, rows: int) -> None:
    """The tiny BERT with `rows` x 64 word embeddings, all zeros, in a file that takes no room on the disk."""
    save_checkpoint("bert", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    content, end = {}, 0
    for name, tensor in weights.items():
        shape = [rows, 64] if name == "embeddings.word_embeddings.weight" else list(tensor.shape)
        num_bytes = 4 * math.prod(shape)
        content[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + num_bytes]}
        end += num_bytes
    header = json.dumps(content).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)


@pytest.mark.parametrize("block_format", ["f32", "bf16", "int4", "nf4", "int8"])
def test_peak_memory_stays_far_below_the_largest_tensor(block_format: str, tmp_path: Path) -> None:
    """A sparse checkpoint: word embeddings of 256 MiB of zeros and a tiny layer."""
    rows, columns = 1 << 20, 64
    sparse_checkpoint(tmp_path / "model", rows)
    measured = python(PEAK_OF_CONVERSION, tmp_path / "model", tmp_path / "store", block_format)
    assert measured.returncode == 0, measured.stderr
    assert int(measured.stdout) < rows * columns * 4 / 4
    assert StoreInfo.read(tmp_path / "store").shape.vocab_size == rows
