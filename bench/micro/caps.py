"""Environment of a benchmark process, set before torch is imported: this file imports nothing of ours."""

import os

# What keeps torch, oneDNN and FBGEMM from using more than AVX2 themselves: a comparison below the CPU's best level
# should stand for a CPU of that level. Read by them when they are imported.
# MKL obeys on Intel's CPUs alone; on others it takes AVX2 anyway.
AVX2_CAPS = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


def cap_peers() -> None:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # torch's idle threads leave the cores, as in the program
    if os.environ.get("CHAINFED_SIMD") in ("avx2", "scalar"):
        for name, value in AVX2_CAPS.items():
            os.environ.setdefault(name, value)
