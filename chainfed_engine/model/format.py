"""The layer store as a whole: `store.json` read from hostile bytes, its files validated, its checksums verified.

Enters: the path of a folder written by `convert` or `synth`. Leaves: a `StoreInfo`, immutable, that holds paths, sizes
and offsets but no weights and no open file. File names are never taken from the JSON: they follow from role and index,
and what the JSON says must be equal. See docs/FORMATS.md.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from chainfed_engine.errors import CorruptFile, InvalidArgument, StorageError, UnsupportedModel
from chainfed_engine.model.header import open_regular, parse_json, pread_exactly, pread_once
from chainfed_engine.model.layout import BlockFormat, parse_block_format
from chainfed_engine.model.shape import model_shape
from chainfed_engine.model.store_file import TensorEntry, read_entries
from chainfed_engine.types import ModelShape

FORMAT_NAME = "chainfed-store"
FORMAT_VERSION = 1
STORE_JSON = "store.json"
TOKENIZER_FOLDER = "tokenizer"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
HEAD_SHARD_ROWS = 8192
Role = Literal["embedding", "layer", "head"]
Pooling = Literal["mean", "first", "last"]
_MAX_JSON_BYTES = 16_000_000
_HASH_BLOCK_BYTES = 1 << 20
_KEYS: dict[str, type | tuple[type, ...]] = {
    "format": str,
    "version": int,
    "architecture": str,
    "config": dict,
    "block_format": str,
    "head_format": str,
    "pooling": (str, type(None)),
    "tied": bool,
    "num_layers": int,
    "labels": (list, type(None)),
    "files": list,
    "tokenizer": bool,
    "tokenizer_files": list,
    "source": str,
}


@dataclass(frozen=True)
class FileInfo:
    """One safetensors file of the store and the matrices in it."""

    name: str
    role: Role
    path: Path
    file_bytes: int
    sha256: str
    tensors: tuple[TensorEntry, ...]

    def native(self) -> tuple[str, int, tuple[TensorEntry, ...]]:
        """The tuple that `native.StoreReader` takes for one file."""
        return (str(self.path), self.file_bytes, self.tensors)

    def tensor(self, name: str) -> TensorEntry | None:
        return next((entry for entry in self.tensors if entry.name == name), None)


@dataclass(frozen=True)
class TokenizerFile:
    name: str
    file_bytes: int
    sha256: str


def file_name(role: Role, index: int = 0) -> str:
    """`embedding.safetensors`, `layer-0003.safetensors`, `head-0000.safetensors`."""
    return "embedding.safetensors" if role == "embedding" else f"{role}-{index:04d}.safetensors"


def num_head_shards(vocab_size: int) -> int:
    return -(-vocab_size // HEAD_SHARD_ROWS)


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a regular file, read a block at a time; its pages leave the page cache afterwards."""
    digest = hashlib.sha256()
    descriptor = open_regular(path)
    try:
        offset, file_bytes = 0, os.fstat(descriptor).st_size
        while offset < file_bytes:
            block = pread_once(descriptor, min(_HASH_BLOCK_BYTES, file_bytes - offset), offset, path)
            digest.update(block)
            offset += len(block)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return digest.hexdigest()


