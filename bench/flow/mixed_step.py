"""Do the threads of the native kernels and torch's get in each other's way? A step that alternates between them, as a
window's does, against the same calls of either kind alone.

    python -m bench.flow.mixed_step [--tokens 256] [--seconds 4] [--threads N]

Prints one JSON line: milliseconds of the torch calls alone, of the native calls alone, of both in turn, and `ratio`,
the last over the sum of the first two (1.0: nothing lost). The three take turns, medians are printed. GOMP_SPINCOUNT is
set as the program sets it unless it is given, so that the two settings can be compared.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is imported; see chainfed_engine.cli

import torch

from bench.micro import buffers, machine
from chainfed_engine import native

WIDTH, INNER = 576, 1536
PAIRS = 8  # of a torch and a native call a step


def calls(num_tokens: int) -> tuple[list[Callable[[], object]], list[Callable[[], object]]]:
    """The torch calls and the native calls of a step: what an adapter and its norm do, and frozen linears both ways."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, WIDTH, generator=generator)
    down, up = torch.randn(WIDTH, 64, generator=generator) / 24, torch.randn(64, WIDTH, generator=generator) / 8
    matrix = buffers.quantised_matrix(torch.randn(INNER, WIDTH, generator=generator) / 24, "int4")
    forward = buffers.Linear(matrix, num_tokens, forward=True)
    backward = buffers.Linear(matrix, num_tokens, forward=False)
    grad_out = torch.randn(num_tokens, INNER, generator=generator)

    def adapter() -> object:
        normed = torch.nn.functional.layer_norm(hidden, (WIDTH,))
        return hidden + torch.nn.functional.gelu(normed @ down) @ up

    ours = [lambda: forward.forward(hidden), lambda: backward.grad_input(grad_out)]
    return [adapter] * PAIRS, [ours[i % 2] for i in range(PAIRS)]


def milliseconds(step: list[Callable[[], object]]) -> float:
    begin = time.perf_counter()
    for call in step:
        call()
    return (time.perf_counter() - begin) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    native.set_num_threads(options.threads)
    with torch.no_grad():
        torch_calls, native_calls = calls(options.tokens)
        mixed = [call for pair in zip(torch_calls, native_calls, strict=True) for call in pair]
        steps = {"torch_ms": torch_calls, "native_ms": native_calls, "mixed_ms": mixed}
        found: dict[str, list[float]] = {name: [] for name in steps}
        end = time.perf_counter() + options.seconds
        while time.perf_counter() < end or len(found["mixed_ms"]) < 5:
            for name, step in steps.items():
                found[name].append(milliseconds(step))
    medians = {name: statistics.median(times[1:]) for name, times in found.items()}
    print(
        json.dumps(
            {
                **{name: round(value, 3) for name, value in medians.items()},
                "ratio": round(medians["mixed_ms"] / (medians["torch_ms"] + medians["native_ms"]), 3),
                "rounds": len(found["mixed_ms"]) - 1,
                "tokens": options.tokens,
                "spin_count": os.environ["GOMP_SPINCOUNT"],
                **machine.facts(),
            }
        )
    )


if __name__ == "__main__":
    main()
