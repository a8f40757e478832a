"""A stage on a CUDA device against the same stage on the CPU; skipped with a reason where there is no device."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from chainfed_engine import native
from chainfed_engine.config import ChainConfig
from chainfed_engine.errors import ChainfedError
from chainfed_engine.model.place import CPU, Place, find_place
from chainfed_engine.step import StageTrainer
from chainfed_engine.types import Batch, Stage, Window
from tests.conftest import Checkpoint, make_batch


@pytest.fixture
def place() -> Place:
    if not native.cuda_is_built():
        pytest.skip("the CUDA backend is not built (CHAINFED_CUDA=1)")
    try:
        return find_place("cuda")
    except ChainfedError as error:
        pytest.skip(str(error))


def labelled(task: str) -> list[Batch]:
    batches = []
    for index, lengths in enumerate(([17, 9, 1, 12], [5, 8])):
        batch = make_batch(lengths, seed=index)
        batch.sample_ids = [f"{index} {row}" for row in range(len(lengths))]
        if task == "classification":
            batch.labels = torch.arange(len(lengths)) % 3
        else:
            batch.labels = torch.where(batch.attention_mask.bool(), batch.input_ids, -100)
        batches.append(batch)
    return batches


def trained(
    source: Checkpoint, where: Place, task: str, num_slots: int | None, folder: Path
) -> tuple[list[float], dict[str, np.ndarray], dict[str, float]]:
    """Losses, trained arrays and scores of two steps through cache, window and head in exact arithmetic."""
    model = source.open("f32", num_slots=num_slots, place=where)
    config = ChainConfig(adapter_size=4, stand_in=False)
    trainer = StageTrainer(model, config, task=task, num_labels=3, cache_format="int8")  # type: ignore[arg-type]
    arrays = trainer.parameters.export()
    trainer.begin(Stage("window", Window(1, 2), 0), arrays, cache_dir=folder, lr=1e-2, settings={"start_layer": 1})
    batches = labelled(task)
    trainer.prepare(batches)
    losses = [trainer.step(batch) for batch in batches]
    arrays = {**arrays, **trainer.trained()}
    scores = trainer.evaluate(batches, arrays)
    trainer.end()
    model.store.close()
    return losses, trainer.trained(), scores


@pytest.mark.parametrize("num_slots", [None, 2])
@pytest.mark.parametrize(("architecture", "task"), [("bert", "classification"), ("llama", "causal-lm")])
def test_a_stage_on_a_device_is_the_cpus(
    checkpoint: Callable[..., Checkpoint],
    place: Place,
    architecture: str,
    task: str,
    num_slots: int | None,
    tmp_path: Path,
) -> None:
    source = checkpoint(architecture, "Model" if task == "classification" else "ForCausalLM")
    on_cpu = trained(source, CPU, task, num_slots, tmp_path / "cpu")
    there = trained(source, place, task, num_slots, tmp_path / "there")
    # The cache rounds to int8: a last bit that differs before it moves a value by a step of 1/127 of its group.
    np.testing.assert_allclose(there[0], on_cpu[0], rtol=1e-3)
    for key, expected in on_cpu[1].items():
        np.testing.assert_allclose(there[1][key], expected, atol=2e-3, err_msg=key)
    for name, value in on_cpu[2].items():
        assert there[2][name] == pytest.approx(value, rel=1e-3), name
