"""Run directories with random adapters, as a run would leave them, and what the engine itself computes with them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chainfed_engine.config import ChainConfig, DataConfig, RunConfig
from chainfed_engine.config_file import dump_config
from chainfed_engine.exports.trained_run import TrainedRun
from chainfed_engine.federation.files import write_arrays
from chainfed_engine.federation.run_directory import ADAPTERS_FORMAT, ADAPTERS_VERSION
from chainfed_engine.model.frozen import FrozenModel
from chainfed_engine.model.store import LayerStore
from chainfed_engine.types import Arrays, Batch
from tests.conftest import Checkpoint

LABELS = ("bad", "fair", "good")


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """make_run(checkpoint, adapter=, labels=, pooling=, layers=): a run directory; layers 0 and 2 trained."""

    def make(
        checkpoint: Checkpoint,
        *,
        adapter: Any = "lora",
        labels: tuple[str, ...] = (),
        pooling: Any = "auto",
        layers: tuple[int, ...] = (0, 2),
    ) -> Path:
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        chain = ChainConfig(adapter=adapter, adapter_size=4, pooling=pooling)
        data = DataConfig(train="train.csv", **({"label": "label"} if labels else {"response": "response"}))
        config = RunConfig(chain, data, str(checkpoint.path))
        (folder / "config.toml").write_text(dump_config(config))
        if labels:
            (folder / "labels.json").write_text(json.dumps(labels))
        arrays = random_parameters(checkpoint, config, len(labels), layers)
        record = {"format": ADAPTERS_FORMAT, "version": ADAPTERS_VERSION, "adapter": adapter, "task": data.task}
        write_arrays(folder / "adapters.safetensors", arrays, record)
        return folder

    return make


def random_parameters(checkpoint: Checkpoint, config: RunConfig, num_labels: int, layers: tuple[int, ...]) -> Arrays:
    from chainfed_engine.step import StageTrainer

    task = config.data.task
    with checkpoint.open().store as store:
        trainer = StageTrainer(FrozenModel(store), config.chain, task=task, num_labels=num_labels)
        arrays = trainer.parameters.export()
    rng = np.random.default_rng(0)
    for key, array in arrays.items():
        if key.startswith("classifier.") or int(key.split(".")[1]) in layers:
            array += rng.normal(0.0, 0.1, array.shape).astype(np.float32)
    return arrays


@torch.no_grad()
def engine_logits(run_dir: Path, batch: Batch) -> torch.Tensor:
    """Logits [B,C] of the classifier, or [M,V] of the tokens, from the store's weights with f32 activations."""
    run = TrainedRun.read(run_dir)
    with LayerStore.open(run.config.store) as store:
        model = FrozenModel(store, "f32")
        adapters = run.adapters(model.shape)
        hidden, context = model.embed(batch), model.context(batch)
        for index in range(model.num_layers):
            hidden = model.run_layer(index, hidden, context, adapters[index])
        hidden = model.final_norm(hidden)
        if run.task == "classification":
            return run.classifier(model.shape)(hidden, batch.attention_mask)
        assert model.head is not None
        return model.head.logits(hidden[batch.attention_mask.bool()])


def original(checkpoint: Checkpoint) -> Path:
    """The checkpoint folder the store was made from."""
    return checkpoint.path.parent / "checkpoint"
