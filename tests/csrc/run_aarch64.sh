#!/usr/bin/env bash
# The C++ tests of the aarch64 build under qemu: run_aarch64.sh [--short]
# One CPU that lacks dotprod, one that has it but lacks i8mm, one that has both; a kernel that used more than its level
# would be killed there by an illegal instruction. Without cross compiler or qemu: says so and succeeds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
for tool in aarch64-linux-gnu-g++ qemu-aarch64-static; do
  command -v "$tool" >/dev/null || {
    echo "aarch64 tests SKIPPED: $tool is missing (Debian: apt-get install g++-aarch64-linux-gnu qemu-user-static)"
    exit 0
  }
done
mkdir -p build
cmake --preset aarch64 >build/aarch64.log || { cat build/aarch64.log; exit 1; }
cmake --build --preset aarch64 --parallel "${JOBS:-2}" --target {base,gemm,boundary,quant,head}_test

run() { # CPU LEVEL TEST [NAME...]: of the test binary, the tests whose name contains one of NAME
  local cpu=$1 level=$2 binary=$3
  shift 3
  echo "aarch64, $cpu ($level): $binary $*"
  CHAINFED_EXPECTED_SIMD=$level timeout 900 qemu-aarch64-static -cpu "$cpu" "build/aarch64/$binary" "$@"
}
edges=(saturation nan_or_inf cosine one_millionth forked)
for model in cortex-a57:neon cortex-a76:dotprod; do
  run "${model%:*}" "${model#*:}" base_test
  if [ "${1:-}" = --short ]; then
    run "${model%:*}" "${model#*:}" gemm_test "${edges[@]}"
  else
    run "${model%:*}" "${model#*:}" gemm_test
  fi
done
run max i8mm base_test
run max i8mm gemm_test
run max i8mm boundary_test
run max i8mm quant_test
if [ "${1:-}" = --short ]; then
  run max i8mm head_test loss_alone non_finite cells integer
else
  run max i8mm head_test
fi
