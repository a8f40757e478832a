"""The frozen prefix: layers below the window, run without gradients, each read once for many batches.

`sweep` is layer-major: as many batches as `fill_bytes` allows are held in float32 while one layer after another passes
over all of them. `first_records` encodes what reaches a boundary, an encoder's last bottleneck fused into the encoding;
`next_records` pushes records through one more layer. Records depend on the batch, the layers and the adapters alone.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeGuard

import torch
from torch import Tensor

from chainfed_engine import native
from chainfed_engine.adapters import Adapter, Bottleneck
from chainfed_engine.memory.lean import kept_heap_bytes
from chainfed_engine.model.families.base import LayerContext
from chainfed_engine.model.frozen import FrozenModel
from chainfed_engine.model.place import stream_of
from chainfed_engine.types import Batch

DEFAULT_FILL_BYTES = 64 << 20


class Prefix:
    """Runs frozen layers with their adapters; owns nothing but references. Records are u8 [tokens, record_bytes]."""

    def __init__(
        self, model: FrozenModel, adapters: Mapping[int, Adapter], *, cache_format: str, fill_bytes: int
    ) -> None:
        self.model, self.adapters = model, adapters
        self.cache_format, self.fill_bytes = cache_format, fill_bytes
        self.record_bytes = native.record_bytes(cache_format, model.shape.hidden_size)

    @torch.no_grad()
    def sweep(
        self, batches: Iterable[Batch], layers: range, *, last_adapter: bool = True
    ) -> Iterator[tuple[Batch, Tensor]]:
        """Each batch with its hidden state [B, T, D] after `layers` (from 0); `last_adapter`: the top one's too."""
        chunk: list[Batch] = []
        held = 0
        for batch in batches:
            size = batch.input_ids.numel() * self.model.shape.hidden_size * 4
            if chunk and held + size > self.fill_bytes:
                yield from self._sweep_chunk(chunk, layers, last_adapter)
                chunk, held = [], 0
            chunk.append(batch)
            held += size
        if chunk:
            yield from self._sweep_chunk(chunk, layers, last_adapter)

    @torch.no_grad()
    def first_records(self, batches: Iterable[Batch], layers: range) -> Iterator[tuple[Batch, list[int], Tensor]]:
        """Batch, tokens a sequence and records of the boundary after `layers`."""
        for batch, hidden in self.sweep(batches, layers, last_adapter=False):
            yield batch, *self._encode(hidden, batch, layers[-1])

    @torch.no_grad()
    def next_records(self, records: Tensor, lengths: list[int], layer: int) -> Tensor:
        """Records entering `layer` -> records leaving it (and its adapter), for one group."""
        batch = masked_batch(lengths)
        hidden = self.decode(records, batch)
        hidden = self.run_layer(layer, hidden, self.model.context(batch), adapter_follows=False)
        return self._encode(hidden, batch, layer)[1]

    def run_layer(self, layer: int, hidden: Tensor, context: LayerContext, *, adapter_follows: bool = True) -> Tensor:
        """One layer [B, T, D] -> [B, T, D] with its adapter; `adapter_follows`: not one that the encoder has."""
        adapter = self.adapters[layer]
        left_out = not adapter.is_trained or (_is_fused(adapter) and not adapter_follows)
        return self.model.run_layer(layer, hidden, context, None if left_out else adapter)

    def decode(self, records: Tensor, batch: Batch) -> Tensor:
        """Hidden state f32 [B, T, D] of packed records, zeros in the padding of `batch`."""
        rows, _ = token_rows(batch)
        device = self.model.device
        hidden = torch.zeros(*batch.attention_mask.shape, self.model.shape.hidden_size, device=device)
        flat = hidden.view(-1, hidden.shape[-1])
        native.boundary_decode(
            records.to(device), rows.to(device), cache_format=self.cache_format, out=flat, stream=stream_of(flat)
        )
        return hidden

    def _sweep_chunk(self, chunk: list[Batch], layers: range, last_adapter: bool) -> Iterator[tuple[Batch, Tensor]]:
        hidden = [self.model.embed(batch) for batch in chunk]
        contexts = [self.model.context(batch) for batch in chunk]
        for layer in layers:
            follows = last_adapter or layer != layers[-1]
            for index, context in enumerate(contexts):
                hidden[index] = self.run_layer(layer, hidden[index], context, adapter_follows=follows)
        for index, batch in enumerate(chunk):
            state, hidden[index] = hidden[index], torch.empty(0)
            yield batch, state
        native.trim_heap(above_bytes=kept_heap_bytes())  # buffers of ever other lengths would touch the whole heap

    def _encode(self, hidden: Tensor, batch: Batch, layer: int) -> tuple[list[int], Tensor]:
        rows, lengths = token_rows(batch)
        tokens = hidden.reshape(-1, hidden.shape[-1])
        if len(rows) != len(tokens):
            tokens = tokens[rows.to(tokens.device)]
        records = torch.empty(len(rows), self.record_bytes, dtype=torch.uint8, device=tokens.device)
        adapter = self.adapters[layer]
        fused = adapter.tensors() if _is_fused(adapter) and adapter.is_trained else None
        native.boundary_encode(
            tokens.contiguous(), adapter=fused, cache_format=self.cache_format, out=records, stream=stream_of(tokens)
        )
        return lengths, records.cpu()


def _is_fused(adapter: Adapter) -> TypeGuard[Bottleneck]:
    return isinstance(adapter, Bottleneck) and adapter.is_fused


def is_active(adapter: Adapter) -> bool:
    """Whether it is a bottleneck that changes its input: an untrained one is the identity and is left out."""
    return isinstance(adapter, Bottleneck) and adapter.is_trained


def token_rows(batch: Batch) -> tuple[Tensor, list[int]]:
    """Rows of the flattened [B * T] batch that hold tokens, and tokens a sequence; the model checked the padding."""
    mask = batch.attention_mask
    return mask.reshape(-1).nonzero().squeeze(1), mask.sum(dim=1).tolist()


def masked_batch(lengths: list[int]) -> Batch:
    """A batch that carries nothing but the right-padded attention mask of `lengths`."""
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return Batch(torch.zeros_like(mask), mask, None, [])
