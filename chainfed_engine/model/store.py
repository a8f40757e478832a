"""The layer store opened for running: `LayerStore` = what is in it (`StoreInfo`) and who holds its weights (readers).

Enters: the path of a store and how many files may be in memory at a time. Leaves: leases on layers and head shards,
word rows, small tensors. Files have the index they have in `info.files`: 0 the embedding, then the layers, then the
head's shards. Layers and shards share one ring of slots (and, for a CUDA device, slots there: `weights`); the embedding
has a reader of its own, so that a large vocabulary does not set the size of the ring's slots. Unless all is resident,
word rows are read from disk one by one.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from chainfed_engine import native
from chainfed_engine.errors import CorruptFile, InvalidArgument
from chainfed_engine.model.device_weights import DeviceLease, InPlace, Streamed, TorchStreams
from chainfed_engine.model.format import StoreInfo
from chainfed_engine.model.place import CPU, Place

FREE_SLOTS = 2  # beside pinned layers: a file in use and one being read
_EMBEDDING = 0
_STAGING_SLOTS = 2  # pinned on the host for a device with memory of its own: one is copied while the next is read
_WORDS, _HEAD = "word_embeddings.weight", "head.weight"


@dataclass(frozen=True)
class Shard:
    """Vocabulary rows first_row .. first_row + num_rows - 1 of the head, in file `file` of the store."""

    file: int
    first_row: int
    num_rows: int


class LayerStore:
    """Made by `open`. Not thread-safe. Leases must be released before `close`."""

    def __init__(self, info: StoreInfo, num_slots: int | None, direct: bool, place: Place = CPU) -> None:
        ring = [file.native() for file in info.files[1:]]
        self.info, self.place = info, place
        on_device = place.is_cuda and not place.is_unified
        self.resident = num_slots is None and not on_device
        self.num_slots = num_slots or len(ring)
        self._embedding = native.StoreReader([info.embedding.native()], num_slots=1, direct=direct)
        host_slots = _STAGING_SLOTS if on_device else self.num_slots
        self._ring = native.StoreReader(ring, num_slots=host_slots, direct=direct, pinned_for=place.index)
        self._device: Streamed | InPlace | None = None
        if place.index is not None:
            streams = TorchStreams(place.index)
            self._device = (
                Streamed(
                    self._ring,
                    streams,
                    num_slots=self.num_slots,
                    num_host_slots=host_slots,
                    file_bytes=[file.file_bytes for file in info.files[1:]] if num_slots is None else None,
                )
                if on_device
                else InPlace(self._ring, streams, index=place.index, num_host_slots=host_slots)
            )
        self.head_shards = _shards(info)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        num_slots: int | None = None,
        direct: bool = True,
        verify: bool = False,
        place: Place = CPU,
    ) -> "LayerStore":
        """Open the store at `path`.

        `num_slots`: files (layers and head shards) in memory at a time, 1 or more; None: the whole store stays in
        memory once read. `direct`: bypass the page cache. `verify`: compare every sha256 first. `place`: who computes;
        on a device with memory of its own the slots are there. Raises InvalidArgument, StorageError, CorruptFile,
        UnsupportedModel.
        """
        if num_slots is not None and num_slots < 1:
            raise InvalidArgument(f"num_slots: expected 1 or more, or None for all files, got {num_slots}")
        info = StoreInfo.read(path)
        if verify:
            info.verify()
        return cls(info, num_slots, direct, place)

    @property
    def num_layers(self) -> int:
        return self.info.num_layers

    @property
    def fingerprint(self) -> str:
        """sha256 of store.json, which holds the sha256 of every file."""
        return self.info.fingerprint

    def layer_file(self, index: int) -> int:
        """File of layer `index`; raises InvalidArgument when there is no such layer."""
        if not 0 <= index < self.num_layers:
            raise InvalidArgument(f"layer {index}: expected 0 to {self.num_layers - 1}")
        return 1 + index

    def lease(self, file: int) -> native.Lease:
        """Pin a file in memory, reading it if need be. Raises CorruptFile, StorageError."""
        return self._embedding.acquire(0) if file == _EMBEDDING else self._ring.acquire(file - 1)

    def weights(self, file: int) -> native.Lease | DeviceLease:
        """A layer or head shard where `place` computes: `lease` for the CPU, a lease on the device otherwise."""
        return self.lease(file) if self._device is None else self._device.lease(file - 1)

    def pin_layers(self, layers: Iterable[int]) -> list[native.Lease | DeviceLease]:
        """Leases that keep these layers in memory until released; none where two slots would not stay free."""
        wanted = list(layers)
        if self.resident or len(wanted) + FREE_SLOTS > self.num_slots:
            return []
        return [self.weights(self.layer_file(index)) for index in wanted]

    def prefetch(self, file: int) -> None:
        """Start reading a layer or a head shard in the background, if a slot is free."""
        self._ring.prefetch(file - 1)

    def lease_layer(self, index: int) -> native.Lease:
        return self.lease(self.layer_file(index))

    def prefetch_layer(self, index: int) -> None:
        self.prefetch(self.layer_file(index))

    def embedding_tensor(self, name: str) -> Tensor | None:
        """A whole small tensor of the embedding file as f32 [num_rows, num_cols] (vectors: [1, n]); None if absent.

        Read from disk without a slot, and not kept.
        """
        entry = self.info.embedding.tensor(name)
        if entry is None:
            return None
        out = torch.empty(entry.num_rows, entry.num_cols)
        self._embedding.gather_rows(0, name, torch.arange(entry.num_rows), out=out)
        return out

    def word_rows(self, ids: Tensor) -> Tensor:
        """Rows of the word embeddings, int64 [M] -> f32 [M,D]; decoded from the head's shards where they are tied.

        Raises InvalidArgument for an id outside the vocabulary.
        """
        vocab_size, hidden_size = self.info.shape.vocab_size, self.info.shape.hidden_size
        unique, inverse = torch.unique(ids, return_inverse=True)  # sorted: each row is read once, in order
        if unique.numel() and (int(unique[0]) < 0 or int(unique[-1]) >= vocab_size):
            raise InvalidArgument(
                f"input_ids: expected 0 to {vocab_size - 1} (the model's vocabulary), got {int(unique[0])} to "
                f"{int(unique[-1])}; use the tokeniser the store was converted with"
            )
        if not self.info.tied:
            rows = torch.empty(unique.numel(), hidden_size)
            self._gather(_EMBEDDING, _WORDS, unique, rows)
            return rows[inverse]
        parts = []
        for shard in self.head_shards:
            inside = unique[(unique >= shard.first_row) & (unique < shard.first_row + shard.num_rows)] - shard.first_row
            if inside.numel():
                parts.append(torch.empty(inside.numel(), hidden_size))
                self._gather(shard.file, _HEAD, inside, parts[-1])
        return torch.cat(parts)[inverse]

    def _gather(self, file: int, name: str, ids: Tensor, out: Tensor) -> None:
        if self.resident:
            with self.lease(file) as lease:
                native.gather_rows(lease.matrix(name), ids, out=out)
        elif file == _EMBEDDING:
            self._embedding.gather_rows(0, name, ids, out=out)
        else:
            self._ring.gather_rows(file - 1, name, ids, out=out)

    def stats(self) -> dict[str, int]:
        """Counters since opening: bytes_read, read_ns, stall_ns, hits, misses; and resident_bytes now."""
        ring, embedding = self._ring.stats(), self._embedding.stats()
        return {name: value + embedding[name] for name, value in ring.items()}

    def close(self) -> None:
        """Stop reading and free the weights."""
        if self._device is not None:
            self._device.close()
        self._ring.close()
        self._embedding.close()

    def __enter__(self) -> "LayerStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def decoded(lease: native.Lease, name: str) -> Tensor:
    """A whole tensor of a leased file as f32 [num_rows, num_cols]: for norms and biases."""
    matrix = lease.matrix(name)
    out = torch.empty(matrix.num_rows, matrix.num_cols)
    native.dequantize_rows(matrix, 0, matrix.num_rows, out=out)
    return out


def like(tensor: Tensor, parameter: Tensor, what: str) -> Tensor:
    """`tensor` in the shape of the `parameter` it fills; CorruptFile when the store's sizes are not the config's."""
    shape = tuple(parameter.shape)
    if tuple(tensor.shape) not in (shape, (1, *shape)):
        raise CorruptFile(f"{what}: expected {list(shape)} from the config, the store holds {list(tensor.shape)}")
    return tensor.view(shape)


def _shards(info: StoreInfo) -> tuple[Shard, ...]:
    shards: list[Shard] = []
    first_row = 0
    for index, file in enumerate(info.head_shards):
        num_rows = file.tensors[0].num_rows
        shards.append(Shard(1 + info.num_layers + index, first_row, num_rows))
        first_row += num_rows
    return tuple(shards)
