"""Padding left out of the window: the same hidden states, the same gradients, and less that is held."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from chainfed_engine.adapters import build_adapter
from chainfed_engine.model.frozen import FrozenModel
from chainfed_engine.model.packing import MOST_TOKENS, Packing
from chainfed_engine.types import Window
from chainfed_engine.window import TrainedWindow
from tests.conftest import make_batch

LENGTHS = [17, 2, 5, 1, 9, 3]
MODELS = ["bert", "roberta", "distilbert", "llama", "mistral", "qwen2", "qwen2-sliding", "qwen3"]


def test_rows_come_back_where_they_were_and_the_padding_is_zero() -> None:
    tokens = torch.arange(5) < torch.tensor([[5], [1], [2]])
    packing = Packing.of(tokens)
    assert packing is not None and packing.positions.tolist() == [0, 1, 2, 3, 4, 0, 0, 1]
    padded = torch.randn(3, 5, 2, 4)
    packed = packing.pack(padded)
    assert packed.shape == (1, 8, 2, 4)
    assert torch.equal(packing.unpack(packed), padded * tokens[..., None, None])


@pytest.mark.parametrize(("lengths", "packs"), [([4, 4], False), ([4, 3], False), ([4, 2], False), ([4, 1], True), ([4, 1, 1], True)])
def test_a_batch_with_little_padding_stays_as_it_is(lengths: list[int], packs: bool) -> None:
    tokens = torch.arange(4) < torch.tensor(lengths)[:, None]
    assert (Packing.of(tokens) is not None) == packs == (sum(lengths) <= MOST_TOKENS * tokens.numel())


def _run(
    model: FrozenModel, kind: str, monkeypatch: pytest.MonkeyPatch, *, packs: bool, recompute: bool
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Size]:
    monkeypatch.setattr("chainfed_engine.model.packing.MOST_TOKENS", MOST_TOKENS if packs else 0.0)
    batch, adapters = make_batch(LENGTHS), {}
    for layer in range(model.num_layers):
        adapters[layer] = build_adapter(kind, model.family, model.shape, layer, 4, 0)
        generator = torch.Generator().manual_seed(layer)
        for parameter in adapters[layer].parameters():
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    window = TrainedWindow(model, Window(1, model.num_layers), adapters, recompute=recompute)
    widths = []
    window.layers[0].module.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape))
    context = model.context(batch)
    with torch.no_grad():
        boundary = model.run_layer(0, model.embed(batch), context)
    hidden = window(boundary, context)[batch.attention_mask.bool()]
    hidden.square().mean().backward()
    window.close()
    parameters = [value for layer in range(1, model.num_layers) for value in adapters[layer].parameters()]
    return hidden.detach(), [value.grad for value in parameters if value.grad is not None], widths[0]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("kind", "recompute"), [("bottleneck", False), ("bottleneck", True), ("lora", False)])
def test_a_window_of_rows_is_the_window_of_the_padded_batch(
    name: str, kind: str, recompute: bool, checkpoint: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoint(name).open()
    padded, gradients, shape = _run(model, kind, monkeypatch, packs=False, recompute=recompute)
    rows, others, packed_shape = _run(model, kind, monkeypatch, packs=True, recompute=recompute)
    assert tuple(shape[:2]) == (len(LENGTHS), max(LENGTHS)) and tuple(packed_shape[:2]) == (1, sum(LENGTHS))
    torch.testing.assert_close(rows, padded, rtol=1e-5, atol=1e-5)
    assert len(gradients) == len(others) > 0
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5 * float(one.abs().max()) + 1e-9)
