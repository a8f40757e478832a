"""The boundary codec: error bounds, exact outliers, bit-exact formats, hostile values and records, fused adapter."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from chainfed_engine import native
from chainfed_engine.errors import InvalidArgument

Rows = NDArray[np.float32]
GROUP = 64


@pytest.fixture(params=native.simd_levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    native.set_simd_level(request.param)
    yield request.param
    native.set_simd_level(None)


def encode(hidden: Rows, cache_format: str, adapter: Any = None) -> NDArray[np.uint8]:
    records = np.full((len(hidden), native.record_bytes(cache_format, hidden.shape[1])), 0xEE, np.uint8)
    native.boundary_encode(hidden, adapter=adapter, cache_format=cache_format, out=records)
    return records


def decode(records: NDArray[np.uint8], hidden_size: int, cache_format: str) -> Rows:
    out = np.full((len(records), hidden_size), -7.0, np.float32)
    native.boundary_decode(records, np.arange(len(records)), cache_format=cache_format, out=out)
    return out


def round_trip(hidden: Rows, cache_format: str) -> Rows:
    return decode(encode(hidden, cache_format), hidden.shape[1], cache_format)


def residual_stream(num_tokens: int, hidden_size: int) -> Rows:
    """Normal values with a few channels of massive activations, as decoder models have."""
    hidden = np.random.default_rng(3).standard_normal((num_tokens, hidden_size)).astype(np.float32)
    hidden[:, [5, hidden_size // 2]] *= 1000
    hidden[0, 7] = 25168.8
    return hidden


def error_bound(hidden: Rows) -> NDArray[np.float64]:
    """Half a scale per value: the group's largest magnitude after the exact values are gone, / 254, and f16's step."""
    num_tokens, hidden_size = hidden.shape
    padded = np.zeros((num_tokens, -(-hidden_size // GROUP) * GROUP))
    padded[:, :hidden_size] = np.abs(hidden)
    exact = np.argsort(-padded, axis=1, kind="stable")[:, : max(1, hidden_size // 128)]
    np.put_along_axis(padded, exact, 0, axis=1)
    largest = padded.reshape(num_tokens, -1, GROUP).max(axis=2)
    return np.repeat(largest, GROUP, axis=1)[:, :hidden_size] / 254 * (1 + 2**-9) + 6e-8


finite_rows = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 200)),
    elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=True),
)
any_rows = hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 200)), elements=st.floats(width=32))


@settings(max_examples=60, deadline=None)
@given(finite_rows)
def test_int8_decodes_to_within_half_a_scale(hidden: Rows) -> None:
    assert bool((np.abs(round_trip(hidden, "int8") - hidden.astype(np.float64)) <= error_bound(hidden)).all())


@settings(max_examples=60, deadline=None)
@given(any_rows)
def test_non_finite_values_stay_visible(hidden: Rows) -> None:
    for cache_format in ("int8", "bf16", "f32"):
        decoded = round_trip(hidden, cache_format)
        assert not np.isfinite(decoded[~np.isfinite(hidden)]).any()


@settings(max_examples=60, deadline=None)
@given(any_rows)
def test_f32_is_bit_exact_and_bf16_is_torchs(hidden: Rows) -> None:
    assert round_trip(hidden, "f32").tobytes() == hidden.tobytes()
    wanted = torch.from_numpy(hidden).bfloat16().float().numpy()
    np.testing.assert_array_equal(round_trip(hidden, "bf16"), wanted)


@settings(max_examples=40, deadline=None)
@given(any_rows)
def test_every_level_writes_the_same_records(hidden: Rows) -> None:
    records: dict[str, set[bytes]] = {"int8": set(), "bf16": set()}
    for simd_level in native.simd_levels():
        native.set_simd_level(simd_level)
        for cache_format, seen in records.items():
            seen.add(encode(hidden, cache_format).tobytes())
    native.set_simd_level(None)
    assert all(len(seen) == 1 for seen in records.values())


@pytest.mark.parametrize("hidden_size", [64, 128, 576, 1000, 4096])
def test_massive_activations_are_exact_and_cost_their_neighbours_nothing(level: str, hidden_size: int) -> None:
    hidden = residual_stream(40, hidden_size)
    decoded = round_trip(hidden, "int8")
    if hidden_size >= 384:  # three slots or more
        massive = [5, hidden_size // 2]
        np.testing.assert_array_equal(decoded[:, massive], hidden[:, massive])
        assert decoded[0, 7] == hidden[0, 7]
        rest = np.setdiff1d(np.arange(hidden_size), massive)
        assert float(np.abs(decoded - hidden)[:, rest].max()) <= 5 / 254
    assert bool((np.abs(decoded - hidden) <= error_bound(hidden)).all())


def test_more_non_finite_values_than_slots_turn_their_group_to_nan(level: str) -> None:
    hidden = residual_stream(2, 192)
    hidden[0, 64:70] = np.inf
    decoded = round_trip(hidden, "int8")
    assert not np.isfinite(decoded[0, 64:70]).any()
    assert np.isfinite(decoded[0, :64]).all() and np.isfinite(decoded[1]).all()


def test_a_magnitude_beyond_the_scale_becomes_nan_not_a_wrong_number(level: str) -> None:
    hidden = np.ones((1, 64), np.float32)
    hidden[0, :2] = 1e9, 1e8  # one slot: the second has to be coded, and 1e8 / 127 is no f16
    decoded = round_trip(hidden, "int8")
    assert decoded[0, 0] == np.float32(1e9)
    assert np.isnan(decoded[0, 1:]).all()


def test_rows_are_scattered_and_padding_is_left_alone(level: str) -> None:
    hidden = residual_stream(3, 130)
    for cache_format in ("int8", "bf16", "f32"):
        records = encode(hidden, cache_format)
        out = np.full((6, 130), 42.0, np.float32)
        native.boundary_decode(records, np.array([4, 0, 2]), cache_format=cache_format, out=out)
        np.testing.assert_array_equal(out[[4, 0, 2]], decode(records, 130, cache_format))
        assert (out[[1, 3, 5]] == 42).all()


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 300))
def test_records_of_any_bytes_decode_without_harm(data: st.DataObject, hidden_size: int) -> None:
    size = native.record_bytes("int8", hidden_size)
    record = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), np.uint8).reshape(1, size)
    out = np.full((3, hidden_size), 42.0, np.float32)
    native.boundary_decode(record, np.array([1]), cache_format="int8", out=out)
    assert (out[[0, 2]] == 42).all()


def test_record_sizes_are_those_of_the_format() -> None:
    assert native.record_bytes("int8", 576) == 576 + 2 * 9 + 6 * 4
    assert native.record_bytes("int8", 65) == 128 + 2 * 2 + 6
    assert native.record_bytes("bf16", 65) == 130
    assert native.record_bytes("f32", 65) == 260
    for cache_format, hidden_size in (("int8", 0), ("int8", 65536), ("f32", -1), ("int4", 64)):
        with pytest.raises(InvalidArgument):
            native.record_bytes(cache_format, hidden_size)


def bottleneck(width: int, hidden_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(width)
    down = torch.randn(width, hidden_size, generator=generator) / hidden_size**0.5
    up = torch.randn(hidden_size, width, generator=generator) / width**0.5
    return down, torch.randn(width, generator=generator), up, torch.randn(hidden_size, generator=generator)


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 33), (37, 16, 576), (18, 300, 130)])
def test_the_fused_adapter_is_the_adapter(level: str, shape: tuple[int, int, int]) -> None:
    num_tokens, width, hidden_size = shape
    hidden = np.random.default_rng(1).standard_normal((num_tokens, hidden_size)).astype(np.float32)
    adapter = bottleneck(width, hidden_size)
    down, down_bias, up, up_bias = (part.double() for part in adapter)
    exact = torch.from_numpy(hidden).double()
    exact = exact + torch.nn.functional.gelu(exact @ down.T + down_bias) @ up.T + up_bias
    got = decode(encode(hidden, "f32", adapter), hidden_size, "f32")
    np.testing.assert_allclose(got, exact.numpy(), rtol=2e-6, atol=3e-6)
    adapted = encode(got, "int8")
    np.testing.assert_array_equal(encode(hidden, "int8", adapter), adapted)


def test_a_nan_passes_through_the_adapter(level: str) -> None:
    hidden = residual_stream(2, 64)
    hidden[0, 3] = np.nan
    decoded = decode(encode(hidden, "int8", bottleneck(4, 64)), 64, "int8")
    assert np.isnan(decoded[0]).all() and np.isfinite(decoded[1]).all()


def encode_call(**changes: Any) -> None:
    arguments: dict[str, Any] = {
        "hidden": np.zeros((3, 64), np.float32),
        "adapter": None,
        "cache_format": "f32",
        "out": np.zeros((3, 256), np.uint8),
    }
    native.boundary_encode(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache_format": "int4"}, "cache_format must be int8, bf16 or f32, got int4"),
        ({"hidden": np.zeros((3, 64))}, "hidden must be float32"),
        ({"hidden": np.zeros((3, 128), np.float32)[:, ::2]}, "strided"),
        ({"out": np.zeros((3, 255), np.uint8)}, r"out must be uint8 \[3, 256\]"),
        ({"out": np.zeros((2, 256), np.uint8)}, r"out must be uint8 \[3, 256\]"),
        ({"adapter": (np.zeros((2, 64), np.float32),)}, "adapter must be None or a tuple"),
        ({"adapter": bottleneck(4, 63)}, "adapter down_weight must be"),
        ({"adapter": (*bottleneck(4, 64)[:2], *bottleneck(5, 64)[2:])}, "adapter up_weight must be"),
        ({"adapter": bottleneck(3000, 64)}, "adapter must have a width of"),
    ],
)
def test_encode_refuses_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        encode_call(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out_rows": np.array([0, 5])}, "out_rows must be in 0..4, got 5 at position 1"),
        ({"out_rows": np.array([0, -1])}, "out_rows must be in 0..4, got -1"),
        ({"out_rows": np.array([3, 3])}, "out_rows must be distinct, got 3 twice"),
        ({"out_rows": np.array([1])}, "out_rows must be int64"),
        ({"out_rows": np.array([0, 1], np.int32)}, "out_rows must be int64"),
        ({"records": np.zeros((2, 255), np.uint8)}, "records must be uint8"),
        ({"out": np.zeros((5, 64))}, "out must be float32"),
        ({"cache_format": "f16"}, "cache_format must be"),
    ],
)
def test_decode_refuses_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "records": np.zeros((2, 256), np.uint8),
        "out_rows": np.array([0, 1]),
        "cache_format": "f32",
        "out": np.zeros((5, 64), np.float32),
    }
    with pytest.raises(InvalidArgument, match=message):
        native.boundary_decode(**(arguments | changes))


def test_overlapping_memory_is_refused() -> None:
    memory = np.zeros(3 * 64, np.float32)
    with pytest.raises(InvalidArgument, match="must not share memory"):
        encode_call(hidden=memory.reshape(3, 64), out=memory.view(np.uint8).reshape(3, 256))
