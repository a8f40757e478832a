"""A LoRA run merged into a whole Hugging Face checkpoint: W becomes W + (alpha / rank) B A, written a block at a time.

Enters: a `Source` (the original checkpoint, or the store read back), the run's adapters and classification head.
Leaves: `model.safetensors`, or shards with `model.safetensors.index.json`, in a folder. Memory: a block of rows (4 MiB)
of one matrix, whatever the size of the model; the products are computed in f32 and rounded once to the file's dtype.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np

from chainfed_engine.adapters import LoRA
from chainfed_engine.errors import CorruptFile
from chainfed_engine.exports.library_names import LibraryModel
from chainfed_engine.exports.peft_adapter import lora_parts
from chainfed_engine.model.convert.plan import StorePlan, TensorPlan, plan_store
from chainfed_engine.model.convert.source import F32Array, Source, SourceTensor, rows_per_block, to_bf16
from chainfed_engine.model.families import Location
from chainfed_engine.model.header import build_header
from chainfed_engine.types import Arrays

Dtype = Literal["f32", "bf16", "f16"]
SAFETENSORS_DTYPES: dict[Dtype, str] = {"f32": "F32", "bf16": "BF16", "f16": "F16"}
LIBRARY_DTYPES: dict[Dtype, str] = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
MAX_SHARD_BYTES = 4_000_000_000
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class OutTensor:
    """One tensor of the checkpoint: rows [begin, end) as f32 by `read`."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[int, int], F32Array]

    @property
    def num_rows(self) -> int:
        return self.shape[0] if len(self.shape) == 2 else 1


def merged_tensors(
    source: Source, model: LibraryModel, adapters: Mapping[int, LoRA], head: Arrays | None
) -> Iterator[OutTensor]:
    """Every tensor of `model` in file order, those of the adapted projections merged.

    Raises what conversion raises for a checkpoint with missing, unknown or misshapen tensors.
    """
    plan = plan_store(source, "f32", "f32")
    for tensor, at in _placed(plan):
        if at.role == "head" and not plan.tied and model.head != "causal-lm":
            continue
        if at.name.startswith("classifier.") and not (
            model.head == "none" and at.name.startswith("classifier.transform")
        ):
            continue  # of another task, or replaced by the trained one
        if at.role == "head" and plan.tied:
            at = Location("embedding", None, "word_embeddings.weight")
        if at.name.startswith("classifier.") and model.architecture != "bert":
            continue  # only BERT's transform is a part of the model without head
        module, _, kind = at.name.rpartition(".")
        adapter = adapters.get(at.layer) if at.layer is not None and kind == "weight" else None
        read: Callable[[int, int], F32Array] = tensor.read_rows
        if adapter is not None and module in adapter.targets:
            read = _with_low_rank(tensor, *lora_parts(adapter)[module], adapter.scale)
        yield OutTensor(model.path(at), tensor.shape, read)
    for name, array in (head or {}).items():
        yield OutTensor(model.classifier_path(name), array.shape, _rows_of(array))


def write_checkpoint(
    folder: Path, tensors: list[OutTensor], dtype: Dtype, max_shard_bytes: int, progress: Progress | None
) -> None:
    """Write the tensors as safetensors files, each at most `max_shard_bytes` (or one tensor) large."""
    item_bytes = 4 if dtype == "f32" else 2
    shards: list[list[OutTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        num_bytes = prod(tensor.shape) * item_bytes
        if shards[-1] and filled + num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += num_bytes
    total, done = sum(prod(tensor.shape) for tensor in tensors) * item_bytes, 0
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {tensor.name: name for tensor in shard}
        for written in _write_shard(folder / name, shard, dtype, item_bytes):
            done += written
            if progress is not None:
                progress(name, done, total)
    if len(shards) > 1:
        index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        (folder / "model.safetensors.index.json").write_text(index_text + "\n", encoding="utf-8")


def _placed(plan: StorePlan) -> Iterator[tuple[SourceTensor, Location]]:
    """Every tensor of the checkpoint once, with its place; the head's shards are one tensor."""
    layer = -1
    for file in plan.files:
        layer += file.role == "layer"
        for tensor in file.tensors:
            if tensor.first_row == 0:
                yield tensor.tensor, _location(file.role, layer, tensor)


def _location(role: Literal["embedding", "layer", "head"], layer: int, tensor: TensorPlan) -> Location:
    return Location(role, layer if role == "layer" else None, tensor.spec.name)


def _with_low_rank(tensor: SourceTensor, a: F32Array, b: F32Array, scale: float) -> Callable[[int, int], F32Array]:
    def read(begin: int, end: int) -> F32Array:
        return tensor.read_rows(begin, end) + np.float32(scale) * (b[begin:end] @ a)

    return read


def _rows_of(array: Any) -> Callable[[int, int], F32Array]:
    return lambda begin, end: np.atleast_2d(array)[begin:end]


def _write_shard(path: Path, tensors: list[OutTensor], dtype: Dtype, item_bytes: int) -> Iterator[int]:
    """Write one file; yields the bytes of every block."""
    sizes = [(t.name, SAFETENSORS_DTYPES[dtype], t.shape, prod(t.shape) * item_bytes) for t in tensors]
    with open(path, "wb") as file:
        file.write(build_header(sizes, {"format": "pt"}))
        for tensor in tensors:
            step = rows_per_block(tensor.shape[-1])
            for begin in range(0, tensor.num_rows, step):
                rows = tensor.read(begin, min(begin + step, tensor.num_rows))
                yield file.write(_encoded(rows, dtype, tensor.name))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _encoded(rows: F32Array, dtype: Dtype, name: str) -> bytes:
    if not np.isfinite(rows).all():
        raise CorruptFile(f"{name}: not finite after merging; the checkpoint or the adapter is damaged")
    if dtype == "bf16":
        return to_bf16(np.ascontiguousarray(rows, np.float32)).tobytes()
    with np.errstate(over="ignore"):
        encoded = rows.astype(np.float32 if dtype == "f32" else np.float16)
    if not np.isfinite(encoded).all():
        raise CorruptFile(f"{name}: values beyond the range of f16; export with --dtype bf16 or f32")
    return encoded.tobytes()
