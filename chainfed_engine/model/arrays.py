"""Trained parameters as NumPy arrays under dotted keys, and back: what a message or a run state carries of a module.

Leaves: fresh f32 copies, in the module's own order. Enters: arrays of exactly the module's shapes, checked before any
parameter is touched.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn

from chainfed_engine.errors import InvalidArgument
from chainfed_engine.types import Arrays


def module_arrays(module: nn.Module, key: Callable[[str], str]) -> Arrays:
    """f32 copies of the module's parameters; `key` turns a parameter's name into the message's key."""
    return {key(name): value.detach().float().cpu().numpy().copy() for name, value in module.named_parameters()}


def load_module_arrays(module: nn.Module, arrays: Mapping[str, np.ndarray], key: Callable[[str], str]) -> None:
    """Copy `arrays` into the module's parameters; keys of other modules are ignored.

    Raises InvalidArgument for a missing key, another shape or a dtype that is not floating point, and then changes
    nothing.
    """
    for name, value in module.named_parameters():
        if key(name) not in arrays:
            raise InvalidArgument(f"{key(name)}: expected an array {list(value.shape)}, got none")
        array = arrays[key(name)]
        if array.shape != tuple(value.shape) or array.dtype.kind != "f":
            raise InvalidArgument(
                f"{key(name)}: expected floating point {list(value.shape)}, got {array.dtype} {list(array.shape)}"
            )
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.copy_(torch.from_numpy(np.ascontiguousarray(arrays[key(name)])))


def seeded(*numbers: int) -> torch.Generator:
    """A generator whose stream depends on all of `numbers` (each >= 0) and on nothing else."""
    state = np.random.SeedSequence(list(numbers)).generate_state(1, dtype=np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)
