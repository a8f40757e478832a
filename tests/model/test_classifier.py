"""The classification head: pooling, where it starts, and its arrays."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from chainfed_engine.errors import InvalidArgument
from chainfed_engine.model.classifier import Classifier, pool
from tests.conftest import Checkpoint

Make = Callable[..., Checkpoint]


@pytest.mark.parametrize(("pooling", "wanted"), [("mean", [2.0, 1.0]), ("first", [1.0, 1.0]), ("last", [3.0, 1.0])])
def test_pooling_reads_tokens_and_never_padding(pooling: Any, wanted: list[float]) -> None:
    hidden = torch.tensor([[1.0, 2.0, 3.0, 99.0], [1.0, 99.0, 99.0, 99.0]])[:, :, None].expand(-1, -1, 5)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    assert torch.allclose(pool(hidden, mask, pooling), torch.tensor(wanted)[:, None].expand(-1, 5))


def test_an_unknown_pooling_is_refused(checkpoint: Make) -> None:
    with pytest.raises(InvalidArgument, match="max"):
        pool(torch.zeros(1, 1, 1), torch.ones(1, 1), "max")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="max"):
        checkpoint("bert").open().new_classifier(2, "max")


@pytest.mark.parametrize(("name", "transform"), [("bert", "tanh"), ("distilbert", "relu"), ("llama", None)])
def test_a_checkpoints_head_is_taken_whole_or_not_at_all(checkpoint: Make, name: str, transform: str | None) -> None:
    model = checkpoint(name, "ForSequenceClassification").open()
    own = model.new_classifier(3)
    assert own.transform == transform and own.pooling == model.family.pooling
    assert model.new_classifier(4).transform is None
    other = model.new_classifier(3, "mean")
    assert other.transform is None and not torch.equal(other.out_weight, own.out_weight)


def test_a_fresh_head_depends_on_the_seed_alone(checkpoint: Make) -> None:
    model = checkpoint("bert").open()
    one, same, other = (model.new_classifier(5, "mean", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.out_weight, same.out_weight) and not torch.equal(one.out_weight, other.out_weight)
    assert not one.out_bias.any() and 0.015 < float(one.out_weight.detach().std()) < 0.025


def test_arrays_go_out_and_come_back(checkpoint: Make) -> None:
    one, other = (Classifier(8, 3, "first", transform="relu", seed=seed) for seed in (1, 2))
    arrays = one.state_arrays()
    names = ("transform_weight", "transform_bias", "out_weight", "out_bias")
    assert set(arrays) == {f"classifier.{name}" for name in names}
    other.load_arrays({**arrays, "adapters.0.up_bias": np.zeros(8, np.float32)})
    hidden, mask = torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.int64)
    assert torch.equal(one(hidden, mask), other(hidden, mask))


def test_arrays_of_another_head_are_refused_and_change_nothing() -> None:
    classifier = Classifier(8, 3, "first")
    before = classifier.state_arrays()
    for change in ({"classifier.out_bias": np.zeros(4, np.float32)}, {"classifier.out_bias": np.zeros(3, np.int64)}):
        with pytest.raises(InvalidArgument, match="out_bias"):
            classifier.load_arrays({"classifier.out_weight": np.ones((3, 8), np.float32), **change})
    with pytest.raises(InvalidArgument, match="got none"):
        classifier.load_arrays({"classifier.out_weight": np.ones((3, 8), np.float32)})
    assert all(np.array_equal(value, before[key]) for key, value in classifier.state_arrays().items())
    with pytest.raises(InvalidArgument, match="num_labels"):
        Classifier(8, 0, "first")
