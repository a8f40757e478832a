"""What travels, in fewer bits: adapters and classifier in eight, 0.27 of their bytes, both ways; statistics in sixteen.

In: float32 arrays; out: `<key>.int8` of the same shape and `<key>.scale`, codes in groups of 64 with one scale each,
and back. Down go values, rounded to the nearest: the server keeps its own exact, so errors do not add up. Up goes what
changed, rounded at random without bias and seeded by the task, so that it needs no memory of earlier rounds: a client
that is killed and asked again answers the same bits, and errors average out over clients and rounds. Rows of statistics
go up as float16, within 2^-11 of each number: less than rows of a client vary unless a column's mean is hundreds of
times its spread (docs/LOG.md, 2026-12-01). NumPy only.
Source: Alistarh et al., 2017, "QSGD", NeurIPS, arXiv 1610.02132.
"""

import hashlib
from collections.abc import Mapping

import numpy as np

from chainfed_engine.errors import InvalidArgument
from chainfed_engine.types import Arrays

GROUP = 64  # values that share a scale
CODES, SCALES = ".int8", ".scale"
_LARGEST = 127


def pack(key: str, array: np.ndarray, generator: np.random.Generator | None = None) -> Arrays:
    """One array as codes int8 of its shape and scales float32 [ceil(n / 64)]; rounded to the nearest, or at random
    where there is a generator. Values that are not finite give a scale that is not, for the reader to refuse."""
    groups = _groups(array.astype(np.float64).ravel())
    scales = (np.abs(groups).max(axis=1) / _LARGEST).astype(np.float32)
    steps = np.where(np.isfinite(scales) & (scales > 0), scales.astype(np.float64), np.inf)
    offsets = 0.5 if generator is None else generator.random(groups.shape)
    codes = np.floor(np.nan_to_num(groups) / steps[:, None] + offsets)
    codes = np.clip(codes, -_LARGEST, _LARGEST).astype(np.int8).ravel()[: array.size].copy()  # not a part of the groups
    return {key + CODES: codes.reshape(array.shape), key + SCALES: scales}


def unpacked(sent: Mapping[str, np.ndarray]) -> Arrays:
    """The float32 arrays that were sent down. Raises InvalidArgument for codes without scales and the like."""
    arrays: Arrays = {}
    for key, array in sent.items():
        if not key.endswith((CODES, SCALES)):
            arrays[key] = array
        elif key.endswith(CODES):
            name, scales = key.removesuffix(CODES), sent.get(key.removesuffix(CODES) + SCALES)
            if (reason := _refuse(name, array, scales)) is not None:
                raise InvalidArgument(reason)
            assert scales is not None
            arrays[name] = _values(array, scales)
        elif key.removesuffix(SCALES) + CODES not in sent:
            raise InvalidArgument(f"{key}: scales came without their codes")
    return arrays


def encode(update: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray], *, seed: int) -> Arrays:
    """What a client sends up: how far its float32 arrays moved from those it was sent."""
    generator = np.random.default_rng(seed)
    encoded: Arrays = {}
    for key in sorted(update):
        if key not in before or before[key].shape != update[key].shape:
            raise InvalidArgument(f"update_format: {key} was not sent with the task; int8 says what changed")
        encoded |= pack(key, update[key].astype(np.float64) - before[key], generator)
    return encoded


def decode(encoded: object, before: Mapping[str, np.ndarray]) -> Arrays | str:
    """`before`, moved as far as a client's arrays moved, or why these bytes cannot be: a reply is not to be trusted."""
    names = {key + suffix for key in before for suffix in (CODES, SCALES)}
    if not isinstance(encoded, Mapping) or encoded.keys() != names:
        found = sorted(map(str, encoded))[:3] if isinstance(encoded, Mapping) else type(encoded).__name__
        return f"update_format: expected int8 codes and scales of {len(before)} parameters, got {found!s:.120}"
    decoded: Arrays = {}
    for key, array in before.items():
        codes, scales = encoded[key + CODES], encoded[key + SCALES]
        if (reason := _refuse(key, codes, scales, array.shape)) is not None:
            return reason
        decoded[key] = array + _values(codes, scales)
    return decoded


def halved(statistics: Mapping[str, np.ndarray]) -> Arrays:
    """Statistics as they go up: float32 as float16, but for arrays with a number too large for it."""
    return {key: _half(array) if array.dtype == np.float32 else array for key, array in statistics.items()}


def dtype_of_statistics(array: object, *, halves: bool) -> "np.dtype[np.floating]":
    """What an array of statistics must be: float16 where that may come (`halves`) and does, else float32."""
    came = isinstance(array, np.ndarray) and array.dtype == np.float16
    return np.dtype(np.float16 if halves and came else np.float32)


def _half(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    return half if np.isfinite(half).all() else array


def fingerprint(array: np.ndarray) -> str:
    """The version of a parameter as it travels: 32 hex digits of a SHA-256 over dtype, shape and bytes."""
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:32]


def _refuse(key: str, codes: object, scales: object, shape: tuple[int, ...] | None = None) -> str | None:
    """Why these are not the codes (of this shape, where it is known) and scales of a parameter, or None."""
    if not isinstance(codes, np.ndarray) or codes.dtype != np.int8 or shape not in (None, codes.shape):
        return f"{key}: expected codes in int8 of shape {shape or 'any'}, got {_described(codes)}"
    num_scales = -(-codes.size // GROUP)
    if not isinstance(scales, np.ndarray) or scales.dtype != np.float32 or scales.shape != (num_scales,):
        return f"{key}: expected {num_scales} scales in float32, one for {GROUP} codes, got {_described(scales)}"
    if not np.isfinite(scales).all() or (scales < 0).any():
        return f"not finite: {key} holds scales that are NaN, infinite or negative"
    return None


def _values(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # infinity is refused with the values
        values: np.ndarray = codes.astype(np.float32)
        values *= np.repeat(scales, GROUP)[: codes.size].reshape(codes.shape)
    return values


def _groups(flat: np.ndarray) -> np.ndarray:
    """[n] as [ceil(n / 64), 64], filled up with zeros."""
    beyond = -len(flat) % GROUP
    return (np.concatenate([flat, np.zeros(beyond, flat.dtype)]) if beyond else flat).reshape(-1, GROUP)


def _described(found: object) -> str:
    return f"{found.dtype} {found.shape}" if isinstance(found, np.ndarray) else type(found).__name__
