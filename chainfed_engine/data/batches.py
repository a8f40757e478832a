"""EncodedData to `types.Batch`: right padding to the longest of the batch, int64, on the CPU.

Without a seed the order is fixed, longest first, so that little is padded and every later buffer fits where an earlier
one lay: the composition in which the boundary cache is filled. With a seed the order is shuffled: the composition of
training.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from chainfed_engine.data.encode import EncodedData
from chainfed_engine.errors import InvalidArgument
from chainfed_engine.types import IGNORE_INDEX, Batch


def batches(encoded: EncodedData, batch_size: int, *, seed: int | None, pad_id: int) -> Iterator[Batch]:
    """Every sample once, `batch_size` at a time, the last batch may be smaller. Equal seeds give equal batches."""
    if batch_size < 1:
        raise InvalidArgument(f"batches: expected a batch_size of at least 1, got {batch_size}")
    order = order_by_length(encoded) if seed is None else np.random.default_rng(seed).permutation(len(encoded))
    for first in range(0, len(order), batch_size):
        yield collate(encoded, order[first : first + batch_size], pad_id)


def order_by_length(encoded: EncodedData) -> npt.NDArray[np.int64]:
    """Indices of the samples from the longest to the shortest, equal ones as they come."""
    return np.argsort([-len(ids) for ids in encoded.input_ids], kind="stable").astype(np.int64)


def collate(encoded: EncodedData, indices: Sequence[int] | npt.NDArray[np.int64], pad_id: int) -> Batch:
    """Samples `indices` as one batch of B = len(indices) sequences, padded on the right to the longest, T tokens."""
    if not len(indices):
        raise InvalidArgument("collate: expected at least one sample, got none")
    rows = [encoded.input_ids[i] for i in indices]
    num_tokens = max(len(ids) for ids in rows)
    input_ids = np.full((len(rows), num_tokens), pad_id, dtype=np.int64)
    attention_mask = np.zeros((len(rows), num_tokens), dtype=np.int64)
    for row, ids in enumerate(rows):
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
    if isinstance(encoded.labels, np.ndarray):
        labels = encoded.labels[np.asarray(indices, dtype=np.int64)]
    else:
        labels = np.full((len(rows), num_tokens), IGNORE_INDEX, dtype=np.int64)
        for row, index in enumerate(indices):
            labels[row, : len(rows[row])] = encoded.labels[index]
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        labels=torch.from_numpy(labels),
        sample_ids=[encoded.sample_ids[i] for i in indices],
    )
