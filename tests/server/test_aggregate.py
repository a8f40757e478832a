import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from chainfed_engine.server.aggregate import federated_average
from chainfed_engine.types import Reply

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 10**6), st.lists(floats, min_size=3, max_size=3)), min_size=1, max_size=6))
def test_the_average_is_the_exact_weighted_mean_rounded_and_lies_between_the_updates(
    updates: list[tuple[int, list[float]]],
) -> None:
    replies = {
        f"c{index}": Reply("train", f"c{index}", 0, weight, {"x": np.array(values, np.float32)})
        for index, (weight, values) in enumerate(updates)
    }
    mean = federated_average(replies)["x"]
    stacked = np.array([values for _, values in updates], np.float64)
    expected = np.average(stacked, axis=0, weights=[weight for weight, _ in updates])
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean, expected, rtol=1e-6, atol=1e-6 * np.abs(stacked).max() + 1e-44)
    assert (mean >= stacked.min(axis=0).astype(np.float32)).all()
    assert (mean <= stacked.max(axis=0).astype(np.float32)).all()
    backwards = dict(reversed(replies.items()))
    assert federated_average(backwards)["x"].tobytes() == mean.tobytes()
