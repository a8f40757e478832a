"""The invariants that make a stage trustworthy, on tiny random models of transformers' own classes."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from chainfed_engine import stand_in
from chainfed_engine.config import ChainConfig
from chainfed_engine.errors import InvalidArgument, NonFiniteLoss
from chainfed_engine.step import StageTrainer
from chainfed_engine.types import Arrays, Batch, Stage, Window, adapter_key
from tests.conftest import Checkpoint, make_batch

LR = 1e-2
LENGTHS = ([17, 9, 1, 12], [5, 8], [3, 20, 11])


def batches(labelled: str = "classes") -> list[Batch]:
    made = []
    for index, lengths in enumerate(LENGTHS):
        batch = make_batch(lengths, seed=index)
        batch.sample_ids = [f"{index} {row}" for row in range(len(lengths))]
        if labelled == "classes":
            batch.labels = torch.arange(len(lengths)) % 3
        else:
            batch.labels = torch.where(batch.attention_mask.bool(), batch.input_ids, -100)
            batch.labels[:, :1] = -100
        made.append(batch)
    return made


def trainer(
    checkpoint: Checkpoint, *, num_slots: int | None = None, labels: int = 3, **options: object
) -> StageTrainer:
    names = ("cache_format", "micro_batch", "recompute", "fill_bytes")
    own = {name: options.pop(name) for name in names if name in options}
    config = ChainConfig(adapter_size=4, **{"stand_in": False, **options})  # type: ignore[arg-type]
    task = "classification" if labels else "causal-lm"
    return StageTrainer(checkpoint.open(num_slots=num_slots), config, task=task, num_labels=labels, **own)  # type: ignore[arg-type]


def window(start: int, stop: int) -> Stage:
    return Stage("window", Window(start, stop), 0)


def trained_adapters(source: StageTrainer, seed: int = 5) -> Arrays:
    """All parameters with every adapter made to do something."""
    rng = np.random.default_rng(seed)
    arrays = source.parameters.export()
    return {
        key: (rng.normal(size=value.shape) * 0.1).astype(np.float32) if key.startswith("adapters.") else value
        for key, value in arrays.items()
    }


@pytest.fixture(params=["bert", "llama"])
def model(request: pytest.FixtureRequest, checkpoint: Callable[..., Checkpoint]) -> Checkpoint:
    return checkpoint(request.param, "Model" if request.param == "bert" else "ForCausalLM")


@pytest.fixture
def ended() -> Iterator[list[StageTrainer]]:
    """Trainers put in here are ended after the test."""
    made: list[StageTrainer] = []
    yield made
    for each in made:
        each.end()
        each.model.store.close()


def begin(
    made: list[StageTrainer], one: StageTrainer, stage: Stage, arrays: Arrays, cache: Path, start: int | None = None
) -> StageTrainer:
    made.append(one)
    first = stage.window.start if start is None else start
    one.begin(stage, arrays, cache_dir=cache, lr=LR, settings={"start_layer": first})
    return one


def recomputed(one: StageTrainer, batch: Batch, layers: int) -> torch.Tensor:
    """The boundary by a straight run, zeros in the padding."""
    ((_, hidden),) = list(one.prefix.sweep([batch], range(layers)))
    return hidden * batch.attention_mask[..., None]


def test_cached_boundary_is_the_recomputed_one_bit_for_bit(model: Checkpoint, tmp_path: Path, ended: list) -> None:
    one = trainer(model)
    begin(ended, one, window(2, 3), trained_adapters(one), tmp_path)
    assert one.prepare(batches())["prefix_layers_run"] == 2
    for batch in batches():
        cached = one.boundary(batch)
        expected = recomputed(one, batch, 2)
        # The fused adapter sums in another order than torch's; without one the bits are the same.
        torch.testing.assert_close(cached, expected, rtol=1e-5, atol=1e-5)
    one.begin(window(2, 3), one_untrained(model), cache_dir=tmp_path / "plain", lr=LR)
    one.prepare(batches())
    for batch in batches():
        assert torch.equal(one.boundary(batch), recomputed(one, batch, 2))


def one_untrained(checkpoint: Checkpoint) -> Arrays:
    return trainer(checkpoint).parameters.export()


def test_boundary_computed_on_the_fly_equals_the_prepared_one(model: Checkpoint, tmp_path: Path, ended: list) -> None:
    one = trainer(model)
    arrays = trained_adapters(one)
    begin(ended, one, window(2, 3), arrays, tmp_path / "prepared", start=1).prepare(batches())
    prepared = [one.boundary(batch) for batch in batches()]
    begin(ended, one, window(2, 3), arrays, tmp_path / "lazy", start=1)
    for batch, expected in zip(batches(), prepared, strict=True):
        assert torch.equal(one.boundary(batch), expected)
        assert torch.equal(one.boundary(batch), expected), "second time: from the cache"


@pytest.mark.parametrize("cache_format", ["f32", "bf16", "int8"])
def test_a_cache_advanced_layer_by_layer_equals_one_filled_afresh(
    model: Checkpoint, tmp_path: Path, cache_format: str, ended: list
) -> None:
    one = trainer(model, cache_format=cache_format)
    arrays = trained_adapters(one)
    begin(ended, one, window(1, 2), arrays, tmp_path / "walked", start=1).prepare(batches())
    one.end()
    begin(ended, one, window(2, 3), arrays, tmp_path / "walked", start=1)
    assert one.prepare(batches())["prefix_layers_run"] == 1, "only the layer between"
    walked = [one.boundary(batch) for batch in batches()]
    begin(ended, one, window(2, 3), arrays, tmp_path / "afresh", start=1)
    assert one.prepare(batches())["prefix_layers_run"] == 2
    for batch, expected in zip(batches(), walked, strict=True):
        assert torch.equal(one.boundary(batch), expected)


def test_int8_cache_stays_within_its_error_budget(model: Checkpoint, tmp_path: Path, ended: list) -> None:
    one = trainer(model, cache_format="int8")
    begin(ended, one, window(2, 3), one.parameters.export(), tmp_path).prepare(batches())
    for batch in batches():
        cached, expected = one.boundary(batch), recomputed(one, batch, 2)
        cosine = torch.nn.functional.cosine_similarity(cached.flatten(), expected.flatten(), dim=0)
        assert cosine > 0.9999  # groups of 64 at 127 steps a side: relative error about 1/250 of the largest of 64


def test_the_cache_misses_when_an_adapter_below_changes_and_hits_otherwise(
    model: Checkpoint, tmp_path: Path, ended: list
) -> None:
    one = trainer(model)
    arrays = trained_adapters(one)
    begin(ended, one, window(2, 3), arrays, tmp_path).prepare(batches())
    above = {**arrays, adapter_key(2, "up_weight"): arrays[adapter_key(2, "up_weight")] * 2}
    begin(ended, one, window(2, 3), above, tmp_path)
    assert one.prepare(batches())["prefix_layers_run"] == 0, "an adapter above the boundary does not matter"
    below = {**arrays, adapter_key(1, "up_weight"): arrays[adapter_key(1, "up_weight")] * 2}
    begin(ended, one, window(2, 3), below, tmp_path)
    assert one.prepare(batches())["prefix_layers_run"] == 2


def test_a_sample_that_is_new_or_a_damaged_file_makes_a_fresh_fill(
    model: Checkpoint, tmp_path: Path, ended: list
) -> None:
    one = trainer(model)
    arrays = one.parameters.export()
    begin(ended, one, window(2, 3), arrays, tmp_path).prepare(batches()[:2])
    begin(ended, one, window(2, 3), arrays, tmp_path)
    assert one.prepare(batches())["prefix_layers_run"] == 2
    expected = one.boundary(batches()[0])
    one.end()
    path = tmp_path / "depth-0002.bin"
    data = bytearray(path.read_bytes())
    data[0] ^= 0xFF
    path.write_bytes(data)
    begin(ended, one, window(2, 3), arrays, tmp_path)
    assert torch.equal(one.boundary(batches()[0]), expected)


def updates(one: StageTrainer, labelled: str) -> tuple[list[float], Arrays]:
    losses = [one.step(batch) for _ in range(2) for batch in batches(labelled)]
    return losses, one.trained()


@pytest.mark.parametrize("option", [{"num_slots": 2}, {"recompute": True}, {"fill_bytes": 1}])
def test_streamed_or_recomputed_training_leaves_the_same_bits(
    model: Checkpoint, tmp_path: Path, option: dict, ended: list
) -> None:
    labels, labelled = (3, "classes") if model.reference.config.model_type == "bert" else (0, "tokens")
    results = []
    for name, extra in (("plain", {}), ("other", option)):
        one = trainer(model, labels=labels, **extra)
        begin(ended, one, window(1, 3), one.parameters.export(), tmp_path / name).prepare(batches(labelled))
        results.append(updates(one, labelled))
    assert results[0][0] == results[1][0]
    for key, value in results[0][1].items():
        np.testing.assert_array_equal(value, results[1][1][key])


@pytest.mark.parametrize("labelled", ["classes", "tokens"])
def test_micro_batches_add_up_to_the_batch(
    checkpoint: Callable[..., Checkpoint], tmp_path: Path, labelled: str, ended: list
) -> None:
    model = checkpoint("bert") if labelled == "classes" else checkpoint("llama", "ForCausalLM")
    labels = 3 if labelled == "classes" else 0
    losses = []
    for size in (0, 1, 3):
        one = trainer(model, labels=labels, micro_batch=size)
        begin(ended, one, window(1, 3), one.parameters.export(), tmp_path / str(size))
        losses.append(updates(one, labelled)[0])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-4)


def test_window_of_all_layers_is_ordinary_adapter_training_in_torch(
    checkpoint: Callable[..., Checkpoint], ended: list
) -> None:
    model = checkpoint("bert")
    one = trainer(model, auxiliary_weight=0.0, weight_decay=0.0)
    ended.append(one)
    initial = one.parameters.export()
    one.begin(window(0, 3), initial, cache_dir=None, lr=LR)
    losses, _ = updates(one, "classes")

    reference = model.reference
    parameters = {key: torch.nn.Parameter(torch.from_numpy(value.copy())) for key, value in initial.items()}

    def adapter(layer: int) -> Callable[..., torch.Tensor]:
        def apply(_: object, __: object, output: torch.Tensor) -> torch.Tensor:
            down, down_bias, up, up_bias = (
                parameters[adapter_key(layer, name)] for name in ("down_weight", "down_bias", "up_weight", "up_bias")
            )
            return output + torch.nn.functional.gelu(output @ down.T + down_bias) @ up.T + up_bias

        return apply

    hooks = [layer.register_forward_hook(adapter(index)) for index, layer in enumerate(reference.encoder.layer)]
    optimizer = torch.optim.AdamW(parameters.values(), lr=LR, weight_decay=0.0)
    expected = []
    try:
        for _ in range(2):
            for batch in batches():
                hidden = reference(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
                logits = hidden[:, 0] @ parameters["classifier.out_weight"].T + parameters["classifier.out_bias"]
                loss = torch.nn.functional.cross_entropy(logits, batch.labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                expected.append(float(loss.detach()))
    finally:
        for hook in hooks:
            hook.remove()
    assert abs(expected[3] - expected[0]) > 1e-3, "the adapters did move"
    np.testing.assert_allclose(losses, expected, rtol=1e-3)  # AdamW's first steps amplify rounding in tiny gradients


def test_untrained_later_adapters_make_the_auxiliary_branch_the_local_one(
    model: Checkpoint, tmp_path: Path, ended: list
) -> None:
    labels, labelled = (3, "classes") if model.reference.config.model_type == "bert" else (0, "tokens")
    first = []
    for weight in (0.0, 0.5):
        one = trainer(model, labels=labels, auxiliary_weight=weight)
        begin(ended, one, window(1, 2), one.parameters.export(), tmp_path)
        first.append(one.step(batches(labelled)[0]))
    assert first[1] == pytest.approx(1.5 * first[0], rel=1e-5)


def test_trained_later_adapters_are_read_but_not_updated(model: Checkpoint, tmp_path: Path, ended: list) -> None:
    labels, labelled = (3, "classes") if model.reference.config.model_type == "bert" else (0, "tokens")
    one = trainer(model, labels=labels, auxiliary_weight=0.5)
    arrays = trained_adapters(one)
    begin(ended, one, window(1, 2), arrays, tmp_path)
    with_branch = one.step(batches(labelled)[0])
    assert not any(key.startswith("adapters.2") for key in one.trained())
    np.testing.assert_array_equal(
        one.parameters.export()[adapter_key(2, "up_weight")], arrays[adapter_key(2, "up_weight")]
    )
    without = trainer(model, labels=labels, auxiliary_weight=0.0)
    begin(ended, without, window(1, 2), arrays, tmp_path)
    assert with_branch != pytest.approx(1.5 * without.step(batches(labelled)[0]), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_step_and_keeps_the_parameters(
    model: Checkpoint, tmp_path: Path, ended: list
) -> None:
    labels, labelled = (3, "classes") if model.reference.config.model_type == "bert" else (0, "tokens")
    one = trainer(model, labels=labels)
    arrays = trained_adapters(one)
    arrays[adapter_key(1, "up_bias")] = np.full_like(arrays[adapter_key(1, "up_bias")], np.inf)
    begin(ended, one, window(1, 2), arrays, tmp_path)
    before = one.trained()
    with pytest.raises(NonFiniteLoss, match="lower"):
        one.step(batches(labelled)[0])
    after = one.trained()
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_profile_scores_every_layer_and_reaches_the_final_features(model: Checkpoint, ended: list) -> None:
    one = trainer(model)
    ended.append(one)
    arrays = one.profile(batches(), one.parameters.export(), depths=[1, 2])
    assert arrays["cka"].shape == (3,) and (arrays["cka"] > 0).all() and (arrays["cka"] <= 1 + 1e-9).all()
    assert arrays["stand_in.1.factor"].shape == (9, 129)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: setattr(batch, "labels", None), "labels"),
        (lambda batch: setattr(batch, "attention_mask", batch.attention_mask.flip(1)), "right"),
    ],
)
def test_batches_that_cannot_be_trained_on_are_refused(
    checkpoint: Callable[..., Checkpoint], tmp_path: Path, change: Callable, message: str, ended: list
) -> None:
    one = trainer(checkpoint("bert"))
    begin(ended, one, window(1, 2), one.parameters.export(), tmp_path)
    batch = batches()[0]
    change(batch)
    with pytest.raises(InvalidArgument, match=message):
        one.step(batch)


def test_statistics_of_the_classifier_are_those_of_the_features_it_reads(
    model: Checkpoint, ended: list[StageTrainer]
) -> None:
    each = trainer(model)
    ended.append(each)
    arrays = trained_adapters(each)
    statistics, loss = each.classifier_statistics(batches(), arrays)
    factor = statistics["classifier.factor"].astype(np.float64)
    rows, labels = [], []
    for batch, hidden in each.prefix.sweep(batches(), range(each.model.num_layers)):
        rows.append(each.model.final_norm(each.classifier.pool(hidden, batch.attention_mask)).double().numpy())
        labels.append(np.eye(3)[batch.labels])
    stacked = np.concatenate([np.concatenate(rows), np.ones((9, 1)), np.concatenate(labels)], axis=1)
    np.testing.assert_allclose(factor.T @ factor, stacked.T @ stacked, rtol=1e-4, atol=1e-3)
    assert loss == pytest.approx(each.evaluate(batches(), arrays)["loss"], rel=1e-5)


def test_foresight_takes_the_gradient_of_the_whole_model(model: Checkpoint, ended: list[StageTrainer]) -> None:
    """The window's adapters move as if every layer above were in the graph; the adapters above do not move."""
    labelled = "classes" if "bert" in str(model.open().shape.architecture) else "tokens"
    labels = 3 if labelled == "classes" else 0
    foreseeing = trainer(model, labels=labels, foresight_every=1, lr=LR)
    whole = trainer(model, labels=labels, lr=LR)
    ended += [foreseeing, whole]
    arrays = trained_adapters(whole)
    foreseeing.begin(window(0, 1), arrays, cache_dir=None, lr=LR)
    whole.begin(window(0, 3), arrays, cache_dir=None, lr=LR)
    batch = batches(labelled)[0]
    assert foreseeing.step(batch) == pytest.approx(whole.step(batch), rel=1e-5)
    ours, theirs = foreseeing.trained(), whole.trained()
    assert all(not key.startswith(("adapters.1", "adapters.2")) for key in ours)
    for key, value in ours.items():
        assert not np.array_equal(value, arrays[key]) or key.endswith("down_bias")
        np.testing.assert_allclose(value, theirs[key], atol=2e-4)


