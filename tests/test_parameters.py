"""What sites that share one model in memory may not see of each other."""

import numpy as np
import pytest
import torch

from chainfed_engine.adapters import AdapterKind, build_adapter
from chainfed_engine.model.families import family
from chainfed_engine.parameters import Parameters
from chainfed_engine.types import ModelShape, Window

SHAPE = ModelShape("llama", 3, 8, 16, 2, 2, 4, 100, 16)


def _parameters(kind: AdapterKind) -> Parameters:
    adapters = {n: build_adapter(kind, family("llama"), SHAPE, layer=n, size=2, seed=0) for n in range(3)}
    return Parameters(adapters, None)


@pytest.mark.parametrize("kind", ["bottleneck", "lora"])
def test_a_layer_that_nobody_names_is_the_identity_again(kind: AdapterKind) -> None:
    parameters = _parameters(kind)
    untrained = parameters.hash_below(3)
    parameters.train_only(Window(1, 2))
    with torch.no_grad():
        for tensor in parameters.adapters[1].parameters():
            tensor += 1.0  # local steps of a site whose update was refused
    trained = parameters.export()
    parameters.load({key: array for key, array in trained.items() if key.startswith("adapters.0.")})
    assert not parameters.adapters[1].is_trained and parameters.hash_below(3) == untrained
    parameters.load(trained)
    assert all(array.tobytes() == trained[key].tobytes() for key, array in parameters.export().items())
    assert parameters.hash_below(3) != untrained


def test_a_layer_that_is_named_in_part_keeps_the_rest() -> None:
    parameters = _parameters("bottleneck")
    parameters.load({key: np.full_like(array, 0.5) for key, array in parameters.export().items()})
    parameters.load({"adapters.2.up_bias": np.zeros(8, np.float32)})
    now = parameters.export()
    assert now["adapters.2.up_weight"].all() and not now["adapters.2.up_bias"].any()
    assert not now["adapters.1.up_weight"].any()
