#!/bin/sh
# Builds, checks and times the CUDA backend on the machine it is run on; needs python3 with torch and pybind11, cmake and
# nvcc, no network and no pytest. Writes one JSON-lines file, within 8 minutes:
#
#     bench/cuda/run.sh [results.jsonl]       (default: bench/cuda/results/<device>.jsonl)
#     bench/cuda/run.sh --build 87            only build, for this architecture: needs no device
#
# Every line has "kind": machine, check, time, crossover, memory or step. The end prints goals, what was calculated before
# and what was measured. Exit code 1 when a check failed, 2 when the machine lacks something.
set -eu
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
START=$(date +%s)
seconds() { echo $(($(date +%s) - START)); }
left() { # seconds until $1, at least 1
  rest=$(($1 - $(seconds)))
  [ "$rest" -gt 0 ] && echo "$rest" || echo 1
}
missing() {
  echo "bench/cuda/run.sh: $1" >&2
  exit 2
}

command -v "$PYTHON" >/dev/null || missing "no $PYTHON; name one with PYTHON=/path/to/python3"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || missing "$PYTHON is older than Python 3.11; PYTHON=..."
command -v cmake >/dev/null || missing "no cmake on PATH"
for module in numpy pybind11 torch; do
  "$PYTHON" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$module') is None)" ||
    missing "$PYTHON has no $module"
done
if [ "${1:-}" = --build ]; then
  ARCHITECTURE=${2:?an architecture, such as 87}
else
  FOUND=$("$PYTHON" -c 'import sys, torch
if not torch.cuda.is_available():
    sys.exit(f"bench/cuda/run.sh: no CUDA device: torch {torch.__version__} sees none (nvidia-smi?)")
name = torch.cuda.get_device_name(0).lower().replace(" ", "-").replace("/", "-")
print("%d%d" % torch.cuda.get_device_capability(0), name)') || exit 2
  ARCHITECTURE=${FOUND%% *}
  RESULTS=${1:-bench/cuda/results/${FOUND#* }.jsonl}
  mkdir -p "$(dirname "$RESULTS")"
fi

BUILD=${CHAINFED_BUILD_DIR:-build/cuda}
mkdir -p "$BUILD"
GENERATOR=$(command -v ninja >/dev/null && echo Ninja || echo 'Unix Makefiles')
cmake -S . -B "$BUILD" -G "$GENERATOR" -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$("$PYTHON" -c 'import sys; print(sys.executable)')" \
  -DCHAINFED_CUDA=1 -DCHAINFED_CUDA_ARCHITECTURES="$ARCHITECTURE" -DCHAINFED_TESTS=OFF \
  ${CHAINFED_MODULE_DIR:+"-DCHAINFED_MODULE_DIR=$CHAINFED_MODULE_DIR"} >"$BUILD/configure.log" 2>&1 ||
  { cat "$BUILD/configure.log" >&2; missing "the configuration failed"; }
cmake --build "$BUILD" --parallel "$(nproc)" >"$BUILD/build.log" 2>&1 ||
  { tail -40 "$BUILD/build.log" >&2; missing "the build failed"; }
BUILT=$(seconds)
echo "built for sm_$ARCHITECTURE in $BUILT s"
[ "${1:-}" = --build ] && exit 0

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
STATUS=0
# A kernel that hangs must not cost the figures: each part has its end.
timeout -k 10 "$(left $((BUILT + 120)))" "$PYTHON" bench/cuda/checks.py --out "$RESULTS" --build-seconds "$BUILT" || STATUS=1
timeout -k 10 "$(left 380)" "$PYTHON" bench/cuda/times.py --out "$RESULTS" --seconds "$(left 350)" || STATUS=1
timeout -k 10 "$(left 465)" "$PYTHON" bench/cuda/step.py --out "$RESULTS" || STATUS=1
"$PYTHON" bench/cuda/summary.py "$RESULTS" || STATUS=1
echo "$RESULTS: $(wc -l <"$RESULTS") lines after $(seconds) s, status $STATUS"
exit $STATUS