def test_foresight_every_second_step_alternates_with_the_stand_in_free_local_loss(
    model: Checkpoint, ended: list[StageTrainer]
) -> None:
    labels = 3 if model.open().shape.architecture == "bert" else 0
    batch = batches("classes" if labels else "tokens")[0]
    local, every_second = trainer(model, labels=labels), trainer(model, labels=labels, foresight_every=2)
    ended += [local, every_second]
    arrays = trained_adapters(local)
    for each in (local, every_second):
        each.begin(window(0, 1), arrays, cache_dir=None, lr=1e-12)
    local_losses = [local.step(batch) for _ in range(2)]
    mixed = [every_second.step(batch) for _ in range(2)]
    assert mixed[1] == pytest.approx(local_losses[1], rel=1e-4)
    assert abs(mixed[0] - local_losses[0]) > 1e-3


def test_a_classifier_inside_the_stand_in_gives_the_same_step_and_stays_as_it_is(
    checkpoint: Callable[..., Checkpoint], ended: list[StageTrainer]
) -> None:
    options = {"stand_in": True, "auxiliary_weight": 0.5}
    apart, merged = (trainer(checkpoint("bert"), **options) for _ in range(2))
    ended += [apart, merged]
    arrays = trained_adapters(apart)
    solved = stand_in.solve(apart.profile(batches(), arrays, depths=[1], with_scores=False), ridge=0.1)
    out = [arrays[f"classifier.{name}"] for name in ("out_weight", "out_bias")]
    one = stand_in.with_classifier(solved, 1, out[0], out[1])
    others = {key: value for key, value in arrays.items() if not key.startswith("classifier.")}
    apart.begin(window(0, 1), {**arrays, **solved}, cache_dir=None, lr=LR)
    merged.begin(window(0, 1), {**others, **one}, cache_dir=None, lr=LR)
    batch = batches()[0]
    assert merged.step(batch) == pytest.approx(apart.step(batch), rel=1e-4)
    ours, theirs = merged.trained(), apart.trained()
    assert theirs.keys() - ours.keys() == {"classifier.out_weight", "classifier.out_bias"}
    for key, value in ours.items():
        np.testing.assert_allclose(value, theirs[key], atol=1e-4)
