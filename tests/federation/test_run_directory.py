import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from chainfed_engine.errors import CorruptFile, InvalidArgument, StorageError
from chainfed_engine.federation import RunDirectory, read_adapters
from chainfed_engine.federation.files import write_arrays
from chainfed_engine.types import Arrays


def _arrays(value: float = 0.0) -> Arrays:
    return {"adapters.0.up_weight": np.full((2, 3), value, np.float32)}


def test_two_runs_cannot_share_a_directory(tmp_path: Path) -> None:
    with RunDirectory(tmp_path), pytest.raises(StorageError, match="another run"):
        RunDirectory(tmp_path, resume=True)
    RunDirectory(tmp_path, resume=True).close()


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_die_with_the_lock, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    RunDirectory(tmp_path, resume=True).close()


def _die_with_the_lock(path: Path) -> None:
    directory = RunDirectory(path)
    assert directory.path == path
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_new_run_does_not_overwrite_another(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as directory:
        directory.record({"event": "round", "round": 0})
    with pytest.raises(InvalidArgument, match="holds a run already"):
        RunDirectory(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"event": "round", "round": 0}\n'


def test_a_folder_with_other_files_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    RunDirectory(tmp_path).close()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_path_that_is_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        RunDirectory(tmp_path / "file" / "run")


def test_the_last_two_states_are_kept_and_the_newest_is_loaded(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as directory:
        for index in range(5):
            directory.save((_arrays(index), {"index": index}))
        assert len(list((tmp_path / "state").glob("state-*"))) == 2
        saved = directory.load()
    assert saved is not None
    assert saved.record == {"index": 4} and (saved.arrays["adapters.0.up_weight"] == 4).all() and saved.skipped == ()


def test_nothing_saved_is_nothing_loaded(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as directory:
        assert directory.load() is None


def test_stand_ins_are_written_once_and_loaded_with_every_state(tmp_path: Path) -> None:
    stand_ins = {"stand_in.2.weight": np.ones((3, 3), np.float32)}
    later = {"stand_in.3.weight": np.zeros((3, 3), np.float32)}
    file = tmp_path / "state" / "stand_in-0002.safetensors"
    with RunDirectory(tmp_path) as directory:
        directory.save(({**_arrays(0), **stand_ins}, {}))
        written = file.stat().st_mtime_ns, file.stat().st_ino
        directory.save(({**_arrays(1), **stand_ins, **later}, {}))
        assert (file.stat().st_mtime_ns, file.stat().st_ino) == written
        saved = directory.load()
    assert saved is not None and saved.arrays.keys() == {"adapters.0.up_weight", *stand_ins, *later}


@pytest.mark.parametrize("name", ["../stand_in-0002.safetensors", "/etc/passwd", "stand_in-2.safetensors"])
def test_a_state_names_no_file_but_its_own(tmp_path: Path, name: str) -> None:
    with RunDirectory(tmp_path) as directory:
        write_arrays(tmp_path / "state" / "state-00000001.safetensors", _arrays(0), _record(name))
        with pytest.raises(CorruptFile, match="names no stand-ins"):
            directory.load()


def _record(name: str) -> dict[str, object]:
    return {"server": {}, "stand_in_sha256": {name: "0" * 64}}


def test_a_failed_write_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunDirectory(tmp_path) as directory:
        directory.save((_arrays(1), {}))

        def no_space(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("chainfed_engine.federation.files.os.replace", no_space)
        with pytest.raises(StorageError, match="No space left on device; make room or choose another folder"):
            directory.save((_arrays(2), {}))
        monkeypatch.undo()
        saved = directory.load()
    assert saved is not None and (saved.arrays["adapters.0.up_weight"] == 1).all()
    assert not list(tmp_path.rglob("*.partial"))


def test_a_run_where_a_file_stands_is_refused_without_advice_to_make_room(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(StorageError, match="cannot create: File exists; choose another path"):
        RunDirectory(tmp_path / "taken")


def test_adapters_open_with_the_ordinary_library_and_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as directory:
        directory.save_adapters(_arrays(3), {"rounds": 1})
        content = (tmp_path / "adapters.safetensors").read_bytes()
        directory.save_adapters(_arrays(3), {"rounds": 1})
    assert (tmp_path / "adapters.safetensors").read_bytes() == content
    with safe_open(tmp_path / "adapters.safetensors", framework="np") as file:
        assert list(file.keys()) == ["adapters.0.up_weight"]
        assert json.loads(file.metadata()["chainfed"])["record"]["rounds"] == 1


def test_adapters_that_are_missing_foreign_or_damaged_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="not found"):
        read_adapters(tmp_path)
    file = tmp_path / "adapters.safetensors"
    save_file(_arrays(), file)
    with pytest.raises(CorruptFile):
        read_adapters(tmp_path)
    with RunDirectory(tmp_path) as directory:
        directory.save_adapters({"x": np.zeros(3, np.float64)}, {})
        with pytest.raises(CorruptFile, match="float32"):
            read_adapters(tmp_path)
        directory.save_adapters(_arrays(), {"format": "something else"})
        with pytest.raises(CorruptFile, match="something else"):
            read_adapters(tmp_path)
        directory.save_adapters(_arrays(), {"version": 1})
        with pytest.raises(CorruptFile, match=r"expected .* version 2, got .* version 1; install the version"):
            read_adapters(tmp_path)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CorruptFile):
        read_adapters(tmp_path)


def test_a_metric_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as directory, pytest.raises(ValueError):
        directory.record({"event": "round", "loss": float("nan")})
