// Which devices a build runs on, and how products run there; no CUDA in it, so that tests reach it.
#include <cstdlib>

#include "cuda/crossover.h"
#include "cuda/runtime.h"

namespace chainfed::cuda {

bool runs_on(const char* architectures, int architecture) {
  int newest = 0;
  for (const char* at = architectures; *at != '\0';) {
    char* end = nullptr;
    const int built = static_cast<int>(std::strtol(at, &end, 10));
    if (end == at) break;
    if (built / 10 == architecture / 10 && built <= architecture) return true;
    if (built > newest) newest = built;
    at = *end == ',' ? end + 1 : end;
  }
  return newest > 0 && architecture > newest;
}

int64_t crossover_of(int architecture) {
  int64_t from_tokens = kNever;
  for (const Crossover& row : kCrossovers) {
    if (row.architecture <= architecture) from_tokens = row.from_tokens;
  }
  return from_tokens;
}

}  // namespace chainfed::cuda
