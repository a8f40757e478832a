"""The gated product against the library's module: the same bits, forward and backward, and less that is kept."""

import torch
from torch import nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from chainfed_engine.model.families.gated import GatedMlp

HIDDEN, INTERMEDIATE = 32, 40


def kept_floats(mlp: nn.Module, x: torch.Tensor) -> int:
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mlp(x)
    return sum(kept.values())


def test_results_and_gradients_are_the_librarys_and_a_third_less_is_kept() -> None:
    torch.manual_seed(0)
    library = LlamaMLP(LlamaConfig(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE))
    ours = GatedMlp(library.gate_proj, library.up_proj, library.down_proj)
    x = 3 * torch.randn(2, 5, HIDDEN)
    gradients = []
    for mlp in (library, ours):
        library.zero_grad()
        leaf = x.clone().requires_grad_()
        out = mlp(leaf)
        out.square().sum().backward()
        gradients.append([out, leaf.grad, *(parameter.grad for parameter in library.parameters())])
    for expected, got in zip(*gradients, strict=True):
        assert expected is not None and got is not None and torch.equal(expected, got)
    with torch.no_grad():
        assert torch.equal(ours(x), gradients[0][0])
    library.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    weights = 3 * HIDDEN * INTERMEDIATE
    assert kept_floats(library, leaf) - weights == 3 * 2 * 5 * INTERMEDIATE
    assert kept_floats(ours, leaf) - weights == 2 * 2 * 5 * INTERMEDIATE
