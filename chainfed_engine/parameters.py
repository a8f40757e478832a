"""The trained parameters of a model as named arrays: every adapter and the classifier, loaded, hashed and exported.

Keys are those of `types.adapter_key` and `types.classifier_key`. Arrays that a module already holds (the same object
as at the last load) are not copied again, so that many sites can share one model cheaply.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from chainfed_engine.adapters import Adapter
from chainfed_engine.errors import InvalidArgument
from chainfed_engine.types import Arrays, Window, adapter_key, classifier_key, layer_of_key


class Parameters:
    def __init__(self, adapters: Mapping[int, Adapter], classifier: nn.Module | None) -> None:
        self.adapters, self.classifier = adapters, classifier
        self._tensors: dict[str, nn.Parameter] = {}
        for layer, adapter in adapters.items():
            self._tensors.update({adapter_key(layer, name): p for name, p in adapter.named_parameters()})
        if classifier is not None:
            self._tensors.update({classifier_key(name): p for name, p in classifier.named_parameters()})
        self._zero_at_first = {key for key, parameter in self._tensors.items() if not parameter.any()}
        self._loaded: dict[str, np.ndarray[Any, Any]] = {}
        self._hashes: dict[int, str] = {}

    def load(self, arrays: Arrays) -> None:
        """Copy the arrays whose keys are parameters into them; other keys (stand-ins) are left to their users. A layer
        of which nothing is named is the identity: what was trained in it here counts for nobody else."""
        self._forget_all_but({layer for layer in map(layer_of_key, arrays) if layer is not None})
        for key, parameter in self._tensors.items():
            array = arrays.get(key)
            if array is None or self._loaded.get(key) is array:
                continue
            if array.shape != tuple(parameter.shape) or array.dtype != np.float32:
                raise InvalidArgument(
                    f"{key}: expected float32 {list(parameter.shape)}, got {array.dtype} {list(array.shape)}; "
                    "the run was made with another adapter, adapter_size or number of labels"
                )
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(array))
            self._changed(key)
            self._loaded[key] = array

    def _forget_all_but(self, layers: set[int]) -> None:
        for layer, adapter in self.adapters.items():
            if layer in layers or not adapter.is_trained:
                continue
            for name, parameter in adapter.named_parameters():
                key = adapter_key(layer, name)
                if key in self._zero_at_first:
                    with torch.no_grad():
                        parameter.zero_()
                self._changed(key)

    def train_only(self, window: Window, *, classifier: bool = True) -> list[nn.Parameter]:
        """Let gradient flow to the window's adapters and (`classifier`) the classifier alone; returns them in a fixed
        order."""
        keys = self.keys(window, classifier=classifier)
        for key, parameter in self._tensors.items():
            parameter.requires_grad_(key in keys)
            parameter.grad = None
        for key in keys:
            self._changed(key)
        return [self._tensors[key] for key in keys]

    def tensors(self) -> list[nn.Parameter]:
        """Every parameter, trained or not."""
        return list(self._tensors.values())

    def keys(self, window: Window, *, classifier: bool = True) -> list[str]:
        """Keys trained in a stage with this window."""
        layers = {
            adapter_key(layer, name) for layer in window.layers for name, _ in self.adapters[layer].named_parameters()
        }
        return [key for key in self._tensors if key in layers or (classifier and key.startswith("classifier."))]

    def export(self, window: Window | None = None, *, classifier: bool = True) -> Arrays:
        """float32 copies of the parameters trained with `window`, or of all."""
        keys: Iterable[str] = self._tensors if window is None else self.keys(window, classifier=classifier)
        return {key: self._tensors[key].detach().cpu().numpy().copy() for key in keys}

    def hash_below(self, layer: int) -> str:
        """Hash of the adapters of layers 0 .. layer - 1; an untrained adapter is the identity and hashes as such."""
        digest = hashlib.sha256()
        for below in range(layer):
            if below not in self._hashes:
                self._hashes[below] = self._hash_one(below)
            digest.update(self._hashes[below].encode())
        return digest.hexdigest()

    def _hash_one(self, layer: int) -> str:
        if not self.adapters[layer].is_trained:
            return "identity"
        digest = hashlib.sha256(type(self.adapters[layer]).__name__.encode())  # equal arrays may mean something else
        for name, parameter in self.adapters[layer].named_parameters():
            digest.update(name.encode())
            array: Any = parameter.detach().contiguous().cpu().numpy()
            digest.update(memoryview(array).cast("B"))
        return digest.hexdigest()

    def _changed(self, key: str) -> None:
        self._loaded.pop(key, None)
        if key.startswith("adapters."):
            self._hashes.pop(int(key.split(".")[1]), None)
