"""What sets each method apart on a client, on tiny random models: no graph, fixed ranks, steps that seeds explain."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from chainfed_engine.config import ChainConfig
from chainfed_engine.directions import direction, walk
from chainfed_engine.errors import InvalidArgument
from chainfed_engine.methods import trainer_class
from chainfed_engine.methods.fwdllm import ForwardGradientTrainer
from chainfed_engine.step import StageTrainer
from chainfed_engine.types import SEED_COEFFICIENTS, Arrays, Batch, Stage, Window
from tests.conftest import Checkpoint, make_batch

WHOLE = Stage("window", Window(0, 3), 0)


@pytest.fixture(params=["bert", "llama"])
def model(request: pytest.FixtureRequest, checkpoint: Callable[..., Checkpoint]) -> Checkpoint:
    return checkpoint(request.param, "Model" if request.param == "bert" else "ForCausalLM")


@pytest.fixture
def opened() -> Iterator[list[StageTrainer]]:
    made: list[StageTrainer] = []
    yield made
    for trainer in made:
        trainer.end()
        trainer.model.store.close()


def open_trainer(opened: list[StageTrainer], model: Checkpoint, method: str, **fields: Any) -> Any:
    options = {"adapter_size": 4, "lr": 0.01, "perturbations": 3, "num_seeds": 8, "stand_in": False, **fields}
    config = ChainConfig(method=method, **options)  # type: ignore[arg-type]
    trainer = trainer_class(config.method)(model.open(), config, task="classification", num_labels=3)
    opened.append(trainer)
    return trainer


def labelled(seed: int = 0) -> Batch:
    batch = make_batch([9, 5, 7], seed=seed)
    batch.labels = torch.tensor([0, 1, 2])
    return batch


def begin(trainer: StageTrainer, arrays: Arrays, stage: Stage = WHOLE, **settings: Any) -> None:
    trainer.begin(stage, arrays, cache_dir=None, lr=0.01, settings={"seed": 3, **settings})


def started(trainer: StageTrainer, seed: int = 2) -> Arrays:
    """Parameters at which every gradient is alive."""
    generator = np.random.default_rng(seed)
    return {
        key: (generator.normal(size=array.shape) * 0.2).astype(np.float32)
        for key, array in trainer.parameters.export().items()
    }


@pytest.mark.parametrize("method", ["fwdllm", "fedkseed"])
def test_forward_methods_never_build_a_graph(
    opened: list[StageTrainer], model: Checkpoint, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    trainer = open_trainer(opened, model, method)
    kept: list[int] = []
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_, **__: pytest.fail("a backward pass was started"))
    begin(trainer, {**started(trainer), SEED_COEFFICIENTS: np.zeros(8, np.float32)})

    def saved(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
        trainer.step(labelled())
    assert kept == []
    assert not any(parameter.requires_grad for parameter in trainer.parameters.tensors())


def test_the_slope_is_the_gradient_along_the_direction_and_moves_nothing(
    opened: list[StageTrainer], model: Checkpoint
) -> None:
    forward: ForwardGradientTrainer = open_trainer(opened, model, "fwdllm")
    arrays, batch = started(forward), labelled()
    begin(forward, arrays)
    along = direction(11, forward.shapes)
    slope, _ = forward.slope(batch, along)
    assert all(forward.trained_tensors[key].numpy().tobytes() == arrays[key].tobytes() for key in along)

    plain: StageTrainer = open_trainer(opened, model, "full-adapters")
    begin(plain, arrays)
    assert plain.window is not None
    loss = plain.objective(plain.window(plain.boundary(batch), plain.model.context(batch)), batch)
    tensors = dict(zip(plain.parameters.keys(WHOLE.window), plain.optimizer.parameters, strict=True))
    gradients = dict(zip(tensors, torch.autograd.grad(loss, list(tensors.values())), strict=True))
    expected = sum(float((gradients[key] * torch.from_numpy(along[key])).sum()) for key in along)
    assert slope == pytest.approx(expected, rel=0.05, abs=0.02)


def test_the_mean_forward_gradient_points_where_the_gradient_does(
    opened: list[StageTrainer], model: Checkpoint
) -> None:
    trainer = open_trainer(opened, model, "fwdllm", perturbations=200)
    begin(trainer, started(trainer))
    batch = labelled()
    loss = trainer.step(batch)
    gradient = trainer.trained()
    for key, tensor in trainer.trained_tensors.items():
        tensor.sub_(torch.from_numpy(gradient[key]), alpha=1e-3)
    assert trainer.loss(batch) < loss


def test_fedkseed_sends_numbers_from_which_its_walk_can_be_rebuilt(
    opened: list[StageTrainer], model: Checkpoint
) -> None:
    trainer = open_trainer(opened, model, "fedkseed", seed=5)
    origin = trainer.parameters.export()
    sent = np.linspace(-0.02, 0.02, 8).astype(np.float32)
    begin(trainer, {SEED_COEFFICIENTS: sent})
    for seed in range(3):
        trainer.step(labelled(seed))
    update = trainer.trained()
    assert {key: array.shape for key, array in update.items()} == {SEED_COEFFICIENTS: (8,)}
    assert 1 <= np.count_nonzero(update[SEED_COEFFICIENTS]) <= 3
    rebuilt = walk(origin, sent + update[SEED_COEFFICIENTS], 5)
    for key, tensor in trainer.trained_tensors.items():
        np.testing.assert_allclose(tensor.numpy(), rebuilt[key], atol=1e-6)


def test_fedkseed_without_the_runs_number_of_seeds_is_refused(opened: list[StageTrainer], model: Checkpoint) -> None:
    trainer = open_trainer(opened, model, "fedkseed")
    with pytest.raises(InvalidArgument, match="expected 8 coefficients"):
        begin(trainer, {SEED_COEFFICIENTS: np.zeros(9, np.float32)})


def test_flora_trains_only_its_rank_and_leaves_the_base(opened: list[StageTrainer], model: Checkpoint) -> None:
    trainer = open_trainer(opened, model, "flora")
    bases = {key: array for key, array in started(trainer).items() if key.endswith("_base")}
    begin(trainer, bases, rank=2)
    for seed in range(3):
        trainer.step(labelled(seed))
    whole = trainer.parameters.export()
    for key, array in whole.items():
        if key.endswith("_a"):
            assert array[:2].all() and not array[2:].any(), "rows beyond the rank stay zero"
        elif key.endswith("_b"):
            assert array[:, :2].any() and not array[:, 2:].any()
        elif key.endswith("_base"):
            assert array.tobytes() == bases[key].tobytes(), "the sum of earlier rounds is frozen"
    shapes = {key.rsplit(".", 1)[1]: array.shape for key, array in trainer.trained().items()}
    assert shapes["query_a"] == (2, 64) and shapes["query_b"] == (64, 2) and "query_base" not in shapes


def test_a_floras_products_moved_into_the_base_compute_the_same(opened: list[StageTrainer], model: Checkpoint) -> None:
    trainer = open_trainer(opened, model, "flora")
    begin(trainer, {}, rank=4)
    for seed in range(3):
        trainer.step(labelled(seed))
    sent, whole = trainer.trained(), trainer.parameters.export()
    merged = dict(whole)
    for key in sent:
        if key.endswith("_a"):
            name = key.removesuffix("_a")
            merged[f"{name}_base"] = sent[f"{name}_b"] @ sent[key]
            merged[f"{name}_b"] = np.zeros_like(whole[f"{name}_b"])
    batch = labelled(7)
    first, second = trainer.evaluate([batch], whole), trainer.evaluate([batch], merged)
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)
    untrained = {key: np.zeros_like(a) if key.startswith("adapters.") else a for key, a in whole.items()}
    assert trainer.evaluate([batch], untrained)["loss"] != pytest.approx(first["loss"], rel=1e-4)


def test_fedra_runs_the_picked_layers_alone(opened: list[StageTrainer], model: Checkpoint) -> None:
    trainer = open_trainer(opened, model, "fedra")
    arrays, batch = started(trainer), labelled()
    begin(trainer, arrays, Stage("window", Window(0, 3, (0, 2)), 0))
    assert trainer.window is not None
    hidden, context = trainer.model.embed(batch), trainer.model.context(batch)
    with torch.no_grad():
        shallow = trainer.window(hidden, context)
        for layer in (0, 2):
            hidden = trainer.model.run_layer(layer, hidden, context, trainer.adapters[layer])
    torch.testing.assert_close(shallow, hidden, rtol=1e-4, atol=1e-4)
    trainer.step(batch)
    layers = {key.split(".")[1] for key in trainer.trained() if key.startswith("adapters.")}
    assert layers == {"0", "2"}
