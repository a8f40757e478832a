import numpy as np
import pytest

from chainfed_engine.errors import ConfigError, InvalidArgument
from chainfed_engine.server import Server
from chainfed_engine.types import Reply
from tests.server.server_parts import Site, changed_keys, initial, make_server, play, same_bits, shape


def _server(**windows: int) -> Server:
    base = make_server(samples={"large": 10, "small": 30}, clients_per_round=2, window=3)
    return Server(
        base.config, shape(), initial(), base.client_samples, "classification", client_windows=windows or None
    )


def test_a_client_of_a_smaller_budget_trains_the_topmost_layers_of_the_window() -> None:
    server = _server(small=1)
    stages = {task.client: task.stage for task in server.next_tasks()}
    large, small = stages["large"], stages["small"]
    assert large is not None and small is not None
    assert (large.window.start, large.window.stop) == (0, 3) and (small.window.start, small.window.stop) == (2, 3)


def test_every_adapter_is_averaged_over_those_who_trained_it() -> None:
    server = _server(small=1)
    replies = []
    for task in server.next_tasks():
        value = {"large": 1.0, "small": 5.0}[task.client]
        assert task.stage is not None
        prefixes = tuple(f"adapters.{layer}." for layer in task.stage.window.layers)
        arrays = {k: np.full_like(a, value) for k, a in initial().items() if k.startswith((*prefixes, "classifier."))}
        samples = server.client_samples[task.client]
        replies.append(Reply("train", task.client, 0, samples, arrays, {"loss": 1.0}, stage=task.stage))
    summary = server.receive(replies)
    assert summary.clients == ("large", "small")
    parameters = server.parameters()
    assert all((parameters[f"adapters.{layer}.up_bias"] == 1.0).all() for layer in (0, 1))
    assert (parameters["adapters.2.up_bias"] == 4.0).all() and (parameters["classifier.out_bias"] == 4.0).all()


def test_an_update_of_layers_that_were_not_asked_for_is_refused() -> None:
    server = _server(small=1)
    whole = _server()
    site = Site(server.client_samples)
    server.next_tasks()
    summary = server.receive([site.answer(task) for task in whole.next_tasks()])
    assert summary.clients == ("large",) and "window" in summary.rejected["small"]


def test_a_client_that_can_train_as_much_as_anybody_changes_nothing() -> None:
    ample, plain = _server(small=7), _server()
    play(ample, rounds=3)
    play(plain, rounds=3)
    assert same_bits(ample.parameters(), plain.parameters()) and changed_keys(initial(), plain.parameters())


def test_a_client_must_be_able_to_train_a_layer_and_a_resumed_run_must_have_the_same_clients() -> None:
    with pytest.raises(InvalidArgument, match="at least one layer"):
        _server(small=0)
    arrays, record = _server(small=1).state()
    with pytest.raises(ConfigError, match="layers that clients can train"):
        _server(small=2).restore(arrays, record)
