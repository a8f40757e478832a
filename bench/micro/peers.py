"""What the kernels are compared with, each a callable of no arguments that does the whole work once.

torch_fp32        torch's product with the output given, so that it pays for no fresh pages
fbgemm_int8       torch's dynamically quantised Linear, of whichever quantised engine torch prefers on this CPU
bitsandbytes_nf4  bitsandbytes' Linear4bit on the CPU, f32 in and out
memcpy            memcpy of as many bytes (read plus written) by the threads that encode: the f32 format's own encoder.
                  torch's copy wakes threads that sleep, which here took 60 us where the copy takes 5
memcpy_rows       memcpy of the f32 rows themselves, by the same threads: what keeping them as they are would take
"""

import importlib.util
import logging
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from chainfed_engine import native

COPIED_WIDTH = 64  # floats: small beside what is copied, so that the threads' shares are equal

Run = Callable[[], object]
Peer = Callable[[], Run]  # makes one; raises PeerMissing


class PeerMissing(Exception):
    """Why a peer cannot run here, in one line."""


def torch_forward(weight: Tensor, x: Tensor) -> Run:
    out = torch.empty(len(x), len(weight))
    return lambda: torch.mm(x, weight.t(), out=out)


def torch_grad_input(weight: Tensor, grad_out: Tensor) -> Run:
    out = torch.empty(len(grad_out), weight.shape[1])
    return lambda: torch.mm(grad_out, weight, out=out)


def fbgemm_int8(weight: Tensor, x: Tensor) -> Run:
    engines = torch.backends.quantized.supported_engines
    if not {"x86", "fbgemm"} & set(engines):
        raise PeerMissing(f"this torch has no FBGEMM (quantised engines: {', '.join(engines)})")
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of its quantisation module
        model = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(linear), {torch.nn.Linear}, torch.qint8)
    return lambda: _without_grad(model, x)


def bitsandbytes_nf4(weight: Tensor, x: Tensor) -> Run:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise PeerMissing("bitsandbytes is not installed: pip install 'chainfed-engine[bitsandbytes]'")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it looks for a kernel on the network, and says so
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes
    rows, cols = weight.shape
    linear = bitsandbytes.nn.Linear4bit(cols, rows, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    linear.weight = bitsandbytes.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    linear = linear.to("cpu")
    try:
        out = _without_grad(linear, x[:1])
    except (RuntimeError, NotImplementedError, OSError) as error:
        raise PeerMissing(f"bitsandbytes {bitsandbytes.__version__} does not run on this CPU: {error}") from error
    expected = x[:1] @ weight.t()
    if not float((out - expected).norm()) <= 0.2 * float(expected.norm()):
        raise PeerMissing(f"bitsandbytes {bitsandbytes.__version__} gives a wrong product on this CPU")
    return lambda: _without_grad(linear, x)


def torch_cross_entropy(weight: Tensor, hidden: Tensor, targets: Tensor) -> Run:
    def run() -> Tensor:
        leaf = hidden.detach().requires_grad_()
        logits = torch.nn.functional.linear(leaf, weight)
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        return torch.autograd.grad(loss, leaf)[0]

    return run


def memcpy(moved_bytes: int) -> Run:
    """A copy that reads half of `moved_bytes` and writes half."""
    rows = torch.ones(moved_bytes // 2 // (4 * COPIED_WIDTH), COPIED_WIDTH)
    records = torch.zeros(len(rows), native.record_bytes("f32", COPIED_WIDTH), dtype=torch.uint8)
    return lambda: native.boundary_encode(rows, adapter=None, cache_format="f32", out=records)


def _without_grad(module: torch.nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = module(x)
    return out
