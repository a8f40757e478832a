"""FLoRA on a client: fresh factors of the client's own rank on top of the sum of all earlier rounds' products.

A factor of rank r is held in arrays of the largest rank whose other rows and columns are zero: they have no gradient
and stay zero, so that one module serves every rank. What is sent is the r rows of A, and the r columns of B times
alpha / rank. Source: Wang et al., NeurIPS 2024, arXiv 2409.05976 (see `server.methods.flora`).
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from chainfed_engine.adapters import Adapter
from chainfed_engine.adapters.lora import BasedLoRA
from chainfed_engine.errors import InvalidArgument
from chainfed_engine.step import StageTrainer
from chainfed_engine.types import Arrays, Scalar, Stage, adapter_key


class StackingTrainer(StageTrainer):
    def new_adapter(self, layer: int) -> Adapter:
        config, model = self.config, self.model
        return BasedLoRA.for_layer(model.family, model.shape, rank=config.adapter_size, layer=layer, seed=config.seed)

    def begin(
        self,
        stage: Stage,
        arrays: Arrays,
        *,
        cache_dir: Path | None,
        lr: float,
        settings: Mapping[str, Scalar] | None = None,
    ) -> None:
        settings = settings or {}
        rank, seed = int(settings.get("rank", 0)), int(settings.get("seed", 0))
        if not 1 <= rank <= self.config.adapter_size:
            raise InvalidArgument(f"flora: expected a rank of 1 to {self.config.adapter_size}, got {rank}")
        fresh: Arrays = {}
        for layer in stage.window.layers:
            for name, array in self.lora(layer).fresh_factors(rank, seed).items():
                fresh[adapter_key(layer, name)] = array
        super().begin(stage, {**arrays, **fresh}, cache_dir=cache_dir, lr=lr, settings=settings)
        for layer in stage.window.layers:
            for base in self.lora(layer).bases:
                base.requires_grad_(False)
        self._rank = rank

    def lora(self, layer: int) -> BasedLoRA:
        adapter = self.adapters[layer]
        assert isinstance(adapter, BasedLoRA)
        return adapter

    def trained(self) -> Arrays:
        """This client's factors, A [r, K] and scaled B [N, r], and the classifier."""
        sent: Arrays = {}
        for key, array in super().trained().items():
            if key.endswith("_a"):
                sent[key] = array[: self._rank]
            elif key.endswith("_b"):
                scale = self.lora(int(key.split(".")[1])).scale
                sent[key] = np.ascontiguousarray(array[:, : self._rank]) * np.float32(scale)
            elif not key.endswith("_base"):
                sent[key] = array
        return sent
