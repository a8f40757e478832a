"""python -m bench.micro [--quick] [--seconds S] [--threads N] [--kernels int4_forward,...] [--benchmark-json FILE]

Every kernel against its peers in one process. Standard output: the peaks of the machine, one JSON line a kernel, peer
and shape ("ratio" above 1: ours is faster), then the table of medians over the shapes. Progress and failures go to
standard error. CHAINFED_SIMD=avx2 forces the kernels down, and the peers with them as far as they can be told.
"""

import contextlib
import sys
from pathlib import Path

from bench.micro.caps import cap_peers


def main() -> int:
    cap_peers()
    import pytest

    folder = str(Path(__file__).parent)
    options = ["--capture=no", "--quiet", "--benchmark-quiet", "--benchmark-disable-gc", "-p", "no:cacheprovider"]
    with contextlib.redirect_stdout(sys.stderr):
        return int(pytest.main([folder, *options, *sys.argv[1:]]))


if __name__ == "__main__":
    sys.exit(main())
