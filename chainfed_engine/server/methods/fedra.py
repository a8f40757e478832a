"""FedRA: every client trains a shallow model of a few random layers; a layer is averaged over those who had it.

A client runs the embedding, its layers in order and the head; the layers it was not given are skipped. The adapters of
a layer that nobody was given stay as they are. Source: Su, Li, Xue, "FedRA: A Random Allocation Strategy for Federated
Tuning to Unleash the Power of Heterogeneous Clients", ECCV 2024, arXiv 2311.11227. Here all clients get the same number
of layers, and adapters are those of the configuration.
"""

import numpy as np

from chainfed_engine.server.methods.averaging import Averaging
from chainfed_engine.server.sampling import LAYER_STREAM, client_seed
from chainfed_engine.types import Arrays, Stage, Window


class RandomLayers(Averaging):
    def stage(self, stage: Stage, round_id: int, client: str) -> Stage:
        """The same random layers for the same seed, round and client."""
        window = stage.window
        count = min(self.config.random_layers or -(-window.size // 2), window.size)
        generator = np.random.default_rng(client_seed(self.config.seed, LAYER_STREAM, round_id, client))
        picked = generator.choice(window.size, size=count, replace=False) + window.start
        return Stage(stage.kind, Window(window.start, window.stop, tuple(sorted(picked.tolist()))), stage.sweep)

    def needed(self, stage: Stage, start_layer: int) -> tuple[Arrays, dict[str, str]]:
        return self.model.select(list(self.model.trained(stage)))
