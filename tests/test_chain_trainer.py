"""`ChainTrainer` as a training script uses it: dicts of tensors in, a trained chain out, no federation."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from chainfed_engine import ChainConfig, ChainTrainer, classifier_fit
from chainfed_engine.chain_trainer import as_batch
from chainfed_engine.errors import ConfigError, InvalidArgument
from chainfed_engine.step import StageTrainer
from tests.conftest import Checkpoint, make_batch


def loader(labelled: str) -> list[dict[str, torch.Tensor]]:
    made = []
    for seed, lengths in enumerate(([17, 9, 4, 12], [5, 8, 30], [3, 20, 11])):
        batch = make_batch(lengths, seed=seed)
        item = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if labelled == "classes":
            item["labels"] = (batch.input_ids[:, 0] % 2).long()
        else:
            item["labels"] = torch.where(batch.attention_mask.bool(), batch.input_ids, -100)
        made.append(item)
    return made


@pytest.mark.parametrize("adapter", ["bottleneck", "lora"])
@pytest.mark.parametrize(
    ("name", "head", "labelled"), [("bert", "Model", "classes"), ("llama", "ForCausalLM", "tokens")]
)
def test_two_sweeps_of_the_chain_lower_the_loss_of_the_whole_model(
    checkpoint: Callable[..., Checkpoint], name: str, head: str, labelled: str, adapter: str
) -> None:
    data = loader(labelled)
    config = ChainConfig(window=1, rounds=6, probe_rounds=0, start_layer=0, adapter=adapter, adapter_size=4, lr=3e-3)  # type: ignore[arg-type]
    measure = "loss" if labelled == "classes" else "token_loss"
    with ChainTrainer(checkpoint(name, head).open(), config, num_labels=2 if labelled == "classes" else 0) as trainer:
        before = trainer.evaluate(data)[measure]
        profile = trainer.profile(data[0])
        assert len(profile["cka"]) == 3 and profile["start_layer"] == 0
        windows = []
        while not trainer.done:
            windows.append(trainer.stage.window.start)
            for _ in range(8):
                for batch in data:
                    trainer.step(batch)
            trainer.advance()
        assert windows == [0, 1, 2, 0, 1, 2]
        assert trainer.evaluate(data)[measure] < before


def test_probing_fits_the_classifier_to_the_batches_it_is_given(checkpoint: Callable[..., Checkpoint]) -> None:
    data = loader("classes")
    config = ChainConfig(window=1, rounds=2, probe_rounds=1, start_layer=0, adapter_size=4)
    with ChainTrainer(checkpoint("bert").open(), config, num_labels=2) as trainer:
        before = trainer.state_dict()
        losses = [trainer.step(batch) for batch in data]
        stage = trainer.advance()
        assert stage is not None and stage.kind == "window"
        changed = {key for key, value in trainer.state_dict().items() if value.tobytes() != before[key].tobytes()}
        assert changed == {"classifier.out_weight", "classifier.out_bias"}
        assert trainer.evaluate(data)["loss"] < float(np.mean(losses))


def test_the_last_rounds_fit_the_classifier_to_their_batches_and_half_the_first(
    checkpoint: Callable[..., Checkpoint],
) -> None:
    data = loader("classes")
    config = ChainConfig(window=1, rounds=3, probe_rounds=1, refit_rounds=1, start_layer=2, adapter_size=4, lr=1e-2)
    with ChainTrainer(checkpoint("bert").open(), config, num_labels=2) as trainer:
        start = trainer.state_dict()
        for _ in range(2):
            for batch in data[:1]:
                trainer.step(batch)
            trainer.advance()
        assert trainer.stage.kind == "probe"
        trained = trainer.state_dict()
        for batch in data:
            trainer.step(batch)
        assert trainer.advance() is None
        fitted = trainer.state_dict()
    alone = StageTrainer(checkpoint("bert").open(), config, task="classification", num_labels=2)
    statistics, _ = alone.classifier_statistics([as_batch(batch) for batch in data], trained)
    first, _ = alone.classifier_statistics([as_batch(data[0])], start)
    both = [classifier_fit.weighted(first["classifier.factor"], 0.5), statistics["classifier.factor"]]
    expected = classifier_fit.solve(classifier_fit.merge(both), 2)
    np.testing.assert_allclose(fitted["classifier.out_weight"], expected["classifier.out_weight"], rtol=1e-3, atol=1e-4)
    assert all(fitted[key].tobytes() == trained[key].tobytes() for key in trained if key.startswith("adapters."))


def test_a_classifier_that_explains_its_batches_is_left_as_it_is_in_the_last_rounds(
    checkpoint: Callable[..., Checkpoint],
) -> None:
    data = loader("classes")[:1]
    config = ChainConfig(window=3, rounds=60, probe_rounds=1, refit_rounds=1, adapter_size=16, lr=0.01, lr_decay="none")
    with ChainTrainer(checkpoint("bert").open(), config, num_labels=2) as trainer:
        while trainer.round_id < 59:
            trainer.step(data[0])
            trainer.advance()
        trained = trainer.state_dict()
        assert trainer.stage.kind == "probe" and trainer.step(data[0]) < 0.06
        trainer.advance()
        assert all(value.tobytes() == trained[key].tobytes() for key, value in trainer.state_dict().items())


def test_a_last_round_without_a_batch_fits_what_is_known(checkpoint: Callable[..., Checkpoint]) -> None:
    data = loader("classes")
    config = ChainConfig(window=3, rounds=3, probe_rounds=1, refit_rounds=1, adapter_size=4)
    with ChainTrainer(checkpoint("bert").open(), config, num_labels=2) as trainer:
        for _ in range(2):
            trainer.step(data[0])
            trainer.advance()
        assert trainer.stage.kind == "probe" and trainer.advance() is None
        assert np.isfinite(trainer.evaluate(data)["loss"])


def test_the_state_moves_to_another_trainer(checkpoint: Callable[..., Checkpoint]) -> None:
    data = loader("classes")
    config = ChainConfig(window=2, rounds=2, start_layer=1, adapter_size=4, lr=1e-2)
    with ChainTrainer(checkpoint("bert").open(), config, num_labels=2) as trainer:
        trainer.step(data[0])
        state, scores = trainer.state_dict(), trainer.evaluate(data)
    with ChainTrainer(checkpoint("bert").open(), config, num_labels=2) as other:
        assert other.evaluate(data) != scores
        other.load_state_dict({key: np.array(value) for key, value in state.items()})
        assert other.evaluate(data) == scores
        with pytest.raises(InvalidArgument, match="unknown key"):
            other.load_state_dict({"adapters.9.up_weight": state["adapters.2.up_weight"]})


def test_caches_are_removed_with_a_temporary_folder_and_kept_in_a_given_one(
    checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    config = ChainConfig(window=1, rounds=2, start_layer=1, adapter_size=4)
    with ChainTrainer(checkpoint("bert").open(), config, num_labels=2, cache_dir=tmp_path) as trainer:
        trainer.step(loader("classes")[0])
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["depth-0001.bin", "depth-0001.json"]


def test_mistakes_are_named(checkpoint: Callable[..., Checkpoint]) -> None:
    model = checkpoint("bert").open()
    with ChainTrainer(model, ChainConfig(window=4, start_layer=0), num_labels=2) as trainer:
        with pytest.raises(InvalidArgument, match="call step first"):
            trainer.advance()
        with pytest.raises(ConfigError, match="window"):
            trainer.step(loader("classes")[0])
    with pytest.raises(InvalidArgument, match="at least 2 classes"):
        ChainTrainer(model, num_labels=1)
    with pytest.raises(InvalidArgument, match="no LM head"):
        ChainTrainer(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.zeros(2, 3)}, "input_ids as an int64"),
        ({"attention_mask": torch.ones(2, 4, dtype=torch.int64)}, r"\[B, T\]"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"\[B, T\]"),
        ({"sample_ids": ["one"]}, "one sample id a sequence"),
    ],
)
def test_malformed_batches_are_refused(change: dict, message: str) -> None:
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.int64), **change}
    with pytest.raises(InvalidArgument, match=message):
        as_batch(batch)


def test_the_default_sample_id_names_the_tokens_and_not_the_padding() -> None:
    batch = make_batch([4, 9])
    alone = make_batch([4, 9])
    short = {"input_ids": alone.input_ids[:1, :4], "attention_mask": alone.attention_mask[:1, :4]}
    padded = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    assert as_batch(short).sample_ids[0] == as_batch(padded).sample_ids[0] != as_batch(padded).sample_ids[1]


def test_a_budget_that_cannot_be_kept_here_is_refused(checkpoint: Callable[..., Checkpoint]) -> None:
    with pytest.raises(ConfigError, match="neither plans nor streams"):
        ChainTrainer(checkpoint("bert").open(), ChainConfig(budget="1GiB"), num_labels=2)
