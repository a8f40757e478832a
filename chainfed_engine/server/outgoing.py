"""The parameters as they go down to clients: themselves, or in eight bits. In: arrays and their versions; out: those of
what is sent, each packed once however many clients ask for it. Maps from hidden state to hidden state go as they are:
the packed form of a large one would be held beside it, and what rounding does to gradients through one is not known."""

from collections.abc import Mapping

import numpy as np

from chainfed_engine.stand_in import is_map
from chainfed_engine.types import Arrays
from chainfed_engine.update_format import fingerprint, pack


class Outgoing:
    """Keeps the packed form of the last version of each parameter, a quarter of its bytes."""

    def __init__(self, *, packs: bool) -> None:
        self._packs = packs
        self._packed: dict[str, tuple[str, Arrays, dict[str, str]]] = {}

    def of(self, arrays: Arrays, versions: Mapping[str, str]) -> tuple[Arrays, Mapping[str, str]]:
        """What stands for these, shared and not to be written to, and its versions."""
        if not self._packs:
            return arrays, versions
        sent: Arrays = {}
        sent_versions: dict[str, str] = {}
        for key, array in arrays.items():
            version = versions[key]
            if is_map(key):
                sent[key], sent_versions[key] = array, version
                continue
            if key not in self._packed or self._packed[key][0] != version:
                self._pack(key, array, version)
            sent |= self._packed[key][1]
            sent_versions |= self._packed[key][2]
        return sent, sent_versions

    def _pack(self, key: str, array: np.ndarray, version: str) -> None:
        packed = pack(key, array)
        versions = {name: fingerprint(part) for name, part in packed.items()}
        if key in self._packed:
            # What is as before stays the same array: clients in this process share it.
            _, before, versions_before = self._packed[key]
            packed |= {name: before[name] for name in packed if versions[name] == versions_before[name]}
        self._packed[key] = (version, packed, versions)
