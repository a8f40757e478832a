"""Checkpoints whose bytes were tampered with: conversion ends in one clear error and writes no store."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chainfed_engine.errors import ChainfedError, CorruptFile, StorageError, UnsupportedModel
from chainfed_engine.model.convert import convert
from chainfed_engine.model.convert.api import write_store
from chainfed_engine.model.convert.gguf_source import open_gguf
from chainfed_engine.model.convert.hf_source import open_folder
from chainfed_engine.model.convert.plan import plan_store
from tests.attacks.test_hostile_stores import edit_header, paths_into, replace_at, values
from tests.model.convert_cases import save_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*the store has no tokenizer.*:UserWarning")
many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WEIGHT = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    save_checkpoint("llama", folder)
    return folder


def plan_folder(folder: Path) -> None:
    """As far as conversion goes before it writes. Every refusal must be one of the engine's own errors, on one line."""
    try:
        source = open_folder(folder, "model")
        try:
            plan_store(source, "f32", "f32")
        finally:
            source.close()
    except ChainfedError as error:
        assert len(str(error)) < 3000


@many
@given(data=st.data())
def test_any_value_of_the_header_may_be_anything(pristine: Path, data: st.DataObject) -> None:
    path = pristine / "model.safetensors"
    original = path.read_bytes()

    def edit(content: dict[str, Any]) -> None:
        replace_at(content, data.draw(st.sampled_from(list(paths_into(content)))), data.draw(values))

    edit_header(path, edit)
    plan_folder(pristine)
    path.write_bytes(original)


@many
@given(data=st.data())
def test_any_value_of_the_config_may_be_anything(pristine: Path, data: st.DataObject) -> None:
    path = pristine / "config.json"
    original = path.read_bytes()
    content = json.loads(original)
    replace_at(content, data.draw(st.sampled_from(list(paths_into(content)))), data.draw(values))
    path.write_text(json.dumps(content))
    plan_folder(pristine)
    path.write_bytes(original)


def copied(pristine: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in pristine.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c[WEIGHT].update(data_offsets=[0, c[WEIGHT]["data_offsets"][1]]), "does not fill"),
        (lambda c: c[WEIGHT].update(shape=[2**45, 2**45]), "does not fill"),
        (lambda c: c[WEIGHT].update(data_offsets=[2**40, 2**40 + 96 * 64 * 4]), "outside the data"),
        (lambda c: c[WEIGHT].update(data_offsets=[0, 96 * 64 * 4]), "overlaps|hole"),
        (lambda c: c.update({"__metadata__": {"a": 1}}), "map from text to text"),
    ],
)
def test_a_header_that_lies_is_refused(
    pristine: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    folder = copied(pristine, tmp_path / "model")
    edit_header(folder / "model.safetensors", edit)
    with pytest.raises(CorruptFile, match=message):
        convert(folder, tmp_path / "store", block_format="f32")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "name", ["../../secret.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", 3, "a\0.safetensors"]
)
def test_an_index_cannot_name_files_outside_the_checkpoint(pristine: Path, tmp_path: Path, name: object) -> None:
    folder = copied(pristine, tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {WEIGHT: name}}))
    with pytest.raises(CorruptFile, match="files of this folder"):
        convert(folder, tmp_path / "store", block_format="f32")


def test_an_index_that_names_a_missing_file_or_a_tensor_twice_is_refused(pristine: Path, tmp_path: Path) -> None:
    folder = copied(pristine, tmp_path / "model")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {WEIGHT: "absent.safetensors"}}))
    with pytest.raises(StorageError, match=r"absent\.safetensors"):
        convert(folder, tmp_path / "store", block_format="f32")
    (folder / "copy.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    index.write_text(json.dumps({"weight_map": {"a": "copy.safetensors", "b": "model.safetensors"}}))
    with pytest.raises(CorruptFile, match="also in another file"):
        convert(folder, tmp_path / "store", block_format="f32")


def test_a_checkpoint_cut_short_while_it_is_read_is_refused(pristine: Path, tmp_path: Path) -> None:
    folder = copied(pristine, tmp_path / "model")
    source = open_folder(folder, "model")
    path = folder / "model.safetensors"
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(CorruptFile, match=r"ends .* bytes before"):
        write_store(source, tmp_path / "store", "f32", "f32", None)
    source.close()
    assert not (tmp_path / "store").exists()


def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    pytest.importorskip("gguf")
    from tests.model.test_convert_gguf import write_gguf

    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, "llama", "Q4_1")
    return path.read_bytes()


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return gguf_bytes(tmp_path_factory)


def plan_gguf(path: Path) -> None:
    try:
        source = open_gguf(path)
        try:
            plan_store(source, "f32", "f32")
        finally:
            source.close()
    except ChainfedError as error:
        assert len(str(error)) < 3000


@many
@given(position=st.integers(0, 3500), new=st.binary(min_size=1, max_size=8))
def test_any_bytes_of_a_gguf_header_may_be_any_others(
    gguf_file: bytes, tmp_path: Path, position: int, new: bytes
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_file[:position] + new + gguf_file[position + len(new) :])
    plan_gguf(path)


@many
@given(size=st.integers(0, 5000))
def test_a_gguf_file_may_end_anywhere(gguf_file: bytes, tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_file[:size])
    with pytest.raises((CorruptFile, UnsupportedModel)):
        open_gguf(path)


@pytest.mark.parametrize("element", [0, 8], ids=["numbers", "texts"])
@pytest.mark.parametrize("length", [2**63, 2**24 + 1, 2**20])
def test_a_forged_array_length_costs_no_time(element: int, length: int, tmp_path: Path) -> None:
    text = b"x"
    field = len(text).to_bytes(8, "little") + text + (9).to_bytes(4, "little")
    field += element.to_bytes(4, "little") + length.to_bytes(8, "little")
    head = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    path = tmp_path / "model.gguf"
    path.write_bytes(head + field + bytes(64))
    pytest.importorskip("gguf")
    before = time.monotonic()
    with pytest.raises(CorruptFile):
        open_gguf(path)
    assert time.monotonic() - before < 5
