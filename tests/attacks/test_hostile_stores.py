"""Stores whose bytes were tampered with: each is refused with a clear error, or safe to read."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chainfed_engine.errors import CorruptFile, StorageError
from chainfed_engine.model.format import StoreInfo
from chainfed_engine.model.synth import synth

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
LAYER = "layer-0001.safetensors"
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
slow_disk = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth(CONFIG, tmp_path_factory.mktemp("hostile") / "store", "int4")


@pytest.fixture
def store(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "store"))


def open_tampered(store: Path) -> None:
    """Read the store; whatever is accepted must be safe to read. Only the two error classes may come out."""
    try:
        info = StoreInfo.read(store)
    except (CorruptFile, StorageError) as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        return
    for file in info.files:
        assert file.path.parent == store and os.path.getsize(file.path) == file.file_bytes
        end = 0
        ranges = [(entry.codes_offset, entry.codes_bytes) for entry in file.tensors]
        ranges += [(entry.scales_offset, entry.scales_bytes) for entry in file.tensors if entry.scales_bytes]
        for offset, num_bytes in sorted(ranges):
            assert offset >= end and num_bytes > 0
            end = offset + num_bytes
        assert end <= file.file_bytes


def paths_into(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from paths_into(inner, (*path, key))


def replace_at(value: Any, path: tuple[Any, ...], new: Any) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


def edit_header(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the JSON of a safetensors header and fix its length, the data stays."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    content = json.loads(raw[8 : 8 + size])
    edit(content)
    text = json.dumps(content).encode().ljust(size)
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


@slow_disk
@given(data=st.data())
def test_any_value_of_store_json_may_be_anything(store: Path, data: st.DataObject) -> None:
    original = (store / "store.json").read_bytes()
    content = json.loads(original)
    replace_at(content, data.draw(st.sampled_from(list(paths_into(content)))), data.draw(values))
    (store / "store.json").write_text(json.dumps(content))
    open_tampered(store)
    (store / "store.json").write_bytes(original)


@slow_disk
@given(data=st.data())
def test_any_value_of_a_files_header_may_be_anything(store: Path, data: st.DataObject) -> None:
    original = (store / LAYER).read_bytes()

    def edit(content: dict[str, Any]) -> None:
        replace_at(content, data.draw(st.sampled_from(list(paths_into(content)))), data.draw(values))

    edit_header(store / LAYER, edit)
    fix_size(store)
    open_tampered(store)
    (store / LAYER).write_bytes(original)
    fix_size(store)


@slow_disk
@given(name=st.sampled_from(["store.json", LAYER]), position=st.integers(0, 6000), byte=st.integers(0, 255))
def test_any_byte_may_be_any_other(store: Path, name: str, position: int, byte: int) -> None:
    original = (store / name).read_bytes()
    raw = bytearray(original)
    raw[position % len(raw)] = byte
    (store / name).write_bytes(raw)
    open_tampered(store)
    (store / name).write_bytes(original)


def fix_size(store: Path) -> None:
    """Let store.json agree with the size of the layer's file, so that its header is looked at."""
    content = json.loads((store / "store.json").read_text())
    next(entry for entry in content["files"] if entry["name"] == LAYER)["bytes"] = (store / LAYER).stat().st_size
    (store / "store.json").write_text(json.dumps(content))


def change_store_json(store: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((store / "store.json").read_text())
    change(content)
    (store / "store.json").write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["../embedding.safetensors", "/etc/passwd", "layer-0001.safetensors/../x", "a\0b", ""])
def test_file_names_cannot_lead_outside_the_store(store: Path, name: str) -> None:
    change_store_json(store, lambda content: content["files"][0].update(name=name))
    with pytest.raises(CorruptFile, match=r"expected an entry for 'embedding\.safetensors'"):
        StoreInfo.read(store)
    change_store_json(store, lambda content: content["files"][0].update(name="embedding.safetensors"))
    change_store_json(store, lambda content: content["tokenizer_files"][0].update(name=name))
    with pytest.raises(CorruptFile, match="tokenizer file"):
        StoreInfo.read(store)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[" * 100_000,
        b'{"format": "chainfed-store", "format": "chainfed-store"}',
        b'{"format": NaN}',
        b"\xff\xfe",
        b'{"version": ' + b"9" * 5000 + b"}",
        b"{}" + b" " * 16_000_000,
    ],
    ids=["empty", "null", "deep", "repeated key", "NaN", "not UTF-8", "long number", "large"],
)
def test_store_json_that_is_no_sane_json_is_refused(store: Path, raw: bytes) -> None:
    (store / "store.json").write_bytes(raw)
    with pytest.raises(CorruptFile):
        StoreInfo.read(store)


