import numpy as np
import pytest

from chainfed_engine.server.aggregate import aggregate, krum_outsiders, num_trimmed
from chainfed_engine.types import Reply
from tests.server.server_parts import Site, make_server, same_bits


def _replies(**values: list[float]) -> dict[str, Reply]:
    return {
        name: Reply("train", name, 0, 1 + 10 * (name == "heavy"), {"x": np.array(numbers, np.float32)})
        for name, numbers in values.items()
    }


def test_the_median_is_taken_coordinate_by_coordinate_and_believes_no_weight() -> None:
    replies = _replies(a=[1, 5], b=[2, 4], heavy=[900, -900])
    assert aggregate("median", replies, hostile_share=0.1)["x"].tolist() == [2, 4]


def test_the_trimmed_mean_drops_the_extremes_of_every_coordinate() -> None:
    replies = _replies(a=[1, 5], b=[2, 4], c=[3, 3], d=[4, -900], heavy=[900, 2])
    result = aggregate("trimmed-mean", replies, hostile_share=0.2)["x"]
    assert result.tolist() == [3, 3] and result.dtype == np.float32
    assert aggregate("trimmed-mean", _replies(a=[1.0], b=[3.0]), hostile_share=0.4)["x"].tolist() == [2]


def test_multi_krum_leaves_out_what_lies_apart_from_the_rest() -> None:
    rng = np.random.default_rng(1)
    honest = {f"c{i}": [float(v) for v in rng.normal(0, 0.1, 4)] for i in range(8)}
    replies = _replies(**honest, liar=[1.0, 1.0, 1.0, 1.0], other=[-1.0, 1.0, -1.0, 1.0])
    assert krum_outsiders(replies, hostile_share=0.2) == ["liar", "other"]
    assert krum_outsiders(_replies(a=[1.0], b=[2.0], c=[900.0]), hostile_share=0.3) == []
    assert krum_outsiders(replies, hostile_share=0.0) == []


def test_a_share_above_zero_means_someone() -> None:
    assert [num_trimmed(count, 0.1) for count in (1, 10, 11, 30)] == [1, 1, 2, 3] and num_trimmed(10, 0.0) == 0


@pytest.mark.parametrize("method", ["mean", "median", "trimmed-mean", "multi-krum"])
def test_every_rule_is_independent_of_the_order_of_replies(method: str) -> None:
    results = []
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        server = make_server(clients_per_round=5, aggregation=method, hostile_share=0.2)
        replies = [Site(server.client_samples).answer(task) for task in server.next_tasks()]
        summary = server.receive([replies[index] for index in order])
        assert len(summary.clients) + len(summary.rejected) == 5
        results.append(server.parameters())
    assert same_bits(results[0], results[1])


def test_those_that_multi_krum_leaves_out_are_named() -> None:
    server = make_server(clients_per_round=5, aggregation="multi-krum", hostile_share=0.2)
    site = Site(server.client_samples)
    replies = [site.answer(task) for task in server.next_tasks()]
    for key, array in replies[3].arrays.items():
        replies[3].arrays[key] = array + 3
    summary = server.receive(replies)
    assert summary.rejected == {replies[3].client: "multi-krum: among the furthest from the other updates"}
    assert len(summary.clients) == 4
