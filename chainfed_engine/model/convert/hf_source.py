"""A Hugging Face checkpoint folder (safetensors, single or sharded) or hub id as a `Source`. Pickles are refused."""

import hashlib
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from chainfed_engine.errors import CorruptFile, StorageError, UnsupportedModel
from chainfed_engine.model.convert.source import F32Array, Source, SourceTensor, bf16_to_f32
from chainfed_engine.model.convert.tokenizer import write_from_folder
from chainfed_engine.model.header import RawTensor, open_regular, parse_json, pread_exactly, pread_once, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_JSON_BYTES = 100_000_000
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_HUB_FILES = [
    "config.json",
    "model*.safetensors",
    INDEX_FILE,
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "sentencepiece*",
    "spiece.model",
    "added_tokens.json",
    "1_Pooling/config.json",
]


class SafetensorsTensor(SourceTensor):
    """Rows of one tensor by `pread`; the pages read leave the page cache at once."""

    def __init__(self, raw: RawTensor, descriptor: int, path: Path):
        self.name, self.shape = raw.name, raw.shape
        self._raw, self._descriptor, self._path = raw, descriptor, path

    def check(self) -> None:
        where = f"{self._path}: tensor {self.name[:200]!r}"
        if self._raw.dtype not in _DTYPES:
            raise UnsupportedModel(
                f"{where} is {self._raw.dtype[:20]}; expected F32, F16 or BF16 (quantised checkpoints such as GPTQ "
                "or AWQ are not converted: use the original weights)"
            )
        if len(self.shape) not in (1, 2) or 0 in self.shape:
            raise UnsupportedModel(f"{where} has the shape {self.shape}; expected [N, K] or [n]")

    def read_rows(self, begin: int, end: int) -> F32Array:
        dtype = _DTYPES[self._raw.dtype]
        row_bytes = self.num_cols * dtype.itemsize
        offset, num_bytes = self._raw.offset + begin * row_bytes, (end - begin) * row_bytes
        raw = np.frombuffer(pread_once(self._descriptor, num_bytes, offset, self._path), dtype)
        rows = bf16_to_f32(raw) if dtype.kind == "u" else raw.astype(np.float32)
        return rows.reshape(end - begin, self.num_cols)


def resolve_hub_id(name: str) -> Path:
    """The local folder of hub repository `name`, downloaded if needed. One StorageError for every way it can fail."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # the library raises a dozen unrelated classes: no network, no repository, bad name
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise StorageError(
            f"{name!r} is neither a folder, a .gguf file, nor a model in the local Hugging Face cache, and it cannot "
            f"be downloaded: {reason.rstrip('.')}; correct the path, or for a hub id go online"
        ) from error


def open_folder(folder: Path, label: str) -> Source:
    """The checkpoint in `folder`. Raises StorageError, CorruptFile or UnsupportedModel naming the file."""
    if not (folder / "config.json").exists() and (folder / "adapter_config.json").exists():
        raise UnsupportedModel(
            f"{folder}: holds an adapter alone (adapter_config.json); name the model it was made for"
        )
    if not (folder / "config.json").exists() and (folder / "store.json").exists():
        raise UnsupportedModel(f"{folder}: is a layer store already; name the checkpoint it was made from, or use it")
    config = _read_json(folder / "config.json")
    _refuse_quantised(folder, config)
    if config.get("model_type") == "xlm-roberta":  # RoBERTa with another vocabulary
        config["model_type"] = "roberta"
    names = _weight_files(folder)
    descriptors: list[int] = []
    tensors: dict[str, SourceTensor] = {}
    identity = [json.dumps(config, sort_keys=True)]
    try:
        for name in names:
            path = folder / name
            descriptors.append(open_regular(path))
            status = os.fstat(descriptors[-1])
            identity.append(f"{name} {status.st_size} {status.st_mtime_ns}")
            for raw in read_header(path, descriptors[-1]).tensors.values():
                if raw.name in tensors:
                    raise CorruptFile(f"{path}: tensor {raw.name[:200]!r} is also in another file of the checkpoint")
                tensors[raw.name] = SafetensorsTensor(raw, descriptors[-1], path)
    except BaseException:
        _close(descriptors)
        raise
    return Source(
        label=label,
        identity=hashlib.sha256("\n".join(identity).encode()).hexdigest(),
        config=config,
        tensors=tensors,
        write_tokenizer=partial(write_from_folder, folder),
        pooling=_pooling(folder),
        close=partial(_close, descriptors),
    )


def _refuse_quantised(folder: Path, config: dict[str, Any]) -> None:
    """Weights in another library's own packing (AWQ, GPTQ, bitsandbytes, FP8 with scales, ...) are not read."""
    settings = config.get("quantization_config")
    if settings is not None:
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        raise UnsupportedModel(
            f"{folder}/config.json: the weights are quantised already (quantization_config: {method!r:.50}); convert "
            "the original checkpoint in bf16, f16 or f32, or a GGUF file"
        )


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
    descriptors.clear()


def _read_json(path: Path) -> dict[str, Any]:
    descriptor = open_regular(path)
    try:
        num_bytes = os.fstat(descriptor).st_size
        if num_bytes > _MAX_JSON_BYTES:
            raise CorruptFile(f"{path}: {num_bytes} bytes of JSON, more than {_MAX_JSON_BYTES}")
        content = parse_json(pread_exactly(descriptor, num_bytes, 0, path), str(path))
    finally:
        os.close(descriptor)
    if not isinstance(content, dict):
        raise CorruptFile(f"{path}: expected a JSON object")
    return content


def _weight_files(folder: Path) -> list[str]:
    if (folder / INDEX_FILE).exists():
        weight_map = _read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not all(_is_plain_name(name) for name in weight_map.values()):
            raise CorruptFile(f"{folder / INDEX_FILE}: weight_map must map tensors to files of this folder")
        return sorted(set(weight_map.values()))
    if (folder / SINGLE_FILE).exists():
        return [SINGLE_FILE]
    if any(folder.glob("pytorch_model*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise UnsupportedModel(
            f"{folder}: holds PyTorch pickles only, which can run code when opened; re-save the checkpoint with "
            "transformers' save_pretrained, which writes safetensors"
        )
    raise StorageError(f"{folder}: expected {SINGLE_FILE} or {INDEX_FILE}")


def _is_plain_name(name: Any) -> bool:
    return (
        isinstance(name, str) and name.endswith(".safetensors") and os.path.basename(name) == name and "\0" not in name
    )


def _pooling(folder: Path) -> str | None:
    """The pooling of a sentence-transformers checkpoint: "mean", "first", "last", or None when it names no such one."""
    path = folder / "1_Pooling" / "config.json"
    if not path.exists():
        return None
    content = _read_json(path)
    modes = {"cls": "first", "mean": "mean", "lasttoken": "last"}
    flags = {"pooling_mode_cls_token": "first", "pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "last"}
    chosen = [key for key, value in content.items() if key.startswith("pooling_mode_") and value is True]
    if len(chosen) == 1:
        return flags.get(chosen[0])
    return modes.get(str(content.get("pooling_mode"))) if not chosen else None