@dataclass(frozen=True)
class StoreInfo:
    """Everything about a store except its weights. `files`: embedding, then layers 0 .. L-1, then head shards 0 .. S-1.

    `config` is the Hugging Face config dict; `labels` names the classes of the checkpoint's own classification head, if
    any; `tied`: the word embeddings are the head's rows; `fingerprint`: sha256 of store.json, which holds every file's.
    """

    path: Path
    architecture: str
    config: dict[str, Any]
    block_format: BlockFormat
    head_format: BlockFormat
    pooling: Pooling | None
    tied: bool
    labels: tuple[str, ...] | None
    num_layers: int
    shape: ModelShape
    files: tuple[FileInfo, ...]
    tokenizer_files: tuple[TokenizerFile, ...]
    source: str
    fingerprint: str

    @staticmethod
    def read(path: str | os.PathLike[str]) -> "StoreInfo":
        """Open the store at `path`.

        Raises StorageError when it is missing or unreadable, CorruptFile when any promise of the format is broken, and
        UnsupportedModel when its config has no usable sizes. Reads headers only; `verify` reads the rest.
        """
        folder = Path(path)
        raw = _read_json_bytes(folder)
        content = _checked_keys(parse_json(raw, str(folder / STORE_JSON)), folder)
        shape = _checked_shape(content, folder)
        info = StoreInfo(
            path=folder,
            architecture=content["architecture"],
            config=content["config"],
            block_format=_checked_format(content, "block_format", folder),
            head_format=_checked_format(content, "head_format", folder),
            pooling=_checked_pooling(content["pooling"], folder),
            tied=content["tied"],
            labels=_checked_labels(content["labels"], folder),
            num_layers=content["num_layers"],
            shape=shape,
            files=_checked_files(content["files"], shape, folder),
            tokenizer_files=_checked_tokenizer(content, folder),
            source=content["source"],
            fingerprint=hashlib.sha256(raw).hexdigest(),
        )
        _check_tensors(info)
        return info

    @property
    def embedding(self) -> FileInfo:
        return self.files[0]

    @property
    def layers(self) -> tuple[FileInfo, ...]:
        return self.files[1 : 1 + self.num_layers]

    @property
    def head_shards(self) -> tuple[FileInfo, ...]:
        """Vocabulary rows in shards of 8192; empty for a model without an LM head."""
        return self.files[1 + self.num_layers :]

    @property
    def tokenizer_path(self) -> Path | None:
        """The folder that transformers' `AutoTokenizer.from_pretrained` opens, or None when the source had none."""
        return self.path / TOKENIZER_FOLDER if self.tokenizer_files else None

    @property
    def num_bytes(self) -> int:
        return sum(file.file_bytes for file in self.files)

    def verify(self) -> None:
        """Compare the sha256 of every file with store.json, streamed. CorruptFile names the first that differs."""
        expected = [(file.path, file.sha256) for file in self.files]
        expected += [(self.path / TOKENIZER_FOLDER / file.name, file.sha256) for file in self.tokenizer_files]
        for path, sha256 in expected:
            if sha256_of(path) != sha256:
                raise CorruptFile(f"{path}: its sha256 differs from store.json; convert or copy the store again")


def _read_json_bytes(folder: Path) -> bytes:
    path = folder / STORE_JSON
    if not path.exists():
        raise StorageError(f"{folder}: no {STORE_JSON}; expected a folder written by `chainfed convert`")
    descriptor = open_regular(path)
    try:
        num_bytes = os.fstat(descriptor).st_size
        if num_bytes > _MAX_JSON_BYTES:
            raise CorruptFile(f"{path}: {num_bytes} bytes, more than {_MAX_JSON_BYTES}")
        return pread_exactly(descriptor, num_bytes, 0, path)
    finally:
        os.close(descriptor)


_OTHER_VERSION = "install one that reads it, or convert the checkpoint again"


def _checked_keys(content: Any, folder: Path) -> dict[str, Any]:
    where = folder / STORE_JSON
    if not isinstance(content, dict) or content.get("format") != FORMAT_NAME:
        raise CorruptFile(f'{where}: expected a JSON object with "format": "{FORMAT_NAME}"')
    if content.get("version") != FORMAT_VERSION:
        raise CorruptFile(
            f"{where}: version {content.get('version')!r:.50}; this engine reads {FORMAT_VERSION}; {_OTHER_VERSION}"
        )
    for key, kind in _KEYS.items():
        value = content.get(key)
        if key not in content or not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise CorruptFile(f"{where}: {key!r} is missing or of the wrong type")
    return content


def _checked_shape(content: dict[str, Any], folder: Path) -> ModelShape:
    try:
        shape = model_shape(content["config"])
    except UnsupportedModel as error:
        raise CorruptFile(f"{folder / STORE_JSON}: {error}") from error
    if shape.architecture != content["architecture"] or shape.num_layers != content["num_layers"]:
        raise CorruptFile(f"{folder / STORE_JSON}: architecture and num_layers differ from the config's")
    return shape


def _checked_format(content: dict[str, Any], key: str, folder: Path) -> BlockFormat:
    try:
        return parse_block_format(content[key])
    except InvalidArgument as error:
        raise CorruptFile(f"{folder / STORE_JSON}: {key}: {str(error)[:200]}") from error


def _checked_pooling(value: str | None, folder: Path) -> Pooling | None:
    if value is not None and value not in get_args(Pooling):
        raise CorruptFile(f"{folder / STORE_JSON}: pooling {value[:50]!r}: expected mean, first, last or null")
    return cast("Pooling | None", value)


