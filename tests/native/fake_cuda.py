"""Arrays that say they are on a CUDA device while their memory is the CPU's: what the emulated CUDA library works on.

`EMULATOR` is that library, the device code compiled for the CPU (csrc/cuda/emulator.h); it has two devices, cuda:0 with
memory of its own and cuda:1 that shares the CPU's.
"""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BUILDS = Path(__file__).parents[2] / "build"
EMULATOR = next((p for p in (_BUILDS / "libchainfed_cuda_emulated.so",) if p.exists()), None)
NEEDS_EMULATOR = "needs the emulated CUDA library of a CMake build with tests in build/ (see CONTRIBUTING.md)"

_CODES = {"i": 0, "u": 1, "f": 2}


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


class CudaArray:
    """A C-contiguous NumPy array, exported as one on cuda:`device`. Must be kept while anything uses its memory.

    `code`: DLPack's number of the kind of dtype where NumPy has none, 4 for bf16 in 16-bit integers.
    """

    def __init__(self, values: NDArray[Any], device: int = 0, *, code: int | None = None) -> None:
        self.values, self.device = values, device
        self.asked_stream: Any = "not asked"
        self._shape = (ctypes.c_int64 * values.ndim)(*values.shape)
        kind = _Tensor(
            values.ctypes.data, 2, device, values.ndim, _CODES[values.dtype.kind] if code is None else code,
            values.dtype.itemsize * 8, 1, self._shape, None, 0,
        )  # fmt: skip
        self._managed = _Managed(1, 0, None, None, 0, kind)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.device

    def __dlpack__(self, *, stream: Any = None, max_version: Any = None) -> Any:
        self.asked_stream = stream
        return _new_capsule(ctypes.addressof(self._managed), b"dltensor_versioned", None)


def empty(shape: tuple[int, ...], dtype: np.typing.DTypeLike, device: int = 0) -> CudaArray:
    """Zeros at 64-byte alignment."""
    item = np.dtype(dtype)
    size = int(np.prod(shape)) * item.itemsize
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return CudaArray(memory[start : start + size].view(item).reshape(shape), device)


def on_device(values: NDArray[Any], device: int = 0) -> CudaArray:
    """An aligned copy."""
    copy = empty(values.shape, values.dtype, device)
    copy.values[...] = values
    return copy
