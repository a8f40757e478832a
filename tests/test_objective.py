import pytest
import torch

from chainfed_engine.objective import accuracy_and_macro_f1, class_counts


def test_macro_f1_counts_every_class_alike() -> None:
    labels, predicted = torch.tensor([0, 0, 0, 1, 2]), torch.tensor([0, 0, 1, 1, 1])
    counts = class_counts(labels[:2], predicted[:2], 4) + class_counts(labels[2:], predicted[2:], 4)
    accuracy, macro_f1 = accuracy_and_macro_f1(counts)
    assert accuracy == pytest.approx(3 / 5)
    # By hand: 2*2 / (3 + 2), 2*1 / (1 + 3), 0 / (1 + 0); class 3 neither occurs nor is predicted.
    assert macro_f1 == pytest.approx((0.8 + 0.5 + 0.0) / 3)
