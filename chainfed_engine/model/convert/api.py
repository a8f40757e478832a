"""`convert`: a checkpoint into a layer store. The flow of the whole package, top to bottom."""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chainfed_engine._version import __version__
from chainfed_engine.errors import StorageError
from chainfed_engine.model.convert.gguf_source import open_gguf
from chainfed_engine.model.convert.hf_source import open_folder, resolve_hub_id
from chainfed_engine.model.convert.partial import PartialStore, is_already_made
from chainfed_engine.model.convert.plan import StorePlan, plan_store
from chainfed_engine.model.convert.source import Source
from chainfed_engine.model.convert.writer import FileRecord, Progress, storage_errors
from chainfed_engine.model.format import FORMAT_NAME, FORMAT_VERSION, TOKENIZER_FILES, sha256_of
from chainfed_engine.model.layout import BlockFormat, is_quantised, parse_block_format

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    block_format: str = "int4",
    head_format: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Convert a checkpoint into a layer store and return the store's path.

    source: a Hugging Face folder with safetensors, a hub id, or a .gguf file. destination: a path that does not exist,
    or the store that the same call made before (then nothing is done). block_format: of the layers' matrices, one of
    int4, nf4, int8, bf16, f32. head_format: of word embeddings and LM head; default int8 for the quantised formats,
    else block_format. progress(file name, bytes done, bytes in all) is called after every block.

    Memory: a few blocks of rows (4 MiB each), whatever the size of the checkpoint. Interrupted, it resumes: finished
    files lie in `<destination>.partial`. Raises UnsupportedModel, CorruptFile, StorageError (missing, unwritable, full,
    destination taken) and InvalidArgument (unknown block format).
    """
    chosen = parse_block_format(block_format)
    chosen_head = parse_block_format(head_format) if head_format is not None else default_head_format(chosen)
    opened = open_source(source)
    try:
        return write_store(opened, Path(destination), chosen, chosen_head, progress)
    finally:
        opened.close()


def default_head_format(block_format: BlockFormat) -> BlockFormat:
    return "int8" if is_quantised(block_format) else block_format


def write_store(
    source: Source,
    destination: Path,
    block_format: BlockFormat,
    head_format: BlockFormat,
    progress: Progress | None,
) -> Path:
    """Write the store of an open source: plan, files, tokenizer, store.json, in this order."""
    plan = plan_store(source, block_format, head_format)
    settings = [FORMAT_VERSION, __version__, source.label, source.identity, block_format, head_format]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    if is_already_made(destination, key):
        return destination
    with PartialStore(Path(os.path.abspath(destination)), key) as partial:
        files = partial.write_files(plan.files, progress)
        tokenizer_files = _write_tokenizer(source, partial.fresh_tokenizer_folder(), source.write_tokenizer)
        content = _store_json(source, plan, block_format, head_format, files, tokenizer_files)
        partial.publish(json.dumps(content, indent=1, ensure_ascii=False).encode())
    return destination


def open_source(source: str | os.PathLike[str]) -> Source:
    path = Path(source)
    if path.is_dir():
        return open_folder(path, path.resolve().name)
    if path.suffix == ".gguf":
        return open_gguf(path)
    name = os.fspath(source)
    if path.exists() or not _HUB_ID.fullmatch(name):
        raise StorageError(f"{name}: expected a folder with safetensors, a .gguf file or a hub id such as org/model")
    return open_folder(resolve_hub_id(name), name)


def _write_tokenizer(source: Source, folder: Path, write: Callable[[Path], str | None]) -> list[FileRecord]:
    with storage_errors(folder, 0):
        reason = write(folder)
        if reason is not None:
            for item in folder.iterdir():
                item.unlink()
            warnings.warn(
                f"{source.label}: the store has no tokenizer ({reason}); text cannot be used with it", stacklevel=4
            )
            return []
        records = []
        for name in TOKENIZER_FILES:
            path = folder / name
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
                records.append(FileRecord(name, path.stat().st_size, sha256_of(path)))
        return records


def _store_json(
    source: Source,
    plan: StorePlan,
    block_format: BlockFormat,
    head_format: BlockFormat,
    files: list[FileRecord],
    tokenizer_files: list[FileRecord],
) -> dict[str, Any]:
    """Nothing in it depends on where or when the store was made: equal sources and settings give equal bytes."""
    roles = {file.name: file.role for file in plan.files}
    return {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "architecture": plan.shape.architecture,
        "config": source.config,
        "block_format": block_format,
        "head_format": head_format,
        "pooling": source.pooling,
        "tied": plan.tied,
        "num_layers": plan.shape.num_layers,
        "labels": list(plan.labels) if plan.labels is not None else None,
        "files": [
            {"name": file.name, "role": roles[file.name], "bytes": file.file_bytes, "sha256": file.sha256}
            for file in files
        ],
        "tokenizer": bool(tokenizer_files),
        "tokenizer_files": [
            {"name": file.name, "bytes": file.file_bytes, "sha256": file.sha256} for file in tokenizer_files
        ],
        "source": source.label,
    }
