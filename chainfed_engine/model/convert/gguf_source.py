"""A .gguf file as a `Source`: Hugging Face names, rows in Hugging Face order, blocks taken over without loss.

Q4_1 becomes int4 and Q8_0 int8 by rearranging bits; every other type is dequantised by the `gguf` package and quantised
again. GGUF files of architecture llama keep the rows of q and k in the order of interleaved RoPE; `_file_rows` says
where each row is.
"""

import hashlib
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chainfed_engine.errors import CorruptFile, UnsupportedModel
from chainfed_engine.model.convert.gguf_config import ROPE_FACTORS, hf_config, hf_name
from chainfed_engine.model.convert.gguf_header import GgufTensorInfo, read_gguf_header
from chainfed_engine.model.convert.source import (
    AnyArray,
    F32Array,
    Source,
    SourceTensor,
    allocate,
    bf16_to_f32,
    check_finite,
)
from chainfed_engine.model.convert.tokenizer import write_from_gguf
from chainfed_engine.model.header import open_regular, pread_exactly, pread_once
from chainfed_engine.model.layout import BlockFormat

_LOSSLESS = {("Q4_1", "int4"), ("Q8_0", "int8")}
_BLOCK_VALUES = 32  # of Q4_1 and Q8_0
_HALVES = {"Q4_1": 2, "Q8_0": 1}  # f16 numbers at the head of a block: scale and offset, or scale


