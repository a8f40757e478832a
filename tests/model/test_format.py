"""The store's layout: what the safetensors library and the native reader rely on."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from chainfed_engine import native
from chainfed_engine.errors import CorruptFile, InvalidArgument, StorageError, UnsupportedModel
from chainfed_engine.memory.meter import resident_file_bytes
from chainfed_engine.model.format import StoreInfo
from chainfed_engine.model.header import DATA_ALIGNMENT, pread_once
from chainfed_engine.model.layout import BLOCK_FORMATS, is_quantised, matrix_layout, parse_block_format
from chainfed_engine.model.shape import model_shape
from chainfed_engine.model.store_file import TENSOR_ALIGNMENT, MatrixSpec, layout_file, read_entries
from chainfed_engine.model.synth import synth

TINY = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 9000,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
names = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF), min_size=1, max_size=12)
sizes = st.integers(1, 70)


@st.composite
def specs(draw: st.DrawFn) -> list[MatrixSpec]:
    result = []
    for name in draw(st.lists(names.filter(lambda name: not name.startswith("__pad_")), unique=True, max_size=8)):
        block_format = draw(st.sampled_from(BLOCK_FORMATS))
        shape: tuple[int, ...] = (draw(sizes), draw(sizes))
        if block_format == "f32" and draw(st.booleans()):
            shape = shape[1:]
        result.append(MatrixSpec(name, block_format, shape))
    return result


@settings(max_examples=60, deadline=None)
@given(specs())
def test_any_file_is_aligned_opens_with_safetensors_and_reads_back(
    tmp_path_factory: pytest.TempPathFactory, matrices: list[MatrixSpec]
) -> None:
    layout = layout_file(matrices)
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    path.write_bytes(layout.header + bytes(layout.file_bytes - len(layout.header)))
    assert len(layout.header) % DATA_ALIGNMENT == 0
    for entry in layout.entries:
        assert entry.codes_offset % TENSOR_ALIGNMENT == 0 and entry.scales_offset % TENSOR_ALIGNMENT == 0
    assert sorted(read_entries(path, layout.file_bytes)) == sorted(layout.entries)
    with safetensors.safe_open(path, "pt") as file:
        stored = {name for name in file.keys() if not name.startswith("__pad_")}  # noqa: SIM118
    quantised = {spec.name for spec in matrices if is_quantised(spec.block_format)}
    plain = {spec.name for spec in matrices} - quantised
    assert stored == plain | {f"{name}.{part}" for name in quantised for part in ("codes", "scales")}


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(BLOCK_FORMATS), st.integers(1, 300), st.integers(1, 300))
def test_sizes_equal_those_of_the_compiled_core(block_format: str, num_rows: int, num_cols: int) -> None:
    layout = matrix_layout(parse_block_format(block_format), num_rows, num_cols)
    assert layout.codes_bytes == native.codes_bytes(block_format, num_rows, num_cols)
    assert layout.scales_bytes == native.scales_bytes(block_format, num_rows, num_cols)


def test_a_layout_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(InvalidArgument, match="share a name"):
        layout_file([MatrixSpec("a", "f32", (3,)), MatrixSpec("a", "f32", (4,))])
    with pytest.raises(InvalidArgument, match="cannot be stored"):
        layout_file([MatrixSpec("a", "int4", (3,))])
    with pytest.raises(InvalidArgument, match="both dimensions"):
        layout_file([MatrixSpec("a", "int4", (3, 0))])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth(TINY, tmp_path_factory.mktemp("format") / "store", "int4")


def test_a_store_knows_its_files_shape_and_formats(store: Path) -> None:
    info = StoreInfo.read(store)
    assert [file.role for file in info.files] == ["embedding", "layer", "layer", "head", "head"]
    assert (info.embedding, info.layers, info.head_shards) == (info.files[0], info.files[1:3], info.files[3:])
    assert (info.shape.vocab_size, info.shape.head_dim, info.shape.num_kv_heads) == (9000, 16, 2)
    assert (info.block_format, info.head_format, info.tied, info.labels) == ("int4", "int8", False, None)
    words = info.embedding.tensor("word_embeddings.weight")
    assert words is not None and words[:4] == ("word_embeddings.weight", "int8", 9000, 64)
    assert [shard.tensors[0].num_rows for shard in info.head_shards] == [8192, 808]
    assert info.num_bytes == sum(path.stat().st_size for path in store.glob("*.safetensors"))
    path, file_bytes, tensors = info.layers[0].native()
    assert path == str(store / "layer-0000.safetensors") and file_bytes == info.layers[0].file_bytes
    assert all(len(entry) == 8 for entry in tensors)
    info.verify()


def test_the_fingerprint_changes_with_any_weight(store: Path, tmp_path: Path) -> None:
    same = StoreInfo.read(synth(TINY, tmp_path / "same", "int4"))
    other = StoreInfo.read(synth(TINY, tmp_path / "other", "int4", seed=1))
    assert StoreInfo.read(store).fingerprint == same.fingerprint != other.fingerprint


def test_verify_names_the_file_with_a_flipped_bit(tmp_path: Path) -> None:
    store = synth(TINY, tmp_path / "store", "int8")
    info = StoreInfo.read(store)
    for name in ("layer-0001.safetensors", "tokenizer/tokenizer.json"):
        raw = bytearray((store / name).read_bytes())
        raw[-100] ^= 1
        (store / name).write_bytes(raw)
        with pytest.raises(CorruptFile, match=name.rpartition("/")[2]):
            info.verify()
        raw[-100] ^= 1
        (store / name).write_bytes(raw)
    info.verify()


def test_a_folder_without_store_json_does_not_open(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no store\.json"):
        StoreInfo.read(tmp_path)
    with pytest.raises(StorageError, match=r"no store\.json"):
        StoreInfo.read(tmp_path / "absent")


def test_shapes_come_from_the_config_of_every_architecture() -> None:
    distil = {"model_type": "distilbert", "dim": 64, "n_heads": 4, "n_layers": 3, "hidden_dim": 96}
    shape = model_shape(distil | {"vocab_size": 99, "max_position_embeddings": 40})
    assert (shape.num_layers, shape.hidden_size, shape.intermediate_size, shape.head_dim) == (3, 64, 96, 16)
    assert model_shape(TINY | {"head_dim": 32}).head_dim == 32
    for change in ({"hidden_size": "64"}, {"num_hidden_layers": 0}, {"vocab_size": True}, {"num_key_value_heads": 3}):
        with pytest.raises(UnsupportedModel, match="config:"):
            model_shape(TINY | change)


def test_metadata_of_a_file_names_formats_and_sizes(store: Path) -> None:
    with safetensors.safe_open(store / "layer-0000.safetensors", "np") as file:
        metadata = json.loads(file.metadata()["chainfed"])
        codes = file.get_tensor("mlp.down_proj.weight.codes")
        assert np.all(file.get_tensor("input_layernorm.weight") == 1.0)
    assert metadata["mlp.down_proj.weight"] == ["int4", 64, 96]
    assert (codes.dtype, codes.shape) == (np.uint8, (8, 3, 128))


def test_what_is_read_once_leaves_the_page_cache(tmp_path: Path) -> None:
    path, block = tmp_path / "file", (1 << 20) + 36
    content = np.random.default_rng(0).bytes(12 * block)
    with open(path, "wb") as file:
        file.write(content)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident_file_bytes([path]) != 0:
        pytest.skip("this file system keeps pages that nobody needs")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for index in range(11):
            begin = index * block + 12
            assert pread_once(descriptor, block, begin, path) == content[begin : begin + block]
        resident = resident_file_bytes([path])
        assert resident is not None and resident <= 2 << 20  # the unit that the next block would begin in
    finally:
        os.close(descriptor)
