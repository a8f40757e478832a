"""How a batch is cut into the parts that go through the layers at a time."""

from collections.abc import Callable
from dataclasses import replace

import torch

from chainfed_engine.config import ChainConfig
from chainfed_engine.step import StageTrainer
from tests.conftest import Checkpoint, make_batch


def test_micro_batches_take_sequences_of_like_lengths(checkpoint: Callable[..., Checkpoint]) -> None:
    model = checkpoint("bert").open()
    one = StageTrainer(model, ChainConfig(), task="classification", num_labels=3, micro_batch=2)
    batch = replace(make_batch([5, 17, 6, 15, 3]), labels=torch.tensor([0, 1, 2, 0, 1]))
    parts = list(one._parts([batch]))
    assert [part.attention_mask.sum(dim=1).tolist() for part in parts] == [[17, 15], [6, 5], [3]]
    assert [part.input_ids.shape[1] for part in parts] == [17, 6, 3]
    assert [name for part in parts for name in part.sample_ids] == [batch.sample_ids[row] for row in (1, 3, 2, 0, 4)]
    assert torch.cat([part.labels for part in parts if part.labels is not None]).tolist() == [1, 0, 2, 0, 1]
