import dataclasses
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from chainfed_engine import classifier_fit
from chainfed_engine.config import ChainConfig
from chainfed_engine.errors import ConfigError, InvalidArgument
from chainfed_engine.server import Server
from chainfed_engine.types import Arrays, Reply, Window
from tests.server.server_parts import Site, changed_keys, initial, make_server, play, same_bits, shape


def test_the_window_moves_up_one_layer_a_round_and_wraps() -> None:
    summaries = play(make_server(rounds=6, window=2))
    assert [(s.stage.window.start, s.stage.sweep) for s in summaries if s.stage] == [
        (0, 0),
        (1, 0),
        (2, 0),
        (0, 1),
        (1, 1),
        (2, 1),
    ]


def test_only_the_windows_adapters_and_the_classifier_change() -> None:
    server = make_server(window=2)
    play(server, rounds=1)
    before = server.parameters()
    play(server, rounds=1)
    changed = changed_keys(before, server.parameters())
    assert {key.split(".")[1] for key in changed if key.startswith("adapters.")} == {"1", "2"}
    assert {key for key in changed if key.startswith("classifier.")} == {"classifier.out_weight", "classifier.out_bias"}


def test_a_causal_language_model_trains_adapters_alone() -> None:
    server = make_server(task="causal-lm")
    tasks = server.next_tasks()
    assert all(key.startswith("adapters.") for task in tasks for key in task.versions)
    play(server)
    assert server.done


@pytest.mark.parametrize(
    ("method", "window"),
    [("linear-probe", Window(4, 4)), ("top-window", Window(2, 4)), ("full-adapters", Window(0, 4))],
)
def test_the_baselines_train_one_window_in_every_round(method: str, window: Window) -> None:
    summaries = play(make_server(method=method, rounds=3, window=2, start_layer=None))
    assert [s.stage.window for s in summaries if s.stage] == [window] * 3
    assert all(s.kind == "round" for s in summaries)


def test_linear_probe_trains_the_classifier_alone() -> None:
    server = make_server(method="linear-probe")
    before = server.parameters()
    play(server)
    assert changed_keys(before, server.parameters()) == {"classifier.out_weight", "classifier.out_bias"}


def test_without_a_method_there_is_nothing_to_do() -> None:
    server = make_server(method="none")
    assert server.done
    with pytest.raises(InvalidArgument, match="done"):
        server.next_tasks()


def test_probe_rounds_come_before_the_chain() -> None:
    summaries = play(make_server(probe_rounds=2, rounds=4))
    assert [s.stage.kind for s in summaries if s.stage] == ["probe", "probe", "window", "window"]


