#!/bin/sh
# Builds, checks and times the CUDA backend on the machine it is run on; needs python3 with torch and pybind11, cmake and
# nvcc, no network and no pytest. Writes one JSON-lines file, within 8 minutes:
#
#     bench/cuda/run.sh [results.jsonl]       (default: bench/cuda/results/<device>.jsonl)
#
# Every line has "kind": machine, check, time, crossover, memory or step. Exit code 1 when a check failed.
set -eu
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
START=$(date +%s)
ARCHITECTURE=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability(0))')
NAME=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name(0).lower().replace(" ", "-").replace("/", "-"))')
RESULTS=${1:-bench/cuda/results/$NAME.jsonl}
BUILD=${CHAINFED_BUILD_DIR:-build/cuda}
mkdir -p "$(dirname "$RESULTS")" "$BUILD"
GENERATOR=$(command -v ninja >/dev/null && echo Ninja || echo 'Unix Makefiles')
cmake -S . -B "$BUILD" -G "$GENERATOR" -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$(command -v "$PYTHON")" \
  -DCHAINFED_CUDA=1 -DCHAINFED_CUDA_ARCHITECTURES="$ARCHITECTURE" -DCHAINFED_TESTS=OFF >"$BUILD/configure.log" ||
  { cat "$BUILD/configure.log" >&2; exit 1; }
cmake --build "$BUILD" --parallel "$(nproc)" >"$BUILD/build.log" || { tail -40 "$BUILD/build.log" >&2; exit 1; }
BUILT=$(date +%s)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
STATUS=0
"$PYTHON" bench/cuda/checks.py --out "$RESULTS" --build-seconds $((BUILT - START)) || STATUS=1
"$PYTHON" bench/cuda/times.py --out "$RESULTS" --seconds $((360 - ($(date +%s) - START))) || STATUS=1
timeout $((470 - ($(date +%s) - START))) "$PYTHON" bench/cuda/step.py --out "$RESULTS" || STATUS=1
echo "$RESULTS: $(wc -l <"$RESULTS") lines after $(($(date +%s) - START)) s, status $STATUS"
exit $STATUS
