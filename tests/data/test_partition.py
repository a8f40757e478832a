import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chainfed_engine.data import as_table, by_column, dirichlet, hold_out, iid
from chainfed_engine.data.partition import Partition
from chainfed_engine.errors import DataError


def assert_is_partition(parts: Partition, num_rows: int) -> None:
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(num_rows))
    assert all(len(rows) and rows.dtype == np.int64 for rows in parts.values())
    assert list(parts) == sorted(parts)


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 6), min_size=1, max_size=120),
    num_clients=st.integers(1, 20),
    alpha=st.sampled_from([1e-9, 0.05, 1.0, 1e5]),
    seed=st.integers(0, 2**63 - 1),
)
def test_dirichlet_deals_every_row_once_and_something_to_everyone(
    labels: list[int], num_clients: int, alpha: float, seed: int
) -> None:
    if num_clients > len(labels):
        with pytest.raises(DataError, match="lower num_clients"):
            dirichlet(labels, num_clients, alpha, seed)
        return
    parts = dirichlet(labels, num_clients, alpha, seed)
    assert len(parts) == num_clients
    assert_is_partition(parts, len(labels))
    again = dirichlet(labels, num_clients, alpha, seed)
    assert all(np.array_equal(parts[name], again[name]) for name in parts)


def test_small_alpha_separates_labels_and_large_alpha_mixes_them() -> None:
    labels = np.repeat(np.arange(4), 500)

    def distance(alpha: float) -> float:  # mean total variation between a client's labels and the whole
        shares = [
            np.bincount(labels[rows], minlength=4) / len(rows) for rows in dirichlet(labels, 10, alpha, 3).values()
        ]
        return float(np.mean([np.abs(share - 0.25).sum() / 2 for share in shares]))

    assert distance(1e5) < 0.02 < 0.3 < distance(0.05)


def test_labels_may_be_text() -> None:
    assert_is_partition(dirichlet(["b", "a", "b", "a"], 2, 1.0, 0), 4)


@pytest.mark.parametrize(("num_rows", "num_clients"), [(1, 1), (7, 3), (64, 64), (1001, 7)])
def test_iid_shares_differ_by_one_at_most(num_rows: int, num_clients: int) -> None:
    parts = iid(num_rows, num_clients, seed=5)
    assert_is_partition(parts, num_rows)
    assert max(map(len, parts.values())) - min(map(len, parts.values())) <= 1


def test_names_are_padded_so_that_they_sort() -> None:
    assert list(iid(8, 8, 0))[-1] == "client-007"
    assert list(iid(1200, 1200, 0))[-1] == "client-1199"
    assert next(iter(iid(1200, 1200, 0))) == "client-0000"


def test_by_column_groups_rows_by_value() -> None:
    table = as_table([{"c": "b"}, {"c": "a"}, {"c": 7}, {"c": "b"}])
    parts = by_column(table, "c")
    assert {name: rows.tolist() for name, rows in parts.items()} == {"7": [2], "a": [1], "b": [0, 3]}
    with pytest.raises(DataError, match="no column 'client'"):
        by_column(table, "client")


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_must_be_positive(alpha: float) -> None:
    with pytest.raises(DataError, match="alpha above 0"):
        dirichlet([0, 1], 2, alpha, 0)


def test_no_clients_is_refused() -> None:
    with pytest.raises(DataError, match="at least one client"):
        iid(3, 0, 0)


def test_rows_are_held_out_of_every_label_and_the_same_ones_for_a_seed() -> None:
    labels = ["a"] * 20 + ["b"] * 9 + ["c"]
    kept, held = hold_out(labels, 30, 0.25, seed=3)
    assert sorted([*kept, *held]) == list(range(30))
    assert [labels[row] for row in held].count("a") == 5 and [labels[row] for row in held].count("b") == 2
    assert 29 in kept  # the only one of its label
    assert np.array_equal(hold_out(labels, 30, 0.25, seed=3)[1], held)
    labels = [str(row % 40) for row in range(360)]
    of_rare = [labels[row] for row in hold_out(labels, 360, 0.1, seed=0)[1]]
    assert len(of_rare) == len(set(of_rare)) == 36  # nine rows a label: a tenth of each would be none
    assert len(hold_out(None, 10, 0.35, seed=0)[1]) == 3
    with pytest.raises(DataError, match="no row of 3 is left for evaluation"):
        hold_out(None, 3, 0.1, seed=0)
    with pytest.raises(DataError, match=r"or correct \[data\] label: every row has one of its own"):
        hold_out(["a text", "another", "a third"], 3, 0.1, seed=0)
