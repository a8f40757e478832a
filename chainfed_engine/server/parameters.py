"""The global parameters with a version each. Owns its arrays: replaced, never changed in place.

A version is a fingerprint of dtype, shape and bytes, so a parameter that did not change is never sent again, and a
client that kept its copy across a restart of the server is still right about it.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from chainfed_engine.errors import InvalidArgument
from chainfed_engine.types import Arrays, layer_of_key
from chainfed_engine.update_format import fingerprint


class Parameters:
    """Float32 arrays under their keys. Reads share the arrays, nobody writes to them; `replace` installs new ones."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays: Arrays = {}
        self._versions: dict[str, str] = {}
        self._identity_layers: set[int] = set()
        self.replace(arrays)

    def replace(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Install copies of `arrays`; all-or-nothing."""
        copies = {key: _checked_copy(key, array) for key, array in arrays.items()}
        self._arrays.update(copies)
        self._versions.update({key: fingerprint(array) for key, array in copies.items()})
        for layer in {layer_of_key(key) for key in copies} - {None}:
            assert layer is not None
            (self._identity_layers.add if self._acts_as_identity(layer) else self._identity_layers.discard)(layer)

    def remove(self, keys: Iterable[str]) -> None:
        """Let go of arrays that belong to no layer."""
        for key in keys:
            del self._arrays[key], self._versions[key]

    def sorted_keys(self) -> list[str]:
        return sorted(self._arrays)

    def select(self, keys: Iterable[str]) -> Arrays:
        return {key: self._arrays[key] for key in keys}

    def versions(self, keys: Iterable[str]) -> dict[str, str]:
        return {key: self._versions[key] for key in keys}

    def layer_keys(self, layers: Iterable[int]) -> list[str]:
        """Keys of the adapters of these layers, sorted."""
        wanted = set(layers)
        return [key for key in self.sorted_keys() if layer_of_key(key) in wanted]

    def classifier_keys(self) -> list[str]:
        return [key for key in self.sorted_keys() if key.startswith("classifier.")]

    def trained_layers(self) -> set[int]:
        """Layers whose adapter does something: its `up` side is not all zero (as it is before any training)."""
        return {layer for key in self._arrays if (layer := layer_of_key(key)) is not None} - self._identity_layers

    def _acts_as_identity(self, layer: int) -> bool:
        up = [key for key in self.layer_keys([layer]) if key.rsplit(".", 1)[1].startswith("up_")]
        return bool(up) and not any(self._arrays[key].any() for key in up)


def _checked_copy(key: str, array: np.ndarray) -> np.ndarray:
    if not isinstance(array, np.ndarray) or array.dtype != np.float32:
        raise InvalidArgument(f"parameter {key}: expected a float32 array, got {getattr(array, 'dtype', type(array))}")
    if not np.isfinite(array).all():
        raise InvalidArgument(f"parameter {key}: expected finite values, got NaN or infinity")
    return np.array(array, order="C", copy=True)
