"""Linear CKA and the choice of the start layer."""

import numpy as np
import pytest

from chainfed_engine.errors import InvalidArgument
from chainfed_engine.start_layer import choose_start_layer, linear_cka, start_layers


def test_cka_is_one_for_rotated_and_scaled_features_and_small_for_unrelated_ones() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 20))
    rotation, _ = np.linalg.qr(rng.normal(size=(20, 20)))
    assert linear_cka(x, 3.0 * x @ rotation + 7.0) == pytest.approx(1.0)
    assert linear_cka(x, rng.normal(size=(500, 20))) < 0.1


def test_gram_form_equals_feature_form() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(30, 10)), rng.normal(size=(30, 10))
    xc, yc = x - x.mean(0), y - y.mean(0)
    gram = np.vdot(xc @ xc.T, yc @ yc.T) / (np.linalg.norm(xc @ xc.T) * np.linalg.norm(yc @ yc.T))
    assert linear_cka(x, y) == pytest.approx(gram)
    wide_x, wide_y = rng.normal(size=(8, 10)), rng.normal(size=(8, 10))
    xc, yc = wide_x - wide_x.mean(0), wide_y - wide_y.mean(0)
    feature = np.linalg.norm(xc.T @ yc) ** 2 / (np.linalg.norm(xc.T @ xc) * np.linalg.norm(yc.T @ yc))
    assert linear_cka(wide_x, wide_y) == pytest.approx(feature)


@pytest.mark.parametrize(
    ("threshold", "allowed", "expected"),
    [(0.8, (0, 4), 2), (1.0, (0, 4), 0), (0.55, (0, 4), 3), (0.1, (0, 4), 3), (0.1, (0, 1), 0), (1.0, (2, 4), 2)],
)
def test_start_is_the_first_layer_below_the_threshold_among_those_allowed(
    threshold: float, allowed: tuple[int, int], expected: int
) -> None:
    scores = np.array([0.95, 0.85, 0.7, 0.5, 0.4])
    assert choose_start_layer(scores, threshold=threshold, allowed=range(*allowed)) == expected


def test_a_causal_lm_starts_no_lower_than_one_window_below_the_topmost() -> None:
    assert start_layers("causal-lm", 30, 4) == range(22, 27)
    assert [start_layers("causal-lm", 30, window).start for window in (2, 8, 15, 20, 30)] == [26, 15, 15, 10, 0]
    assert [start_layers("causal-lm", 3, window).start for window in (1, 2, 3)] == [1, 1, 0]


def test_a_wide_window_of_a_classifier_slides_over_all_layers_and_a_narrow_one_from_where_the_scores_say() -> None:
    assert [start_layers("classification", 6, window) for window in (2, 3, 4, 6)] == [
        range(5),
        range(4),
        range(1),
        range(1),
    ]


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InvalidArgument):
        choose_start_layer(np.array([0.5, np.nan]), threshold=0.8, allowed=range(2))
