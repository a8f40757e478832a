"""AdamW against torch's own, bit for bit."""

import torch

from chainfed_engine.optimizer import AdamW


def test_steps_are_those_of_torch_bit_for_bit() -> None:
    torch.manual_seed(0)
    start = [torch.randn(5, 3), torch.randn(7)]
    ours = [value.clone().requires_grad_() for value in start]
    theirs = [value.clone().requires_grad_() for value in start]
    one = AdamW(ours, lr=1e-2, weight_decay=0.1)
    other = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, foreach=False)
    for step in range(6):
        for mine, yours in zip(ours, theirs, strict=True):
            grad = torch.randn_like(mine) if step != 2 or mine.ndim == 2 else None  # a parameter may sit a step out
            mine.grad = None if grad is None else grad.clone()
            yours.grad = None if grad is None else grad.clone()
        one.step()
        other.step()
        assert all(torch.equal(mine, yours) for mine, yours in zip(ours, theirs, strict=True))
    one.zero_grad()
    assert all(value.grad is None for value in ours)