def test_missing_truncated_and_extended_files_are_named(store: Path) -> None:
    raw = (store / LAYER).read_bytes()
    for content in (raw[:-1], raw + b"\0", raw[:100], b""):
        (store / LAYER).write_bytes(content)
        with pytest.raises(CorruptFile, match=LAYER):
            StoreInfo.read(store)
    (store / LAYER).unlink()
    with pytest.raises(StorageError, match=LAYER):
        StoreInfo.read(store)


def test_a_pipe_or_folder_in_place_of_a_file_does_not_block(store: Path) -> None:
    for make in (os.mkfifo, os.mkdir):
        (store / LAYER).unlink(missing_ok=True)
        make(store / LAYER)
        with pytest.raises(StorageError, match="expected a regular file"):
            StoreInfo.read(store)
        (store / LAYER).unlink() if make is os.mkfifo else (store / LAYER).rmdir()


@pytest.mark.parametrize("size", [2**63, 2**64 - 1, 100_000_001, 50_000])
def test_a_header_longer_than_the_file_is_refused(store: Path, size: int) -> None:
    raw = (store / LAYER).read_bytes()
    (store / LAYER).write_bytes(size.to_bytes(8, "little") + raw[8:])
    with pytest.raises(CorruptFile, match="header of"):
        StoreInfo.read(store)


CODES, SCALES = "mlp.up_proj.weight.codes", "mlp.up_proj.weight.scales"


def set_sizes(content: dict[str, Any], sizes: list[Any]) -> None:
    content["__metadata__"]["chainfed"] = json.dumps({"mlp.up_proj.weight": sizes})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c[CODES].update(data_offsets=c[SCALES]["data_offsets"]), "does not fill"),
        (lambda c: c[SCALES].update(data_offsets=[0, 2 * 2 * 64 * 8]), "fill|overlaps|hole"),
        (lambda c: c[CODES].update(data_offsets=[-1, 2047]), "lists of integers"),
        (lambda c: c[CODES].update(data_offsets=[2**60, 2**60]), "lists of integers"),
        (lambda c: c[CODES].update(shape=[2**40, 2**40, 2**40]), "does not fill"),
        (lambda c: c[CODES].update(shape=[True]), "lists of integers"),
        (lambda c: c[CODES].update(shape=[8.0, 2, 128]), "lists of integers"),
        (lambda c: c[CODES].update(shape=[1] * 17), "lists of integers"),
        (lambda c: c[CODES].update(dtype="I8"), "do not hold int4"),
        (lambda c: c[CODES].update(dtype="OBJECT"), "do not hold int4"),
        (lambda c: c[CODES].update(extra=1), "expected exactly dtype, shape and data_offsets"),
        (lambda c: c["input_layernorm.weight"].update(dtype="I32"), "is not part of a store"),
        (lambda c: c.pop(SCALES), "hole"),
        (lambda c: c["__metadata__"].pop("chainfed"), "not valid JSON"),
        (lambda c: set_sizes(c, ["int4", 64, 2**50]), "both dimensions"),
        (lambda c: set_sizes(c, ["int4", 64, 65]), "do not hold int4"),
        (lambda c: set_sizes(c, ["int3", 64, 64]), "expected one of"),
        (lambda c: set_sizes(c, ["f32", 64, 64]), "and no other"),
        (lambda c: set_sizes(c, ["int4", 64]), r"expected \[block format, rows, columns\]"),
    ],
)
def test_a_header_that_lies_is_refused(store: Path, edit: Callable[[dict[str, Any]], object], message: str) -> None:
    edit_header(store / LAYER, edit)
    fix_size(store)
    with pytest.raises(CorruptFile, match=message):
        StoreInfo.read(store)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=2), "this engine reads 1"),
        (lambda c: c.update(tied=True), "tied"),
        (lambda c: c.update(num_layers=3), "differ from the config"),
        (lambda c: c["config"].update(num_hidden_layers=2**31), "num_hidden_layers is 2147483648"),
        (lambda c: c.update(num_layers=4096) or c["config"].update(num_hidden_layers=4096), "files; expected"),
        (lambda c: c["config"].update(vocab_size=301), r"expected exactly head.weight \[301, 64\]"),
        (lambda c: c["files"].reverse(), "in its place"),
        (lambda c: c.update(labels=[1]), "labels"),
        (lambda c: c.update(pooling="max"), "pooling"),
        (lambda c: c.update(tokenizer=False), "tokenizer says"),
        (lambda c: c["files"][1].update(sha256="x" * 64), "hexadecimal"),
        (lambda c: c["files"][1].update(bytes=2**70), "bytes must be an integer"),
    ],
)
def test_a_store_json_that_contradicts_itself_is_refused(
    store: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    change_store_json(store, change)
    with pytest.raises(CorruptFile, match=message):
        StoreInfo.read(store)
