"""Frozen layers: gradients, precision, leases, and that streaming changes nothing but the bytes read."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chainfed_engine import native
from chainfed_engine.adapters import LoRA, build_adapter
from chainfed_engine.errors import CorruptFile, InvalidArgument
from chainfed_engine.model.families.base import LayerContext
from chainfed_engine.model.frozen import FrozenLayer, FrozenModel
from chainfed_engine.model.linear import Binding, Compute, FrozenLinear
from chainfed_engine.model.store import LayerStore
from chainfed_engine.types import Batch
from tests.conftest import Checkpoint, inputs, make_batch, relative_error, streamed

Make = Callable[..., Checkpoint]


def reference_layer(reference: Any, index: int) -> Any:
    """Layer `index` of a transformers model without a head."""
    layers = reference.layers if hasattr(reference, "layers") else None
    if layers is None:
        layers = (reference.encoder if hasattr(reference, "encoder") else reference.transformer).layer
    return layers[index]


def dense(layer: Any, hidden: Tensor, context: LayerContext, kind: str) -> Tensor:
    arguments = {} if context.rotary is None else {"position_embeddings": context.rotary}
    out: Tensor = layer(hidden, attention_mask=context.masks[kind], **arguments)
    return out


@pytest.mark.parametrize("name", ["bert", "distilbert", "llama-biases", "qwen3-sliding"])
def test_the_gradient_of_a_layers_input_is_that_of_the_dense_layer(
    checkpoint: Make, padded_batch: Batch, name: str
) -> None:
    tiny = checkpoint(name)
    model = tiny.open()
    layer, context = model.layer(1), model.context(padded_batch)
    hidden = model.embed(padded_batch)
    grad_out = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    wanted = dense(reference_layer(tiny.reference, 1), theirs, context, layer.attention_kind)
    torch.autograd.backward([layer(ours, context), wanted], [grad_out, grad_out])
    assert ours.grad is not None and theirs.grad is not None
    assert relative_error(ours.grad, theirs.grad) <= 1e-5


@pytest.mark.parametrize("name", ["bert", "llama", "qwen3"])
@pytest.mark.parametrize("kind", ["bottleneck", "lora"])
def test_the_gradient_of_a_window_agrees_with_finite_differences(
    checkpoint: Make, monkeypatch: pytest.MonkeyPatch, name: str, kind: Any
) -> None:
    # The library's RMS norm computes in float32 whatever it is given; differences need the digits.
    for norm in ("llama.modeling_llama.LlamaRMSNorm", "qwen3.modeling_qwen3.Qwen3RMSNorm"):
        monkeypatch.setattr(f"transformers.models.{norm}.forward", rms_norm_in_float64)
    model = checkpoint(name).open()
    batch = make_batch([4, 3])
    context = model.context(batch)
    layers = [model.layer(index).double() for index in (1, 2)]
    adapters = [
        build_adapter(kind, model.family, model.shape, layer=index, size=2, seed=0).double() for index in (1, 2)
    ]
    generator = torch.Generator().manual_seed(3)
    parameters = [parameter for adapter in adapters for parameter in adapter.parameters()]
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.1, generator=generator)
    boundary = model.embed(batch).double().requires_grad_()

    def window(hidden: Tensor, *_: Tensor) -> Tensor:
        for layer, adapter in zip(layers, adapters, strict=True):
            hidden = layer(hidden, context, adapter)
        return hidden[batch.attention_mask.bool()]

    torch.autograd.gradcheck(window, (boundary, *parameters), fast_mode=True, atol=1e-6, rtol=1e-4)


def rms_norm_in_float64(self: Any, hidden: Tensor) -> Tensor:
    scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    normed: Tensor = self.weight * hidden * scale
    return normed


def test_a_frozen_linear_saves_neither_its_input_nor_its_weight(checkpoint: Make) -> None:
    layer = checkpoint("bert").open().layer(0)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    x = torch.randn(2, 5, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer.linears["intermediate.dense"](x).sum()
    assert saved == []


def test_a_graph_keeps_the_layer_it_was_built_with_when_its_linear_is_bound_again(checkpoint: Make) -> None:
    model = checkpoint("bert").open()
    store, weights = model.store, [reference_layer(checkpoint("bert").reference, i).output.dense.weight for i in (0, 1)]
    linear = FrozenLinear(96, 64, False, Compute("f32"))
    linear.bind(Binding(store, store.layer_file(0), "output.dense.weight"))
    x = torch.randn(3, 96, requires_grad=True)
    out = linear(x)
    linear.bind(Binding(store, store.layer_file(1), "output.dense.weight"))
    out.sum().backward()
    assert x.grad is not None
    assert relative_error(x.grad, weights[0].detach().sum(dim=0).expand(3, -1)) <= 1e-5
    assert relative_error(linear(x), x @ weights[1].T) <= 1e-5


def test_a_linear_refuses_another_width_and_use_before_it_is_bound(checkpoint: Make) -> None:
    linear = FrozenLinear(96, 64, False, Compute("f32"))
    with pytest.raises(InvalidArgument, match="bind"):
        linear(torch.zeros(1, 96))
    with pytest.raises(InvalidArgument, match=r"expected \[\.\.\., 96\]"):
        checkpoint("bert").open().layer(0).linears["output.dense"](torch.zeros(1, 64))


def test_a_released_lease_raises_instead_of_reading_what_the_slot_holds_now(checkpoint: Make) -> None:
    store = checkpoint("bert").open().store
    with store.lease_layer(0) as lease:
        matrix = lease.matrix("output.dense.weight")
        assert (matrix.num_rows, matrix.num_cols) == (64, 96)
    with pytest.raises(InvalidArgument):
        lease.matrix("output.dense.weight")
    with pytest.raises(InvalidArgument):
        native.dequantize_rows(matrix, 0, 64, out=torch.empty(64, 96))


@pytest.mark.parametrize("name", ["roberta", "llama-tied", "mistral-sliding"])
def test_streaming_with_two_slots_gives_the_bits_of_the_resident_model(
    checkpoint: Make, padded_batch: Batch, name: str
) -> None:
    tiny = checkpoint(name)
    resident, two_slots, one_slot = tiny.open(), tiny.open(num_slots=2), tiny.open(num_slots=1)
    wanted = streamed(resident, padded_batch)
    assert torch.equal(streamed(two_slots, padded_batch), wanted)
    assert torch.equal(streamed(one_slot, padded_batch), wanted)


def test_a_resident_store_is_read_once_and_a_streamed_one_in_every_pass(checkpoint: Make, padded_batch: Batch) -> None:
    for num_slots, grows in ((None, False), (2, True)):
        model = checkpoint("bert").open(num_slots=num_slots)
        streamed(model, padded_batch)
        first = model.store.stats()["bytes_read"]
        streamed(model, padded_batch)
        assert (model.store.stats()["bytes_read"] > first) == grows
        model.store.close()


def test_the_gradient_does_not_change_when_the_layers_were_evicted_between_forward_and_backward(
    checkpoint: Make, padded_batch: Batch
) -> None:
    grads = []
    for num_slots in (None, 1):
        model = checkpoint("llama").open(num_slots=num_slots)
        context, hidden = model.context(padded_batch), model.embed(padded_batch).requires_grad_()
        model.layer(1)(model.layer(0)(hidden, context), context).square().sum().backward()
        assert hidden.grad is not None
        grads.append(hidden.grad)
    assert torch.equal(*grads)


def test_the_shared_skeleton_equals_a_layer_of_its_own(checkpoint: Make, padded_batch: Batch) -> None:
    model = checkpoint("qwen2-sliding").open()
    context, hidden = model.context(padded_batch), model.embed(padded_batch)
    for index in (2, 0, 1):
        with torch.no_grad():
            assert torch.equal(model.run_layer(index, hidden, context), model.layer(index)(hidden, context))


def test_a_bf16_store_is_exact_against_transformers_with_the_same_bf16_weights(
    checkpoint: Make, padded_batch: Batch
) -> None:
    tiny = checkpoint("llama", "ForCausalLM", "bf16")
    for parameter in tiny.reference.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data.bfloat16().float()
    model, tokens = tiny.open(), padded_batch.attention_mask.bool()
    with torch.no_grad():
        wanted = tiny.reference(**inputs(padded_batch)).logits[tokens]
    assert model.head is not None
    assert relative_error(model.head.logits(streamed(model, padded_batch)[tokens]), wanted) <= 1e-5


@pytest.mark.parametrize(("block_format", "limit"), [("int8", 0.03), ("int4", 0.3), ("nf4", 0.4)])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_quantised_layer_is_near_the_dense_one_and_exact_for_its_decoded_weights(
    checkpoint: Make, padded_batch: Batch, name: str, block_format: str, limit: float
) -> None:
    exact, model = checkpoint(name).open(), checkpoint(name, block_format=block_format).open("f32")
    fast = checkpoint(name, block_format=block_format).open()
    assert fast.activation == "int8"
    hidden, context, tokens = exact.embed(padded_batch), exact.context(padded_batch), padded_batch.attention_mask.bool()
    wanted = exact.run_layer(0, hidden, context)[tokens]
    decoded = model.run_layer(0, hidden, context)[tokens]
    in_float64 = model.layer(0).double()(hidden.double(), context)[tokens].float()
    assert relative_error(decoded, wanted) <= limit
    assert relative_error(decoded, in_float64) <= 1e-5
    quick = fast.run_layer(0, hidden, context)[tokens]
    assert float(torch.cosine_similarity(quick.flatten(), decoded.flatten(), dim=0)) >= 0.999


def test_lora_acts_as_if_it_were_merged_into_the_weights(checkpoint: Make, padded_batch: Batch) -> None:
    tiny = checkpoint("llama")
    model = tiny.open()
    lora = build_adapter("lora", model.family, model.shape, layer=1, size=3, seed=0)
    assert isinstance(lora, LoRA)
    context, hidden = model.context(padded_batch), model.embed(padded_batch)
    assert torch.equal(model.run_layer(1, hidden, context, lora), model.run_layer(1, hidden, context))
    for parameter in lora.parameters():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(4))
    layer = reference_layer(tiny.reference, 1)
    merged = {"q_proj": lora.query_b @ lora.query_a, "v_proj": lora.value_b @ lora.value_a}
    with torch.no_grad():
        before = {name: getattr(layer.self_attn, name).weight.clone() for name in merged}
        for name, change in merged.items():
            getattr(layer.self_attn, name).weight += lora.scale * change
        wanted = dense(layer, hidden, context, "full_attention")
        for name, weight in before.items():
            getattr(layer.self_attn, name).weight.copy_(weight)
    assert relative_error(model.run_layer(1, hidden, context, lora), wanted) <= 1e-5
    assert all(linear.low_rank is None for linear in model.layer(1).linears.values())


def test_dropout_stays_off_when_a_surrounding_module_is_switched_to_training(
    checkpoint: Make, padded_batch: Batch
) -> None:
    model = checkpoint("bert").open()
    context, hidden = model.context(padded_batch), model.embed(padded_batch)
    layer = model.layer(0)
    wanted = layer(hidden, context)
    nn.ModuleList([layer]).train()
    assert torch.equal(layer(hidden, context), wanted)


def test_token_ids_outside_the_vocabulary_are_refused(checkpoint: Make) -> None:
    for name in ("bert", "llama-tied"):
        model = checkpoint(name, "Model" if name == "bert" else "ForCausalLM").open()
        for bad in (-1, 211):
            batch = replace(make_batch([2]), input_ids=torch.tensor([[5, bad]]))
            with pytest.raises(InvalidArgument, match="expected 0 to 210"):
                model.embed(batch)


def test_a_layer_that_does_not_exist_and_a_ring_without_slots_are_refused(checkpoint: Make) -> None:
    model = checkpoint("bert").open()
    with pytest.raises(InvalidArgument, match="layer 3: expected 0 to 2"):
        model.layer(3)
    with pytest.raises(InvalidArgument, match="num_slots"):
        LayerStore.open(checkpoint("bert").path, num_slots=0)
    with LayerStore.open(checkpoint("bert").path, verify=True) as store:
        assert store.fingerprint == model.fingerprint


def test_an_adapter_for_another_family_is_refused(checkpoint: Make, padded_batch: Batch) -> None:
    llama, bert = checkpoint("llama").open(), checkpoint("bert").open()
    lora = build_adapter("lora", llama.family, llama.shape, layer=0, size=2, seed=0)
    with pytest.raises(InvalidArgument, match=r"self_attn\.q_proj.*attention\.self\.query"):
        bert.run_layer(0, bert.embed(padded_batch), bert.context(padded_batch), lora)


def test_a_store_whose_matrices_are_not_the_configs_is_refused(
    checkpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LayerStore.open(checkpoint("bert").path)
    object.__setattr__(store.info, "config", {**store.info.config, "intermediate_size": 128})
    with pytest.raises(CorruptFile, match=r"intermediate\.dense\.weight.*\[128, 64\].*\[96, 64\]"):
        FrozenModel(store).layer(0)


def test_post_norm_models_have_no_final_norm_and_pre_norm_models_do(checkpoint: Make) -> None:
    hidden = torch.randn(2, 64)
    assert checkpoint("bert").open().final_norm(hidden) is hidden
    llama = checkpoint("llama").open()
    assert llama.is_pre_norm and not checkpoint("bert").open().is_pre_norm
    assert relative_error(llama.final_norm(hidden), checkpoint("llama").reference.norm(hidden)) <= 1e-6
    assert isinstance(llama.layer(0), FrozenLayer)


def test_the_cores_threads_are_as_many_as_torchs(checkpoint: Make) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        checkpoint("llama").open()
        assert native.num_threads() == 1
    finally:
        torch.set_num_threads(before)
        native.set_num_threads(before)
