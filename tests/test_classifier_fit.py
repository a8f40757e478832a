"""The closed-form classifier: what clients send adds up to the solution of all rows in one place."""

import tracemalloc

import numpy as np
import pytest

from chainfed_engine import classifier_fit, least_squares


def _blobs(n: int, seed: int, *, classes: int = 3, width: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Points around one centre a class, the same centres for every seed."""
    centres = np.random.default_rng(99).normal(size=(classes, width))
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    return (centres[labels] + rng.normal(size=(n, width))).astype(np.float32), labels


def _accuracy(solved: dict[str, np.ndarray], x: np.ndarray, labels: np.ndarray) -> float:
    logits = x @ solved["classifier.out_weight"].T + solved["classifier.out_bias"]
    return float((logits.argmax(axis=1) == labels).mean())


def test_clients_of_one_label_each_give_the_classifier_of_all_their_rows() -> None:
    x, labels = _blobs(300, seed=0)
    skewed = [
        classifier_fit.statistics(x[labels == label], labels[labels == label], 3)[classifier_fit.FACTOR_KEY]
        for label in range(3)
    ]
    together = classifier_fit.statistics(x, labels, 3)[classifier_fit.FACTOR_KEY]
    merged = classifier_fit.merge([classifier_fit.merge(skewed[:2]), skewed[2]])
    np.testing.assert_allclose(merged.T @ merged, together.T @ together, rtol=1e-3, atol=1e-2)
    solved, expected = classifier_fit.solve(merged, 3), classifier_fit.solve(together, 3)
    for key, value in expected.items():
        np.testing.assert_allclose(solved[key], value, rtol=1e-3, atol=1e-4)
    assert _accuracy(solved, *_blobs(2000, seed=1)) > 0.9


def test_the_factor_is_never_larger_than_the_rows_or_the_square_it_stands_for() -> None:
    few, many = _blobs(5, seed=0), _blobs(400, seed=0)
    assert classifier_fit.statistics(*few, 3)["classifier.factor"].shape == (5, 12 + 1 + 3)
    assert classifier_fit.statistics(*many, 3)["classifier.factor"].shape == (16, 16)


def test_a_class_that_no_client_holds_gets_finite_weights_and_is_never_predicted() -> None:
    x, labels = _blobs(200, seed=0)
    solved = classifier_fit.solve(classifier_fit.statistics(x, labels, 4)[classifier_fit.FACTOR_KEY], 4)
    assert all(np.isfinite(value).all() for value in solved.values())
    logits = x @ solved["classifier.out_weight"].T + solved["classifier.out_bias"]
    assert (logits.argmax(axis=1) == labels).mean() > 0.9


def test_one_sample_in_all_predicts_its_own_class() -> None:
    x, labels = _blobs(1, seed=0)
    solved = classifier_fit.solve(classifier_fit.statistics(x, labels, 3)[classifier_fit.FACTOR_KEY], 3)
    assert _accuracy(solved, x, labels) == 1.0


def test_near_interpolation_the_penalty_is_not_left_to_cross_validation() -> None:
    """With as many rows as features the score is 0/0: unchecked it picks the weakest penalty and overfits."""
    x, labels = _blobs(14, seed=3)
    solved = classifier_fit.solve(classifier_fit.statistics(x, labels, 3)[classifier_fit.FACTOR_KEY], 3)
    assert _accuracy(solved, *_blobs(2000, seed=1)) > 0.75
    assert least_squares.MAX_FREEDOM_SHARE < 1.0


def test_without_a_bias_the_classifier_goes_through_the_origin_as_plain_ridge_does() -> None:
    x, labels = _blobs(300, seed=0)
    x = x + 2.0
    solved = classifier_fit.solve(classifier_fit.statistics(x, labels, 3)[classifier_fit.FACTOR_KEY], 3, bias=False)
    assert solved.keys() == {"classifier.out_weight"}
    assert ((x @ solved["classifier.out_weight"].T).argmax(axis=1) == labels).mean() > 0.9
    factor = least_squares.factor(x, np.eye(3)[labels])
    through = np.concatenate([np.zeros(12), np.full(3, 1 / 3)])
    weight = least_squares.solve(factor, 12, ridge=0.1, through=through).weight
    penalty = 0.1 * np.trace(x.T @ x) / 12
    expected = np.linalg.solve(x.T @ x + penalty * np.eye(12), x.T @ (np.eye(3)[labels] - 1 / 3)).T
    np.testing.assert_allclose(weight, expected, rtol=1e-3, atol=1e-4)


def test_rows_of_all_clients_together_stay_within_64_mib() -> None:
    for hidden_size, num_clients in ((384, 80), (4096, 80), (4096, 10**6)):
        rows = classifier_fit.max_rows(hidden_size, 2, num_clients)
        assert rows == 1 or rows * num_clients * (hidden_size + 3) * 4 <= 64 << 20


@pytest.mark.parametrize("rows", [10, 40])  # of a client: fewer than columns in all, so joined, or more, so reduced
def test_rows_in_sixteen_bits_are_merged_as_their_values_and_never_held_twice(rows: int) -> None:
    width = 400
    halves = [np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float16) for seed in range(20)]
    widened = [half.astype(np.float32) for half in halves]
    scales = [1.0, 0.5] * 10
    peaks = []
    for factors in (halves, widened):
        tracemalloc.start()
        merged = least_squares.merge(factors, scales)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        np.testing.assert_array_equal(merged, least_squares.merge(widened, scales))
    one_more = max(half.size for half in widened) * 4
    assert peaks[0] < peaks[1] + 2 * one_more
