from collections.abc import Callable

import numpy as np
import pytest

from chainfed_engine.errors import InvalidArgument
from chainfed_engine.types import Arrays
from chainfed_engine.update_format import GROUP, decode, encode, pack, unpacked

SHAPES = {"adapters.0.down_weight": (16, 384), "adapters.0.down_bias": (16,), "classifier.out_weight": (3, 5, 7)}


def _before() -> Arrays:
    generator = np.random.default_rng(1)
    return {key: generator.normal(size=shape).astype(np.float32) for key, shape in SHAPES.items()}


def _update(before: Arrays, *, size: float = 1e-2) -> Arrays:
    generator = np.random.default_rng(2)
    return {
        key: array + np.float32(size) * generator.normal(size=array.shape).astype(np.float32)
        for key, array in before.items()
    }


def test_what_comes_back_is_within_one_step_and_takes_a_third_of_the_bytes() -> None:
    before = _before()
    update = _update(before)
    encoded = encode(update, before, seed=3)
    decoded = decode(encoded, before)
    assert isinstance(decoded, dict)
    for key, array in decoded.items():
        scales = np.repeat(encoded[key + ".scale"], GROUP)[: array.size].reshape(array.shape)
        assert array.dtype == np.float32
        assert (np.abs(array - update[key]) <= scales * 1.001 + np.spacing(np.abs(update[key]))).all()
    assert sum(array.nbytes for array in encoded.values()) < 0.28 * sum(array.nbytes for array in update.values())


def test_the_same_seed_gives_the_same_bits_and_many_seeds_the_mean() -> None:
    before = _before()
    update = _update(before)
    first, second = encode(update, before, seed=3), encode(update, before, seed=3)
    assert all(first[key].tobytes() == second[key].tobytes() for key in first)
    key = "adapters.0.down_weight"
    trials = 400
    total = np.zeros(SHAPES[key])
    for seed in range(trials):
        decoded = decode(encode(update, before, seed=seed), before)
        assert isinstance(decoded, dict)
        total += decoded[key]
    scale = float(first[key + ".scale"].max())
    # One error is uniform on at most a step: standard deviation 0.5 steps; six of those of the mean of 400.
    assert np.abs(total / trials - update[key]).max() < 6 * 0.5 * scale / np.sqrt(trials)


def test_no_change_comes_back_as_no_change_and_infinities_are_for_the_server_to_refuse() -> None:
    before = _before()
    decoded = decode(encode(before, before, seed=0), before)
    assert isinstance(decoded, dict) and all(decoded[key].tobytes() == before[key].tobytes() for key in before)
    broken = {**before, "adapters.0.down_bias": np.full(16, np.nan, np.float32)}
    reason = decode(encode(broken, before, seed=0), before)
    assert isinstance(reason, str) and reason.startswith("not finite")
    with pytest.raises(InvalidArgument, match="was not sent"):
        encode(before, {}, seed=0)


def _without(encoded: Arrays, key: str) -> Arrays:
    return {name: array for name, array in encoded.items() if name != key}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda encoded, key: _without(encoded, key + ".scale"),
        lambda encoded, key: {**encoded, "more": np.zeros(1, np.float32)},
        lambda encoded, key: {**encoded, key + ".int8": encoded[key + ".int8"].astype(np.uint8)},
        lambda encoded, key: {**encoded, key + ".int8": encoded[key + ".int8"][:-1]},
        lambda encoded, key: {**encoded, key + ".int8": encoded[key + ".int8"][None]},
        lambda encoded, key: {**encoded, key + ".scale": encoded[key + ".scale"].astype(np.float64)},
        lambda encoded, key: {**encoded, key + ".scale": np.repeat(encoded[key + ".scale"], 2)},
        lambda encoded, key: {**encoded, key + ".scale": np.full_like(encoded[key + ".scale"], np.nan)},
        lambda encoded, key: {**encoded, key + ".scale": -encoded[key + ".scale"]},
        lambda encoded, key: {**encoded, key + ".int8": "text"},
        lambda encoded, key: [1, 2],
        lambda encoded, key: None,
    ],
)
def test_hostile_codes_are_refused_with_a_line(spoil: object) -> None:
    before = _before()
    assert callable(spoil)
    reason = decode(spoil(encode(_update(before), before, seed=0), "adapters.0.down_weight"), before)
    assert isinstance(reason, str) and "\n" not in reason and len(reason) < 400


def test_values_that_go_down_come_back_to_the_nearest_step_and_other_arrays_as_they_are() -> None:
    sent: Arrays = {"classifier.out_bias": np.arange(3, dtype=np.float32)}
    for key, array in _before().items():
        sent |= pack(key, array)
    back = unpacked(sent)
    assert back["classifier.out_bias"] is sent["classifier.out_bias"]
    for key, array in _before().items():
        steps = np.repeat(sent[key + ".scale"], GROUP)[: array.size].reshape(array.shape)
        assert back[key].dtype == np.float32 and back[key].shape == array.shape == sent[key + ".int8"].shape
        assert (np.abs(back[key] - array) <= 0.5001 * steps).all()
        assert pack(key, array)[key + ".int8"].tobytes() == sent[key + ".int8"].tobytes()
    assert sum(array.nbytes for array in sent.values()) < 0.28 * sum(array.nbytes for array in back.values())
    zeros = np.zeros((5, 70), np.float32)
    assert unpacked(pack("k", zeros))["k"].tobytes() == zeros.tobytes()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda sent: _without(sent, "k.scale"), "k: expected 2 scales in float32, one for 64 codes, got NoneType"),
        (lambda sent: _without(sent, "k.int8"), "k.scale: scales came without their codes"),
        (lambda sent: {**sent, "k.int8": sent["k.int8"].astype(np.int16)}, "k: expected codes in int8 of shape any"),
        (lambda sent: {**sent, "k.scale": sent["k.scale"][:1]}, "k: expected 2 scales"),
        (lambda sent: {**sent, "k.scale": sent["k.scale"] * np.float32("inf")}, "not finite: k holds scales"),
    ],
)
def test_damaged_values_are_refused_by_the_client(spoil: Callable[[Arrays], Arrays], reason: str) -> None:
    sent = pack("k", np.ones((5, 20), np.float32))
    with pytest.raises(InvalidArgument, match=reason):
        unpacked(spoil(sent))