def test_probing_fits_the_classifier_to_all_rows_seen_so_far_and_touches_nothing_else() -> None:
    server = make_server(probe_rounds=2, rounds=4)
    before, site = server.parameters(), Site(server.client_samples)
    replies = []
    for _ in range(2):
        tasks = server.next_tasks()
        assert all(task.settings["closed_form"] for task in tasks)
        answers = [site.answer(task) for task in tasks]
        replies += answers
        server.receive(reversed(answers))
    after = server.parameters()
    assert changed_keys(before, after) == {"classifier.out_weight", "classifier.out_bias"}
    factor = classifier_fit.merge([reply.arrays["classifier.factor"] for reply in replies])
    expected = classifier_fit.solve(factor, 3)
    np.testing.assert_allclose(after["classifier.out_weight"], expected["classifier.out_weight"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("damage", ["shape", "nan", "key", "dtype"])
def test_damaged_classifier_statistics_are_refused(damage: str) -> None:
    server = make_server(probe_rounds=1, rounds=4)
    site = Site(server.client_samples)
    replies = [site.answer(task) for task in server.next_tasks()]
    factor = replies[0].arrays["classifier.factor"].copy()
    if damage == "nan":
        factor[0, 0] = np.nan
    arrays = {"classifier.factor": factor[:, 1:] if damage == "shape" else factor}
    if damage == "key":
        arrays = {"classifier.out_weight": factor}
    if damage == "dtype":
        arrays = {"classifier.factor": factor.astype(np.float64)}
    replies[0] = replace(replies[0], arrays=arrays)
    summary = server.receive(replies)
    assert set(summary.rejected) == {replies[0].client} and len(summary.clients) == 4


@pytest.mark.parametrize(
    ("rounds", "asked", "task", "expected"),
    [
        (24, 1, "classification", [*range(4), *range(20, 24)]),
        (24, 3, "classification", [0, 1, 22, 23]),  # three of five clients: two rounds see all their samples
        (24, 9, "classification", [0, 23]),
        (10, 1, "classification", [0, 1, 8, 9]),
        (4, 1, "classification", [0]),
        (24, 1, "causal-lm", []),
    ],
)
def test_auto_fits_the_classifier_in_the_first_and_last_rounds_where_there_is_one(
    rounds: int, asked: int, task: str, expected: list[int]
) -> None:
    server = make_server(probe_rounds=None, rounds=rounds, clients_per_round=asked, task=task)
    kinds = [summary.stage.kind for summary in play(server) if summary.stage]
    assert [index for index, kind in enumerate(kinds) if kind == "probe"] == expected


def test_in_the_last_rounds_rows_of_trained_features_count_twice_as_much_as_those_before_training() -> None:
    server = make_server(probe_rounds=1, refit_rounds=2, rounds=6)
    site, replies = Site(server.client_samples), []
    before = server.parameters()
    while not server.done:
        answers = [site.answer(task) for task in server.next_tasks()]
        if server.round_id == 4:
            before = server.parameters()
        if server.round_id == 0 or server.round_id >= 4:
            weight = 0.5 if server.round_id == 0 else 1.0
            replies += [
                replace(a, arrays={k: v * np.float32(weight**0.5) for k, v in a.arrays.items()}) for a in answers
            ]
        server.receive(answers)
    assert changed_keys(before, server.parameters()) == {"classifier.out_weight", "classifier.out_bias"}
    factor = classifier_fit.merge([reply.arrays["classifier.factor"] for reply in replies])
    expected = classifier_fit.solve(factor, 3)["classifier.out_weight"]
    np.testing.assert_allclose(server.parameters()["classifier.out_weight"], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("loss", "stays"), [(0.1, True), (0.12, False)])
def test_a_classifier_that_already_explains_the_rows_is_not_fitted_again(loss: float, stays: bool) -> None:
    """Of three labels: a tenth of log 3 is 0.11. What is fitted before training is fitted whatever clients say."""
    server = make_server(probe_rounds=1, refit_rounds=2, rounds=6)
    site, changed = Site(server.client_samples), []
    while not server.done:
        before = server.parameters()
        answers = [site.answer(task) for task in server.next_tasks()]
        server.receive([replace(answer, metrics={**answer.metrics, "loss": loss}) for answer in answers])
        changed.append("classifier.out_weight" in changed_keys(before, server.parameters()))
    assert changed[0] and changed[4:] == [not stays] * 2


def test_one_client_cannot_stop_the_last_fit_by_a_loss_below_nothing() -> None:
    server = make_server(probe_rounds=1, refit_rounds=1, rounds=4)
    site = Site(server.client_samples)
    while server.round_id < 3:
        server.receive([site.answer(task) for task in server.next_tasks()])
    before, answers = server.parameters(), [site.answer(task) for task in server.next_tasks()]
    losses = [-1e30] + [1.0] * (len(answers) - 1)
    told = zip(answers, losses, strict=True)
    server.receive([replace(answer, metrics={**answer.metrics, "loss": loss}) for answer, loss in told])
    assert "classifier.out_weight" in changed_keys(before, server.parameters())


@pytest.mark.parametrize("fields", [{"method": "linear-probe"}, {"probe_rounds": 1}, {"refit_rounds": 1}])
def test_a_language_model_has_no_classifier_to_probe(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="classification"):
        make_server(task="causal-lm", **fields)


@pytest.mark.parametrize(
    "fields", [{"window": 9}, {"start_layer": 3, "window": 2}, {"method": "top-window", "window": 5}]
)
def test_a_window_that_does_not_fit_is_refused_at_once(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        make_server(**fields)


def test_missing_adapters_or_clients_are_refused_at_once() -> None:
    server = make_server()
    arrays = {key: array for key, array in server.parameters().items() if not key.startswith("adapters.2.")}
    with pytest.raises(InvalidArgument, match="layer 2"):
        Server(server.config, server.shape, arrays, {"a": 1}, "classification")
    with pytest.raises(InvalidArgument, match="client"):
        Server(server.config, server.shape, server.parameters(), {}, "classification")
    with pytest.raises(InvalidArgument, match="client"):
        Server(server.config, server.shape, server.parameters(), {"a": 0}, "classification")


def test_the_result_does_not_depend_on_who_answers_first() -> None:
    results: list[Arrays] = []
    for order in itertools.permutations(range(3)):
        server = make_server(rounds=3)
        site = Site(server.client_samples)
        while not server.done:
            replies = [site.answer(task) for task in server.next_tasks()]
            server.receive(replies[position] for position in order)
        results.append(server.parameters())
    assert all(same_bits(results[0], result) for result in results)


def test_the_average_of_one_client_is_its_update_bit_for_bit() -> None:
    server = make_server(clients_per_round=1)
    reply = Site(server.client_samples).answer(server.next_tasks()[0])
    update = {key: array.copy() for key, array in reply.arrays.items()}
    next(iter(update.values())).flat[0] = -0.0
    next(iter(update.values())).flat[1] = np.float32(1e-45)  # subnormal
    server.receive([Reply("train", reply.client, 0, reply.num_samples, update, {"loss": 1.0}, stage=reply.stage)])
    assert same_bits({key: server.parameters()[key] for key in update}, update)


def test_equal_updates_average_to_themselves() -> None:
    server = make_server(samples={"a": 7, "b": 13, "c": 101})
    first, *others = [Site(server.client_samples).answer(task) for task in server.next_tasks()]
    replies = [first, *(dataclasses.replace(r, arrays=first.arrays) for r in others)]
    server.receive(replies)
    assert same_bits({key: server.parameters()[key] for key in first.arrays}, first.arrays)


def test_clients_weigh_as_many_samples_as_they_have() -> None:
    server = make_server(samples={"a": 1, "b": 3}, clients_per_round=2)
    replies = []
    for task, value in zip(server.next_tasks(), (0.0, 4.0), strict=True):
        arrays = {key: np.full_like(array, value) for key, array in task.arrays.items() if _is_trained(key)}
        replies.append(
            Reply(
                "train", task.client, 0, server.client_samples[task.client], arrays, {"loss": value}, stage=task.stage
            )
        )
    summary = server.receive(replies)
    assert summary.loss == 3.0
    assert all((array == 3.0).all() for key, array in server.parameters().items() if _is_trained(key))


def _is_trained(key: str) -> bool:
    return key.startswith(("adapters.0.", "adapters.1.", "classifier."))


def test_a_task_tells_the_client_all_it_has_to_know() -> None:
    server = make_server(lr=0.5, batch_size=7, local_epochs=2, max_local_steps=9)
    first, second, _ = server.next_tasks()
    expected = {"lr": 0.5, "batch_size": 7, "local_epochs": 2, "max_local_steps": 9, "start_layer": 0}
    expected |= {"closed_form": False, "update_format": "f32", "trains_classifier": True}
    assert {key: value for key, value in first.settings.items() if key != "seed"} == expected
    assert first.settings["seed"] != second.settings["seed"]
    assert 0 <= int(first.settings["seed"]) < 2**63


def test_asking_twice_gives_equal_tasks_and_receiving_needs_asking() -> None:
    server = make_server()
    once, again = server.next_tasks(), server.next_tasks()
    assert [(t.client, t.settings, t.versions, sorted(t.arrays)) for t in once] == [
        (t.client, t.settings, t.versions, sorted(t.arrays)) for t in again
    ]
    with pytest.raises(InvalidArgument, match="next_tasks"):
        make_server().receive([])


def test_evaluation_gets_the_whole_model() -> None:
    server = make_server()
    play(server)
    task = server.evaluation_task("judge")
    assert task.kind == "evaluate"
    assert same_bits(task.arrays, server.parameters())
    assert task.versions.keys() == task.arrays.keys()


def test_probing_fits_a_classifier_without_a_bias_as_one() -> None:
    arrays = {key: array for key, array in initial(4).items() if key != "classifier.out_bias"}
    config = ChainConfig(start_layer=0, stand_in=False, probe_rounds=1, rounds=3, clients_per_round=2)
    server = Server(config, shape(4), arrays, {"a": 5, "b": 6}, "classification")
    play(server)
    assert server.done and "classifier.out_bias" not in server.parameters()


def test_clients_are_told_the_rate_of_their_round() -> None:
    server = make_server(rounds=4, lr=0.5, lr_decay="cosine", start_layer=0)
    rates = []
    while not server.done:
        rates.append(server.next_tasks()[0].settings.get("lr"))
        play(server, rounds=1)
    told = [rate for rate in rates if rate is not None]
    assert told == [pytest.approx(0.5 * (1 + math.cos(math.pi * index / 4)) / 2) for index in range(4)]


@pytest.mark.parametrize(
    ("steps", "weights"), [(0, (10, 30)), (3, (6, 6)), (10, (10, 20))], ids=["all", "equal", "one has fewer"]
)
def test_an_update_weighs_the_samples_that_it_was_trained_on(steps: int, weights: tuple[int, int]) -> None:
    samples = {"a": 10, "b": 30}
    server = make_server(samples=samples, clients_per_round=2, batch_size=2, max_local_steps=steps)
    site = Site(samples)
    replies = [site.answer(task) for task in server.next_tasks()]
    server.receive(replies)
    for key, array in replies[0].arrays.items():
        expected = np.average([array, replies[1].arrays[key]], axis=0, weights=weights)
        np.testing.assert_allclose(server.parameters()[key], expected, rtol=1e-5, atol=1e-6)
