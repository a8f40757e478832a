"""The closed-form stand-in against an ordinary least-squares solution on the pooled rows."""

import numpy as np
import pytest

from chainfed_engine import stand_in
from chainfed_engine.errors import InconsistentUpdates


def _rows(n: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, width)) + 3.0
    y = x @ rng.normal(size=(width, width)) * 0.3 + rng.normal(size=width) + 0.01 * rng.normal(size=(n, width))
    return x, y


def _apply(solved: dict[str, np.ndarray], depth: int, x: np.ndarray) -> np.ndarray:
    bias = solved[f"stand_in.{depth}.bias"]
    if f"stand_in.{depth}.weight" in solved:
        return x @ solved[f"stand_in.{depth}.weight"].T + bias
    return x @ solved[f"stand_in.{depth}.in_weight"].T @ solved[f"stand_in.{depth}.out_weight"].T + bias


@pytest.mark.parametrize("n", [5, 12, 40, 400])
def test_merged_factors_give_the_ridge_solution_of_the_pooled_rows(n: int) -> None:
    width = 12
    x, y = _rows(n, width, 0)
    split = n // 3
    parts = [stand_in.statistics(2, x[:split], y[:split]), stand_in.statistics(2, x[split:], y[split:])]
    solved = stand_in.solve(stand_in.merge(parts), ridge=0.01)
    xc, yc = x - x.mean(0), y - y.mean(0)
    penalty = 0.01 * (xc**2).sum() / width
    weight = np.linalg.solve(xc.T @ xc + penalty * np.eye(width), xc.T @ yc)
    expected = xc @ weight + y.mean(0)
    np.testing.assert_allclose(_apply(solved, 2, x), expected, rtol=2e-3, atol=2e-3)


def test_cross_validation_shrinks_more_when_rows_are_few_and_noisy() -> None:
    rng = np.random.default_rng(3)
    width, noise = 20, 3.0
    weight = rng.normal(size=(width, width))

    def held_out_error(n: int, ridge: float | None) -> float:
        x, x_new = rng.normal(size=(n, width)), rng.normal(size=(2000, width))
        y = x @ weight + noise * rng.normal(size=(n, width)) * np.sqrt(width)
        solved = stand_in.solve(stand_in.merge([stand_in.statistics(1, x, y)]), ridge=ridge)
        return float(((_apply(solved, 1, x_new) - x_new @ weight) ** 2).mean())

    assert held_out_error(30, None) < 0.5 * held_out_error(30, 1e-4)
    assert held_out_error(5000, None) < 1.1 * held_out_error(5000, 1e-4)


def test_few_rows_of_a_wide_model_are_kept_as_two_thin_factors() -> None:
    x, y = _rows(5, 64, 1)
    solved = stand_in.solve(stand_in.merge([stand_in.statistics(1, x, y)]), ridge=0.1)
    assert solved["stand_in.1.in_weight"].shape == (4, 64)  # centring takes one
    assert solved["stand_in.1.out_weight"].shape == (64, 4)


def test_a_client_with_other_shapes_is_refused() -> None:
    x, y = _rows(5, 8, 1)
    wide_x, wide_y = _rows(5, 9, 1)
    with pytest.raises(InconsistentUpdates, match="differs between clients"):
        stand_in.merge([stand_in.statistics(1, x, y), stand_in.statistics(1, wide_x, wide_y)])


@pytest.mark.parametrize("n", [5, 400])
def test_stand_in_and_classifier_as_one_map_give_the_same_logits(n: int) -> None:
    x, y = _rows(n, 12, 0)
    rng = np.random.default_rng(1)
    out_weight, out_bias = rng.normal(size=(3, 12)).astype(np.float32), rng.normal(size=3).astype(np.float32)
    solved = stand_in.solve(stand_in.merge([stand_in.statistics(2, x, y)]), ridge=0.1)
    one = stand_in.with_classifier(solved, 2, out_weight, out_bias)
    logits = x @ one["stand_in.2.logit_weight"].T + one["stand_in.2.logit_bias"]
    np.testing.assert_allclose(logits, _apply(solved, 2, x) @ out_weight.T + out_bias, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("architecture", "names", "expected"),
    [
        ("bert", ["out_weight", "out_bias"], True),
        ("roberta", ["transform_weight", "out_weight"], False),
        ("llama", ["out_weight"], False),
        ("bert", [], False),
    ],
)
def test_only_a_linear_classifier_right_after_the_last_layer_can_be_merged(
    architecture: str, names: list[str], expected: bool
) -> None:
    keys = [f"classifier.{name}" for name in names]
    assert stand_in.is_linear_readout(architecture, keys) is expected
