"""Adapters start as the identity, depend on their seed alone, and travel as named arrays."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from chainfed_engine.adapters import Bottleneck, LoRA, ScaledBottleneck, build_adapter
from chainfed_engine.errors import InvalidArgument
from chainfed_engine.model.families import family
from chainfed_engine.parameters import Parameters
from chainfed_engine.types import ModelShape, layer_of_key

SHAPE = ModelShape("llama", 4, 64, 96, 4, 2, 24, 211, 40)


def build(kind: Any, layer: int = 2, seed: int = 0, size: int = 4) -> Bottleneck | LoRA:
    return build_adapter(kind, family("llama"), SHAPE, layer=layer, size=size, seed=seed)


def test_an_untrained_bottleneck_gives_its_input_back_bit_by_bit() -> None:
    hidden = torch.randn(3, 7, 64) * torch.logspace(-6, 6, 64)
    adapter = build("bottleneck")
    assert not adapter.is_trained
    assert torch.equal(adapter(hidden), hidden)


def trained_bottleneck(architecture: str) -> Bottleneck:
    adapter = build_adapter("bottleneck", family(architecture), SHAPE, layer=2, size=4, seed=0)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    assert isinstance(adapter, Bottleneck) and adapter.is_trained
    return adapter.double()


def added(adapter: Bottleneck, read: torch.Tensor) -> torch.Tensor:
    down_weight, down_bias, up_weight, up_bias = adapter.tensors()
    inner = read @ down_weight.T + down_bias
    inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    return inner @ up_weight.T + up_bias


def test_a_bottleneck_is_its_formula_with_the_exact_gelu() -> None:
    adapter = trained_bottleneck("bert")
    assert not isinstance(adapter, ScaledBottleneck)
    hidden = torch.randn(5, 64).double()
    assert torch.allclose(adapter(hidden), hidden + added(adapter, hidden), rtol=1e-12, atol=1e-12)


def test_a_pre_norm_models_bottleneck_reads_clipped_rows_of_unit_size_and_adds_in_proportion() -> None:
    adapter = trained_bottleneck("llama")
    assert isinstance(adapter, ScaledBottleneck)
    hidden = torch.randn(5, 64).double()
    hidden[:, 3] *= 40  # most of the row
    size = hidden.square().mean(-1, keepdim=True).sqrt()
    read = hidden / size
    assert (read.abs() > 3).any()
    wanted = hidden + size * added(adapter, read.clamp(-3, 3))
    assert torch.allclose(adapter(hidden), wanted, rtol=1e-12, atol=1e-12)
    assert torch.allclose(adapter(1000 * hidden), 1000 * wanted, rtol=1e-12, atol=1e-9)
    assert torch.equal(adapter(torch.zeros(2, 64).double()).isfinite(), torch.ones(2, 64, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_whose_squares_half_precision_cannot_hold_are_read_all_the_same(dtype: torch.dtype) -> None:
    adapter, hidden = trained_bottleneck("llama").float(), 400 * torch.randn(5, 64)
    wanted = adapter(hidden)
    close = adapter.to(dtype)(hidden.to(dtype)).float()
    assert close.isfinite().all()
    assert (close - wanted).norm() <= 0.03 * wanted.norm()


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_a_bottlenecks_gradients_are_those_of_its_formula(architecture: str) -> None:
    adapter = trained_bottleneck(architecture)
    hidden = (torch.randn(2, 3, 64) * torch.logspace(-1, 1, 64)).double().requires_grad_()
    names = [name for name, _ in adapter.named_parameters()]

    def run(hidden: torch.Tensor, *parameters: torch.Tensor) -> Any:
        return torch.func.functional_call(adapter, dict(zip(names, parameters, strict=True)), (hidden,))

    assert torch.autograd.gradcheck(run, (hidden, *adapter.parameters()))


def test_an_untrained_lora_adds_nothing_and_a_trained_one_its_product() -> None:
    lora = build("lora")
    assert isinstance(lora, LoRA) and not lora.is_trained and lora.scale == 2.0
    x = torch.randn(3, 64)
    query = lora.low_rank["self_attn.q_proj"]
    assert query(x).shape == (3, 96) and lora.low_rank["self_attn.v_proj"](x).shape == (3, 48)
    assert not query(x).any()
    assert lora(x) is x
    torch.nn.init.normal_(lora.query_b)
    assert lora.is_trained
    assert torch.allclose(query(x), 2.0 * functional.linear(x, lora.query_b @ lora.query_a), atol=1e-5)


@pytest.mark.parametrize("kind", ["bottleneck", "lora"])
def test_the_start_depends_on_seed_and_layer_alone(kind: str) -> None:
    def start(**choice: int) -> np.ndarray:
        return next(value for value in build(kind, **choice).state_arrays().values() if value.any())

    assert np.array_equal(start(layer=1, seed=5), start(layer=1, seed=5))
    assert not np.array_equal(start(layer=1, seed=5), start(layer=2, seed=5))
    assert not np.array_equal(start(layer=1, seed=5), start(layer=1, seed=6))


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("bottleneck", {"down_weight", "down_bias", "up_weight", "up_bias"}),
        ("lora", {"query_a", "query_b", "value_a", "value_b"}),
    ],
)
def test_arrays_go_out_under_adapter_keys_and_come_back(kind: str, names: set[str]) -> None:
    one, other = build(kind, seed=1), build(kind, seed=2)
    for parameter in one.parameters():
        torch.nn.init.normal_(parameter)
    arrays = one.state_arrays()
    assert set(arrays) == {f"adapters.2.{name}" for name in names}
    assert all(value.dtype == np.float32 and layer_of_key(key) == 2 for key, value in arrays.items())
    other.load_arrays(arrays)
    assert all(np.array_equal(value, arrays[key]) for key, value in other.state_arrays().items())
    next(iter(arrays.values()))[...] = 0  # a copy: the module does not follow
    assert all(value.any() for value in one.state_arrays().values())


def test_arrays_of_another_size_or_layer_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"adapters\.2\.down_weight.*\[4, 64\].*\[5, 64\]"):
        build("bottleneck").load_arrays(build("bottleneck", size=5).state_arrays())
    with pytest.raises(InvalidArgument, match="got none"):
        build("lora").load_arrays(build("lora", layer=1).state_arrays())


def test_an_unknown_kind_and_a_size_below_one_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="prefix"):
        build("prefix")
    with pytest.raises(InvalidArgument, match="adapter_size"):
        build("bottleneck", size=0)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "llama", "mistral", "qwen2", "qwen3"])
def test_every_family_names_projections_that_its_layer_has(name: str) -> None:
    kind = family(name)
    layer = kind.layer(kind.config({}), 0)
    for target in kind.lora_targets:
        assert isinstance(layer.get_submodule(target), torch.nn.Linear)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "llama", "mistral", "qwen2", "qwen3"])
def test_a_family_is_pre_norm_where_a_norm_follows_its_last_layer(name: str) -> None:
    kind = family(name)
    assert kind.is_pre_norm == (kind.final_norm(kind.config({})) is not None)


def test_equal_arrays_of_another_kind_of_adapter_are_another_cache() -> None:
    scaled, plain = ScaledBottleneck(8, 2), Bottleneck(8, 2)
    torch.nn.init.ones_(scaled.up_bias)
    plain.load_state_dict(scaled.state_dict())
    assert Parameters({0: scaled}, None).hash_below(1) != Parameters({0: plain}, None).hash_below(1)
