"""Updates in eight bits: what a client changed, in groups of 64 with one scale each, rounded at random without bias.

In: trained arrays and the values they were trained from; out: `<key>.int8` and `<key>.scale`, 0.27 of the bytes, and
back. Rounding is stochastic and seeded by the task, so it needs no memory of earlier rounds: a client that is killed
and asked again answers the same bits, and errors average out over clients and rounds. NumPy only. Source: Alistarh et
al., 2017, "QSGD", NeurIPS, arXiv 1610.02132.
"""

from collections.abc import Mapping

import numpy as np

from chainfed_engine.errors import InvalidArgument
from chainfed_engine.types import Arrays

GROUP = 64  # values that share a scale
_CODES, _SCALES, _LARGEST = ".int8", ".scale", 127


def encode(update: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray], *, seed: int) -> Arrays:
    """Float32 arrays to codes int8 [n] and scales float32 [ceil(n / 64)]. A change that is not finite gives a scale
    that is not, for the server to refuse."""
    generator = np.random.default_rng(seed)
    encoded: Arrays = {}
    for key in sorted(update):
        if key not in before or before[key].shape != update[key].shape:
            raise InvalidArgument(f"update_format: {key} was not sent with the task; int8 says what changed")
        groups = _groups(update[key].astype(np.float64).ravel() - before[key].ravel())
        scales = (np.abs(groups).max(axis=1) / _LARGEST).astype(np.float32)
        steps = np.where(np.isfinite(scales) & (scales > 0), scales.astype(np.float64), np.inf)
        codes = np.floor(np.nan_to_num(groups) / steps[:, None] + generator.random(groups.shape))
        codes = np.clip(codes, -_LARGEST, _LARGEST).astype(np.int8).ravel()[: update[key].size]
        encoded[key + _CODES], encoded[key + _SCALES] = codes, scales
    return encoded


def decode(encoded: object, before: Mapping[str, np.ndarray]) -> Arrays | str:
    """The trained arrays, or why these bytes cannot be: a reply is not to be trusted."""
    names = {key + suffix for key in before for suffix in (_CODES, _SCALES)}
    if not isinstance(encoded, Mapping) or encoded.keys() != names:
        found = sorted(map(str, encoded))[:3] if isinstance(encoded, Mapping) else type(encoded).__name__
        return f"update_format: expected int8 codes and scales of {len(before)} parameters, got {found!s:.120}"
    decoded: Arrays = {}
    for key, array in before.items():
        codes, scales = encoded[key + _CODES], encoded[key + _SCALES]
        if not _is(codes, np.int8, array.size) or not _is(scales, np.float32, -(-array.size // GROUP)):
            return f"{key}: expected {array.size} codes in int8 and a float32 scale for {GROUP} of them each"
        if not np.isfinite(scales).all() or (scales < 0).any():
            return f"not finite: {key} holds scales that are NaN, infinite or negative"
        with np.errstate(over="ignore"):  # infinity is refused with the values
            change = (_groups(codes.astype(np.float32)) * scales[:, None]).ravel()[: array.size]
            decoded[key] = array + change.reshape(array.shape)
    return decoded


def _groups(flat: np.ndarray) -> np.ndarray:
    """[n] as [ceil(n / 64), 64], filled up with zeros."""
    return np.pad(flat, (0, -len(flat) % GROUP)).reshape(-1, GROUP)


def _is(array: object, dtype: object, size: int) -> bool:
    return isinstance(array, np.ndarray) and array.dtype == dtype and array.shape == (size,)
