"""What sets each method apart, seen from the server: who trains what, what travels, how replies are put together."""

from typing import Any

import numpy as np
import pytest

from chainfed_engine.config import ChainConfig, Method
from chainfed_engine.directions import walk
from chainfed_engine.errors import ConfigError
from chainfed_engine.server import Server
from chainfed_engine.server.methods.fwdllm import relative_variance, squared_length
from chainfed_engine.types import SEED_COEFFICIENTS, Arrays, Reply, Task
from tests.server.server_parts import HIDDEN, Site, changed_keys, initial, make_server, play, same_bits, shape

CLIENTS = {f"client-{index}": 10 + index for index in range(5)}


def lora_initial(num_layers: int = 2, rank: int = 4, *, bases: bool) -> Arrays:
    arrays = {key: array for key, array in initial(num_layers).items() if key.startswith("classifier.")}
    for layer in range(num_layers):
        for name in ("query", "value"):
            arrays[f"adapters.{layer}.{name}_a"] = np.ones((rank, HIDDEN), np.float32)
            arrays[f"adapters.{layer}.{name}_b"] = np.zeros((HIDDEN, rank), np.float32)
            if bases:
                arrays[f"adapters.{layer}.{name}_base"] = np.zeros((HIDDEN, HIDDEN), np.float32)
    return arrays


def flora_server(**fields: Any) -> Server:
    config = ChainConfig(**{"method": "flora", "adapter_size": 4, "rounds": 3, "clients_per_round": 5, **fields})
    return Server(config, shape(2), lora_initial(bases=True), CLIENTS, "classification")


def flora_reply(task: Task, server: Server) -> Reply:
    generator = np.random.default_rng(int(task.settings["seed"]))
    rank = int(task.settings["rank"])
    arrays: Arrays = {}
    for key, array in server.parameters().items():
        size = {"a": (rank, HIDDEN), "b": (HIDDEN, rank), "base": None}.get(key.rsplit("_", 1)[1], array.shape)
        if size is not None:
            arrays[key] = generator.normal(size=size).astype(np.float32)
    return Reply("train", task.client, task.round_id, CLIENTS[task.client], arrays, {"loss": 1.0}, stage=task.stage)


# -- FedRA -------------------------------------------------------------------------------------------------------


def test_fedra_gives_every_client_and_round_its_own_few_layers() -> None:
    server = make_server(method="fedra", random_layers=2, rounds=8, clients_per_round=5)
    site, seen = Site(server.client_samples), set()
    while not server.done:
        tasks = server.next_tasks()
        for task in tasks:
            assert task.stage is not None and task.stage.window.picked is not None
            assert len(task.stage.window.layers) == task.stage.window.size == 2
            assert {key.split(".")[1] for key in task.versions if key.startswith("adapters.")} == {
                str(layer) for layer in task.stage.window.layers
            }, "a client needs the adapters of its own layers and no others"
            seen.add(task.stage.window.picked)
        server.receive([site.answer(task) for task in tasks])
    assert len(seen) == 6, "all pairs of four layers turn up in forty draws"


def test_fedra_averages_a_layer_over_those_who_trained_it_and_leaves_the_others() -> None:
    server = make_server(method="fedra", random_layers=1, rounds=1, clients_per_round=2)
    before = server.parameters()
    tasks = server.next_tasks()
    site = Site(server.client_samples)
    replies = [site.answer(task) for task in tasks]
    server.receive(replies)
    after = server.parameters()
    total = sum(reply.num_samples for reply in replies)
    for key in before:
        having = [reply for reply in replies if key in reply.arrays]
        if not having:
            assert after[key].tobytes() == before[key].tobytes()
        elif len(having) == 1:
            assert after[key].tobytes() == having[0].arrays[key].tobytes(), "the only one who trained it decides"
        else:
            mean = sum(reply.num_samples * reply.arrays[key].astype(np.float64) for reply in having) / total
            np.testing.assert_allclose(after[key], mean, rtol=1e-6)
    touched = {key.split(".")[1] for key in changed_keys(before, after) if key.startswith("adapters.")}
    picked = {str(layer) for task in tasks if task.stage for layer in task.stage.window.layers}
    assert touched == picked != {"0", "1", "2", "3"}


def test_fedra_refuses_an_update_of_layers_that_the_client_was_not_given() -> None:
    server = make_server(method="fedra", random_layers=1, rounds=1, clients_per_round=1)
    (task,) = server.next_tasks()
    whole = {key: array for key, array in server.parameters().items()}
    summary = server.receive(
        [Reply("train", task.client, 0, CLIENTS[task.client], whole, {"loss": 1.0}, stage=task.stage)]
    )
    assert not summary.accepted and "not asked for" in summary.rejected[task.client]