def _checked_labels(value: list[Any] | None, folder: Path) -> tuple[str, ...] | None:
    if value is not None and not all(isinstance(label, str) for label in value):
        raise CorruptFile(f"{folder / STORE_JSON}: labels: expected a list of text or null")
    return None if value is None else tuple(value)


def _checked_record(entry: Any, name: str, where: Path) -> tuple[int, str]:
    """Size and sha256 of a {"name", "bytes", "sha256"} record whose name must be `name`."""
    if not isinstance(entry, dict) or entry.get("name") != name:
        raise CorruptFile(f"{where}: expected an entry for {name!r} in its place in the list of files")
    num_bytes, sha256 = entry.get("bytes"), entry.get("sha256")
    if type(num_bytes) is not int or num_bytes < 0 or num_bytes > 1 << 48:
        raise CorruptFile(f"{where}: {name}: bytes must be an integer in 0 .. 2**48")
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise CorruptFile(f"{where}: {name}: sha256 must be 64 hexadecimal digits")
    return num_bytes, sha256


def _checked_files(entries: list[Any], shape: ModelShape, folder: Path) -> tuple[FileInfo, ...]:
    where = folder / STORE_JSON
    num_shards = len(entries) - 1 - shape.num_layers
    if num_shards not in (0, num_head_shards(shape.vocab_size)):
        raise CorruptFile(
            f"{where}: {len(entries)} files; expected 1 embedding, {shape.num_layers} layers and "
            f"0 or {num_head_shards(shape.vocab_size)} head shards"
        )
    places: list[tuple[Role, int]] = [("embedding", 0)]
    places += [("layer", index) for index in range(shape.num_layers)]
    places += [("head", index) for index in range(num_shards)]
    files = []
    for (role, index), entry in zip(places, entries, strict=True):
        name = file_name(role, index)
        file_bytes, sha256 = _checked_record(entry, name, where)
        if entry.get("role") != role:
            raise CorruptFile(f"{where}: {name}: expected the role {role!r}")
        path = folder / name
        files.append(FileInfo(name, role, path, file_bytes, sha256, read_entries(path, file_bytes)))
    return tuple(files)


def _checked_tokenizer(content: dict[str, Any], folder: Path) -> tuple[TokenizerFile, ...]:
    files = []
    for entry in content["tokenizer_files"]:
        name = entry.get("name") if isinstance(entry, dict) else None
        if name not in TOKENIZER_FILES:
            raise CorruptFile(f"{folder / STORE_JSON}: tokenizer file {name!r:.100}: expected one of {TOKENIZER_FILES}")
        file_bytes, sha256 = _checked_record(entry, name, folder / STORE_JSON)
        path = folder / TOKENIZER_FOLDER / name
        if not path.is_file() or path.stat().st_size != file_bytes:
            raise CorruptFile(f"{path}: missing or not of {file_bytes} bytes; convert or copy the store again")
        files.append(TokenizerFile(name, file_bytes, sha256))
    if content["tokenizer"] != any(file.name == "tokenizer.json" for file in files):
        raise CorruptFile(f"{folder / STORE_JSON}: tokenizer says {content['tokenizer']}, its files say otherwise")
    return tuple(files)


def _check_tensors(info: StoreInfo) -> None:
    """Embedding and head have the config's sizes; all layers hold the same matrices."""
    vocab_size, hidden_size = info.shape.vocab_size, info.shape.hidden_size
    first_row = 0
    for shard in info.head_shards:
        rows = min(HEAD_SHARD_ROWS, vocab_size - first_row)
        found = [(entry.name, entry.num_rows, entry.num_cols) for entry in shard.tensors]
        if found != [("head.weight", rows, hidden_size)]:
            raise CorruptFile(f"{shard.path}: expected exactly head.weight [{rows}, {hidden_size}]")
        first_row += rows
    words = info.embedding.tensor("word_embeddings.weight")
    if info.tied and (words is not None or not info.head_shards):
        raise CorruptFile(f"{info.path}: a tied store keeps its word embeddings in head shards alone")
    if not info.tied and (words is None or (words.num_rows, words.num_cols) != (vocab_size, hidden_size)):
        raise CorruptFile(f"{info.embedding.path}: expected word_embeddings.weight [{vocab_size}, {hidden_size}]")
    reference = sorted(entry[:4] for entry in info.layers[0].tensors)
    for layer in info.layers:
        if sorted(entry[:4] for entry in layer.tensors) != reference:
            raise CorruptFile(f"{layer.path}: its matrices differ from those of {info.layers[0].path.name}")