class GgufTensor(SourceTensor):
    """Rows of one tensor by `pread`. num_heads: the rows are in interleaved-RoPE order of so many heads; None: not."""

    def __init__(self, info: GgufTensorInfo, name: str, descriptor: int, path: Path, num_heads: int | None):
        self.name, self.shape, self._info = name, info.shape, info
        self._descriptor, self._path = descriptor, path
        # A permuted bias [n] is permuted along its only axis.
        self._order = _file_rows(info.shape[0], num_heads, path) if num_heads else None

    def check(self) -> None:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        where = f"{self._path}: tensor {self._info.name[:200]!r}"
        if len(self.shape) > 2:
            raise UnsupportedModel(f"{where} has {len(self.shape)} dimensions; expected 1 or 2")
        try:
            block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[self._info.type_name]][1]
            _decode(np.zeros((1, block_bytes), np.uint8), self._info.type_name)
        except NotImplementedError as error:
            raise UnsupportedModel(
                f"{where} is {self._info.type_name}; expected F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, a K-quant "
                "(Q2_K .. Q6_K) or another type the gguf package dequantises"
            ) from error

    def read_rows(self, begin: int, end: int) -> F32Array:
        rows = _decode(self._raw_rows(begin, end), self._info.type_name)
        if self._order is not None and len(self.shape) == 1:
            rows = rows[:, self._order]
        return np.ascontiguousarray(rows)

    def encode(self, begin: int, end: int, block_format: BlockFormat) -> tuple[AnyArray, AnyArray | None]:
        if (self._info.type_name, block_format) not in _LOSSLESS:
            return super().encode(begin, end, block_format)
        from chainfed_engine import native

        raw = self._raw_rows(begin, end)
        halves = raw.reshape(end - begin, self.num_cols // _BLOCK_VALUES, -1)[:, :, : 2 * _HALVES[self._info.type_name]]
        scales = np.ascontiguousarray(halves).view(np.float16).reshape(end - begin, -1)
        check_finite(scales, f"{self.name} (block scales)", begin)
        codes_out, scales_out = allocate(block_format, end - begin, self.num_cols)
        repack = native.repack_q4_1 if block_format == "int4" else native.repack_q8_0
        repack(raw, num_rows=end - begin, num_cols=self.num_cols, codes_out=codes_out, scales_out=scales_out)
        return codes_out, scales_out

    def _raw_rows(self, begin: int, end: int) -> NDArray[np.uint8]:
        """The file's bytes of rows [begin, end) of the Hugging Face order: u8 [end - begin, row_bytes]."""
        if self._order is None or len(self.shape) == 1:
            return self._read(begin, end)
        wanted = self._order[begin:end]
        first, last = int(wanted.min()), int(wanted.max())  # inside the heads that the rows belong to
        return np.ascontiguousarray(self._read(first, last + 1)[wanted - first])

    def _read(self, begin: int, end: int) -> NDArray[np.uint8]:
        offset, num_bytes = self._info.offset + begin * self._info.row_bytes, (end - begin) * self._info.row_bytes
        raw = pread_once(self._descriptor, num_bytes, offset, self._path)
        return np.frombuffer(raw, np.uint8).reshape(end - begin, self._info.row_bytes)


def open_gguf(path: Path) -> Source:
    """The model in a .gguf file. Raises UnsupportedModel, CorruptFile or StorageError naming the file."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UnsupportedModel(
            f"{path}: expected the package gguf for GGUF files; pip install 'chainfed-engine[gguf]'"
        ) from error
    descriptor = open_regular(path)
    try:
        header = read_gguf_header(path, descriptor)
        infos = {info.name: info for info in header.tensors}
        rope_factors = _rope_factors(infos, descriptor, path)
        config = hf_config(header.metadata, set(infos), _vocab_size(infos, path), rope_factors)
        tensors: dict[str, SourceTensor] = {}
        for info in header.tensors:
            name = hf_name(info.name)
            if name is not None:
                tensors[name] = GgufTensor(info, name, descriptor, path, _num_heads(info.name, config))
            elif info.name != ROPE_FACTORS:
                raise UnsupportedModel(f"{path}: tensor {info.name[:200]!r} is not part of {config['model_type']}")
        status = os.fstat(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    identity = [json.dumps(config, sort_keys=True), f"{status.st_size} {status.st_mtime_ns}"]
    return Source(
        label=path.name,
        identity=hashlib.sha256("\n".join(identity).encode()).hexdigest(),
        config=config,
        tensors=tensors,
        write_tokenizer=partial(write_from_gguf, path),
        close=partial(os.close, descriptor),
    )


def _decode(raw: NDArray[np.uint8], type_name: str) -> F32Array:
    if type_name == "F32":
        return raw.view(np.float32).copy()
    if type_name == "F16":
        return raw.view(np.float16).astype(np.float32)
    if type_name == "BF16":
        return bf16_to_f32(raw.view(np.uint16))
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):  # whoever takes the rows refuses what is not finite
        decoded: F32Array = dequantize(raw, GGMLQuantizationType[type_name])
    return decoded


def _file_rows(num_rows: int, num_heads: int, path: Path) -> NDArray[np.int64]:
    """Row of the file that holds each Hugging Face row: head h, half s, pair d lies at (h, d, s)."""
    if num_rows % (2 * num_heads):
        raise CorruptFile(f"{path}: {num_rows} rows of q or k do not divide into {num_heads} heads of even size")
    pairs = num_rows // num_heads // 2
    return np.arange(num_rows).reshape(num_heads, pairs, 2).swapaxes(1, 2).ravel()


def _num_heads(name: str, config: dict[str, Any]) -> int | None:
    if config["model_type"] != "llama":
        return None
    if ".attn_q." in name:
        return int(config["num_attention_heads"])
    return int(config["num_key_value_heads"]) if ".attn_k." in name else None


def _vocab_size(infos: dict[str, GgufTensorInfo], path: Path) -> int:
    info = infos.get("token_embd.weight")
    if info is None or len(info.shape) != 2:
        raise CorruptFile(f"{path}: no tensor token_embd.weight [vocabulary, hidden]")
    return info.shape[0]


def _rope_factors(infos: dict[str, GgufTensorInfo], descriptor: int, path: Path) -> NDArray[np.float32] | None:
    info = infos.get(ROPE_FACTORS)
    if info is None:
        return None
    if info.type_name != "F32" or len(info.shape) != 1 or info.shape[0] > 4096:
        raise CorruptFile(f"{path}: {ROPE_FACTORS}: expected at most 4096 F32 values")
    return np.frombuffer(pread_exactly(descriptor, info.row_bytes, info.offset, path), np.float32)