# -- FLoRA -------------------------------------------------------------------------------------------------------


def test_flora_adds_exactly_the_weighted_sum_of_the_clients_products() -> None:
    server = flora_server()
    expected = {key: np.zeros((HIDDEN, HIDDEN)) for key in server.parameters() if key.endswith("_base")}
    for _ in range(2):
        tasks = server.next_tasks()
        replies = [flora_reply(task, server) for task in tasks]
        total = sum(reply.num_samples for reply in replies)
        for key in expected:
            name = key.removesuffix("_base")
            for reply in replies:
                b, a = (reply.arrays[f"{name}_{side}"].astype(np.float64) for side in "ba")
                expected[key] += reply.num_samples / total * (b @ a)
        assert server.receive(replies).accepted
    for key, wanted in expected.items():
        np.testing.assert_allclose(server.parameters()[key], wanted, atol=1e-5)
        averaged = np.linalg.matrix_rank(server.parameters()[key])
        assert averaged == HIDDEN, "averaging factors of rank 4 could not"


def test_flora_clients_have_ranks_of_their_own_and_send_no_more() -> None:
    server = flora_server(adapter_size=4, min_rank=1)
    tasks = server.next_tasks()
    ranks = {task.client: int(task.settings["rank"]) for task in tasks}
    assert len(set(ranks.values())) > 1 and set(ranks.values()) <= {1, 2, 4}
    too_large = flora_reply(tasks[0], server)
    rank = ranks[tasks[0].client] + 1
    arrays = {
        key: np.ones((rank, HIDDEN), np.float32) if key.endswith("_a") else array
        for key, array in too_large.arrays.items()
    }
    summary = server.receive(
        [Reply("train", tasks[0].client, 0, too_large.num_samples, arrays, {"loss": 1.0}, stage=tasks[0].stage)]
    )
    assert not summary.accepted


def test_flora_starts_every_round_from_fresh_factors() -> None:
    server = flora_server()
    tasks = server.next_tasks()
    assert all(key.startswith("classifier.") for key in tasks[0].arrays), "nothing to send but the classifier"
    server.receive([flora_reply(task, server) for task in tasks])
    tasks = server.next_tasks()
    assert {key.rsplit("_", 1)[1] for key in tasks[0].versions if key.startswith("adapters.")} == {"base"}


# -- FwdLLM ------------------------------------------------------------------------------------------------------


def gradient_reply(task: Task, server: Server, gradient: Arrays) -> Reply:
    return Reply("train", task.client, task.round_id, CLIENTS[task.client], gradient, {"loss": 1.0}, stage=task.stage)


def gradients(server: Server, seed: int, *, common: float) -> Arrays:
    generator = np.random.default_rng(seed)
    return {
        key: (generator.normal(size=array.shape) + common).astype(np.float32)
        for key, array in server.parameters().items()
    }


def test_fwdllm_gathers_rounds_until_the_gradients_agree_and_then_steps_by_their_mean() -> None:
    # Noise of deviation 1 around a common 1: the relative variance of the mean of n gradients is near 1 / (1 + n).
    server = make_server(method="fwdllm", rounds=3, clients_per_round=2, lr=1.0, max_variance=0.17, max_gather_rounds=9)
    before, sent = server.parameters(), []
    for moves in (False, False, True):
        replies = []
        for task in server.next_tasks():
            sent.append((CLIENTS[task.client], gradients(server, len(sent), common=1.0)))
            replies.append(gradient_reply(task, server, sent[-1][1]))
        assert server.receive(replies).accepted
        assert bool(changed_keys(before, server.parameters())) == moves
    total = sum(samples for samples, _ in sent)
    for key, array in before.items():
        mean = sum(samples * gradient[key].astype(np.float64) for samples, gradient in sent) / total
        # The cosine has brought the rate down to a fourth in the third of three rounds.
        np.testing.assert_allclose(server.parameters()[key], array - 0.25 * mean, rtol=1e-4, atol=1e-5)


def test_fwdllm_steps_at_the_latest_after_so_many_rounds() -> None:
    server = make_server(method="fwdllm", rounds=2, clients_per_round=2, max_variance=1e-9, max_gather_rounds=2)
    before = server.parameters()
    for moved in (False, True):
        tasks = server.next_tasks()
        server.receive([gradient_reply(t, server, gradients(server, CLIENTS[t.client], common=0.0)) for t in tasks])
        assert bool(changed_keys(before, server.parameters())) == moved


def test_the_relative_variance_is_one_for_noise_and_small_for_agreement() -> None:
    def ratio(common: float) -> float:
        generator = np.random.default_rng(0)
        sums, counts = np.zeros(20_000), np.zeros(4)
        for samples in (3, 5, 4, 6):
            gradient = generator.normal(size=20_000) + common
            sums += samples * gradient
            counts += (samples, samples**2, samples**2 * squared_length({"": gradient}), 0)
        return relative_variance({"": sums}, counts)

    assert ratio(0.0) == pytest.approx(1.0, abs=0.05)
    assert ratio(3.0) == pytest.approx(1 / (1 + 9 / 0.265), abs=0.02)  # sum of squared shares: 86 / 18^2


# -- FedKSeed ----------------------------------------------------------------------------------------------------


def kseed_reply(task: Task, size: int) -> Reply:
    steps = np.zeros(size, np.float32)
    steps[np.random.default_rng(int(task.settings["seed"])).integers(size, size=4)] += 0.01
    arrays = {SEED_COEFFICIENTS: steps}
    return Reply("train", task.client, task.round_id, CLIENTS[task.client], arrays, {"loss": 1.0}, stage=task.stage)


@pytest.mark.parametrize("num_layers", [2, 12])
def test_fedkseed_traffic_does_not_depend_on_the_size_of_the_model(num_layers: int) -> None:
    server = make_server(method="fedkseed", num_layers=num_layers, num_seeds=64, rounds=3, clients_per_round=2)
    while not server.done:
        summary = server.receive([kseed_reply(task, 64) for task in server.next_tasks()])
        assert summary.bytes_down <= 2 * 64 * 4 and summary.bytes_up == 2 * 64 * 4


def test_fedkseed_parameters_can_be_rebuilt_from_the_start_and_the_seeds_alone() -> None:
    server = make_server(method="fedkseed", num_seeds=32, rounds=3, clients_per_round=3, seed=7)
    while not server.done:
        server.receive([kseed_reply(task, 32) for task in server.next_tasks()])
    coefficients = server.state()[0][SEED_COEFFICIENTS]
    assert coefficients.any()
    assert same_bits(walk(initial(), coefficients, 7), server.parameters())
    assert not same_bits(walk(initial(), coefficients, 8), server.parameters())


# -- all ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fedra", "fwdllm", "fedkseed"])
def test_a_server_that_was_saved_half_way_goes_on_with_the_same_bits(method: Method) -> None:
    def answer(server: Server, site: Site, task: Task) -> Reply:
        if method == "fedkseed":
            return kseed_reply(task, 16)
        return site.answer(task)

    def go_on(server: Server) -> Arrays:
        site = Site(CLIENTS)
        while not server.done:
            server.receive([answer(server, site, task) for task in server.next_tasks()])
        return server.state()[0]

    fields: dict[str, Any] = {"method": method, "rounds": 5, "num_seeds": 16, "max_gather_rounds": 3}
    whole = go_on(make_server(**fields))
    half, site = make_server(**fields), Site(CLIENTS)
    for _ in range(2):
        half.receive([answer(half, site, task) for task in half.next_tasks()])
    restored = make_server(**fields)
    restored.restore(*half.state())
    assert same_bits(go_on(restored), whole)


def test_what_a_method_keeps_for_itself_is_no_part_of_the_model() -> None:
    for method in ("fwdllm", "fedkseed"):
        server = make_server(method=method)
        assert not [key for key in server.parameters() if key.startswith("method.")]
        assert not [key for key in server.evaluation_task("judge").versions if key.startswith("method.")]


def test_lora_methods_train_lora_whatever_the_adapter_option_says() -> None:
    assert ChainConfig(method="lora").adapter == ChainConfig(method="flora", adapter="bottleneck").adapter == "lora"
    assert ChainConfig(method="fedra").adapter == "bottleneck"


def test_a_mistyped_method_is_told_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"\[train\] method: expected one of .* did you mean fedkseed\?"):
        ChainConfig(method="fed-k-seed")  # type: ignore[arg-type]


def test_lora_is_averaged_factor_by_factor() -> None:
    config = ChainConfig(method="lora", adapter_size=4, rounds=2, clients_per_round=3, update_format="f32")
    server = Server(config, shape(2), lora_initial(bases=False), CLIENTS, "classification")
    summaries = play(server)
    assert all(summary.accepted and summary.stage and summary.stage.window.size == 2 for summary in summaries)
    assert all(server.parameters()[f"adapters.{layer}.query_b"].any() for layer in range(2))
